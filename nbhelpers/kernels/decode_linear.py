"""Linear layers with LoRA for a step of decoding: few rows, no gradient, and as few launches as can be.

    t = x [A_1; A_2; A_3]^T                  [N, sum of r]     one launch for all parts, K cut into splits
    y_i = x W_i^T + b_i                      [N, out_i]        bitsandbytes' few-row product, or dequantise and cuBLAS
    y_i += s_i t_i B_i^T                     in place          one launch for all parts; gate and up go through SwiGLU,
                                                               and the residual is added, in that same launch

A step of a small model is bound by launches: PyTorch would need a dozen here (A's stacked and cast, a product with each
B, ...). A and B are read where the optimizer writes them, in fp32. The rank is too thin for a tensor core, so the
products are sums on registers, which serves a T4 as well.

The splits of t are added up by whoever reads it: t is [splits, N, sum of r] in fp32.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .lora_linear import dense, project
from .lora_mlp import FP16_MAX, SHRINK_FP16
from .nf4 import few_rows, matmul_few_rows
from .swiglu import forward as swiglu_forward

TILE = 8192  # rows x ranks x columns that a program of the thin product multiplies at once
SPLIT = 256  # columns of a split
ROWS = 4  # rows of a program of the thin product
OUT_COLUMNS = 128  # of a program of the second product


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
def _delta(b, t, row, rows, first, rank, R: tl.constexpr, SPLITS: tl.constexpr, S_BLOCK: tl.constexpr,
           R_BLOCK: tl.constexpr):  # fmt: skip
    """t_i B_i^T of one row for the columns whose B is given: b [columns, R_BLOCK] -> [columns]."""
    s, r = tl.arange(0, S_BLOCK), tl.arange(0, R_BLOCK)
    at = (s[:, None] * rows + row) * R + first + r[None, :]
    thin = tl.sum(tl.load(t + at, (s < SPLITS)[:, None] & (r < rank)[None, :], 0.0), axis=0)
    return tl.sum(b * thin[None, :], axis=1)


@triton.jit(do_not_specialize=["rows"])
def _add(y0, y1, y2, b0, b1, b2, t, residual, out, rows, N0, N1, N2, s0, s1, s2, alpha,
         R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, RESIDUAL: tl.constexpr, SPLITS: tl.constexpr,
         S_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """y_i += s_i t_i B_i^T; with a residual (one part then): out = residual + alpha (y + s t B^T)."""
    block = tl.program_id(0)
    y, b, N, scale, rank, first = y0, b0, N0, s0, R0, 0
    blocks0, blocks1 = tl.cdiv(N0, COLUMNS), tl.cdiv(N1, COLUMNS)
    if block >= blocks0:
        if block < blocks0 + blocks1:
            y, b, N, scale, rank, first = y1, b1, N1, s1, R1, R0
            block -= blocks0
        else:
            y, b, N, scale, rank, first = y2, b2, N2, s2, R2, R0 + R1
            block -= blocks0 + blocks1
    n, r = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R_BLOCK)
    rows_b = tl.load(b + n[:, None] * rank + r[None, :], (n < N)[:, None] & (r < rank)[None, :], 0.0).to(tl.float32)
    start = tl.program_id(1) * ROWS
    for row in range(start, tl.minimum(start + ROWS, rows)):
        value = tl.load(y + row * N + n, n < N, 0.0).to(tl.float32)
        value += scale * _delta(rows_b, t, row, rows, first, rank, R0 + R1 + R2, SPLITS, S_BLOCK, R_BLOCK)
        if RESIDUAL:
            value = tl.load(residual + row * N + n, n < N, 0.0).to(tl.float32) + alpha * value
            if out.dtype.element_ty == tl.float16:
                value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
            tl.store(out + row * N + n, value.to(out.dtype.element_ty), n < N)
        else:
            tl.store(y + row * N + n, value.to(y.dtype.element_ty), n < N)


@triton.jit(do_not_specialize=["rows"])
def _gate(g, u, bg, bu, t, h, rows, N, step, sg, su, inverse, RG: tl.constexpr, RU: tl.constexpr, FIRST: tl.constexpr,
          R: tl.constexpr, SPLITS: tl.constexpr, S_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """h = silu(g + s t_g B_g^T) * (u + s t_u B_u^T) * inverse; up's ranks begin at FIRST of the R in t."""
    n, r = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R_BLOCK)
    real = n < N
    rows_g = tl.load(bg + n[:, None] * RG + r[None, :], real[:, None] & (r < RG)[None, :], 0.0).to(tl.float32)
    rows_u = tl.load(bu + n[:, None] * RU + r[None, :], real[:, None] & (r < RU)[None, :], 0.0).to(tl.float32)
    start = tl.program_id(1) * ROWS
    for row in range(start, tl.minimum(start + ROWS, rows)):
        gate = tl.load(g + row * step + n, real, 0.0).to(tl.float32)
        gate += sg * _delta(rows_g, t, row, rows, 0, RG, R, SPLITS, S_BLOCK, R_BLOCK)
        up = tl.load(u + row * step + n, real, 0.0).to(tl.float32)
        up += su * _delta(rows_u, t, row, rows, FIRST, RU, R, SPLITS, S_BLOCK, R_BLOCK)
        if h.dtype.element_ty == tl.float16:  # an infinite gate or up would make 0 * inf
            gate = tl.minimum(tl.maximum(gate, -65504.0), 65504.0)
            up = tl.minimum(tl.maximum(up, -65504.0), 65504.0)
        value = gate / (1.0 + tl.exp(-gate)) * up * inverse
        if h.dtype.element_ty == tl.float16:
            value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
        tl.store(h + row * N + n, value.to(h.dtype.element_ty), real)


def _pad(values, filler):
    return (*values, *[filler] * (3 - len(values)))


def _thin_product(x, parts):
    """t [splits, N, sum of r] in fp32."""
    ranks = _pad([part.lora_a.shape[0] for part in parts], 0)
    a = _pad([part.lora_a.detach() for part in parts], parts[0].lora_a.detach())
    rows, width = x.shape
    splits = triton.cdiv(width, SPLIT)
    t = torch.empty(splits, rows, sum(ranks), dtype=torch.float32, device=x.device)
    r_block = triton.next_power_of_2(max(ranks))
    k_block = max(16, min(SPLIT, TILE // (ROWS * r_block)))
    _thin[(triton.cdiv(rows, ROWS), len(parts), splits)](
        x, *a, t, rows, x.stride(0), width, *ranks, SPLIT, ROWS, r_block, k_block, num_warps=4
    )
    return t


def _second(t, parts) -> dict:
    """What the kernels that read t need to know of it."""
    r_block = triton.next_power_of_2(max(part.lora_a.shape[0] for part in parts))
    splits = t.shape[0]
    columns = max(16, min(OUT_COLUMNS, 4096 // r_block))
    return {"SPLITS": splits, "S_BLOCK": triton.next_power_of_2(splits), "R_BLOCK": r_block,
            "ROWS": _rows_of_a_program(t.shape[1]), "COLUMNS": columns, "num_warps": 4}  # fmt: skip


def _rows_of_a_program(rows: int) -> int:
    """One row while there are few: they would wait for each other. Later several, which share a part of B."""
    return min(8, triton.next_power_of_2(triton.cdiv(rows, 16)))


def _base(x, part, bias=None):
    """x W^T + bias, contiguous and ours to write over."""
    bias = part.bias if bias is None else bias
    bias = None if bias is None else bias.detach().to(x.dtype)
    if part.quant_state is not None and few_rows(x, part.quant_state):
        return matmul_few_rows(x, part.weight, part.quant_state, bias)
    return F.linear(x, dense(part, x.dtype, x.device), bias)


def _served(parts) -> bool:
    """Whether every part has a LoRA as the kernels read it."""
    tensors = [t for part in parts for t in (part.lora_a, part.lora_b)]
    return all(t is not None and t.is_contiguous() for t in tensors)


def decode_linear(x, parts):
    """See nbhelpers.kernels.decode_linear."""
    rows = x.reshape(-1, x.shape[-1])
    if not _served(parts):
        return tuple(y.view(*x.shape[:-1], -1) for y in project(rows, parts))
    t = _thin_product(rows, parts)
    outputs = [_base(rows, part) for part in parts]
    _launch_add(t, parts, outputs)
    return tuple(y.view(*x.shape[:-1], -1) for y in outputs)


def _launch_add(t, parts, outputs, residual=None, out=None, alpha=1.0):
    y, b = _pad(outputs, outputs[0]), _pad([part.lora_b.detach() for part in parts], parts[0].lora_b.detach())
    widths = _pad([y.shape[1] for y in outputs], 0)
    scales = _pad([part.scale for part in parts], 0.0)
    ranks = _pad([part.lora_a.shape[0] for part in parts], 0)
    options, rows = _second(t, parts), outputs[0].shape[0]
    blocks = sum(triton.cdiv(width, options["COLUMNS"]) for width in widths)
    _add[(blocks, triton.cdiv(rows, options["ROWS"]))](
        *y, *b, t, outputs[0] if residual is None else residual, outputs[0] if out is None else out, rows,
        *widths, *map(float, scales), float(alpha), *ranks, residual is not None, **options,
    )  # fmt: skip


def decode_mlp(x, gate_up, down, residual):
    """See nbhelpers.kernels.decode_mlp."""
    rows, residual_rows = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1]).contiguous()
    shrink = SHRINK_FP16 if x.dtype == torch.float16 else 1.0
    if _served(gate_up):
        h = _gated(rows, gate_up, 1.0 / shrink)
    else:
        outputs = project(rows, gate_up)
        h = swiglu_forward(*(outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)), shrink)
    bias = None if down.bias is None else down.bias.detach() / shrink
    if _served((down,)):
        t, y = _thin_product(h, (down,)), _base(h, down, bias)
        out = torch.empty_like(residual_rows)
        _launch_add(t, (down,), [y], residual_rows, out, shrink)
    else:
        (y,) = project(h, (down._replace(bias=bias),))
        out = torch.add(residual_rows, y, alpha=shrink)
        out = out.clamp_(-FP16_MAX, FP16_MAX) if out.dtype == torch.float16 else out
    return out.view(residual.shape)


def _gated(rows, parts, inverse):
    """silu(gate) * up * inverse [N, I] of two projections, or of one with both (Phi-3)."""
    t, outputs = _thin_product(rows, parts), [_base(rows, part) for part in parts]
    (gate, up), b = (outputs[0], outputs[-1]), [part.lora_b.detach() for part in parts]
    width, first = gate.shape[1], parts[0].lora_a.shape[0]
    if len(parts) == 1:  # the second half of everything, but of t
        width, first = width // 2, 0
        up, b = gate[:, width:], [b[0], b[0][width:]]
    h = torch.empty(rows.shape[0], width, dtype=rows.dtype, device=rows.device)
    options = _second(t, parts)
    _gate[(triton.cdiv(width, options["COLUMNS"]), triton.cdiv(len(rows), options["ROWS"]))](
        gate, up, *b, t, h, len(rows), width, gate.stride(0), float(parts[0].scale), float(parts[-1].scale), inverse,
        parts[0].lora_a.shape[0], parts[-1].lora_a.shape[0], first, t.shape[2], **options,
    )  # fmt: skip
    return h
