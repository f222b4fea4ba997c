"""The fused kernels against eager torch, torch.compile, Liger and the bytes that have to move.

    python benchmarks/kernels.py --check   first every kernel against fp64 in bf16 and fp16, then the timings
    python benchmarks/kernels.py --profile also where the time of a decoder layer goes, kernel by kernel
    python benchmarks/kernels.py --quick   tiny shapes on a CPU, Triton interpreted: does the script run at all?

Writes benchmarks/results/kernels.json (and $OUT/kernels.json), after each section, so that a crash loses little. With
--only SECTION ... the other rows of a file from the same host stay; --join FILE ... puts files together.

How it measures. Training (8 x 1,024 tokens): CUDA events around one call, the L2 cache overwritten before each, the
median. `forward` is without autograd; `forward+backward` takes both, since backward alone cannot be repeated where it
writes over what was kept. `peak` is the most memory above what was there before, results included.

Element-wise forward+backward and decoding (8 rows) are shorter than autograd's and Python's work around them. There 20
calls are captured in a CUDA graph and replayed, for every contestant alike, and the time per call is the kernels' own
(rows with "method": "cuda graph"); `forward+backward/eager_launch` is ours launched from Python, as in training.
Between two calls the graph reads a buffer larger than the L2 and the time of these reads alone is subtracted, except
for element-wise kernels in decoding, which find their data in the cache there as they do in a model.

`floor` is the bytes that must be read and written once, at the bandwidth of a large copy on this card (so a cached
kernel may beat it); `cublas` is the bare 16-bit matrix products of an operation. torch.compile of LoRA layers is timed
for one model: compiling takes long.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--check", action="store_true")
parser.add_argument("--quick", action="store_true")
parser.add_argument("--profile", action="store_true")
parser.add_argument("--join", nargs="+", type=Path, help="measure nothing, put the rows of these files together")
parser.add_argument("--only", nargs="*", help="sections: check elementwise lora few_rows logprob layer profile")
ARGS = parser.parse_args()
if ARGS.quick:
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402

from benchmarks import kernels_cases as cases  # noqa: E402
from benchmarks.kernels_measure import (  # noqa: E402
    DEVICE,
    DTYPE,
    FAILED,
    GRAPH,
    ROWS,
    attempt,
    autocast,
    bandwidth,
    decode_rows,
    graph_milliseconds,
    kernel_times,
    milliseconds,
    peak_gb,
    row,
    train_rows,
    wall_milliseconds,
    write,
)
from nbhelpers import kernels
from nbhelpers.models import patch  # noqa: E402

MODELS = cases.QUICK if ARGS.quick else cases.MODELS
BATCH, LENGTH, FEW = (2, 4, 2) if ARGS.quick else (8, 1024, 8)


def compiled(function):
    return torch.compile(function, dynamic=False, backend="eager" if ARGS.quick else "inductor")


# ------------------------------------------------------------------------------------------------------- sections


def elementwise(speed):
    for shape in MODELS:
        torch._dynamo.reset()
        for name, case in cases.elementwise(shape, BATCH, LENGTH, DTYPE, DEVICE, compiled).items():
            train_rows(f"{shape.name}/{name}", case, speed, graph=True)
        for name, case in cases.elementwise(shape, FEW, 1, DTYPE, DEVICE, compiled).items():
            decode_rows(f"{shape.name}/{name}", case, speed)
        nf4_rows(shape, speed)
        write(keep=bool(ARGS.only))


def nf4_rows(shape, speed):
    """Dequantisation of the gate's weight: ours, and bitsandbytes' (who: eager)."""
    import bitsandbytes.functional as functional

    weight = torch.randn(shape.wide, shape.hidden, dtype=DTYPE, device=DEVICE)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    out, name, n = torch.empty_like(weight), f"{shape.name}/nf4", weight.numel()
    into = {} if DEVICE.type == "cpu" else {"out": out}  # bitsandbytes' CPU operator cannot write into a tensor
    contestants = {
        "ours": lambda: kernels.dequantize_nf4(packed, state, DTYPE, out),
        "eager": lambda: functional.dequantize_4bit(packed, state, **into),
    }

    def measure(who, call):
        row(f"{name}/forward", who, milliseconds(call), "ms")
        row(f"{name}/forward/peak", who, peak_gb(call)[0], "GB")
        row(f"{name}/decode", who, graph_milliseconds(call, cold=True), "ms", **GRAPH)

    for who, call in contestants.items():
        attempt(f"{name} {who}", measure, who, call)
    floor = (n // 2 + n // 64 + n * DTYPE.itemsize) / speed * 1e3
    row(f"{name}/forward", "floor", floor, "ms")
    row(f"{name}/decode", "floor", floor, "ms")


def lora(speed):
    for shape in MODELS:
        torch._dynamo.reset()
        tool = compiled if shape.family == "llama" else None
        # training as stock does it: fp32 adapters, everything under autocast
        made, _ = cases.lora(shape, BATCH * LENGTH, DTYPE, DEVICE, torch.float32, tool)
        for name, case in made.items():
            train_rows(f"{shape.name}/{name}", case, speed, with_autocast=True)
        x = torch.randn(BATCH * LENGTH, shape.hidden, dtype=DTYPE, device=DEVICE)
        w = torch.randn(shape.wide, shape.hidden, dtype=DTYPE, device=DEVICE)
        y, name = x @ w.t(), f"{shape.name}/lora_linear"
        row(f"{name}/forward", "cublas", milliseconds(lambda x=x, w=w: x @ w.t()), "ms")
        row(f"{name}/forward+backward", "cublas", milliseconds(lambda x=x, w=w, y=y: (x @ w.t(), y @ w)), "ms")
        # decoding: adapters in 16 bits, which is the best that stock can do
        made, _ = cases.lora(shape, FEW, DTYPE, DEVICE, DTYPE, tool)
        for name, case in made.items():
            decode_rows(f"{shape.name}/{name}", case, speed, cold=True)
        write(keep=bool(ARGS.only))


def few_rows(_):
    """What nf4.few_rows goes by: bitsandbytes' fused product against dequantising and cuBLAS."""
    from nbhelpers.kernels.triton.nf4 import matmul_few_rows

    def dense(x, w, out):
        return x @ kernels.dequantize_nf4(w, w.quant_state, DTYPE, out).t()

    def fused(x, w, out):
        return matmul_few_rows(x, w, w.quant_state)

    for shape in MODELS:
        for height, width in ((shape.hidden, shape.hidden), (shape.wide, shape.hidden), (shape.hidden, shape.wide)):
            w = cases.linear4bit(width, height, DTYPE, DEVICE).weight
            out = torch.empty(height, width, dtype=DTYPE, device=DEVICE)
            for rows in (1, 2, 4, 8, 16, 32, 64):
                x = torch.randn(rows, width, dtype=DTYPE, device=DEVICE)
                name = f"{shape.name}/few_rows {height}x{width}/{rows}"
                for who, product in (("ours", dense), ("bitsandbytes", fused)):
                    time_it = partial(graph_milliseconds, partial(product, x, w, out), cold=True)
                    attempt(name, lambda name=name, who=who, time_it=time_it: row(name, who, time_it(), "ms", **GRAPH))
        write(keep=bool(ARGS.only))


def logprob(_):
    """The head: 8,192 tokens of each model against everybody, 32,768 tokens x 128,256 words against TRL's."""
    from trl.kernels import ChunkedLogProbFunction

    def ours(h, w, target):
        return kernels.linear_logprob(h, w, target, temperature=0.9)

    def trl(h, w, target):
        outputs = ("log_probs",)
        return ChunkedLogProbFunction.apply(h, w, None, target, 0.9, 32768, None, 1.0, outputs)[0]

    def eager(h, w, target):
        logps = torch.log_softmax((h @ w.t()).float() / 0.9, dim=-1)
        return logps.gather(-1, target[:, None]).squeeze(-1)

    def liger(h, w, target):
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

        return _ChunkedSelectiveLogProbFunction.apply(h, w, target, None, 0.9, 4096)

    def cublas(h, w, target):
        """The two products of a frozen head, in chunks of the same size, and nothing else."""
        h = h.detach()
        out, buffer = torch.empty_like(h), torch.empty(1024, w.shape[0], dtype=h.dtype, device=h.device)
        for start in range(0, h.shape[0], 1024):
            rows = h[start : start + 1024]
            z = buffer[: rows.shape[0]]
            torch.mm(rows, w.t(), out=z)
            torch.mm(z, w, out=out[start : start + 1024])

    def inputs(tokens, hidden, words):
        h = torch.randn(tokens, hidden, dtype=DTYPE, device=DEVICE, requires_grad=True)
        w = torch.randn(words, hidden, dtype=DTYPE, device=DEVICE) * 2 * hidden**-0.5
        return [h, w, torch.randint(0, words, (tokens,), device=DEVICE)]

    for shape in MODELS:
        torch._dynamo.reset()
        everybody = {"ours": ours, "eager": eager, "compile": compiled(eager), "liger": liger, "trl": trl}
        if DEVICE.type == "cpu":  # Liger has none
            del everybody["liger"]
        data = inputs(BATCH * LENGTH, shape.hidden, shape.words)
        train_rows(f"{shape.name}/linear_logprob", cases.Case(data, everybody), 1)
        what = f"{shape.name}/linear_logprob/forward+backward"
        row(what, "cublas", milliseconds(lambda data=data: cublas(*data)), "ms")
        write(keep=bool(ARGS.only))
    nf4_head()

    tokens, hidden, words = (64, 32, 320) if ARGS.quick else (32_768, 4096, 128_256)
    data = inputs(tokens, hidden, words)
    name = f"llama-3.1-8b/linear_logprob {tokens}x{words}"
    train_rows(name, cases.Case(data, {"ours": ours, "trl": trl}), 1)
    row(f"{name}/forward+backward", "cublas", milliseconds(lambda: cublas(*data)), "ms")
    for tile in () if ARGS.quick else TILES:
        attempt(f"{name} {tile}", logprob_tile, name, data, tile)
    # of the peak the hidden states' gradient is a result, not scratch
    row(f"{name}/forward+backward/gradient", "ours", tokens * hidden * DTYPE.itemsize / 1e9, "GB")


# (tokens, words) of one product where no gradient is wanted: linear_logprob.FORWARD_TOKENS is chosen from these. The
# first four fill the scratch; the results of the others, 16 to 64 MB, stay more or less in an L2 cache of 50 MB.
TILES = ((1024, 128_256), (2048, 64_128), (4096, 32_064), (8192, 16_032), (4096, 8192), (2048, 8192), (2048, 4096),
         (4096, 4096), (8192, 4096), (1024, 12_288))  # fmt: skip


def logprob_tile(name, data, tile):
    from nbhelpers.kernels.triton.linear_logprob import linear_logprob

    with torch.no_grad():
        time_it = partial(linear_logprob, *data, temperature=0.9, tile=tile)
        row(f"{name}/forward/tile {tile[0]}x{tile[1]}", "ours", milliseconds(time_it, budget=0.5), "ms")


def nf4_head():
    import bitsandbytes.functional as functional

    shape = MODELS[0] if ARGS.quick else MODELS[1]
    weight = torch.randn(shape.words, shape.hidden, dtype=DTYPE, device=DEVICE) * 2 * shape.hidden**-0.5
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    h = torch.randn(BATCH * LENGTH, shape.hidden, dtype=DTYPE, device=DEVICE, requires_grad=True)
    target = torch.randint(0, shape.words, (BATCH * LENGTH,), device=DEVICE)
    case = cases.Case([h], {"ours": lambda h: kernels.linear_logprob(h, packed, target, quant_state=state)})
    train_rows(f"{shape.name}/linear_logprob of an NF4 head", case, 1)


def layer(_):
    """One decoder layer, QLoRA r=16, 8 x 1,024 tokens: stock transformers + peft + bitsandbytes, and patched."""
    for shape in MODELS:
        attempt(f"{shape.name}/decoder_layer", one_layer, shape)
        write(keep=bool(ARGS.only))


def layer_calls(shape):
    """(model, its one layer's forward, forward and backward) as stock."""
    model = cases.one_layer_model(shape, DTYPE, DEVICE).train()
    inner = model.get_base_model().model
    h = torch.randn(BATCH, LENGTH, shape.hidden, dtype=DTYPE, device=DEVICE, requires_grad=True)
    position = torch.arange(LENGTH, device=DEVICE)[None]
    tables = inner.rotary_emb(h, position)
    grad = torch.randn_like(h)
    learn = [h, *(p for p in inner.layers[0].parameters() if p.requires_grad)]

    def forward():
        with autocast(True):
            return inner.layers[0](h, position_embeddings=tables, position_ids=position, attention_mask=None)

    def step():
        return torch.autograd.grad(forward(), learn, grad)

    return model, forward, step


def one_layer(shape):
    model, forward, step = layer_calls(shape)
    name = f"{shape.name}/decoder_layer"

    def measure(who):
        row(f"{name}/forward", who, milliseconds(forward), "ms")
        row(f"{name}/forward+backward", who, milliseconds(step), "ms")
        row(f"{name}/saved", who, peak_gb(forward)[1], "GB")  # with the layer's output
        row(f"{name}/peak", who, peak_gb(step)[0], "GB")

    attempt(f"{name} stock", measure, "stock")
    report = patch.with_kernels(model)
    print(report)
    attempt(f"{name} ours", measure, "ours")


def profile(_):
    """The same layer's forward and backward: what the GPU does, kernel by kernel, and how long Python takes for it."""
    for shape in MODELS:
        attempt(f"{shape.name}/decoder_layer profile", profile_layer, shape)
        write(keep=bool(ARGS.only))


def profile_layer(shape):
    model, _, step = layer_calls(shape)
    name = f"{shape.name}/decoder_layer/forward+backward"
    for who in ("stock", "ours"):
        if who == "ours":
            patch.with_kernels(model)
        wall, queued = wall_milliseconds(step)
        times = kernel_times(step)
        row(f"{name}/wall", who, wall, "ms")
        row(f"{name}/python", who, queued, "ms")
        row(f"{name}/kernels", who, sum(ms for _, _, ms in times), "ms")
        row(f"{name}/launches", who, sum(count for _, count, _ in times), "launches")
        for kernel, count, ms in times[:12]:
            print(f"    {ms:8.4f} ms {count:6.1f} x  {kernel[:100]}", flush=True)


SECTIONS = {"elementwise": elementwise, "lora": lora, "few_rows": few_rows, "logprob": logprob, "layer": layer,
            "profile": profile}  # fmt: skip


def main():
    if ARGS.join:
        common.join("kernels", ARGS.join)
        return
    torch.manual_seed(0)
    wanted = set(ARGS.only or SECTIONS.keys() - {"profile"})
    wanted |= {name for name in ("check", "profile") if vars(ARGS)[name] or ARGS.quick}
    begin = time.perf_counter()
    with kernels.use("triton"):
        if "check" in wanted:
            from benchmarks import kernels_check

            attempt("check", kernels_check.run, DEVICE, ARGS.quick, row, FAILED)
            write(keep=bool(ARGS.only))
        speed = bandwidth()
        for name in [name for name in SECTIONS if name in wanted]:
            print(f"---- {name}, {time.perf_counter() - begin:.0f} s so far", flush=True)
            attempt(name, SECTIONS[name], speed)
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
            write(keep=bool(ARGS.only))
    print(f"{len(ROWS)} rows, {time.perf_counter() - begin:.0f} s, {len(FAILED)} failures")
    if FAILED:
        sys.exit("\n".join(["FAILED", *FAILED]))


if __name__ == "__main__":
    main()
