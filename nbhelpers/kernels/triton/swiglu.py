"""SwiGLU: h = silu(g) * u, silu(g) = g sigmoid(g) (Shazeer, arXiv:2002.05202).

Backward, with a = sigmoid(g):

    du = dh * g a          dg = dh * u * a (1 + g (1 - a))

g, u, h [rows, I] in one dtype, arithmetic in fp32. The backward writes dg over g and du over u: these are a layer's
widest tensors, and nothing else needs them (inplace.py makes that safe). It can also recompute h, written over dh, for
a down projection that did not keep its input.

fp16's largest number is 65504: g, u and h saturate there, and h can be requested divided by `shrink`, a power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import ceil_div
from .inplace import may_overwrite, overwritten, share_memory

BLOCK = 1024  # 4 warps, one load of 16 bytes per thread and tensor


@triton.jit
def _load(pointer, mask):
    """Load in fp32; from fp16 clamped to its range."""
    value = tl.load(pointer, mask, 0.0).to(tl.float32)
    if pointer.dtype.element_ty == tl.float16:  # an infinite factor would make 0 * inf
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    return value


@triton.jit
def _store(pointer, value, mask):
    """Store in the pointer's dtype, saturating in fp16."""
    if pointer.dtype.element_ty == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["blocks"])
def _forward(g_ptr, u_ptr, h_ptr, width, blocks, g_stride, u_stride, h_stride, scale, BLOCK: tl.constexpr):
    """h = silu(g) * u * scale; h may be g."""
    row = (tl.program_id(0) // blocks).to(tl.int64)  # divide before widening: a 64-bit division is slow
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    gate = _load(g_ptr + row * g_stride + col, mask)
    up = _load(u_ptr + row * u_stride + col, mask)
    _store(h_ptr + row * h_stride + col, gate * tl.sigmoid(gate) * up * scale, mask)


@triton.jit(do_not_specialize=["blocks"])
def _backward(dh_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, h_ptr, width, blocks, dh_stride, g_stride, u_stride, dg_stride,
              du_stride, h_stride, scale, AGAIN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gradients of g and u, which may be written over them; with AGAIN h is written too, and may be dh."""
    row = (tl.program_id(0) // blocks).to(tl.int64)  # divide before widening: a 64-bit division is slow
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    gate = _load(g_ptr + row * g_stride + col, mask)
    up = _load(u_ptr + row * u_stride + col, mask)
    grad = tl.load(dh_ptr + row * dh_stride + col, mask, 0.0).to(tl.float32)
    a = tl.sigmoid(gate)
    silu = gate * a
    # gradients are not saturated: a loss scaler has to see them overflow
    tl.store(dg_ptr + row * dg_stride + col, (grad * up * (a + silu * (1.0 - a))).to(dg_ptr.dtype.element_ty), mask)
    tl.store(du_ptr + row * du_stride + col, (grad * silu).to(du_ptr.dtype.element_ty), mask)
    if AGAIN:
        _store(h_ptr + row * h_stride + col, silu * up * scale, mask)


def _rows(t: Tensor) -> Tensor:
    """t as [rows, I] with adjacent channels: a view of t wherever its strides allow one."""
    t = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()


def forward(gate: Tensor, up: Tensor, shrink: float = 1.0, over: bool = False) -> Tensor:
    """h / shrink, without autograd.

    Args:
        gate (`Tensor`): [..., I].
        up (`Tensor`): [..., I] in gate's dtype.
        shrink (`float`): Divides h, a power of two.
        over (`bool`): Write the result over gate, which is then [rows, I], keeping its strides.

    Returns [..., I], contiguous unless written over gate.
    """
    g, u = _rows(gate), _rows(up)
    rows, width = g.shape
    h = gate if over else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    strides = (t.stride(0) for t in (g, u, _rows(h)))
    blocks = ceil_div(width, BLOCK)
    if h.numel():
        _forward[(rows * blocks,)](g, u, h, width, blocks, *strides, 1 / shrink, BLOCK, num_warps=4)
    return h


def backward(
    dh: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor, h: Tensor | None = None, shrink: float = 1.0
) -> None:
    """Write the gradients of g and u into dg and du, without autograd; all tensors are [rows, I].

    Args:
        dh (`Tensor`): The gradient of h.
        g (`Tensor`): From the forward.
        u (`Tensor`): From the forward.
        dg (`Tensor`): Written to; may be g.
        du (`Tensor`): Written to; may be u.
        h (`Tensor`, *optional*): h / shrink is written to it, if given; may be dh.
        shrink (`float`): As in `forward`.
    """
    rows, width = g.shape
    blocks = ceil_div(width, BLOCK)
    again, h = h is not None, dh if h is None else h
    if rows * width:
        _backward[(rows * blocks,)](
            dh, g, u, dg, du, h, width, blocks, *(t.stride(0) for t in (dh, g, u, dg, du, h)), 1 / shrink, again, BLOCK,
            num_warps=4,
        )  # fmt: skip


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.reuse = may_overwrite(gate) and may_overwrite(up) and not share_memory(gate, up)
        ctx.save_for_backward(gate, up)
        return forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        g, u = _rows(gate), _rows(up)
        dg, du = (g, u) if ctx.reuse else (torch.empty(g.shape, dtype=g.dtype, device=g.device) for _ in range(2))
        backward(_rows(dh), g, u, dg, du)
        if ctx.reuse:
            overwritten(gate, up)
        return dg.view(gate.shape), du.view(up.shape)


class _SwiGLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.reuse = may_overwrite(gate_up)
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        both = _rows(gate_up)
        grad = both if ctx.reuse else torch.empty(both.shape, dtype=both.dtype, device=both.device)
        g, u = both.chunk(2, dim=-1)
        dg, du = grad.chunk(2, dim=-1)
        backward(_rows(dh), g, u, dg, du)
        if ctx.reuse:
            overwritten(gate_up)
        return grad.view(gate_up.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See nbhelpers.kernels.swiglu."""
    return _SwiGLU.apply(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """See nbhelpers.kernels.swiglu_packed."""
    return _SwiGLUPacked.apply(gate_up)
