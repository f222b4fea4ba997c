"""RMSNorm with the residual addition fused in (Zhang & Sennrich, arXiv:1910.07467).

    s = x + residual          r = 1 / sqrt(mean(s^2) + eps)          y = w * s * r

Backward, with g = dy * w and the mean over the H channels of a row:

    ds = r * (g - s r * mean(g * s r)) + (gradient that reaches s itself)          dw = sum over rows of dy * s r

x, residual, s, y [rows, H]; w [H]; r [rows] in fp32. All arithmetic is in fp32. A row is held in registers, so each
tensor is read once and written once; kept for the backward: s and r (not y). Without a residual s is x itself.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import begin, ceil_div, early, power_of_2, wait


@triton.jit(do_not_specialize=["rows"])  # one compilation for every number of tokens
def _forward(x_ptr, residual_ptr, w_ptr, s_ptr, y_ptr, r_ptr, rows, x_stride, residual_stride, eps, H: tl.constexpr,
             ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """s = x + residual, r and y of ROWS rows; without ADD s is x and is not written."""
    begin(EARLY)
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < H)
    value = tl.load(x_ptr + row * x_stride + col, mask, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual_ptr + row * residual_stride + col, mask, 0.0).to(tl.float32)
        if s_ptr.dtype.element_ty == tl.float16:
            value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
        rounded = value.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + row * H + col, rounded, mask)
        value = rounded.to(tl.float32)  # normalise what is stored, so that the backward uses the same numbers
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True) / H + eps)
    tl.store(r_ptr + row, scale, row < rows)
    weight = tl.load(w_ptr + col, col < H, 0.0).to(tl.float32)
    tl.store(y_ptr + row * H + col, (value * scale * weight).to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])  # one compilation for every number of tokens
def _backward(dy_ptr, ds_ptr, s_ptr, w_ptr, r_ptr, dx_ptr, dw_ptr, rows, dy_stride, ds_stride, s_stride,
              H: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
              STEPS: tl.constexpr):  # fmt: skip
    """STEPS x ROWS rows per program: one step when the weight is frozen, more when dw is summed over them."""
    first = tl.program_id(0).to(tl.int64) * ROWS * STEPS
    col = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(w_ptr + col, col < H, 0.0).to(tl.float32)
    total = tl.zeros([1, BLOCK], tl.float32)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (col < H)
        grad = tl.load(dy_ptr + row * dy_stride + col, mask, 0.0).to(tl.float32)
        scale = tl.load(r_ptr + row, row < rows, 0.0)
        normed = tl.load(s_ptr + row * s_stride + col, mask, 0.0).to(tl.float32) * scale
        if WEIGHT:
            total += tl.sum(grad * normed, axis=0, keep_dims=True)
        grad *= weight
        grad = scale * (grad - normed * (tl.sum(grad * normed, axis=1, keep_dims=True) / H))
        if ADD:
            grad += tl.load(ds_ptr + row * ds_stride + col, mask, 0.0).to(tl.float32)
        tl.store(dx_ptr + row * H + col, grad.to(dx_ptr.dtype.element_ty), mask)
    if WEIGHT:
        tl.store(dw_ptr + tl.program_id(0) * H + col, total, col < H)


@cache
def _tiles(hidden: int, few: bool) -> dict[str, int]:
    """The tile and warps of a program: one long row or several short ones, at least 2,048 elements.

    16 elements per thread (two loads of 16 bytes in 16 bits), up to 16 warps. Few rows (a decoding step's) do not fill
    the device: then 8 per thread.
    """
    block = power_of_2(hidden)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // (256 if few else 512)))}


def _rows(t: Tensor) -> Tensor:
    """t as [rows, H] with adjacent channels; a copy only where the strides require one."""
    t = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()


def forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The norm without autograd.

    Args:
        x (`Tensor`): [..., H].
        weight (`Tensor`): [H].
        eps (`float`): Added to the mean square.
        residual (`Tensor`, *optional*): [..., H].

    Returns s [..., H], which is x if there is no residual; y [..., H]; r, fp32 [rows].
    """
    x2 = _rows(x)
    res2 = x2 if residual is None else _rows(residual)
    rows, hidden = x2.shape
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    s = x2 if residual is None else torch.empty((rows, hidden), dtype=sum_dtype, device=x.device)
    y = torch.empty(x.shape, dtype=torch.promote_types(sum_dtype, weight.dtype), device=x.device)
    r = torch.empty(rows, dtype=torch.float32, device=x.device)
    few = rows <= 256
    tiles = _tiles(hidden, few)
    if rows:
        _forward[(ceil_div(rows, tiles["ROWS"]),)](
            x2, res2, weight, s, y, r, rows, x2.stride(0), res2.stride(0), eps, hidden, residual is not None, **tiles,
            **early(x.device, few),
        )  # fmt: skip
    return (x if residual is None else s.view(x.shape)), y, r


def backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, r: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `forward`, without autograd.

    Args:
        dy (`Tensor`): [..., H], the gradient of y.
        ds (`Tensor`, *optional*): [..., H], the gradient that reaches s from elsewhere.
        s (`Tensor`): [..., H], from the forward.
        weight (`Tensor`): [H].
        r (`Tensor`): fp32 [rows], from the forward.
        weight_grad (`bool`): Whether the weight's gradient is wanted.

    Returns the gradient of s [..., H] in its dtype, and the weight's [H] in its dtype or None.
    """
    dy2, s2 = _rows(dy), _rows(s)
    ds2 = dy2 if ds is None else _rows(ds)
    rows, hidden = s2.shape
    tiles = _tiles(hidden, False)
    # with a weight gradient: few enough programs that their partial sums stay small, but enough to fill the device
    steps = power_of_2(max(1, ceil_div(ceil_div(rows, tiles["ROWS"]), 512))) if weight_grad else 1
    programs = ceil_div(rows, tiles["ROWS"] * steps)
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dw = torch.empty((programs, hidden), dtype=torch.float32, device=s.device) if weight_grad else r
    if rows:
        _backward[(programs,)](
            dy2, ds2, s2, weight, r, dx, dw, rows, dy2.stride(0), ds2.stride(0), s2.stride(0), hidden,
            ds is not None, weight_grad, STEPS=steps, **tiles,
        )  # fmt: skip
    return dx, (dw.sum(0).to(weight.dtype) if weight_grad else None)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        s, y, r = forward(x, weight, eps, residual)
        ctx.save_for_backward(s, weight, r)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)  # no tensor of zeros for an output that gets no gradient
        return (s, y) if residual is not None else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        s, weight, r = ctx.saved_tensors
        ds, dy = grads if ctx.has_residual else (None, grads[0])
        if dy is None:
            return ds, None, None, ds
        dx, dw = backward(dy, ds, s, weight, r, ctx.needs_input_grad[1])
        return dx, dw, None, dx if ctx.has_residual else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """See nbhelpers.kernels.rms_norm."""
    if not torch.is_grad_enabled():
        s, y, _ = forward(x, weight, eps, residual)
        return y if residual is None else (s, y)
    return _RMSNorm.apply(x, weight, eps, residual)
