"""The whole MLP of a decoder layer as one function, so that fewer of its widest tensors are kept for the backward.

    g, u = gate(x), up(x)        h = silu(g) * u        y = residual + down(h)

gate, up [H -> I] (or one gate_up [H -> 2 I]) and down [I -> H] are frozen linear layers with LoRA (lora_linear.py).
With a norm folded in this is the second half of a decoder layer,

    s = x + residual        y = s + mlp(rms_norm(s))

Kept for the backward: x (with a norm s instead), g and u, and what is thin. h is recomputed, and every I-wide tensor of
the backward is written over another:

    dh = dy W_down + ...         a new buffer, the only one
    h over dh, dg over g, du over u, in one launch (swiglu.py)
    dA, dB of down from h;  dA, dB of gate and up, and dx, from dg and du

Without gradients (prefill, or a layer's forward computed only for its output) h is written over g.

fp16's largest number is 65504, and h of a trained model may exceed it: in fp16 h is kept divided by 16, and y is
multiplied by 16 in the fp32 arithmetic of the residual addition, where it saturates instead of becoming infinite.
"""

from typing import Any

import torch
from torch import Tensor

from ..reference import Projection, Stacked
from .inplace import overwritten
from .lora_linear import input_grad, lora_grads, normed_grads, prepare, project, with_lora, without_lora
from .lora_stack import stack_adapters
from .rms_norm import backward as norm_backward
from .rms_norm import forward as norm_forward
from .swiglu import backward as swiglu_backward
from .swiglu import forward as swiglu_forward

SHRINK_FP16 = 16.0
FP16_MAX = 65504.0


def shrink_of(dtype: torch.dtype) -> float:
    """What h is divided by."""
    return SHRINK_FP16 if dtype == torch.float16 else 1.0


def forward(
    x: Tensor, gate_up: tuple[Projection, ...], down: Projection, residual: Tensor | None,
    norm: tuple[Tensor, float] | None, dtype: torch.dtype, value: bool, over: bool,
    adapters: tuple[Stacked, Stacked] | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    """`lora_mlp` without autograd; over: write h over g.

    Returns y [..., H], and what a backward needs: x, with a norm s; the norm's 1 / rms [N]; wide [N, 2 I], g and u side
    by side; and what A makes of both inputs [N, r].
    """
    shrink = shrink_of(dtype)
    if norm is None:
        rows, r = x.reshape(-1, x.shape[-1]), None
    else:
        x, rows, r = norm_forward(x, *norm, residual)
        rows, residual = rows.view(-1, x.shape[-1]).to(dtype), x
    wide, z = project(rows, gate_up, adapters and adapters[0])
    if not value:
        return torch.empty_like(rows if residual is None else residual).view(x.shape), (x, r, wide, z, None)
    g, u = wide.chunk(2, dim=1)
    h = swiglu_forward(g, u, shrink, over)
    if down.bias is not None:
        down = down._replace(bias=down.bias / shrink)
    y, of_h = project(h, (down,), adapters and adapters[1])
    y = y.view(x.shape)
    if residual is not None:
        y = torch.add(residual, y, alpha=shrink)
    elif shrink != 1.0:
        y.mul_(shrink)
    return y.clamp_(-FP16_MAX, FP16_MAX) if y.dtype == torch.float16 else y, (x, r, wide, z, of_h)


class LoraMLP(torch.autograd.Function):
    """`lora_mlp` for autograd; see the module's docstring for what is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: tuple[Projection, ...], down: Projection, residual: Tensor | None,
        norm: tuple[Tensor, float] | None, dtype: torch.dtype, value: bool, *a_and_b: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y, kept = forward(x, gate_up, down, residual, norm, dtype, value, over=False)
        ctx.save_for_backward(*kept, *a_and_b)
        ctx.parts, ctx.norm, ctx.shrink = without_lora((*gate_up, down)), norm, shrink_of(dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, r, wide, z, of_h, *a_and_b = ctx.saved_tensors
        *gate_up, down = with_lora(ctx.parts, a_and_b)
        need_lora = any(ctx.needs_input_grad[7:])
        dtype = wide.dtype
        rows = dy.reshape(-1, dy.shape[-1]).to(dtype)

        a, b = stack_adapters([down], dtype)
        u = None if b is None else rows @ b
        dh = input_grad(rows, [down], a, u)
        g, up = wide.chunk(2, dim=1)
        swiglu_backward(dh, g, up, dg=g, du=up, h=dh if need_lora and a is not None else None, shrink=ctx.shrink)
        overwritten(wide)
        of_down = []
        if need_lora and a is not None:  # dh now holds h / shrink
            of_h = dh @ a.t() if of_h is None else of_h
            of_down = lora_grads(dh, rows, [down], of_h, u)
        if ctx.shrink != 1.0:
            of_down = [grad.mul_(ctx.shrink) for grad in of_down]
        del dh

        a, b = stack_adapters(gate_up, dtype)
        u = None if b is None else wide @ b  # wide now holds dg and du
        of_both = normed_grads(x, ctx.norm, r, wide, gate_up, z, u) if need_lora else []
        grads = iter([*of_both, *of_down])
        flat = [next(grads, None) if tensor is not None and need_lora else None for tensor in a_and_b]
        dx, dresidual = None, dy if ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[0] or (ctx.norm is not None and ctx.needs_input_grad[3]):
            dx = input_grad(wide, gate_up, a, u).view(x.shape)
            if r is not None:
                dx, _ = norm_backward(dx, dy, x, ctx.norm[0], r, weight_grad=False)
                dresidual = dx if ctx.needs_input_grad[3] else None
        return dx, None, None, dresidual, *[None] * 3, *flat


def lora_mlp(
    x: Tensor,
    gate_up: tuple[Projection, ...],
    down: Projection,
    residual: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    value: bool = True,
    adapters: tuple[Stacked, Stacked] | None = None,
) -> Tensor:
    """See nbhelpers.kernels.lora_mlp."""
    dtype = prepare(x, (*gate_up, down), norm)
    x = x.to(dtype) if norm is None else x
    if not torch.is_grad_enabled():
        return forward(x, gate_up, down, residual, norm, dtype, value, True, adapters)[0]
    a_and_b = [t for part in (*gate_up, down) for t in (part.lora_a, part.lora_b)]
    return LoraMLP.apply(x, tuple(gate_up), down, residual, norm, dtype, value, *a_and_b)
