"""The sections of `python -m benchmarks.kernels`: what is measured of each kernel, for each model's shapes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nbhelpers import kernels
from nbhelpers.models import patch

from . import cases
from .cases import Shape
from .logprob import logprob
from .measure import (
    DEVICE,
    DTYPE,
    GRAPH,
    Run,
    attempt,
    autocast,
    decode_rows,
    graph_milliseconds,
    kernel_times,
    milliseconds,
    peak_gb,
    row,
    train_rows,
    wall_milliseconds,
)


def elementwise(run: Run) -> None:
    """Norms, rotary embedding, SwiGLU and dequantisation, in training and in decoding."""
    for shape in run.shapes:
        torch._dynamo.reset()
        for name, case in cases.elementwise(shape, run.batch, run.length, DTYPE, DEVICE, run.compiled).items():
            train_rows(f"{shape.name}/{name}", case, run.speed, graph=True)
        for name, case in cases.elementwise(shape, run.few, 1, DTYPE, DEVICE, run.compiled).items():
            decode_rows(f"{shape.name}/{name}", case, run.speed)
        nf4_rows(shape, run.speed)
        run.write()


def nf4_rows(shape: Shape, speed: float) -> None:
    """Dequantisation of the gate's weight: ours, and bitsandbytes' (who: eager)."""
    import bitsandbytes.functional as functional

    weight = torch.randn(shape.wide, shape.hidden, dtype=DTYPE, device=DEVICE)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    out, name, n = torch.empty_like(weight), f"{shape.name}/nf4", weight.numel()
    # bitsandbytes' CPU operator cannot write into a tensor
    into: dict[str, Any] = {} if DEVICE.type == "cpu" else {"out": out}
    contestants = {
        "ours": lambda: kernels.dequantize_nf4(packed, state, DTYPE, out),
        "eager": lambda: functional.dequantize_4bit(packed, state, **into),
    }

    def measure(who: str, call: Callable) -> None:
        row(f"{name}/forward", who, milliseconds(call), "ms")
        row(f"{name}/forward/peak", who, peak_gb(call)[0], "GB")
        row(f"{name}/decode", who, graph_milliseconds(call, cold=True), "ms", **GRAPH)

    for who, call in contestants.items():
        attempt(f"{name} {who}", measure, who, call)
    floor = (n // 2 + n // 64 + n * DTYPE.itemsize) / speed * 1e3
    row(f"{name}/forward", "floor", floor, "ms")
    row(f"{name}/decode", "floor", floor, "ms")


def lora(run: Run) -> None:
    """The products with LoRA, alone and in groups, in training and in decoding."""
    for shape in run.shapes:
        torch._dynamo.reset()
        tool = run.compiled if shape.family == "llama" else None
        # training as stock does it: fp32 adapters, everything under autocast
        made, _ = cases.lora(shape, run.tokens, DTYPE, DEVICE, torch.float32, tool)
        for name, case in made.items():
            train_rows(f"{shape.name}/{name}", case, run.speed, with_autocast=True)
        x = torch.randn(run.tokens, shape.hidden, dtype=DTYPE, device=DEVICE)
        w = torch.randn(shape.wide, shape.hidden, dtype=DTYPE, device=DEVICE)
        y, name = x @ w.t(), f"{shape.name}/lora_linear"
        row(f"{name}/forward", "cublas", milliseconds(lambda x=x, w=w: x @ w.t()), "ms")
        row(f"{name}/forward+backward", "cublas", milliseconds(lambda x=x, w=w, y=y: (x @ w.t(), y @ w)), "ms")
        # decoding: adapters in 16 bits, which is the best that stock can do
        made, _ = cases.lora(shape, run.few, DTYPE, DEVICE, DTYPE, tool)
        for name, case in made.items():
            decode_rows(f"{shape.name}/{name}", case, run.speed, cold=True)
        run.write()


def few_rows(run: Run) -> None:
    """What nf4.few_rows goes by: bitsandbytes' fused product against dequantising and cuBLAS."""
    from nbhelpers.kernels.triton.nf4 import matmul_few_rows

    def dense(x: Tensor, w: Any, out: Tensor) -> Tensor:
        return x @ kernels.dequantize_nf4(w, w.quant_state, DTYPE, out).t()

    def fused(x: Tensor, w: Any, out: Tensor) -> Tensor:
        return matmul_few_rows(x, w, w.quant_state)

    for shape in run.shapes:
        for height, width in ((shape.hidden, shape.hidden), (shape.wide, shape.hidden), (shape.hidden, shape.wide)):
            w = cases.linear4bit(width, height, DTYPE, DEVICE).weight
            out = torch.empty(height, width, dtype=DTYPE, device=DEVICE)
            for rows in (1, 2, 4, 8, 16, 32, 64):
                x = torch.randn(rows, width, dtype=DTYPE, device=DEVICE)
                name = f"{shape.name}/few_rows {height}x{width}/{rows}"
                for who, product in (("ours", dense), ("bitsandbytes", fused)):
                    time_it = partial(graph_milliseconds, partial(product, x, w, out), cold=True)
                    attempt(name, lambda name=name, who=who, time_it=time_it: row(name, who, time_it(), "ms", **GRAPH))
        run.write()


def layer(run: Run) -> None:
    """One decoder layer, QLoRA r=16, 8 x 1,024 tokens: stock transformers + peft + bitsandbytes, and patched."""
    for shape in run.shapes:
        attempt(f"{shape.name}/decoder_layer", one_layer, run, shape)
        run.write()


def layer_calls(run: Run, shape: Shape) -> tuple[Any, Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """(model, its one layer's forward, forward and backward) as stock."""
    model = cases.one_layer_model(shape, DTYPE, DEVICE).train()
    inner = model.get_base_model().model
    h = torch.randn(run.batch, run.length, shape.hidden, dtype=DTYPE, device=DEVICE, requires_grad=True)
    position = torch.arange(run.length, device=DEVICE)[None]
    tables = inner.rotary_emb(h, position)
    grad = torch.randn_like(h)
    learn = [h, *(p for p in inner.layers[0].parameters() if p.requires_grad)]

    def forward() -> Tensor:
        with autocast(True):
            return inner.layers[0](h, position_embeddings=tables, position_ids=position, attention_mask=None)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), learn, grad)

    return model, forward, step


def one_layer(run: Run, shape: Shape) -> None:
    """Time and memory of one layer, stock and then ours."""
    model, forward, step = layer_calls(run, shape)
    name = f"{shape.name}/decoder_layer"

    def measure(who: str) -> None:
        row(f"{name}/forward", who, milliseconds(forward), "ms")
        row(f"{name}/forward+backward", who, milliseconds(step), "ms")
        row(f"{name}/saved", who, peak_gb(forward)[1], "GB")  # with the layer's output
        row(f"{name}/peak", who, peak_gb(step)[0], "GB")

    attempt(f"{name} stock", measure, "stock")
    report = patch.with_kernels(model)
    print(report)
    attempt(f"{name} ours", measure, "ours")


def profile(run: Run) -> None:
    """The same layer's forward and backward: what the GPU does, kernel by kernel, and how long Python takes for it."""
    for shape in run.shapes:
        attempt(f"{shape.name}/decoder_layer profile", profile_layer, run, shape)
        run.write()


def profile_layer(run: Run, shape: Shape) -> None:
    """The kernels of one layer's forward and backward, stock and then ours."""
    model, _, step = layer_calls(run, shape)
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


SECTIONS: dict[str, Callable[[Run], None]] = {
    "elementwise": elementwise, "lora": lora, "few_rows": few_rows, "logprob": logprob, "layer": layer,
    "profile": profile,
}  # fmt: skip
