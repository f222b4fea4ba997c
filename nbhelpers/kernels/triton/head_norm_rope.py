"""RMSNorm of each head of Q and K, and their rotation behind it, in one launch (Qwen3's q_norm and k_norm).

    n = w * x * r,   r = 1 / sqrt(mean(x^2) + eps)  over a head's D channels      (arXiv:1910.07467)
    y1 = n1 cos - n2 sin          y2 = n2 cos + n1 sin                            (arXiv:2104.09864)

for the halves of each head; all D channels are rotated. Backward, with u the inverse rotation of dy:

    dx = r * (u w - x r * mean(u w * x r))

Kept for the backward: x, which the rotation of rope.py would have overwritten; r is computed again. The norms' weights
get no gradient here: where they learn, rms_norm.py and rope.py run one after the other.

q [B, heads, S, D], k [B, kv heads, S, D] with adjacent channels; cos, sin [1 or B, S, D]; weights [D]. One program per
token, as in rope.py.
"""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import HeadNorms
from .common import power_of_2
from .rms_norm import rms_norm
from .rope import Rope, RopePacked, adjacent, heads_of
from .rope import forward as rotated


@triton.jit
def _head_rows(x_ptr, y_ptr, g_ptr, w_ptr, x_stride, y_stride, g_stride, c, s, eps, HALF: tl.constexpr,
               HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
               BACKWARD: tl.constexpr):  # fmt: skip
    """All heads of one token: y from x, or the gradient of x into y from that of the output at g_ptr."""
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    mask = (head < HEADS) & (i < HALF)
    x1 = tl.load(x_ptr + head * x_stride + i, mask, 0.0).to(tl.float32)
    x2 = tl.load(x_ptr + head * x_stride + HALF + i, mask, 0.0).to(tl.float32)
    w1 = tl.load(w_ptr + i, i < HALF, 0.0).to(tl.float32)
    w2 = tl.load(w_ptr + HALF + i, i < HALF, 0.0).to(tl.float32)
    squares = tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True)
    r = 1.0 / tl.sqrt(squares / (2 * HALF) + eps)
    x1 *= r
    x2 *= r
    if BACKWARD:
        g1 = tl.load(g_ptr + head * g_stride + i, mask, 0.0).to(tl.float32)
        g2 = tl.load(g_ptr + head * g_stride + HALF + i, mask, 0.0).to(tl.float32)
        u1 = (g1 * c + g2 * s) * w1
        u2 = (g2 * c - g1 * s) * w2
        along = tl.sum(u1 * x1 + u2 * x2, axis=1, keep_dims=True) / (2 * HALF)
        y1 = r * (u1 - x1 * along)
        y2 = r * (u2 - x2 * along)
    else:
        n1 = x1 * w1
        n2 = x2 * w2
        y1 = n1 * c - n2 * s
        y2 = n2 * c + n1 * s
    tl.store(y_ptr + head * y_stride + i, y1.to(y_ptr.dtype.element_ty), mask)
    tl.store(y_ptr + head * y_stride + HALF + i, y2.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _norm_rotate(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, dq_ptr, dk_ptr, wq_ptr, wk_ptr, cos_ptr, sin_ptr, eps,
    q_batch_stride, q_head_stride, q_pos_stride, k_batch_stride, k_head_stride, k_pos_stride,
    q_out_batch_stride, q_out_head_stride, q_out_pos_stride, k_out_batch_stride, k_out_head_stride, k_out_pos_stride,
    dq_batch_stride, dq_head_stride, dq_pos_stride, dk_batch_stride, dk_head_stride, dk_pos_stride,
    cos_batch_stride, cos_pos_stride, sin_batch_stride, sin_pos_stride,
    HALF: tl.constexpr, QH: tl.constexpr, KH: tl.constexpr,
    QH_BLOCK: tl.constexpr, KH_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, HALF_BLOCK)[None, :]
    c = tl.load(cos_ptr + b * cos_batch_stride + t * cos_pos_stride + i, i < HALF, 0.0).to(tl.float32)
    s = tl.load(sin_ptr + b * sin_batch_stride + t * sin_pos_stride + i, i < HALF, 0.0).to(tl.float32)
    _head_rows(
        q_ptr + b * q_batch_stride + t * q_pos_stride, q_out_ptr + b * q_out_batch_stride + t * q_out_pos_stride,
        dq_ptr + b * dq_batch_stride + t * dq_pos_stride, wq_ptr, q_head_stride, q_out_head_stride, dq_head_stride,
        c, s, eps, HALF, QH, QH_BLOCK, HALF_BLOCK, BACKWARD,
    )  # fmt: skip
    _head_rows(
        k_ptr + b * k_batch_stride + t * k_pos_stride, k_out_ptr + b * k_out_batch_stride + t * k_out_pos_stride,
        dk_ptr + b * dk_batch_stride + t * dk_pos_stride, wk_ptr, k_head_stride, k_out_head_stride, dk_head_stride,
        c, s, eps, HALF, KH, KH_BLOCK, HALF_BLOCK, BACKWARD,
    )  # fmt: skip


def _launch(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, grads: tuple[Tensor, Tensor] | None,
    weights: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, eps: float,
) -> None:  # fmt: skip
    """The forward of q, k into q_out, k_out, or with `grads` of the outputs the gradients of q, k there."""
    batch, q_heads, tokens, dim = q.shape
    if not q.numel():
        return
    dq, dk = grads or (q, k)  # not read in the forward
    strides = [t.stride(n) for t in (q, k, q_out, k_out, dq, dk) for n in (0, 1, 2)]
    table_strides = [stride for t in (cos, sin) for stride in (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1))]
    heads_block, half_block = power_of_2(q_heads), power_of_2(dim // 2)
    _norm_rotate[(tokens, batch)](
        q, k, q_out, k_out, dq, dk, *weights, cos, sin, eps, *strides, *table_strides, dim // 2, q_heads, k.shape[1],
        heads_block, power_of_2(k.shape[1]), half_block, grads is not None,
        num_warps=min(8, max(1, heads_block * half_block // 512)),  # as in rope.py
    )  # fmt: skip


def _empty(x: Tensor, heads: int) -> Tensor:
    """[B, heads, S, D], laid out like a projection's output [B, S, heads, D]."""
    batch, _, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


class _HeadNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        q, k, cos, sin = (adjacent(t) for t in (q, k, cos, sin))
        q_out, k_out = _empty(q, q.shape[1]), _empty(k, k.shape[1])
        _launch(q, k, q_out, k_out, None, (q_weight, k_weight), cos, sin, eps)
        ctx.save_for_backward(q, k, cos, sin, q_weight, k_weight)
        ctx.eps = eps
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        q, k, cos, sin, *weights = ctx.saved_tensors
        q_grad, k_grad = _empty(q, q.shape[1]), _empty(k, k.shape[1])
        _launch(q, k, q_grad, k_grad, (adjacent(dq), adjacent(dk)), tuple(weights), cos, sin, ctx.eps)
        return q_grad, k_grad, None, None, None, None, None


class _HeadNormRopePacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float,
        counts: list[int],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        qkv, cos, sin = qkv.contiguous(), adjacent(cos), adjacent(sin)
        q, k, v = heads_of(qkv.detach(), counts)
        q_out, k_out = _empty(q, counts[0]), _empty(q, counts[1])
        _launch(q, k, q_out, k_out, None, (q_weight, k_weight), cos, sin, eps)
        ctx.save_for_backward(qkv, cos, sin, q_weight, k_weight)
        ctx.eps, ctx.counts = eps, counts
        return q_out, k_out, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, *weights = ctx.saved_tensors
        q, k, _ = heads_of(qkv, ctx.counts)
        grad = torch.empty_like(qkv)  # one tensor, as the projection's backward expects it
        q_grad, k_grad, v_grad = heads_of(grad, ctx.counts)
        v_grad.copy_(dv)
        _launch(q, k, q_grad, k_grad, (adjacent(dq), adjacent(dk)), tuple(weights), cos, sin, ctx.eps)
        return grad, None, None, None, None, None, None


def _fusable(norms: HeadNorms, dim: int, rotary: int) -> bool:
    """Whether one launch can do both: all `dim` channels of a head are rotated, and the norms' weights are frozen."""
    return rotary == dim and not (norms.q.requires_grad or norms.k.requires_grad)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None = None) -> tuple[Tensor, Tensor]:
    """See nbhelpers.kernels.rope."""
    if norms is not None and _fusable(norms, q.shape[-1], cos.shape[-1]):
        return _HeadNormRope.apply(q, k, cos, sin, *norms)
    if norms is not None:
        q, k = cast(Tensor, rms_norm(q, norms.q, norms.eps)), cast(Tensor, rms_norm(k, norms.k, norms.eps))
    return Rope.apply(q, k, cos, sin) if torch.is_grad_enabled() else rotated(q, k, adjacent(cos), adjacent(sin))


def rope_packed(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, kv_heads: int, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See nbhelpers.kernels.rope_packed."""
    counts = [q_heads, kv_heads, kv_heads]
    if norms is None:
        return RopePacked.apply(qkv, cos, sin, counts)
    if _fusable(norms, qkv.shape[-1] // sum(counts), cos.shape[-1]):
        return _HeadNormRopePacked.apply(qkv, cos, sin, *norms, counts)
    q, k, v = heads_of(qkv, counts)
    return *rope(q, k, cos, sin, norms), v
