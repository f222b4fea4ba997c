"""Linear layers with LoRA in a decoding step: few rows, no gradient, and as few launches as possible.

    y_i = x W_i^T,  t_i = x A_i^T               [N, out_i], [N, r_i]    one launch for all NF4 parts (nf4_few_rows.py);
                                                                        or bitsandbytes' few-row product or cuBLAS, and
                                                                        one launch for all t_i
    z_i = y_i + b_i + s_i t_i B_i^T             one launch for all parts; it includes the SwiGLU of gate and up, or the
                                                addition of a residual and, of few channels, the RMSNorm behind it

A step of a small model is launch-bound: PyTorch would need a dozen launches here (stacking and casting the A's, a
product with each B, ...). A and B are read where the optimizer writes them, in fp32. Both t and y are split along the
inner dimension, fp32 [splits, N, width], and the last launch sums the splits. Without tensor cores (T4) the thin
products are multiplications and sums in registers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Projection
from . import nf4_few_rows, plain_few_rows
from .common import begin, early, fill_none, pad_to_three, tensor_cores, wait
from .lora_linear import project, without_lora
from .lora_mlp import SHRINK_FP16
from .rms_norm import forward as norm_forward

TILE = 8192  # rows x ranks x columns that a program of the thin product multiplies per iteration
SPLIT, ROWS = 256, 4  # columns per split of the thin product, and rows per program
OUT_COLUMNS, OUT_WARPS = 32, 1  # per program of the last launch
ROW, ROW_RANKS, ROW_WARPS = 2048, 32768, 16  # channels, and channels x ranks, of a row that one program adds and norms
NORMED_ROWS = 16  # at most are added and normed so: of more, programs that share B are quicker


@triton.jit(do_not_specialize=["rows"])
def _thin(x_ptr, a0_ptr, a1_ptr, a2_ptr, t_ptr, rows, x_stride, K, R0, R1, R2, SPLIT: tl.constexpr, ROWS: tl.constexpr,
          R_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr):  # fmt: skip
    """t of one part and split, [ROWS, R_BLOCK] per program: x A^T over the split's columns. Ranks are not compiled in:
    one variant serves every group of layers."""
    part, split = tl.program_id(1), tl.program_id(2)
    a_ptr, rank, first = a0_ptr, R0, 0
    if part == 1:
        a_ptr, rank, first = a1_ptr, R1, R0
    if part == 2:
        a_ptr, rank, first = a2_ptr, R2, R0 + R1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r, k = tl.arange(0, R_BLOCK), tl.arange(0, K_BLOCK)
    total = tl.zeros([ROWS, R_BLOCK], tl.float32)
    for start in range(0, SPLIT, K_BLOCK):
        column = split * SPLIT + start + k
        rows_x = tl.load(
            x_ptr + row[:, None] * x_stride + column[None, :], (row < rows)[:, None] & (column < K)[None, :], 0.0
        )
        rows_a = tl.load(a_ptr + r[:, None] * K + column[None, :], (r < rank)[:, None] & (column < K)[None, :], 0.0)
        total += tl.sum(rows_x.to(tl.float32)[:, None, :] * rows_a.to(tl.float32)[None, :, :], axis=2)
    offset = (split * rows + row[:, None]) * (R0 + R1 + R2) + first + r[None, :]
    tl.store(t_ptr + offset, total, (row < rows)[:, None] & (r < rank)[None, :])


@triton.jit
def _sum(ptrs, real, split_stride, SPLITS: tl.constexpr):
    """The sum of a tile over the splits."""
    total = tl.load(ptrs, real, 0.0).to(tl.float32)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(ptrs + s * split_stride, real, 0.0).to(tl.float32)
    return total


@triton.jit
def _rows_of_b(b_ptr, n, real_n, rank, R_BLOCK: tl.constexpr):
    """B's rows n [COLUMNS, R_BLOCK], read before the kernel before has ended: no kernel of a step writes B, and between
    an optimizer's, which does, and a step lies a prompt, whose kernels wait for one another's end."""
    r = tl.arange(0, R_BLOCK)
    return tl.load(b_ptr + n[:, None] * rank + r, real_n[:, None] & (r < rank), 0.0)


@triton.jit
def _delta(rows_b, t_ptr, m, real_m, rows, first, rank, R: tl.constexpr, SPLITS: tl.constexpr, R_BLOCK: tl.constexpr,
           DOT: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """t_i B_i^T [ROWS, COLUMNS], where t_i begins at column `first` of the R columns of t."""
    r = tl.arange(0, R_BLOCK)
    thin = _sum(t_ptr + m[:, None] * R + first + r, real_m[:, None] & (r < rank), rows * R, SPLITS)  # [ROWS, R_BLOCK]
    if DOT:
        return tl.dot(thin.to(dtype), tl.trans(rows_b.to(dtype)), input_precision="ieee")
    return tl.sum(thin[:, None, :] * rows_b.to(tl.float32)[None, :, :], axis=2)


@triton.jit
def _within_fp16(value):
    """value, clamped to fp16's range."""
    return tl.minimum(tl.maximum(value, -65504.0), 65504.0)


@triton.jit(do_not_specialize=["rows"])
def _add(y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, split_stride, bias0_ptr, bias1_ptr, bias2_ptr, b0_ptr,
         b1_ptr, b2_ptr, t_ptr, residual_ptr, out_ptr, rows, N0, N1, N2, scale0, scale1, scale2, alpha,
         R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BIAS0: tl.constexpr, BIAS1: tl.constexpr,
         BIAS2: tl.constexpr, RESIDUAL: tl.constexpr, Y_SPLITS: tl.constexpr, SPLITS: tl.constexpr,
         R_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, DTYPE: tl.constexpr,
         EARLY: tl.constexpr):  # fmt: skip
    """out = [z_1, z_2, ..], or residual + alpha (y + s t B^T) + b of a single part."""
    begin(EARLY)
    block = tl.program_id(0)
    y_ptr, y_stride, bias_ptr, b_ptr = y0_ptr, y0_stride, bias0_ptr, b0_ptr
    N, scale, rank, t_column, first, has_bias = N0, scale0, R0, 0, 0, BIAS0
    blocks0, blocks1 = tl.cdiv(N0, COLUMNS), tl.cdiv(N1, COLUMNS)
    if block >= blocks0:
        if block < blocks0 + blocks1:
            y_ptr, y_stride, bias_ptr, b_ptr = y1_ptr, y1_stride, bias1_ptr, b1_ptr
            N, scale, rank, t_column, first, has_bias = N1, scale1, R1, R0, N0, BIAS1
            block -= blocks0
        else:
            y_ptr, y_stride, bias_ptr, b_ptr = y2_ptr, y2_stride, bias2_ptr, b2_ptr
            N, scale, rank, t_column, first, has_bias = N2, scale2, R2, R0 + R1, N0 + N1, BIAS2
            block -= blocks0 + blocks1
    n, m = block * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real_n, real_m = n < N, m < rows
    real = real_m[:, None] & real_n[None, :]
    if R0 + R1 + R2 > 0:
        rows_b = _rows_of_b(b_ptr, n, real_n, rank, R_BLOCK)
    wait(EARLY)
    value = _sum(y_ptr + m[:, None] * y_stride + n[None, :], real, split_stride, Y_SPLITS)
    if R0 + R1 + R2 > 0:
        value += scale * _delta(
            rows_b, t_ptr, m, real_m, rows, t_column, rank, R0 + R1 + R2, SPLITS, R_BLOCK, DOT, DTYPE
        )
    value = alpha * value + tl.load(bias_ptr + n, real_n & has_bias, 0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        value += tl.load(residual_ptr + m[:, None] * N + n[None, :], real, 0.0).to(tl.float32)
        if out_ptr.dtype.element_ty == tl.float16:
            value = _within_fp16(value)
    tl.store(out_ptr + m[:, None] * (N0 + N1 + N2) + first + n[None, :], value.to(out_ptr.dtype.element_ty), real)


@triton.jit(do_not_specialize=["rows"])
def _gate(g_ptr, u_ptr, y_stride, split_stride, bias_g_ptr, bias_u_ptr, b_g_ptr, b_u_ptr, t_ptr, h_ptr, rows, N,
          scale_g, scale_u, inverse, RG: tl.constexpr, RU: tl.constexpr, FIRST: tl.constexpr, R: tl.constexpr,
          BIAS: tl.constexpr, Y_SPLITS: tl.constexpr, SPLITS: tl.constexpr, R_BLOCK: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr, DOT: tl.constexpr, DTYPE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """h = silu(z_gate) * z_up * inverse; up's ranks begin at column FIRST of the R columns of t."""
    begin(EARLY)
    n, m = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real_n, real_m = n < N, m < rows
    real = real_m[:, None] & real_n[None, :]
    if RG > 0:
        rows_g = _rows_of_b(b_g_ptr, n, real_n, RG, R_BLOCK)
    if RU > 0:
        rows_u = _rows_of_b(b_u_ptr, n, real_n, RU, R_BLOCK)
    wait(EARLY)
    gate = _sum(g_ptr + m[:, None] * y_stride + n[None, :], real, split_stride, Y_SPLITS)
    up = _sum(u_ptr + m[:, None] * y_stride + n[None, :], real, split_stride, Y_SPLITS)
    if RG > 0:
        gate += scale_g * _delta(rows_g, t_ptr, m, real_m, rows, 0, RG, R, SPLITS, R_BLOCK, DOT, DTYPE)
    if RU > 0:
        up += scale_u * _delta(rows_u, t_ptr, m, real_m, rows, FIRST, RU, R, SPLITS, R_BLOCK, DOT, DTYPE)
    if BIAS:
        gate += tl.load(bias_g_ptr + n, real_n, 0.0).to(tl.float32)[None, :]
        up += tl.load(bias_u_ptr + n, real_n, 0.0).to(tl.float32)[None, :]
    if h_ptr.dtype.element_ty == tl.float16:  # an infinite gate or up would make 0 * inf
        gate, up = _within_fp16(gate), _within_fp16(up)
    value = gate / (1.0 + tl.exp(-gate)) * up * inverse
    if h_ptr.dtype.element_ty == tl.float16:
        value = _within_fp16(value)
    tl.store(h_ptr + m[:, None] * N + n[None, :], value.to(h_ptr.dtype.element_ty), real)


@triton.jit(do_not_specialize=["rows"])
def _add_norm(y_ptr, y_stride, split_stride, bias_ptr, b_ptr, t_ptr, residual_ptr, weight_ptr, s_ptr, norm_ptr, rows,
              scale, alpha, eps, H: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr, ROUND: tl.constexpr,
              Y_SPLITS: tl.constexpr, SPLITS: tl.constexpr, R_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
              DOT: tl.constexpr, DTYPE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """A row of s = residual + alpha (y + s t B^T) + b, as `_add` makes it, and of its RMSNorm."""
    begin(EARLY)
    row, n, r = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, R_BLOCK)
    if R > 0:
        rows_b = _rows_of_b(b_ptr, n, n < H, R, R_BLOCK)
    wait(EARLY)
    value = _sum(y_ptr + row * y_stride + n, n < H, split_stride, Y_SPLITS)
    if R > 0:
        thin = _sum(t_ptr + row * R + r, r < R, rows * R, SPLITS)
        if DOT:  # as the tensor cores would read them
            thin, rows_b = thin.to(DTYPE).to(tl.float32), rows_b.to(DTYPE)
        value += scale * tl.sum(rows_b.to(tl.float32) * thin[None, :], axis=1)
    value *= alpha
    if BIAS:
        value += tl.load(bias_ptr + n, n < H, 0.0).to(tl.float32)
    if ROUND:
        value = value.to(DTYPE).to(tl.float32)
    value += tl.load(residual_ptr + row * H + n, n < H, 0.0).to(tl.float32)
    if s_ptr.dtype.element_ty == tl.float16:
        value = _within_fp16(value)
    rounded = value.to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + row * H + n, rounded, n < H)
    value = tl.where(n < H, rounded.to(tl.float32), 0.0)  # what is stored is normalised
    value *= 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / H + eps)
    value *= tl.load(weight_ptr + n, n < H, 0.0).to(tl.float32)
    tl.store(norm_ptr + row * H + n, value.to(norm_ptr.dtype.element_ty), n < H)


# ------------------------------------------------------------------------------------------------- the three launches


def _rank(part: Projection) -> int:
    """The LoRA rank of a part; 0 without a LoRA."""
    return 0 if part.lora_a is None else part.lora_a.shape[0]


def _thin_product(x: Tensor, parts: Sequence[Projection]) -> Tensor:
    """t, fp32 [splits, N, sum of r]; without elements if no part has a LoRA."""
    if plain_few_rows.suits(x) and any(map(_rank, parts)):
        return plain_few_rows.few_rows_product(x, (), [part.lora_a for part in parts])[1]
    ranks = [_rank(part) for part in parts]
    rows, width = x.shape
    splits = triton.cdiv(width, SPLIT)
    t = torch.empty(splits, rows, sum(ranks), dtype=torch.float32, device=x.device)
    if t.numel():
        a = fill_none([part.lora_a for part in parts], t)
        r_block = triton.next_power_of_2(max(ranks))
        k_block = max(16, min(SPLIT, TILE // (ROWS * r_block)))
        _thin[(triton.cdiv(rows, ROWS), len(parts), splits)](
            x, *pad_to_three(a, a[0]), t, rows, x.stride(0), width, *pad_to_three(ranks, 0), SPLIT, ROWS, r_block,
            k_block, num_warps=4,
        )  # fmt: skip
    return t


def _products(x: Tensor, parts: Sequence[Projection]) -> tuple[Sequence[Tensor], Tensor]:
    """y, x W_i^T of every part [splits, N, out_i], all with one stride between splits; and t of `_thin_product`."""
    outs = [part.out_features for part in parts]
    loras = [part.lora_a for part in parts]
    if nf4_few_rows.serves(x, parts):
        product, t = nf4_few_rows.few_rows_product(x, parts)
        return product.split(outs, dim=2), _thin_product(x, parts) if t is None else t
    if plain_few_rows.serves(x, parts):
        product, t = plain_few_rows.few_rows_product(x, [part.weight for part in parts], loras)
        return product.split(outs, dim=2), t
    packed = [part for part in parts if part.quant_state is not None]
    plain = [part for part in parts if part.quant_state is None]
    if packed and plain and nf4_few_rows.serves(x, packed) and plain_few_rows.serves(x, plain):
        # a group of which some are in 16 bits, as "dynamic" 4-bit checkpoints have them
        weights = [part.weight for part in plain]
        product, t = nf4_few_rows.few_rows_product(x, packed, weights, loras)
        if x.shape[0] > nf4_few_rows.MOST_IN_REGISTERS:  # a second launch, into the same tensor
            rest = product[:, :, -sum(part.out_features for part in plain) :]
            t = plain_few_rows.few_rows_product(x, weights, loras, rest)[1]
        order = [*packed, *plain]
        columns = dict(zip(map(id, order), product.split([part.out_features for part in order], dim=2), strict=True))
        return [columns[id(part)] for part in parts], _thin_product(x, parts) if t is None else t
    y = [project(x, [part._replace(bias=None)])[0][None] for part in without_lora(parts)]
    return y, _thin_product(x, parts)


TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _options(x: Tensor, t: Tensor, y: Sequence[Tensor], parts: Sequence[Projection]) -> dict[str, Any]:
    """Keyword arguments of the last launch: how it reads t and y, and its tile."""
    r_block, dot = triton.next_power_of_2(max(1, *map(_rank, parts))), tensor_cores(x.device)
    # without tl.dot: one row per program while rows are few, since rows of a program run one after the other; several
    # once there are more, which then share B
    rows = 16 if dot else min(8, triton.next_power_of_2(triton.cdiv(x.shape[0], 16)))
    return {
        "Y_SPLITS": y[0].shape[0], "SPLITS": t.shape[0], "R_BLOCK": max(16, r_block) if dot else r_block, "DOT": dot,
        "ROWS": rows, "COLUMNS": OUT_COLUMNS if dot else max(16, min(128, 4096 // (r_block * rows))),
        "DTYPE": TYPES[x.dtype], "num_warps": OUT_WARPS if dot else 4, **early(x.device),
    }  # fmt: skip


def _finish(x: Tensor, parts: Sequence[Projection], residual: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """[z_1, z_2, ..] as one tensor [N, sum of out] in x's dtype, or residual + alpha (y + s t B^T) + b."""
    y, t = _products(x, parts)
    options, widths = _options(x, t, y, parts), [product.shape[2] for product in y]
    out = torch.empty(x.shape[0], sum(widths), dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    bias, b = fill_none([part.bias for part in parts], t), fill_none([part.lora_b for part in parts], t)
    blocks = sum(triton.cdiv(width, options["COLUMNS"]) for width in widths)
    _add[(blocks, triton.cdiv(x.shape[0], options["ROWS"]))](
        *pad_to_three(y, y[0]), *pad_to_three([product.stride(1) for product in y], 0), y[0].stride(0),
        *pad_to_three(bias, bias[0]), *pad_to_three(b, b[0]), t, out if residual is None else residual, out, x.shape[0],
        *pad_to_three(widths, 0), *pad_to_three([float(part.scale) for part in parts], 0.0), float(alpha),
        *pad_to_three(list(map(_rank, parts)), 0), *pad_to_three([part.bias is not None for part in parts], False),
        residual is not None, **options,
    )  # fmt: skip
    return out


def decode_linear(x: Tensor, parts: tuple[Projection, ...]) -> tuple[Tensor, ...]:
    """See nbhelpers.kernels.decode_step.decode_linear."""
    out = _finish(x.reshape(-1, x.shape[-1]), parts)
    widths = [part.out_features for part in parts]
    return out.view(*x.shape[:-1], -1).split(widths, dim=-1)


def decode_out(
    x: Tensor, part: Projection, residual: Tensor, norm: tuple[Tensor, float], *, alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """See nbhelpers.kernels.decode_step.decode_out; alpha: a factor of the product, which is not rounded then."""
    weight, eps = norm
    x, shape, width, rank = x.reshape(-1, x.shape[-1]), residual.shape, part.out_features, _rank(part)
    block, r_block = triton.next_power_of_2(width), triton.next_power_of_2(max(1, rank))
    if x.shape[0] > NORMED_ROWS or block > ROW or block * r_block > ROW_RANKS:
        if alpha is None:
            return norm_forward(_finish(x, (part,)).view(shape), weight, eps, residual)[:2]
        s = _finish(x, (part,), residual.reshape(x.shape[0], -1).contiguous(), alpha).view(shape)
        return norm_forward(s, weight, eps)[:2]
    y, t = _products(x, (part,))
    residual = residual.contiguous()
    s = torch.empty(shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    normed = torch.empty(shape, dtype=torch.promote_types(s.dtype, weight.dtype), device=x.device)
    (bias,), (b,) = fill_none([part.bias], t), fill_none([part.lora_b], t)
    _add_norm[(x.shape[0],)](
        y[0], y[0].stride(1), y[0].stride(0), bias, b, t, residual, weight, s, normed, x.shape[0], float(part.scale),
        1.0 if alpha is None else alpha, eps, width, rank, part.bias is not None, alpha is None, y[0].shape[0],
        t.shape[0], r_block, block, tensor_cores(x.device), TYPES[x.dtype], num_warps=ROW_WARPS, **early(x.device),
    )  # fmt: skip
    return s, normed


def decode_mlp(
    x: Tensor, gate_up: tuple[Projection, ...], down: Projection, residual: Tensor, norm: tuple[Tensor, float]
) -> tuple[Tensor, Tensor]:
    """See nbhelpers.kernels.decode_step.decode_mlp."""
    shrink = SHRINK_FP16 if x.dtype == torch.float16 else 1.0
    h = _gated(x.reshape(-1, x.shape[-1]), gate_up, 1.0 / shrink)
    return decode_out(h, down, residual, norm, alpha=shrink)


def _gated(x: Tensor, parts: Sequence[Projection], inverse: float) -> Tensor:
    """silu(gate) * up * inverse, [N, I], of two projections, or of one that holds both (Phi-3)."""
    y, t = _products(x, parts)
    bias = [t if part.bias is None else part.bias.detach() for part in parts]
    b = [t if part.lora_b is None else part.lora_b.detach().contiguous() for part in parts]
    first = _rank(parts[0])
    if len(parts) == 1:  # gate and up are the two halves of everything except t
        first, y = 0, y[0].chunk(2, dim=2)
        b, bias = ([both[0], both[0][len(both[0]) // 2 :]] if both[0] is not t else [t, t] for both in (b, bias))
    width = y[0].shape[2]
    h = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    options = _options(x, t, y, parts)
    _gate[(triton.cdiv(width, options["COLUMNS"]), triton.cdiv(x.shape[0], options["ROWS"]))](
        *y, y[0].stride(1), y[0].stride(0), *bias, *b, t, h, x.shape[0], width, float(parts[0].scale),
        float(parts[-1].scale), inverse, _rank(parts[0]), _rank(parts[-1]), first, t.shape[2],
        parts[0].bias is not None, **options,
    )  # fmt: skip
    return h
