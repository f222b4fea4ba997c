"""Keys and values in 8 bits on this GPU: is the kernel right, what do they cost in probabilities, what do they save?

    python -m benchmarks.engines --only eight-bits --models qwen2.5-1.5b llama-3.1-8b
    python -m benchmarks.engines --only eight-bits --models qwen2.5-1.5b --weights qwen2.5-1.5b-instruct.gguf
    TRITON_INTERPRET=1 python -m benchmarks.engines --only eight-bits --quick      on a CPU, the kernel included

With `--weights` the gaps alone are measured, of that checkpoint. With random weights the k_proj of two layers gets a
bias as large as the one in Qwen2.5's first layers, where the model has a bias.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import GB, Job, build, device, shape, timed
from benchmarks.random_model import Model
from nbhelpers import gpu, kernels, loader
from nbhelpers.engines import Sampling
from nbhelpers.engines.cuda_graphs import CHUNK, LEFT, POSITION
from nbhelpers.engines.forward import Decoder
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.kernels import EightBits, HeadNorms, decode_step, eight_bits
from nbhelpers.memory.kv import KV_BITS
from nbhelpers.models import chat, families

from . import cases, check

LARGE = 100.0  # of the bias that random weights get in one channel of each key head; Qwen2.5-1.5B's reach 400
SIZES = ((8, 456), (2, 20_000))  # rows and positions of the steps that are timed
QUESTIONS = (
    "A farmer has 17 sheep. All but 9 run away. How many are left?",
    "Which is larger, 9.11 or 9.9? Explain.",
    "Write a short story about a lighthouse keeper who is afraid of the sea.",
    "A train leaves at 14:35 and arrives at 17:10. How long does it travel?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?",
    "Explain in simple words why the sky is blue.",
    "List ten uses of a brick.",
)


# ---- the kernel ----


class Case(NamedTuple):
    """Shapes of one call of the attention kernel."""

    rows: int
    heads: int
    kv_heads: int
    dim: int
    length: int
    rotary: int = 0  # channels; 0: all
    bias: bool = False
    norms: bool = False
    window: int | None = None


CASES = (
    Case(8, 12, 2, 128, 1000, bias=True), Case(1, 12, 2, 128, 3000, bias=True), Case(32, 12, 2, 128, 700, bias=True),
    Case(8, 14, 2, 64, 900, bias=True), Case(8, 32, 8, 128, 1000), Case(2, 32, 8, 128, 5000),
    Case(128, 32, 8, 128, 200), Case(8, 16, 8, 128, 700, norms=True), Case(4, 40, 10, 128, 900, rotary=96),
    Case(4, 32, 8, 128, 900, window=300), Case(4, 16, 2, 128, 900, bias=True, window=300),
)  # fmt: skip
QUICK = (Case(2, 6, 2, 16, 70, bias=True), Case(2, 4, 2, 24, 40, rotary=16, norms=True), Case(1, 4, 2, 16, 50))


def arguments(case: Case, dtype: torch.dtype, place: torch.device) -> dict[str, Any]:
    """Of `decode_step.decode_attention`, the same ones for the same case."""
    generator = torch.Generator().manual_seed(case.rows + case.length)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(place, dtype)

    half = (case.rotary or case.dim) // 2
    turns = torch.arange(case.length)[:, None] * 1e4 ** (-torch.arange(half) / half)
    every = [t.repeat(1, 2).to(place, dtype) for t in (turns.cos(), turns.sin())]
    positions = torch.randint(case.length, (case.rows,), generator=generator).to(place)
    positions[0] = case.length - 1
    q, k, v = (normal(case.rows, 1, n * case.dim).unflatten(-1, (n, case.dim)).transpose(1, 2)
               for n in (case.heads, case.kv_heads, case.kv_heads))  # fmt: skip
    bias = None
    if case.bias:
        bias = normal(case.kv_heads, case.dim)
        bias[:, [1, half // 2, half + 1, 2 * half - 1]] *= LARGE
        k = k + bias[:, None]
    cache, scales = eight_bits.quantise(normal(2, 2, case.rows + 1, case.kv_heads, case.length, case.dim))
    eight = EightBits(scales, eight_bits.angles_of(*every, case.dim), bias)
    strides, addresses = cache.stride(), [scales.data_ptr(), eight.angles.data_ptr()]
    table = torch.tensor([cache.data_ptr(), strides[0], strides[2], strides[3], *addresses], device=place)
    return {
        "q": q, "k": k, "v": v, "cos": every[0][positions][:, None], "sin": every[1][positions][:, None],
        "cache": cache, "table": table, "layer": 1, "positions": positions, "longest": case.length,
        "scale": case.dim**-0.5, "window": case.window,
        "norms": HeadNorms(1 + 0.1 * normal(case.dim), 1 + 0.1 * normal(case.dim), 1e-6) if case.norms else None,
        "eight": eight,
    }  # fmt: skip


def exact(of: dict[str, Any]) -> None:
    """The arguments in fp32, q and k rotated before in their own dtype, as every kernel here rounds them."""
    bias = of["eight"].bias
    q, k = kernels.reference.rope(of["q"], eight_bits.without(of["k"], bias), of["cos"], of["sin"], of["norms"])
    of["q"], of["k"], of["v"], of["norms"] = q.float(), k.float(), of["v"].float(), None
    if bias is not None:
        of["k"] = of["k"] + bias.float()[:, None]
    of["cos"], of["sin"] = torch.ones_like(of["cos"]).float(), torch.zeros_like(of["sin"]).float()


def kernel(place: torch.device, quick: bool, line: Callable[[str], None]) -> int:
    """The Triton kernel against torch in fp32, as on Ampere and later and as on a T4: a `line` of text each. Returns
    how many were wrong; none is tried on a CPU without Triton's interpreter."""
    if place.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return 0
    failed, dtypes = 0, [torch.bfloat16, torch.float16] if place.type == "cuda" else [torch.float32, torch.float16]
    module = import_module("nbhelpers.kernels.triton.decode_attention")
    for dtype in dtypes:
        for dot in (True,) if dtype == torch.bfloat16 else (True, False):  # a T4 has no bf16
            worst, moved, scales = 0.0, 0.0, 0.0
            for case in QUICK if quick else CASES:
                ours, wide = arguments(case, dtype, place), arguments(case, dtype, place)
                with (
                    kernels.use("triton"),
                    mock.patch.object(module, "tensor_cores", lambda device, answer=dot: answer),
                ):
                    got = decode_step.decode_attention(**ours).float()
                exact(wide)
                with kernels.use("torch"):
                    wanted = decode_step.decode_attention(**wide)
                worst = max(worst, ((got - wanted).norm() / wanted.norm()).item())
                moved = max(moved, (ours["cache"].int() - wide["cache"].int()).abs().max().item())
                off = (ours["eight"].scales / wide["eight"].scales - 1).abs()
                scales = max(scales, off.max().item())
            near = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-4)
            # without its bias a key is rounded to 16 bits, and a number near the middle of two steps goes either way
            good = worst < near and moved <= (1 if dtype != torch.bfloat16 else 2) and scales < near
            failed += not good
            line(f"{'ok  ' if good else 'FAIL'} {dtype} attention over 8 bits, dot={dot}: relative error {worst:.5f}, "
                 f"numbers {moved:.0f} apart, scales {scales:.5f}")  # fmt: skip
    return failed


# ---- the engine ----


def plant(model: Model) -> None:
    """A large bias in the k_proj of the first and the middle layer, where there is one."""
    layers = families.skeleton(model).layers
    for layer in (layers[0], layers[len(layers) // 2]):
        bias = getattr(getattr(layer.self_attn, "k_proj", None), "bias", None)
        if bias is not None:
            heads = bias.data.view(-1, layer.self_attn.head_dim)
            heads[:, [1, heads.shape[1] - 2]] += LARGE


def gaps(name: str, model: Model, prompts: list[list[int]], new: int, row: cases.RowWriter) -> None:
    """How far the reported log-probabilities are from the training forward's, with 16 and with 8 bits; and whether
    captured graphs write with 8 bits what steps without a graph do."""
    sampling = Sampling(max_tokens=new, seed=1)
    for bits in KV_BITS:
        written = GraphEngine(model, kv_bits=bits).generate(prompts, sampling)
        off = check.errors(model, prompts, written, 1.0)
        row(f"{name}kv-{bits}/logprob_gap", off.mean().item(), "nats", p99=round(off.quantile(0.99).item(), 4),
            largest=round(off.max().item(), 4), tokens=len(off))  # fmt: skip
    engine, eager = GraphEngine(model, kv_bits=8), GraphEngine(model, kv_bits=8, eager=True)
    first = engine.generate(prompts, sampling)
    same = eager.generate(prompts, sampling)
    engine.generate(prompts[:3], replace(sampling, max_tokens=new // 2, num_generations=5))  # another cache
    again = engine.generate(prompts, sampling)
    parted = sum(a.token_ids != b.token_ids for a, b in zip(first, same, strict=True))
    moved = sum(a.token_ids != b.token_ids for a, b in zip(first, again, strict=True))
    row(f"{name}kv-8/parted", parted, "texts", reallocated=moved, of=len(prompts))


def steps(model: Model, job: Job, row: cases.RowWriter) -> None:
    """Milliseconds of a decoding step, and bytes of keys and values, for each of SIZES and both widths."""
    for rows, length in ((2, 24), (1, 40)) if job["quick"] else SIZES:
        for bits in KV_BITS:
            engine = GraphEngine(model, kv_bits=bits, max_rows=rows)
            with torch.no_grad():
                runner = engine._prepare(Decoder(model), Sampling(max_tokens=length))
                slot = -(-(length + 400) // 16) * 16
                runner.cache.allocate(rows, slot, rows * slot * runner.cache.token_bytes)
                runner.state.zero_()
                runner.state[POSITION], runner.state[LEFT] = length, 10**6

                def several(runner: Any = runner, rows: int = rows, slot: int = slot) -> None:
                    runner.run(rows, CHUNK, slot)

                times = [timed(several) for _ in range(4 if job["quick"] else 40)][2:]
                kv = rows * length * runner.cache.token_bytes / GB
                row(f"kv-{bits}/batch-{rows}-at-{length}/step", 1000 * statistics.median(times) / CHUNK, "ms",
                    kv_gb=round(kv, 4))  # fmt: skip
                runner.cache.free()
            del runner, engine
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def measure(job: Job, row: cases.RowWriter) -> None:
    """All of it for one model."""
    new = 24 if job["quick"] else 256
    if job.get("weights"):
        model, tokenizer = loader.load(job["weights"], quantization="nf4", lora_rank=16, progress=False)
        prompts = [chat.prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
        gaps(f"{Path(job['weights']).stem}/", model, prompts, new, row)
        return
    failed = kernel(device(), job["quick"], print)
    model = build(job)
    plant(model)
    print(f"{job['model']}: {gpu.compute_dtype()}, {shape(job).num_hidden_layers} layers", flush=True)
    gaps("", model, cases.prompts_of(job, 8), new, row)
    steps(model, job, row)
    if failed:
        raise RuntimeError(f"{failed} checks of the kernel failed")
