"""Attention of one new token per row over its KV cache. It is memory-bound: what counts is that K and V are read once.

    o = softmax(scale q K^T) V        q [G, D] of the query heads that share a key head, K, V [positions, D]

q and the new token's k are rotated to their position as they are loaded, with the rounding of rope.py.

Each row's positions are cut into splits, one program per split, so that a few rows fill the card too
("flash-decoding"); the program that ends last joins the splits, each with the logarithm of its softmax's denominator:

    o = sum_s exp(lse_s - max) o_s / sum_s exp(lse_s - max)

The new token's K and V are arguments: the first split includes them and stores them. The cache's address and strides
are read from a table, so that a captured CUDA graph stays valid when the cache is reallocated. Triton has no tensor
core instructions for a T4: there the products are multiplications and sums in fp32 registers.

With int8 in the cache a scale of the position multiplies its score, and its weight. Keys are kept without their bias b;
what it adds to a score needs no key, only the position's cosines and sines (angles, the same for all rows and layers):

    q . R(p) b = u . [cos(p), sin(p), 1]
    u = [q1 b1 + q2 b2, q2 b1 - q1 b2, q3 b3]        1 and 2: the halves that are rotated, 3: what is not

u is summed from two numbers of 16 bits, as one would round a product of hundreds by whole units.

On tensor cores int8 keys are multiplied as they are, by q = step (256 high + low), two int8 numbers of a 16-bit one. A
value has to become 16 bits wide, but a product over positions wants a channel's positions side by side, which no load
of bytes from shared memory gives. So two channels are read as one number of 16 bits, for which there is such a load,
and unpacked behind it: the even channels of the output are one product and the odd ones another.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..eight_bits import EightBits
from ..reference import HeadNorms
from .common import begin, ceil_div, early, power_of_2, tensor_cores, wait

TILE = 8192  # without tensor cores: query heads of a group x positions x D that a program multiplies per iteration
BLOCK = 64  # with tensor cores: positions per iteration
WARPS, STAGES, STAGES_8_BITS = 2, 2, 3
PROGRAMS = 264  # at least this many, for a card of 40 to 140 multiprocessors: no splits of so many rows x key heads
SPLITS, MOST_SPLITS = 16, 64  # at most: of a short text, and of a long one that has SHARE positions for each
SHARE, LONG_WARPS = 1024, 1024  # and while all programs have no more than so many warps
JOINED = 2048  # numbers of all splits together that a warp joins at once

# Two positions' pairs of int8 channels in a word -> the even channels in 16 bits, and the odd ones. In bf16 128 plus
# the lower seven bits are exact, less 128 or, of a negative number, 256. In fp16 1,024 to 1,279 are exact: with its
# sign's bit turned over a number is 128 more, from 0 to 255.
TO_BF16 = tl.constexpr("""{
    .reg .b32 odd, low, sign, minus; mov.b32 minus, 0xbf80bf80; shr.u32 odd, $2, 8;
    lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xEA; lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, sign, minus, low;
    lop3.b32 low, odd, 0x007f007f, 0x43004300, 0xEA; lop3.b32 sign, odd, 0x00800080, 0x43004300, 0xEA;
    fma.rn.bf16x2 $1, sign, minus, low;
}""")
TO_FP16 = tl.constexpr("""{
    .reg .b32 odd, low, more; mov.b32 more, 0x64806480; shr.u32 odd, $2, 8;
    lop3.b32 low, $2, 0x00ff00ff, 0x64806480, 0x6A; sub.rn.f16x2 $0, low, more;
    lop3.b32 low, odd, 0x00ff00ff, 0x64806480, 0x6A; sub.rn.f16x2 $1, low, more;
}""")


@triton.jit
def _rotated(head_ptr, d, real, cos_ptr, sin_ptr, weight_ptr, eps, bias_ptr, D: tl.constexpr, HALF: tl.constexpr,
             NORM: tl.constexpr, AXIS: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """The channels d (along AXIS) of the head at `head_ptr`, without a bias or behind its norm if there is one, those
    below 2 HALF rotated, rounded to its dtype."""
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    rotary = d < 2 * HALF
    value = tl.load(head_ptr + d, real, 0.0).to(tl.float32)
    other = tl.load(head_ptr + partner, real & rotary, 0.0).to(tl.float32)
    if BIAS:
        value -= tl.load(bias_ptr + d, real, 0.0).to(tl.float32)
        other -= tl.load(bias_ptr + partner, real & rotary, 0.0).to(tl.float32)
    if NORM:
        r = 1.0 / tl.sqrt(tl.sum(value * value, axis=AXIS, keep_dims=True) / D + eps)
        value *= r * tl.load(weight_ptr + d, d < D, 0.0).to(tl.float32)
        other *= r * tl.load(weight_ptr + partner, rotary, 0.0).to(tl.float32)
    c = tl.load(cos_ptr + d % HALF, rotary, 1.0).to(tl.float32)
    s = tl.load(sin_ptr + d % HALF, rotary, 0.0).to(tl.float32)
    return (value * c + tl.where(d < HALF, -other, other) * s).to(head_ptr.dtype.element_ty)


@triton.jit
def _store(numbers_ptrs, scale_ptr, x, real, own):
    """x [D] as eight_bits.quantise makes it int8 and a scale; returns what they hold, in fp32."""
    x = x.to(tl.float32)
    scale = tl.max(tl.abs(x), axis=0) / 127
    numbers = tl.floor(x / tl.where(scale > 0, scale, 1.0) + 0.5)
    tl.store(scale_ptr, scale, own)
    tl.store(numbers_ptrs, numbers.to(tl.int8), real & own)
    return numbers * scale


@triton.jit
def _of_bias(q_ptrs, d, real, cos_ptr, sin_ptr, bias_ptr, D: tl.constexpr, HALF: tl.constexpr):
    """u [G, D] of the module's text. q_ptrs [G, 1]: the heads', d [1, D]: channels, bias_ptr: the key head's."""
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    query = _rotated(q_ptrs, d, real, cos_ptr, sin_ptr, q_ptrs, 0.0, q_ptrs, D, HALF, False, 1, False)
    other = _rotated(q_ptrs, partner, real, cos_ptr, sin_ptr, q_ptrs, 0.0, q_ptrs, D, HALF, False, 1, False)
    bias = tl.load(bias_ptr + d, d < D, 0.0).to(tl.float32)
    other_bias = tl.load(bias_ptr + partner, d < D, 0.0).to(tl.float32)
    query, other = query.to(tl.float32), other.to(tl.float32)
    same = query * bias
    return tl.where(
        d < HALF, same + other * other_bias, tl.where(d < 2 * HALF, query * other_bias - other * bias, same)
    )


@triton.jit
def _in_16_bits(query, scale):
    """fp32 [G, D] -> int8 `high` and `low` [G, D] and fp32 [G, 1] with scale query = step (256 high + low)."""
    step = tl.max(tl.abs(query), axis=1, keep_dims=True) / 32639  # 127 * 256 + 127
    whole = tl.floor(query / tl.where(step > 0, step, 1.0) + 0.5)
    high = tl.floor((whole + 128) * (1 / 256))
    return high.to(tl.int8), (whole - high * 256).to(tl.int8), step * scale


@triton.jit(do_not_specialize=["layer"])
def _attend(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, table_ptr, positions_ptr, out_ptr, lse_ptr,
            joined_ptr, counters_ptr, q_weight_ptr, k_weight_ptr, bias_ptr, layer, scale, window, eps,
            q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, v_batch_stride, v_head_stride,
            cos_batch_stride, sin_batch_stride, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
            SPLITS: tl.constexpr, WINDOW: tl.constexpr, GROUP_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
            BLOCK: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, EIGHT: tl.constexpr, BIAS: tl.constexpr,
            DOT: tl.constexpr, BYTES: tl.constexpr, AT_ONCE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """One split of the positions of a row and key head, for the query heads that share it; see the module's text.

    BYTES: int8 keys are multiplied and values unpacked as it says of tensor cores.
    """
    begin(EARLY)
    wait(EARLY)
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    split = tl.program_id(1)
    g, d, n = tl.arange(0, GROUP_BLOCK), tl.arange(0, D_BLOCK), tl.arange(0, BLOCK)
    real_g, real_d = g < GROUP, d < D

    dtype: tl.constexpr = k_ptr.dtype.element_ty
    kept: tl.constexpr = tl.int8 if EIGHT else dtype
    UNPACK: tl.constexpr = TO_BF16 if dtype == tl.bfloat16 else TO_FP16
    address = tl.load(table_ptr).to(tl.pointer_type(kept))
    layer_stride, row_stride, head_stride = tl.load(table_ptr + 1), tl.load(table_ptr + 2), tl.load(table_ptr + 3)
    keys_ptr = tl.multiple_of(address + layer * layer_stride + row * row_stride + head * head_stride, 16)
    values_ptr = tl.multiple_of(keys_ptr + layer_stride // 2, 16)
    if EIGHT:
        scales_ptr = tl.load(table_ptr + 4).to(tl.pointer_type(tl.float32))
        key_scales_ptr = scales_ptr + (layer * layer_stride + row * row_stride + head * head_stride) // D
        value_scales_ptr = key_scales_ptr + layer_stride // (2 * D)

    cos_ptr += row * cos_batch_stride
    sin_ptr += row * sin_batch_stride
    q_ptrs = q_ptr + row * q_batch_stride + (head * GROUP + g[:, None]) * q_head_stride
    real_q = real_g[:, None] & real_d[None, :]
    query = _rotated(
        q_ptrs, d[None, :], real_q, cos_ptr, sin_ptr, q_weight_ptr, eps, q_ptr, D, HALF, NORM, 1, False
    ).to(tl.float32)
    new_key_ptr = k_ptr + row * k_batch_stride + head * k_head_stride
    bias_ptr += head * D
    new_key = _rotated(new_key_ptr, d, real_d, cos_ptr, sin_ptr, k_weight_ptr, eps, bias_ptr, D, HALF, NORM, 0, BIAS)
    new_value = tl.load(v_ptr + row * v_batch_stride + head * v_head_stride + d, real_d, 0.0)
    position = tl.load(positions_ptr + row)

    own = split == 0
    if EIGHT:
        new_key = _store(keys_ptr + position * D + d, key_scales_ptr + position, new_key, real_d, own)
        new_value = _store(values_ptr + position * D + d, value_scales_ptr + position, new_value, real_d, own)
    else:
        tl.store(keys_ptr + position * D + d, new_key, real_d & own)
        tl.store(values_ptr + position * D + d, new_value, real_d & own)
    own_score = tl.sum(query * new_key.to(tl.float32)[None, :], axis=1) * scale
    if BIAS:
        angles_ptr = tl.multiple_of(tl.load(table_ptr + 5).to(tl.pointer_type(dtype)), 16)
        of_bias = _of_bias(q_ptrs, d[None, :], real_q, cos_ptr, sin_ptr, bias_ptr, D, HALF) * scale
        most = of_bias.to(dtype)
        least = (of_bias - most.to(tl.float32)).to(dtype)
        own_score += tl.sum(
            of_bias * tl.load(angles_ptr + position * D + d, real_d, 0.0).to(tl.float32)[None, :], axis=1
        )
    running_max = tl.where(own, own_score, float("-inf"))  # [G]
    total = tl.where(own, 1.0, 0.0) + tl.zeros([GROUP_BLOCK], tl.float32)
    result = tl.where(own, new_value.to(tl.float32)[None, :] + tl.zeros_like(query), 0.0)  # [G, D]

    if BYTES:
        high, low, step = _in_16_bits(query, scale)
        result, odd_result = tl.split(tl.reshape(result, [GROUP_BLOCK, D_BLOCK // 2, 2]))
        pairs_ptr, pair_d = values_ptr.to(tl.pointer_type(tl.int16)), tl.arange(0, D_BLOCK // 2)[None, :]
        position = position.to(tl.int32)  # addresses in a head are short, and half the work

    first = position * 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
    share = tl.cdiv(tl.cdiv(position - first, SPLITS), BLOCK) * BLOCK
    start = first + split * share
    stop = tl.minimum(start + share, position)
    for block_start in range(start, stop, BLOCK):
        index = block_start + n
        within = index < stop
        if BYTES:  # the last position again instead of none: no comparison for each load
            index = tl.minimum(index, stop - 1)
            real = real_d[None, :]
            key = tl.load(keys_ptr + index[:, None] * D + d[None, :], real, 0, eviction_policy="evict_first")
            pair = tl.load(
                pairs_ptr + index[:, None] * (D // 2) + pair_d, pair_d < D // 2, 0, eviction_policy="evict_first"
            )
            products = tl.dot(high, tl.trans(key), out_dtype=tl.int32) * 256
            score = tl.dot(low, tl.trans(key), products, out_dtype=tl.int32).to(tl.float32) * step
        else:
            real = within[:, None] & real_d[None, :]
            key = tl.load(keys_ptr + index[:, None] * D + d[None, :], real, 0.0)
            value = tl.load(values_ptr + index[:, None] * D + d[None, :], real, 0.0)
            if DOT:
                score = tl.dot(query.to(dtype), tl.trans(key.to(dtype)), input_precision="ieee") * scale
            else:
                score = tl.sum(query[:, None, :] * key.to(tl.float32)[None, :, :], axis=2) * scale
        if EIGHT:
            score *= tl.load(key_scales_ptr + index, within, 0.0)[None, :]
        if BIAS:
            angle = tl.load(angles_ptr + index[:, None] * D + d[None, :], real, 0.0)
            if DOT:
                score = tl.dot(most, tl.trans(angle), score, input_precision="ieee")
                score = tl.dot(least, tl.trans(angle), score, input_precision="ieee")
            else:
                score += tl.sum(of_bias[:, None, :] * angle.to(tl.float32)[None, :, :], axis=2)
        score = tl.where(within[None, :], score, float("-inf"))  # [G, BLOCK]
        new_max = tl.maximum(running_max, tl.max(score, axis=1))
        old, weight = tl.exp(running_max - new_max), tl.exp(score - new_max[:, None])
        total = total * old + tl.sum(weight, axis=1)
        if EIGHT:
            weight *= tl.load(value_scales_ptr + index, within, 0.0)[None, :]
        if BYTES:
            even, odd = tl.inline_asm_elementwise(
                UNPACK, "=r,=r,r", [pair], [k_ptr.dtype.element_ty] * 2, is_pure=True, pack=2
            )
            result = tl.dot(weight.to(dtype), even, result * old[:, None])
            odd_result = tl.dot(weight.to(dtype), odd, odd_result * old[:, None])
        elif DOT:
            result = tl.dot(weight.to(dtype), value.to(dtype), result * old[:, None], input_precision="ieee")
        else:
            fresh = tl.sum(weight[:, :, None] * value.to(tl.float32)[None, :, :], axis=1)
            result = result * old[:, None] + fresh
        running_max = new_max

    if BYTES:
        result = tl.reshape(tl.join(result, odd_result), [GROUP_BLOCK, D_BLOCK])
    not_empty = total > 0.0  # false where the split has no positions
    result = result / tl.where(not_empty, total, 1.0)[:, None]
    slot = (row * KV_HEADS + head) * GROUP + g
    out_ptrs = out_ptr + (slot[:, None] * SPLITS + split) * D + d[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), real_g[:, None] & real_d[None, :])
    if SPLITS > 1:
        split_lse = tl.where(not_empty, running_max + tl.log(total), float("-inf"))
        tl.store(lse_ptr + slot * SPLITS + split, split_lse, real_g)
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counters_ptr + tl.program_id(0), 0)
            first_slot = (row * KV_HEADS + head) * GROUP
            _join(out_ptr + first_slot * SPLITS * D, lse_ptr + first_slot * SPLITS, joined_ptr + first_slot * D,
                  GROUP, D, SPLITS, AT_ONCE)  # fmt: skip


@triton.jit
def _join(parts_ptr, lse_ptr, out_ptr, GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
          AT_ONCE: tl.constexpr):  # fmt: skip
    """The output of a row and key head's query heads from its splits, so many channels at once."""
    s = tl.arange(0, SPLITS)[:, None]
    for start in range(0, GROUP * D, AT_ONCE):
        i = start + tl.arange(0, AT_ONCE)[None, :]
        real = i < GROUP * D
        at = (i // D) * SPLITS + s
        weight = tl.load(lse_ptr + at, real, 0.0)
        weight = tl.exp(weight - tl.max(weight, axis=0, keep_dims=True))
        part = tl.load(parts_ptr + at * D + i % D, real, 0.0)
        joined = tl.sum(part * weight, axis=0, keep_dims=True) / tl.sum(weight, axis=0, keep_dims=True)
        tl.store(out_ptr + i, joined.to(out_ptr.dtype.element_ty), real)


@cache
def counters(device: torch.device) -> Tensor:
    """int32 [PROGRAMS], by which the splits of a row and key head tell one another that they have ended.

    All are 0 between two launches: the last split makes its own 0 again. They take one stream for each device, and are
    never freed, since captured graphs keep the address. Whoever captures one has run the kernel before.
    """
    return torch.zeros(PROGRAMS, dtype=torch.int32, device=device)


def attention_splits(device: torch.device, rows: int, heads: int, kv_heads: int, longest: int) -> int:
    """See nbhelpers.kernels.decode_step.attention_splits. A power of two."""
    each, warps = rows * kv_heads, _warps(device, heads, kv_heads)
    room = power_of_2(LONG_WARPS // (each * warps) + 1) // 2  # the largest power of two that has room, or 0
    most = min(MOST_SPLITS, power_of_2(ceil_div(longest, SHARE)), room)
    most = max(SPLITS, most) if longest > SHARE else SPLITS * WARPS // warps
    return min(most, power_of_2(ceil_div(PROGRAMS, each)))


def _warps(device: torch.device, heads: int, kv_heads: int) -> int:
    """Of a program: with tl.dot more for a large group, as joining its splits takes as many numbers as it has heads."""
    return 2 * WARPS if tensor_cores(device) and heads // kv_heads > 4 else WARPS


def decode_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, table: Tensor,
                     layer: int, positions: Tensor, longest: int, scale: float, window: int | None = None,
                     norms: HeadNorms | None = None, eight: EightBits | None = None) -> Tensor:  # fmt: skip
    """See nbhelpers.kernels.decode_step.decode_attention."""
    rows, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    q, k, v, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, cos, sin))
    splits = attention_splits(q.device, rows, heads, kv_heads, min(longest, window or longest))
    dot = tensor_cores(q.device)
    in_bytes = eight is not None and dot and q.element_size() == 2
    *weights, eps = norms or (q, k, 0.0)  # not read without norms
    bias = eight.bias if eight is not None and eight.bias is not None else k  # likewise
    out = torch.empty(rows, 1, heads * dim, dtype=q.dtype, device=q.device)
    parts = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=q.device) if splits > 1 else out
    lse = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device) if splits > 1 else out
    group_block, dim_block = triton.next_power_of_2(group), triton.next_power_of_2(dim)
    if dot:
        group_block, dim_block, block = max(16, group_block), max(32 if in_bytes else 16, dim_block), BLOCK
    else:
        block = max(8, min(64, TILE // (group_block * dim_block)))
    warps = _warps(q.device, heads, kv_heads)
    if bias is not k and not in_bytes:
        block //= 2  # as much in registers, with the angles beside the keys
    _attend[(rows * kv_heads, splits)](
        q, k, v, cos, sin, table, positions, parts, lse, out, counters(q.device), *weights, bias, layer, scale,
        window or 0, eps,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        *(t.stride(0) if t.shape[0] > 1 else 0 for t in (cos, sin)),
        kv_heads, group, dim, splits, window is not None, group_block, dim_block, block, cos.shape[-1] // 2,
        norms is not None, eight is not None, bias is not k, dot, in_bytes,
        min(triton.next_power_of_2(group * dim), warps * JOINED // splits),
        num_warps=warps, num_stages=(STAGES_8_BITS if in_bytes else STAGES) if dot else 1, **early(q.device),
    )  # fmt: skip
    return out
