"""The cases of benchmarks/engines.py, each in a process of its own."""

import json
import os
import statistics
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import common
from nbhelpers import architecture, gpu, host, presets

GB = architecture.GB
PROMPT, COMPLETION = 200, 512


def main(job: dict) -> None:
    rows: list[dict] = []

    def row(metric, value, unit, who="graph", **more):
        rows.append(common.row(f"{job['model']}/{metric}", who, round(value, 4), unit, **more))
        if not host.is_first_process():
            return
        Path(job["out"]).write_text(json.dumps(rows))
        print(f"{job['model']}/{metric} {who} {value:,.3f} {unit} {more or ''}", flush=True)

    if torch.cuda.is_available():
        if job.get("gpus", 1) > 1:  # else not: vLLM looks whether somebody has begun with CUDA
            torch.cuda.set_device(gpu.device())
        if job.get("t4"):
            play_t4()
    try:
        KINDS[job["kind"]](job, row)
    except Exception:  # its end alone: vLLM's logs are long, and this is what a reader of their last lines needs
        print(f"FAILED {job['kind']} {job['model']}:\n{traceback.format_exc()[-3500:]}", flush=True)
        raise SystemExit(1) from None


# ---- what every case needs ----


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shape(job: dict) -> architecture.Architecture:
    architecture = presets.get(job["model"]).architecture
    if not job.get("quick"):
        return architecture
    return replace(architecture, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=16, vocab_size=320)  # fmt: skip


def build(job: dict):
    from benchmarks.random_model import make

    return make(shape(job), device(), gpu.compute_dtype())


def prompts_of(job: dict, n: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(n)
    width = 20 if job.get("quick") else PROMPT
    return torch.randint(3, shape(job).vocab_size, (n, width), generator=generator).tolist()


def completion_of(job: dict) -> int:
    return 12 if job.get("quick") else COMPLETION


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def driver_gb() -> float:
    """Memory in use on the card, whoever uses it: run it alone."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GB


@contextmanager
def peak_driver():
    """Yields a list whose only element is the largest driver_gb() seen, looked at every 5 ms."""
    seen, over = [driver_gb()], threading.Event()

    def watch():
        while not over.wait(0.005):
            seen[0] = max(seen[0], driver_gb())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def timed(call, *args) -> float:
    wait()
    start = time.perf_counter()
    call(*args)
    wait()
    return time.perf_counter() - start


def play_t4() -> None:
    """From now on this card says that it is a T4, to torch and to us: fp16, no `tl.dot`, memory-efficient attention."""
    from triton.runtime import driver

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # 8 MB, as torch gives a T4; an H200 gets 33
    driver.active.get_current_target()  # first: later Triton would compile for what the next lines say
    card = gpu.Card("Tesla T4 (played)", torch.cuda.mem_get_info()[1], (7, 5))
    gpu.cards = lambda: [card] * torch.cuda.device_count()
    torch.cuda.get_device_capability = lambda *_: card.capability
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


# ---- the cases ----


def ready(job: dict, row) -> None:
    """From a loaded model to the first tokens of a batch of 8, with all that is made on the way: two tokens, so that a
    prompt, a captured graph and its replay are in it."""
    from nbhelpers.engines import Sampling
    from nbhelpers.engines.graph import GraphEngine

    model, texts = build(job), prompts_of(job, 8)
    seconds = timed(lambda: GraphEngine(model).generate(texts, Sampling(max_tokens=2)))
    warm = job["triton_cache"] == "warm"
    row("ready" if warm else "ready-first-ever", seconds, "s", triton_cache=job["triton_cache"])


def decode(job: dict, row) -> None:
    from nbhelpers.engines import Sampling
    from nbhelpers.engines.graph import GraphEngine

    model, t4 = build(job), "-t4" if job.get("t4") else ""
    wait()
    weights, new = driver_gb(), completion_of(job)
    row(f"weights_driver{t4}", weights, "GB")
    for batch in job["batches"]:
        texts, sampling = prompts_of(job, batch), Sampling(max_tokens=new, seed=1)
        engine = GraphEngine(model, max_rows=batch)
        capture = timed(engine.generate, texts, replace(sampling, max_tokens=2))
        engine.generate(texts, replace(sampling, max_tokens=9))
        prefill = timed(engine.generate, texts, replace(sampling, max_tokens=1))
        times = [timed(engine.generate, texts, sampling) for _ in range(3)]
        seconds = statistics.median(times)
        row(f"batch-{batch}{t4}/decode", batch * new / seconds, "tokens/s", prompt=PROMPT, completion=new)
        row(f"batch-{batch}{t4}/step", 1000 * (seconds - prefill) / (new - 1), "ms", prefill_s=round(prefill, 4))
        row(f"batch-{batch}{t4}/capture", capture, "s")
        length = -(-(len(texts[0]) + new) // 16) * 16
        kv = batch * length * engine._steps.cache.token_bytes / GB
        used = driver_gb()
        row(f"batch-{batch}{t4}/driver", used, "GB", above_weights=round(used - weights, 3), kv=round(kv, 3))
        if job.get("profile") and torch.cuda.is_available():
            profile(job, engine, texts, sampling, batch)
        del engine
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def profile(job: dict, engine, texts, sampling, batch: int) -> None:
    """Where a step's time goes: kernels of 65 steps, summed by name, as text on the screen."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        engine.generate(texts, replace(sampling, max_tokens=66))
        wait()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:25]
    print(f"{job['model']} batch {batch}: kernels of 65 steps and one prefill")
    for event in events:
        print(f"  {event.self_device_time_total / 65:9.1f} us a step, {event.count / 65:6.1f} x  {event.key[:100]}")


def transformers(job: dict, row) -> None:
    from transformers import GenerationConfig

    model, new = build(job), 8 if job.get("quick") else 64
    for batch in job["batches"]:
        ids = torch.tensor(prompts_of(job, batch), device=device())
        mask = torch.ones_like(ids)

        def generate(tokens, ids=ids, mask=mask):
            config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0,
                                      pad_token_id=0, eos_token_id=2, disable_compile=True)  # fmt: skip
            with torch.no_grad():
                model.generate(ids, attention_mask=mask, generation_config=config)

        first = timed(generate, 2)
        seconds = timed(generate, new)
        row(f"batch-{batch}/decode", batch * new / seconds, "tokens/s", "transformers", prompt=PROMPT, completion=new)
        if batch == job["batches"][0]:
            row("ready", first, "s", "transformers")
    row("driver", driver_gb(), "GB", "transformers")


def tempfile_folder():
    import tempfile

    return tempfile.TemporaryDirectory()


@contextmanager
def checkpoint(job: dict):
    """Yields a folder with a bf16 checkpoint of random weights and a tokenizer, for those who load from disk."""
    sys.modules["common"] = common  # as benchmarks/loader.py calls it
    from benchmarks.loader import make_checkpoint

    with tempfile_folder() as folder:
        made = Path(folder) / "model"
        make_checkpoint(shape(job), made, 4e9)
        yield str(made)


def vllm(job: dict, row) -> None:
    """vLLM 0.26 in a process of its own: NF4 made from a checkpoint of random weights, a slot for a LoRA of rank 16.

    ready: from LLM's construction to the first tokens of a batch of 8, vLLM's import before it."""
    from vllm import LLM, SamplingParams

    new = completion_of(job)
    with checkpoint(job) as folder:
        start = time.perf_counter()
        llm = LLM(
            folder, quantization="bitsandbytes", dtype="bfloat16", enable_lora=True,
            max_lora_rank=16, max_model_len=PROMPT + new + 8, gpu_memory_utilization=0.5, max_num_seqs=128, seed=0,
        )  # fmt: skip

        def generate(batch, tokens):
            # no text: with the checkpoint's tokenizer of 259 words that costs more than decoding does
            sampling = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
            llm.generate([{"prompt_token_ids": p} for p in prompts_of(job, batch)], sampling, use_tqdm=False)

        generate(8, 2)
        row("ready", time.perf_counter() - start, "s", "vllm")
        for batch in job["batches"]:
            generate(batch, 8)
            seconds = statistics.median(timed(generate, batch, new) for _ in range(3))
            row(f"batch-{batch}/decode", batch * new / seconds, "tokens/s", "vllm", prompt=PROMPT, completion=new)
        row("driver", driver_gb(), "GB", "vllm", gpu_memory_utilization=0.5)


def grpo(job: dict, row) -> None:
    from benchmarks.engines_grpo import steps

    steps(job, row)


def trl(job: dict, row) -> None:
    from benchmarks.engines_trl import steps

    steps(job, row)


KINDS = {"ready": ready, "decode": decode, "transformers": transformers, "grpo": grpo, "vllm": vllm, "trl": trl}


def first(quick: bool) -> int:
    """--first: the checks, then one speed. Returns how many checks failed."""
    from benchmarks import engines_check

    def say(text: str) -> None:
        print(text, flush=True)

    dtypes = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32]
    failed = engines_check.run(device(), dtypes, quick or not torch.cuda.is_available(), say)
    job = {"model": "qwen2.5-1.5b", "batches": [8], "quick": quick, "profile": True}
    decode(job, lambda metric, value, unit, **more: say(f"{metric} {value:,.3f} {unit} {more or ''}"))
    print(f"{failed} checks failed", file=sys.stderr)
    return failed
