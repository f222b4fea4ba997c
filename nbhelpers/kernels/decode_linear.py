"""Linear layers with LoRA for a step of decoding: few rows, no gradient, and as few launches as can be.

    t = x [A_1; A_2; A_3]^T                     [N, sum of r]       one launch for all parts
    y_i = x W_i^T                               [N, out_i]          one launch for all NF4 parts (nf4_rows.py), or
                                                                    bitsandbytes' few-row product, or cuBLAS
    z_i = y_i + b_i + s_i t_i B_i^T             one launch for all parts; gate and up go through SwiGLU in it, and a
                                                residual is added

A step of a small model is bound by launches: PyTorch would need a dozen here (A's stacked and cast, a product with each
B, ...). A and B are read where the optimizer writes them, in fp32. The rank is too thin for a tensor core, so those
products are sums on registers, which serves a T4 as well.

Both t and y come in splits of the inner sum, fp32 [splits, N, width], and are added up by the third launch.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import nf4_rows
from .lora_linear import dense
from .lora_mlp import SHRINK_FP16
from .nf4 import few_rows, matmul_few_rows

TILE = 8192  # rows x ranks x columns that a program of the thin product multiplies at once
SPLIT, ROWS = 256, 4  # columns of a split of the thin product, and rows of one of its programs
OUT_COLUMNS = 128  # of a program of the last launch


@triton.jit(do_not_specialize=["rows"])
def _thin(x, a0, a1, a2, t, rows, x_step, K, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
          SPLIT: tl.constexpr, ROWS: tl.constexpr, R_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr):  # fmt: skip
    part, split = tl.program_id(1), tl.program_id(2)
    a, rank, first = a0, R0, 0
    if part == 1:
        a, rank, first = a1, R1, R0
    if part == 2:
        a, rank, first = a2, R2, R0 + R1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r, k = tl.arange(0, R_BLOCK), tl.arange(0, K_BLOCK)
    total = tl.zeros([ROWS, R_BLOCK], tl.float32)
    for start in range(0, SPLIT, K_BLOCK):
        at = split * SPLIT + start + k
        rows_x = tl.load(x + row[:, None] * x_step + at[None, :], (row < rows)[:, None] & (at < K)[None, :], 0.0)
        rows_a = tl.load(a + r[:, None] * K + at[None, :], (r < rank)[:, None] & (at < K)[None, :], 0.0)
        total += tl.sum(rows_x.to(tl.float32)[:, None, :] * rows_a.to(tl.float32)[None, :, :], axis=2)
    out = (split * rows + row[:, None]) * (R0 + R1 + R2) + first + r[None, :]
    tl.store(t + out, total, (row < rows)[:, None] & (r < rank)[None, :])


@triton.jit
def _sum(y, n, real, split_step, SPLITS: tl.constexpr):
    """The splits of y added up, at columns n."""
    total = tl.load(y + n, real, 0.0).to(tl.float32)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(y + s * split_step + n, real, 0.0).to(tl.float32)
    return total


@triton.jit
def _delta(b, t, row, rows, first, rank, R: tl.constexpr, SPLITS: tl.constexpr, S_BLOCK: tl.constexpr,
           R_BLOCK: tl.constexpr):  # fmt: skip
    """t_i B_i^T of one row for the columns whose B is given: b [columns, R_BLOCK] -> [columns]."""
    s, r = tl.arange(0, S_BLOCK), tl.arange(0, R_BLOCK)
    at = (s[:, None] * rows + row) * R + first + r[None, :]
    thin = tl.sum(tl.load(t + at, (s < SPLITS)[:, None] & (r < rank)[None, :], 0.0), axis=0)
    return tl.sum(b * thin[None, :], axis=1)


@triton.jit
def _within_fp16(value):
    return tl.minimum(tl.maximum(value, -65504.0), 65504.0)


@triton.jit(do_not_specialize=["rows"])
def _add(y0, y1, y2, step0, step1, step2, split_step, bias0, bias1, bias2, b0, b1, b2, t, residual, out, rows,
         N0, N1, N2, s0, s1, s2, alpha, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
         BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr, Y_SPLITS: tl.constexpr,
         SPLITS: tl.constexpr, S_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, ROWS: tl.constexpr,
         COLUMNS: tl.constexpr):  # fmt: skip
    """out = [z_1, z_2, ..], or residual + alpha (y + s t B^T) + b of one part."""
    block = tl.program_id(0)
    y, step, bias, b, N, scale, rank, at_t, first, has = y0, step0, bias0, b0, N0, s0, R0, 0, 0, BIAS0
    blocks0, blocks1 = tl.cdiv(N0, COLUMNS), tl.cdiv(N1, COLUMNS)
    if block >= blocks0:
        if block < blocks0 + blocks1:
            y, step, bias, b, N, scale, rank, at_t, first, has = y1, step1, bias1, b1, N1, s1, R1, R0, N0, BIAS1
            block -= blocks0
        else:
            y, step, bias, b, N, scale, rank, at_t, has = y2, step2, bias2, b2, N2, s2, R2, R0 + R1, BIAS2
            first = N0 + N1
            block -= blocks0 + blocks1
    n, r = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R_BLOCK)
    real = n < N
    constant = tl.load(bias + n, real & has, 0.0).to(tl.float32)
    rows_b = tl.load(b + n[:, None] * rank + r[None, :], real[:, None] & (r < rank)[None, :], 0.0).to(tl.float32)
    start = tl.program_id(1) * ROWS
    for row in range(start, tl.minimum(start + ROWS, rows)):
        value = _sum(y + row * step, n, real, split_step, Y_SPLITS)
        if R0 + R1 + R2 > 0:
            value += scale * _delta(rows_b, t, row, rows, at_t, rank, R0 + R1 + R2, SPLITS, S_BLOCK, R_BLOCK)
        value = alpha * value + constant
        if RESIDUAL:
            value += tl.load(residual + row * N + n, real, 0.0).to(tl.float32)
            if out.dtype.element_ty == tl.float16:
                value = _within_fp16(value)
        tl.store(out + row * (N0 + N1 + N2) + first + n, value.to(out.dtype.element_ty), real)


@triton.jit(do_not_specialize=["rows"])
def _gate(g, u, step, split_step, bias_g, bias_u, bg, bu, t, h, rows, N, sg, su, inverse,
          RG: tl.constexpr, RU: tl.constexpr, FIRST: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr,
          Y_SPLITS: tl.constexpr, SPLITS: tl.constexpr, S_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """h = silu(z_gate) * z_up * inverse; up's ranks begin at FIRST of the R in t."""
    n, r = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R_BLOCK)
    real = n < N
    rows_g = tl.load(bg + n[:, None] * RG + r[None, :], real[:, None] & (r < RG)[None, :], 0.0).to(tl.float32)
    rows_u = tl.load(bu + n[:, None] * RU + r[None, :], real[:, None] & (r < RU)[None, :], 0.0).to(tl.float32)
    start = tl.program_id(1) * ROWS
    for row in range(start, tl.minimum(start + ROWS, rows)):
        gate = _sum(g + row * step, n, real, split_step, Y_SPLITS)
        up = _sum(u + row * step, n, real, split_step, Y_SPLITS)
        if RG > 0:
            gate += sg * _delta(rows_g, t, row, rows, 0, RG, R, SPLITS, S_BLOCK, R_BLOCK)
        if RU > 0:
            up += su * _delta(rows_u, t, row, rows, FIRST, RU, R, SPLITS, S_BLOCK, R_BLOCK)
        if BIAS:
            gate += tl.load(bias_g + n, real, 0.0).to(tl.float32)
            up += tl.load(bias_u + n, real, 0.0).to(tl.float32)
        if h.dtype.element_ty == tl.float16:  # an infinite gate or up would make 0 * inf
            gate, up = _within_fp16(gate), _within_fp16(up)
        value = gate / (1.0 + tl.exp(-gate)) * up * inverse
        if h.dtype.element_ty == tl.float16:
            value = _within_fp16(value)
        tl.store(h + row * N + n, value.to(h.dtype.element_ty), real)


# ------------------------------------------------------------------------------------------------- the three launches


def _three(values, filler):
    return (*values, *[filler] * (3 - len(values)))


def _or_some(tensors, filler) -> list:
    """The tensors; in the place of None any other of them (a kernel's branches want pointers of one type)."""
    some = next((tensor for tensor in tensors if tensor is not None), filler)
    return [(some if tensor is None else tensor).detach().contiguous() for tensor in tensors]


def _rank(part) -> int:
    return 0 if part.lora_a is None else part.lora_a.shape[0]


def _thin_product(x, parts):
    """t, fp32 [splits, N, sum of r]; where no part has a LoRA a tensor without elements."""
    ranks = [_rank(part) for part in parts]
    rows, width = x.shape
    splits = triton.cdiv(width, SPLIT)
    t = torch.empty(splits, rows, sum(ranks), dtype=torch.float32, device=x.device)
    if t.numel():
        some = next(part.lora_a for part in parts if part.lora_a is not None).detach()
        a = [some if part.lora_a is None else part.lora_a.detach().contiguous() for part in parts]
        r_block = triton.next_power_of_2(max(ranks))
        k_block = max(16, min(SPLIT, TILE // (ROWS * r_block)))
        _thin[(triton.cdiv(rows, ROWS), len(parts), splits)](
            x, *_three(a, some), t, rows, x.stride(0), width, *_three(ranks, 0), SPLIT, ROWS, r_block, k_block,
            num_warps=4,
        )  # fmt: skip
    return t


def _base_products(x, parts):
    """x W_i^T of every part, each [splits, N, out_i] with one stride between splits for all of them."""
    if nf4_rows.serves(x, parts):
        y = nf4_rows.few_rows_product(x, parts)
        return y.split([part.quant_state.shape[0] for part in parts], dim=2)
    products = []
    for part in parts:
        if part.quant_state is not None and few_rows(x, part.quant_state):
            products.append(matmul_few_rows(x, part.weight, part.quant_state)[None])
        else:
            products.append(F.linear(x, dense(part, x.dtype, x.device))[None])
    return products


def _options(t, y, parts) -> dict:
    """How the last launch reads t and y, and its tile."""
    rows, r_block = t.shape[1], triton.next_power_of_2(max(1, *map(_rank, parts)))
    return {
        "Y_SPLITS": y[0].shape[0], "SPLITS": t.shape[0], "S_BLOCK": triton.next_power_of_2(t.shape[0]),
        "R_BLOCK": r_block, "COLUMNS": max(16, min(OUT_COLUMNS, 4096 // r_block)), "num_warps": 4,
        # one row while there are few: they would wait for each other; later several, which share a part of B
        "ROWS": min(8, triton.next_power_of_2(triton.cdiv(rows, 16))),
    }  # fmt: skip


def _finish(x, parts, residual=None, alpha=1.0):
    """[z_1, z_2, ..] as one tensor [N, sum of out] in x's dtype, or residual + alpha (y + s t B^T) + b."""
    t, y = _thin_product(x, parts), _base_products(x, parts)
    options, widths = _options(t, y, parts), [product.shape[2] for product in y]
    out = torch.empty(x.shape[0], sum(widths), dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    bias, b = _or_some([part.bias for part in parts], t), _or_some([part.lora_b for part in parts], t)
    blocks = sum(triton.cdiv(width, options["COLUMNS"]) for width in widths)
    _add[(blocks, triton.cdiv(x.shape[0], options["ROWS"]))](
        *_three(y, y[0]), *_three([product.stride(1) for product in y], 0), y[0].stride(0), *_three(bias, bias[0]),
        *_three(b, b[0]), t, out if residual is None else residual, out, x.shape[0], *_three(widths, 0),
        *_three([float(part.scale) for part in parts], 0.0), float(alpha), *_three(list(map(_rank, parts)), 0),
        *_three([part.bias is not None for part in parts], False), residual is not None, **options,
    )  # fmt: skip
    return out


def decode_linear(x, parts):
    """See nbhelpers.kernels.decode_linear."""
    out = _finish(x.reshape(-1, x.shape[-1]), parts)
    widths = [(part.weight if part.quant_state is None else part.quant_state).shape[0] for part in parts]
    return out.view(*x.shape[:-1], -1).split(widths, dim=-1)


def decode_mlp(x, gate_up, down, residual):
    """See nbhelpers.kernels.decode_mlp."""
    shrink = SHRINK_FP16 if x.dtype == torch.float16 else 1.0
    h = _gated(x.reshape(-1, x.shape[-1]), gate_up, 1.0 / shrink)
    return _finish(h, (down,), residual.reshape(h.shape[0], -1).contiguous(), shrink).view(residual.shape)


def _gated(x, parts, inverse):
    """silu(gate) * up * inverse [N, I] of two projections, or of one with both (Phi-3)."""
    t, y = _thin_product(x, parts), _base_products(x, parts)
    bias = [t if part.bias is None else part.bias.detach() for part in parts]
    b = [t if part.lora_b is None else part.lora_b.detach().contiguous() for part in parts]
    first = _rank(parts[0])
    if len(parts) == 1:  # the second half of everything, but of t
        first, y = 0, y[0].chunk(2, dim=2)
        b, bias = ([both[0], both[0][len(both[0]) // 2 :]] if both[0] is not t else [t, t] for both in (b, bias))
    width = y[0].shape[2]
    h = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    options = _options(t, y, parts)
    _gate[(triton.cdiv(width, options["COLUMNS"]), triton.cdiv(x.shape[0], options["ROWS"]))](
        *y, y[0].stride(1), y[0].stride(0), *bias, *b, t, h, x.shape[0], width, float(parts[0].scale),
        float(parts[-1].scale), inverse, _rank(parts[0]), _rank(parts[-1]), first, t.shape[2],
        parts[0].bias is not None, **options,
    )  # fmt: skip
    return h
