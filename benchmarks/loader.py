"""The loader at real shapes: seconds, host peak, GPU peak and final GB, against transformers and against the bytes.

    python -m benchmarks.loader            # a GPU, about 4 minutes, 30 GB of disk
    python -m benchmarks.loader --quick    # a CPU, half a minute: small shapes, proves the script and nothing else

Checkpoints have random bf16 weights at the presets' real shapes, in shards of 5 GB as on the hub, and are written right
before they are read: the page cache is warm, so seconds are without the disk. Each load runs in a process of its own.
Host peak is resident memory above the moment before the load, mapped file pages included ("host_peak"), and without
them ("host_peak_anonymous"). GPU peak and final are torch's allocated bytes. GB is 10^9 bytes.

The second part is the quality of dynamic 4-bit: KL of the next token to the 16-bit model, on tokens that it was not
measured on, for a model with planted outlier channels, one without, and the workshop model.
"""

import gc
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, harness, random_model
from nbhelpers import presets
from nbhelpers.architecture import GB
from nbhelpers.models import families, smoke

MODELS = ("qwen2.5-1.5b", "llama-3.1-8b", "phi-4")


def resident() -> tuple[int, int]:
    """(all, anonymous) resident bytes of this process; zeros where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return int(sizes["VmRSS"]) * 1024, int(sizes["RssAnon"]) * 1024


class Peak(threading.Thread):
    """The largest resident memory seen, every 2 ms, above that at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_at = self.peak = resident()
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.002):
            rss, anonymous = resident()
            self.peak = max(self.peak[0], rss), max(self.peak[1], anonymous)

    def stop(self) -> tuple[int, int]:
        """Bytes (all, anonymous) that were resident at most, above the start's."""
        self.done.set()
        self.join()
        return self.peak[0] - self.start_at[0], self.peak[1] - self.start_at[1]


def child(job: harness.Job) -> dict[str, float]:
    """One load in this fresh process: {metric: value}; everything is imported and the GPU awake before it starts."""
    import peft
    from bitsandbytes.functional import quantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from nbhelpers import loader
    from nbhelpers.models import quantize

    preset = presets.get(job["preset"])
    preset = replace(preset, hub_id=job["folder"], architecture=families.architecture(job["architecture"]))
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    dtype = torch.bfloat16
    small = torch.randn(64, 64, device=device, dtype=dtype)
    quantize_4bit(small @ small, quant_type="nf4", compress_statistics=True)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    peak, start = Peak(), time.perf_counter()
    if job["who"] == "ours":
        model, _ = loader.load(preset, quantization=job["quantization"], dtype=dtype, progress=False)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            job["folder"], quantization_config=config, dtype=dtype, device_map={"": device}
        )
        lora = peft.LoraConfig(
            r=preset.lora_rank, target_modules=list(preset.lora_targets), lora_alpha=16, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, lora)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    host, anonymous = peak.stop()
    values = {"seconds": seconds, "host_peak": host / GB, "host_peak_anonymous": anonymous / GB}
    if cuda:
        values["gpu_peak"] = (torch.cuda.max_memory_allocated() - before) / GB
        values["gpu_peak_reserved"] = torch.cuda.max_memory_reserved() / GB
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # scratch of the matrix products while measuring, not the model
        values["final"] = (torch.cuda.memory_allocated() - before) / GB
    else:
        values["final"] = quantize.nbytes(model) / GB
    choice = model.nbhelpers_choice if job["who"] == "ours" else None
    if choice:
        print(choice.report().splitlines()[-1])
        values["extra"] = choice.extra_bytes / GB
    return values


def measure(name: str, folder: Path, quick: bool) -> list[common.Row]:
    """All loads of one model, its checkpoint made before and deleted after."""
    preset = presets.get(name)
    architecture = preset.architecture
    if quick:
        architecture = replace(
            architecture, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, head_dim=32, vocab_size=1024,
        )  # fmt: skip
    rows: list[common.Row] = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        start = time.perf_counter()
        largest_shard = random_model.write_checkpoint(architecture, Path(work) / name, 1e6 if quick else 5e9)
        print(f"{name}: checkpoint made in {time.perf_counter() - start:.0f} s", flush=True)
        for who, quantization in (("ours", "nf4"), ("ours", "dynamic"), ("transformers", "nf4")):
            job: harness.Job = {
                "preset": name,
                "folder": str(Path(work) / name),
                "who": who,
                "quantization": quantization,
            }
            job |= {"architecture": architecture.config(), "out": str(Path(work) / "result.json")}
            if code := harness.run_child("benchmarks.loader", job, None, os.environ):
                if who == "ours":  # the comparison may fail where a version differs; our own may not
                    raise SystemExit(f"{name}: our loader failed: {code}")
                print(f"{name}: {who} failed")
                continue
            values = json.loads(Path(job["out"]).read_text())
            for metric, value in values.items():
                unit = "s" if metric == "seconds" else "GB"
                more = {"page_cache": "warm"} if metric == "seconds" else {}
                rows.append(common.row(f"{name}/{quantization}/{metric}", who, value, unit, **more))
            if who == "ours":
                lora = 4 * architecture.lora_parameters(preset.lora_rank, preset.lora_targets)
                floor = (architecture.weight_bytes("nf4") + lora) / GB
                floor += values.get("extra", 0)
                peak = floor + architecture.largest_tensor_bytes() / GB
                rows.append(common.row(f"{name}/{quantization}/final", "floor", floor, "GB"))
                rows.append(common.row(f"{name}/{quantization}/gpu_peak", "limit", peak, "GB"))
                rows.append(common.row(f"{name}/{quantization}/host_peak", "limit", 1.5 * largest_shard / GB, "GB"))
    return rows


def quality(name: str, source: str, test: list[torch.Tensor], calibration: list | None) -> list[common.Row]:
    """KL to 16 bits of nf4 and dynamic, and how many bytes dynamic took."""
    from nbhelpers import loader
    from nbhelpers.models import quantize

    def load(quantization: str) -> Any:
        model, _ = loader.load(
            source, quantization=quantization, lora_rank=1, calibration=calibration, progress=False, kernels=False
        )
        return model

    reference = load("none").get_base_model()
    rows = []
    for quantization in ("nf4", "dynamic"):
        model = load(quantization)
        kl = quantize.divergence(reference, model.get_base_model(), test)
        rows.append(common.row(f"{name}/{quantization}/kl", "ours", kl, "nats"))
        if model.nbhelpers_choice:
            extra = 100 * model.nbhelpers_choice.extra_bytes / model.nbhelpers_choice.model_bytes
            rows.append(common.row(f"{name}/{quantization}/extra", "ours", extra, "%"))
    return rows


def outlier_model(folder: Path, quick: bool, planted: int) -> list[torch.Tensor]:
    """A random Qwen2 written into `folder`, with outliers in `planted` of its layers; returns tokens to test on."""
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = replace(
        presets.get("qwen2.5-1.5b").architecture, hidden_size=128 if quick else 512, num_hidden_layers=8,
        intermediate_size=256 if quick else 1024, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32 if quick else 128, vocab_size=320,
    )  # fmt: skip
    fields = architecture.config() | {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        fields.pop("model_type"), **fields, initializer_range=0.56 / architecture.hidden_size**0.5
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if any(f".layers.{layer}." in name for layer in range(planted)):
            random_model.plant(name, parameter.data)
    model.to(torch.bfloat16).save_pretrained(folder)
    smoke.make_tokenizer().save_pretrained(folder)
    return [torch.randint(3, 259, (4, 128))]


def workshop_test(count: int = 32, length: int = 24) -> tuple[list, list[torch.Tensor]]:
    """(calibration prompts, test tokens) for the workshop model: its own questions, and its own answers to others."""
    from nbhelpers import loader
    from nbhelpers.models import chat

    generator = random.Random(0)

    def questions() -> Iterator[list[dict[str, str]]]:
        for _ in range(count):
            a, b = (f"{generator.randint(1, 9)}.{generator.randint(10, 99)}" for _ in range(2))
            yield [{"role": "user", "content": f"Which is bigger? {a} or {b}?"}]

    calibration = list(questions())
    model, tokenizer = loader.load(presets.get("workshop"), progress=False, kernels=False)
    prompts = torch.tensor([chat.prompt_ids(tokenizer, messages) for messages in questions()]).to(model.device)
    with torch.no_grad():
        tokens = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=length,
            max_new_tokens=length,
        )  # fmt: skip
    return calibration, [tokens.cpu()]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, no results file: proves the script")
    parser.add_argument("--models", nargs="*", default=MODELS, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where checkpoints are made, on a local disk")
    args = parser.parse_args()
    if args.child:
        job = json.loads(args.child)
        Path(job["out"]).write_text(json.dumps(child(job)))
        return
    if args.join:
        common.join("loader", args.join, args.out or common.RESULTS)
        return
    rows: list[common.Row] = []

    def add(more: list[common.Row]) -> None:
        rows.extend(more)
        if not args.quick:
            common.publish("loader", rows, args.out)  # after each part, so that a run cut short leaves what it has

    for kind, planted in (("outliers", 2), ("no-outliers", 0)):
        with tempfile.TemporaryDirectory() as work:
            add(quality(kind, work, outlier_model(Path(work), args.quick, planted), None))
    if (presets.WORKSHOP / "model.safetensors").exists():
        calibration, test = workshop_test()
        add(quality("workshop", str(presets.WORKSHOP), test, calibration))
    gc.collect()
    for name in args.models:
        add(measure(name, Path(args.folder).resolve(), args.quick))
    print(common.table(rows))


if __name__ == "__main__":
    main()
