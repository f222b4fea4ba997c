"""Generation by one engine: the cases of `python -m benchmarks.engines`, each in a process of its own."""

import os
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import torch
from torch import nn

from benchmarks.harness import GB, Job, build, checkpoint, device, driver_gb, kv_token_bytes, shape, timed, wait
from benchmarks.random_model import Model
from nbhelpers import gpu
from nbhelpers.engines import Sampling
from nbhelpers.engines.base import Engine
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.kernels import ahead
from nbhelpers.models import quantize

PROMPT, COMPLETION = 200, 512
RowWriter = Callable[..., None]  # (metric, value, unit, who="graph", **more): one row of this job


def prompts_of(job: Job, n: int) -> list[list[int]]:
    """`n` prompts of random tokens, the same ones for the same `n`; 200 tokens each, 20 in a `quick` job."""
    generator = torch.Generator().manual_seed(n)
    width = 20 if job.get("quick") else PROMPT
    return torch.randint(3, shape(job).vocab_size, (n, width), generator=generator).tolist()


def completion_of(job: Job) -> int:
    """How many new tokens are written to each prompt."""
    return 12 if job.get("quick") else COMPLETION


def ready(job: Job, row: RowWriter) -> None:
    """From a loaded model to the first tokens of a batch of 8, with all that is made on the way: two tokens, so that a
    prompt, a captured graph and its replay are in it. A job whose `ahead` is False has no dry pass: kernels are
    compiled one by one."""
    side_by_side = job.get("ahead", True)
    if side_by_side:
        ahead.begin(device())  # as the loader does
    model, texts = build(job), prompts_of(job, 8)
    with nullcontext() if side_by_side else mock.patch.object(ahead, "possible", lambda device: False):
        seconds = timed(lambda: GraphEngine(model).generate(texts, Sampling(max_tokens=2)))
    cores, metric = len(os.sched_getaffinity(0)), "ready" if job["triton_cache"] == "warm" else "ready-first-ever"
    if cores < ahead.THREADS:  # a row of its own
        metric = f"cores-{cores}/{metric}"
    row(metric, seconds, "s", "graph" if side_by_side else "one by one", triton_cache=job["triton_cache"], cores=cores)


def decode(job: Job, row: RowWriter) -> None:
    """The graph engine's tokens/s, milliseconds a step and memory, for each of the job's `batches`."""
    model, kind = build(job), "-t4" if job.get("t4") else "-dynamic" if job.get("dynamic") else ""
    if job.get("dynamic"):
        kept = leave_in_16_bits(model)
        torch.cuda.empty_cache()
        print(f"{job['model']}: {kept} layers in 16 bits", flush=True)
    wait()
    weights, new = driver_gb(), completion_of(job)
    row(f"weights_driver{kind}", weights, "GB")
    for batch in job["batches"]:
        texts, sampling = prompts_of(job, batch), Sampling(max_tokens=new, seed=1)
        engine = GraphEngine(model, max_rows=batch)
        capture = timed(engine.generate, texts, replace(sampling, max_tokens=2))
        engine.generate(texts, replace(sampling, max_tokens=9))
        prefill = timed(engine.generate, texts, replace(sampling, max_tokens=1))
        times = [timed(engine.generate, texts, sampling) for _ in range(3)]
        seconds = statistics.median(times)
        row(f"batch-{batch}{kind}/decode", batch * new / seconds, "tokens/s", prompt=PROMPT, completion=new)
        row(f"batch-{batch}{kind}/step", 1000 * (seconds - prefill) / (new - 1), "ms", prefill_s=round(prefill, 4))
        row(f"batch-{batch}{kind}/capture", capture, "s")
        length = -(-(len(texts[0]) + new) // 16) * 16
        kv = batch * length * kv_token_bytes(shape(job), gpu.compute_dtype()) / GB
        used = driver_gb()
        row(f"batch-{batch}{kind}/driver", used, "GB", above_weights=round(used - weights, 3), kv=round(kv, 3))
        if job.get("profile") and torch.cuda.is_available():
            profile(f"{job['model']} batch {batch}", engine, texts, sampling)
        del engine
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def leave_in_16_bits(model: Model) -> int:
    """Every v_proj, and gate_proj of every fourth layer, as "dynamic" 4-bit may: groups in which NF4 and 16 bits
    meet. Returns how many."""
    kept = 0
    for name, wrapped in list(model.named_modules()):
        layer, leaf = re.search(r"layers\.(\d+)\.", f"{name}."), name.rpartition(".")[2]
        if layer is None or not (leaf == "v_proj" or (leaf == "gate_proj" and int(layer[1]) % 4 == 0)):
            continue
        packed = wrapped.base_layer
        dense = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
        dense.weight, dense.bias = nn.Parameter(quantize.unpack(packed.weight), False), packed.bias
        wrapped.base_layer = dense
        kept += 1
    return kept


def profile(label: str, engine: Engine, texts: list[list[int]], sampling: Sampling) -> None:
    """Where a step's time goes: kernels of 65 steps, summed by name, as text on the screen."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as recorded:
        engine.generate(texts, replace(sampling, max_tokens=66))
        wait()
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_device_time_total)[:25]
    print(f"{label}: kernels of 65 steps and one prefill")
    for event in events:
        print(f"  {event.self_device_time_total / 65:9.1f} us a step, {event.count / 65:6.1f} x  {event.key[:100]}")


def transformers(job: Job, row: RowWriter) -> None:
    """transformers' own `generate` on the same model: tokens/s of 64 new tokens, and seconds to the first two."""
    from transformers import GenerationConfig

    model, new = build(job), 8 if job.get("quick") else 64
    for batch in job["batches"]:
        ids = torch.tensor(prompts_of(job, batch), device=device())
        mask = torch.ones_like(ids)

        def generate(tokens: int, ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
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


def vllm(job: Job, row: RowWriter) -> None:
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

        def generate(batch: int, tokens: int) -> None:
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
