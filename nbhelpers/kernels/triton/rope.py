"""Rotary position embedding of Q and K, all heads in one launch, in place (Su et al., arXiv:2104.09864).

    q1' = q1 cos - q2 sin          q2' = q2 cos + q1 sin

for the halves q1 = q[..., :R/2], q2 = q[..., R/2:R] of each head; channels past R (partial rotary) are unchanged.
Backward: the inverse rotation, the same kernel with -sin. (With cos and sin scaled, as longrope does, it is the
transpose, which is what a gradient needs.) Only cos and sin are kept.

q [B, heads, S, D], k [B, kv heads, S, D] with any strides; cos, sin [1 or B, S, R]. One program per token: cos and sin
are read once for all its heads. `rope_packed` takes Q, K and V as one tensor [B, S, (heads + 2 kv heads) D], Phi-3's
layout, and returns its gradient as one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import power_of_2
from .inplace import may_overwrite, overwritten


@triton.jit
def _rotate_heads(x_ptr, y_ptr, x_head_stride, y_head_stride, c, s, half, HEADS: tl.constexpr,
                  HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr):  # fmt: skip
    """Rotate all heads of one token from x into y."""
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    mask = (head < HEADS) & (i < half)
    x1 = tl.load(x_ptr + head * x_head_stride + i, mask, 0.0).to(tl.float32)
    x2 = tl.load(x_ptr + head * x_head_stride + half + i, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + head * y_head_stride + i, (x1 * c - x2 * s).to(y_ptr.dtype.element_ty), mask)
    tl.store(y_ptr + head * y_head_stride + half + i, (x2 * c + x1 * s).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _rotate(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr,
    q_batch_stride, q_head_stride, q_pos_stride, k_batch_stride, k_head_stride, k_pos_stride,
    q_out_batch_stride, q_out_head_stride, q_out_pos_stride, k_out_batch_stride, k_out_head_stride, k_out_pos_stride,
    cos_batch_stride, cos_pos_stride, sin_batch_stride, sin_pos_stride,
    sign, HALF: tl.constexpr, QH: tl.constexpr, KH: tl.constexpr,
    QH_BLOCK: tl.constexpr, KH_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of q and k at one position of one row."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, HALF_BLOCK)[None, :]
    c = tl.load(cos_ptr + b * cos_batch_stride + t * cos_pos_stride + i, i < HALF, 0.0).to(tl.float32)
    s = tl.load(sin_ptr + b * sin_batch_stride + t * sin_pos_stride + i, i < HALF, 0.0).to(tl.float32) * sign
    q_ptr = q_ptr + b * q_batch_stride + t * q_pos_stride
    q_out_ptr = q_out_ptr + b * q_out_batch_stride + t * q_out_pos_stride
    _rotate_heads(q_ptr, q_out_ptr, q_head_stride, q_out_head_stride, c, s, HALF, QH, QH_BLOCK, HALF_BLOCK)
    k_ptr = k_ptr + b * k_batch_stride + t * k_pos_stride
    k_out_ptr = k_out_ptr + b * k_out_batch_stride + t * k_out_pos_stride
    _rotate_heads(k_ptr, k_out_ptr, k_head_stride, k_out_head_stride, c, s, HALF, KH, KH_BLOCK, HALF_BLOCK)


def rotate(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Rotate q and k by sign * angle, without autograd.

    Args:
        q (`Tensor`): [B, heads, S, D], channels adjacent, as in all of these.
        k (`Tensor`): [B, kv heads, S, D].
        q_out (`Tensor`): Written to, like q; may be q itself.
        k_out (`Tensor`): Written to, like k; may be k itself.
        cos (`Tensor`): [1 or B, S, R].
        sin (`Tensor`): [1 or B, S, R].
        sign (`float`): 1 for the forward, -1 for the backward.
    """
    batch, q_heads, tokens, _ = q.shape
    half = cos.shape[-1] // 2
    if not q.numel():
        return
    # a table for a batch of one serves all rows: its batch stride is 0
    strides = [stride for t in (q, k, q_out, k_out) for stride in t.stride()[:3]]
    table_strides = [stride for t in (cos, sin) for stride in (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1))]
    heads_block, half_block = power_of_2(q_heads), power_of_2(half)
    _rotate[(tokens, batch)](
        q, k, q_out, k_out, cos, sin, *strides, *table_strides, sign, half, q_heads, k.shape[1],
        heads_block, power_of_2(k.shape[1]), half_block,
        num_warps=min(8, max(1, heads_block * half_block // 512)),  # 16 elements per thread
    )  # fmt: skip


def _copy_rest(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, rotary: int) -> None:
    """Copy the channels that are not rotated, if there are any."""
    if rotary < q.shape[-1]:
        q_out[..., rotary:], k_out[..., rotary:] = q[..., rotary:], k[..., rotary:]


def adjacent(t: Tensor) -> Tensor:
    """t, copied if its last dimension is not contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated, without autograd; cos and sin with adjacent channels."""
    # a copy where q or k must not be overwritten, or where both are the same tensor
    alone = q.data_ptr() != k.data_ptr()
    q, k = (t.detach() if alone and t.stride(-1) == 1 and may_overwrite(t) else t.clone() for t in (q, k))
    rotate(q, k, q, k, cos, sin, 1.0)
    overwritten(q, k)
    return q, k


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = adjacent(cos), adjacent(sin)
        ctx.save_for_backward(cos, sin)
        return forward(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = adjacent(dq), adjacent(dk)
        # not over dq and dk: other code may hold them, and the bytes moved are the same. Laid out like a projection's
        # output, [B, S, heads, D], because the projection's backward comes next.
        q_out, k_out = (t.new_empty([t.shape[n] for n in (0, 2, 1, 3)]).transpose(1, 2) for t in (dq, dk))
        _copy_rest(dq, dk, q_out, k_out, cos.shape[-1])
        rotate(dq, dk, q_out, k_out, cos, sin, -1.0)
        return q_out, k_out, None, None


def heads_of(qkv: Tensor, counts: list[int]) -> list[Tensor]:
    """Q, K and V [B, heads, S, D] as views of qkv [B, S, (sum of counts) * D]."""
    batch, tokens, width = qkv.shape
    heads = qkv.view(batch, tokens, sum(counts), width // sum(counts)).transpose(1, 2)
    first = [0, counts[0], counts[0] + counts[1]]
    return [heads[:, start : start + count] for start, count in zip(first, counts, strict=True)]


class RopePacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
        cos, sin = adjacent(cos), adjacent(sin)
        qkv = qkv.detach() if may_overwrite(qkv) and qkv.is_contiguous() else qkv.contiguous().clone()
        q, k, _ = heads_of(qkv, counts)
        rotate(q, k, q, k, cos, sin, 1.0)
        overwritten(qkv)
        ctx.save_for_backward(cos, sin)
        ctx.counts = counts
        return tuple(heads_of(qkv, counts))

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = adjacent(dq), adjacent(dk)
        batch, _, tokens, width = dq.shape
        grad = dq.new_empty(batch, tokens, sum(ctx.counts) * width)  # one tensor, as the projection's backward takes it
        q_out, k_out, v_out = heads_of(grad, ctx.counts)
        _copy_rest(dq, dk, q_out, k_out, cos.shape[-1])
        v_out.copy_(dv)
        rotate(dq, dk, q_out, k_out, cos, sin, -1.0)
        return grad, None, None, None
