"""The loader at real shapes: seconds, host peak, GPU peak and final GB, against transformers and against the bytes.

    python benchmarks/loader.py            # a GPU, about 4 minutes, 30 GB of disk
    python benchmarks/loader.py --quick    # a CPU, half a minute: small shapes, proves the script and nothing else

Checkpoints have random bf16 weights at the presets' real shapes, in shards of 5 GB as on the hub, and are written right
before they are read: the page cache is warm, so seconds are without the disk. Each load runs in a process of its own.
Host peak is resident memory above the moment before the load, mapped file pages included ("host_peak"), and without
them ("host_peak_anonymous"). GPU peak and final are torch's allocated bytes. GB is 10^9 bytes.

The second part is the quality of dynamic 4-bit: KL of the next token to the 16-bit model, on tokens that it was not
measured on, for a model with planted outlier channels, one without, and the workshop model.
"""

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import torch

from nbhelpers import architecture, presets
from nbhelpers.models import smoke

MODELS = ("qwen2.5-1.5b", "llama-3.1-8b", "phi-4")
GB = architecture.GB


def tensors(architecture: architecture.Architecture) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a checkpoint."""
    a = architecture
    found = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_hidden_layers):
        for linear in a.linears():
            part = "self_attn" if linear.name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj") else "mlp"
            name = f"model.layers.{layer}.{part}.{linear.name}"
            found[f"{name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                found[f"{name}.bias"] = (linear.out_features,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{norm}.weight"] = (a.hidden_size,)
    found["model.norm.weight"] = (a.hidden_size,)
    if not a.tie_word_embeddings:
        found["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    return found


def make_checkpoint(architecture: architecture.Architecture, folder: Path, shard_bytes: float) -> int:
    """Random weights straight to disk, made on the GPU if there is one; returns the bytes of the largest shard."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True)
    tokenizer = smoke.make_tokenizer()
    tokenizer.save_pretrained(folder)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(architecture.config() | special | {"torch_dtype": "bfloat16"}))
    shards, size = [{}], 0
    for name, shape in tensors(architecture).items():
        nbytes = 2 * torch.Size(shape).numel()
        if size + nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = (shape, size, size + nbytes)
        size += nbytes
    index, largest = {}, 0
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header = {n: {"dtype": "BF16", "shape": s, "data_offsets": (a, b)} for n, (s, a, b) in shard.items()}
        header = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        header += b" " * (-len(header) % 8)
        with open(file, "wb", buffering=0) as f:
            f.write(len(header).to_bytes(8, "little") + header)
            for name, (shape, _, _) in shard.items():
                data = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
                if name.endswith("norm.weight"):
                    data += 1
                if ".layers.0." in name:  # something for dynamic 4-bit to find
                    plant(name, data)
                view = memoryview(data.cpu().view(torch.uint8).numpy()).cast("B")
                while view:  # one write takes 2 GB at most
                    view = view[f.write(view) :]
        index |= dict.fromkeys(shard, file.name)
        largest = max(largest, file.stat().st_size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if device == "cuda":
        torch.cuda.empty_cache()
    return largest


def plant(name: str, data: torch.Tensor, scale: float = 30.0) -> None:
    """Outlier channels in a layer's attention inputs, undone in the norm before: the function stays the same, but in
    NF4 the blocks of 64 weights around each outlier lose their precision."""
    channels = torch.arange(5, data.shape[-1], 32, device=data.device)
    if name.endswith("input_layernorm.weight"):
        data[channels] /= scale
    elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "qkv_proj.weight")):
        data[:, channels] *= scale


def resident() -> tuple[int, int]:
    """(all, anonymous) resident bytes of this process; zeros where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return int(found["VmRSS"]) * 1024, int(found["RssAnon"]) * 1024


class Peak(threading.Thread):
    """The largest resident memory seen, every 2 ms, above that at the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_at = self.peak = resident()
        self.done = threading.Event()
        self.start()

    def run(self):
        while not self.done.wait(0.002):
            self.peak = tuple(map(max, self.peak, resident()))

    def stop(self) -> tuple[int, int]:
        self.done.set()
        self.join()
        return tuple(peak - start for peak, start in zip(self.peak, self.start_at, strict=True))


def child(job: dict) -> dict:
    """One load in this fresh process: {metric: value}; everything is imported and the GPU awake before it starts."""
    import peft
    from bitsandbytes.functional import quantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from nbhelpers import loader
    from nbhelpers.models import quantize

    preset = presets.get(job["preset"])
    preset = replace(preset, hub_id=job["folder"], architecture=architecture.Architecture(**job["architecture"]))
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
    found = {"seconds": seconds, "host_peak": host / GB, "host_peak_anonymous": anonymous / GB}
    if cuda:
        found["gpu_peak"] = (torch.cuda.max_memory_allocated() - before) / GB
        found["gpu_peak_reserved"] = torch.cuda.max_memory_reserved() / GB
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # scratch of the matrix products while measuring, not the model
        found["final"] = (torch.cuda.memory_allocated() - before) / GB
    else:
        found["final"] = quantize.nbytes(model) / GB
    choice = model.nbhelpers_choice if job["who"] == "ours" else None
    if choice:
        print(choice.report().splitlines()[-1])
        found["extra"] = choice.extra_bytes / GB
    return found


def measure(name: str, folder: Path, quick: bool) -> list[dict]:
    """All loads of one model, its checkpoint made before and deleted after."""
    preset = presets.get(name)
    architecture = preset.architecture
    if quick:
        architecture = replace(
            architecture, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, head_dim=32, vocab_size=1024,
        )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        start = time.perf_counter()
        largest_shard = make_checkpoint(architecture, Path(work) / name, 1e6 if quick else 5e9)
        print(f"{name}: checkpoint made in {time.perf_counter() - start:.0f} s", flush=True)
        for who, quantization in (("ours", "nf4"), ("ours", "dynamic"), ("transformers", "nf4")):
            job = {"preset": name, "folder": str(Path(work) / name), "architecture": asdict(architecture)}
            job |= {"who": who, "quantization": quantization, "out": str(Path(work) / "result.json")}
            done = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], check=who == "ours")
            if done.returncode:  # the comparison may fail where a version differs; our own may not
                print(f"{name}: {who} failed")
                continue
            found = json.loads(Path(job["out"]).read_text())
            for metric, value in found.items():
                unit = "s" if metric == "seconds" else "GB"
                more = {"page_cache": "warm"} if metric == "seconds" else {}
                rows.append(common.row(f"{name}/{quantization}/{metric}", who, value, unit, **more))
            if who == "ours":
                lora = 4 * architecture.lora_parameters(preset.lora_rank, preset.lora_targets)
                floor = (architecture.weight_bytes("nf4") + lora) / GB
                floor += found.get("extra", 0)
                peak = floor + architecture.largest_tensor_bytes() / GB
                rows.append(common.row(f"{name}/{quantization}/final", "floor", floor, "GB"))
                rows.append(common.row(f"{name}/{quantization}/gpu_peak", "limit", peak, "GB"))
                rows.append(common.row(f"{name}/{quantization}/host_peak", "limit", 1.5 * largest_shard / GB, "GB"))
    return rows


def quality(name: str, source: str, test: list[torch.Tensor], calibration: list | None) -> list[dict]:
    """KL to 16 bits of nf4 and dynamic, and how many bytes dynamic took."""
    from nbhelpers import loader
    from nbhelpers.models import quantize

    def load(quantization: str):
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


def random_model(folder: Path, quick: bool, planted: int) -> list[torch.Tensor]:
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
            plant(name, parameter.data)
    model.to(torch.bfloat16).save_pretrained(folder)
    smoke.make_tokenizer().save_pretrained(folder)
    return [torch.randint(3, 259, (4, 128))]


def workshop_test(count: int = 32, length: int = 24) -> tuple[list, list[torch.Tensor]]:
    """(calibration prompts, test tokens) for the workshop model: its own questions, and its own answers to others."""
    from nbhelpers import loader
    from nbhelpers.models import chat

    generator = random.Random(0)

    def questions():
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, no results file: proves the script")
    parser.add_argument("--models", nargs="*", default=MODELS, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where checkpoints are made, on a local disk")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        job = json.loads(args.child)
        Path(job["out"]).write_text(json.dumps(child(job)))
        return
    rows = []

    def add(more: list[dict]) -> None:
        rows.extend(more)
        if not args.quick:
            common.write("loader", rows)  # after each part, so that a run cut short leaves what it has

    for kind, planted in (("outliers", 2), ("no-outliers", 0)):
        with tempfile.TemporaryDirectory() as work:
            add(quality(f"{kind}", work, random_model(Path(work), args.quick, planted), None))
    if (presets.WORKSHOP / "model.safetensors").exists():
        calibration, test = workshop_test()
        add(quality("workshop", str(presets.WORKSHOP), test, calibration))
    gc.collect()
    for name in args.models:
        add(measure(name, Path(args.folder), args.quick))
    print(common.table(rows))


if __name__ == "__main__":
    main()
