"""Products of a few rows with NF4 weights and with LoRA's A, all layers of a group in one launch.

    y_s = x[:, K_s] W[:, K_s]^T        s: the splits of K, W = code[q] absmax as in nf4.py, rounded to x's dtype first
    t_s = x[:, K_s] A[:, K_s]^T        by a few additional programs that run at the same time

A decoding step reads little more than the weights, at half a byte each, so dequantising them is most of the work: eight
at a time, by byte look-up (nf4_lookup.py). K is split until the programs fill the card; the splits' results,
fp32 [splits, rows, sum of out], are summed by the kernel that reads them (decode_linear.py). The loop prefetches the
operands of its next iteration: memory answers after a microsecond, and there are only a few iterations.

Up to 16 rows of x are served by nf4_mma.py, on a T4 too; more rows by `_base`, which goes through shared memory for
tl.dot, or on a T4 by bitsandbytes' kernel.

Layers in 16 bits of the same group, as dynamic 4-bit has them, are more columns of y: their programs wait for memory
while those of NF4 layers dequantise.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Projection
from .common import begin, ceil_div, early, fill_none, in_16_bytes, pad_to_three, power_of_2, tensor_cores, turing, wait
from .lora_stack import whose
from .nf4 import multiprocessors
from .nf4_lookup import PTX, eight_weights
from .nf4_mma import in_registers, product

MOST_ROWS = 128  # for more: dequantise once and cuBLAS
MOST_SPLITS = 16
MOST_IN_REGISTERS = 16
WARPS = 4
THIN_WIDTH = 128  # columns of K per iteration of the thin product
PLAIN_COLUMNS, PLAIN_WIDTH = 16, 128  # of a program for a 16-bit layer, and of K per iteration


@triton.jit
def _load_weights(w_ptr, absmax_ptr, outer_ptr, block, real, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr):
    """Load one block of 64 weights per row, at `block` [C]: its words [C, 8], and its scales, still quantised."""
    words = tl.load(w_ptr + block[:, None].to(tl.int64) * 8 + tl.arange(0, 8)[None, :], real[:, None], 0)
    scale = tl.load(absmax_ptr + block, real, 0)
    outer_scale = tl.load(outer_ptr + block // NESTED_BLOCK, real, 0.0) if NESTED else scale
    return words, scale, outer_scale


@triton.jit
def _base(x_ptr, y_ptr, code_ptr, code8_ptr, w_ptr, absmax_ptr, outer_ptr, offset_ptr, column, split, rows, iters, K, N,
          first, y_stride, x_stride, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr, PTX: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """COLUMNS columns of y_split from `first + column` on: x by COLUMNS rows of W."""
    n, m, k = column + tl.arange(0, COLUMNS), tl.arange(0, ROWS), tl.arange(0, 64)
    real_m, real_n = m < rows, n < N
    x_ptrs = x_ptr + m[:, None] * x_stride + k[None, :]
    blocks, block = K // 64, split * iters
    stop = tl.minimum(blocks, block + iters)
    shift = tl.load(offset_ptr) if NESTED else 0.0
    real = real_n & (block < stop)
    next_words, next_scale, next_outer = _load_weights(
        w_ptr, absmax_ptr, outer_ptr, n * blocks + block, real, NESTED, NESTED_BLOCK)  # fmt: skip
    wait(EARLY)
    next_x = tl.load(x_ptrs + block * 64, real_m[:, None] & (block < stop), 0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(iters):
        words, scale, outer_scale, part, was_real = next_words, next_scale, next_outer, next_x, real
        block += 1
        real = real_n & (block < stop)
        next_words, next_scale, next_outer = _load_weights(
            w_ptr, absmax_ptr, outer_ptr, n * blocks + block, real, NESTED, NESTED_BLOCK)  # fmt: skip
        next_x = tl.load(x_ptrs + block * 64, real_m[:, None] & (block < stop), 0.0)
        if NESTED:
            scale = tl.load(code8_ptr + scale.to(tl.int32)) * outer_scale + shift
        scale = tl.where(was_real, scale, 0.0)
        w0, w1, w2, w3, w4, w5, w6, w7 = eight_weights(words, scale, code_ptr, x_ptr.dtype.element_ty, PTX)
        # each join appends a faster-varying index: join weights 4 apart first, then 2 apart, then neighbours
        weights = tl.join(
            tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7))
        )  # [COLUMNS, 8, 2, 2, 2]
        weights = tl.reshape(weights, [COLUMNS, 64])
        total = tl.dot(part, tl.trans(weights), total, input_precision="ieee")
    y_ptrs = y_ptr + (split * rows + m[:, None]) * y_stride + first + n[None, :]
    tl.store(y_ptrs, total, real_m[:, None] & real_n[None, :])


@triton.jit
def _dense(x_ptr, t_ptr, a_ptr, split, rows, iters, K, R, first, t_stride, x_stride, R_BLOCK: tl.constexpr,
           ROWS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """The columns of t_split from `first` on: x by all R rows of A, or of a block of a 16-bit weight."""
    wait(EARLY)
    m, r, k = tl.arange(0, ROWS), tl.arange(0, R_BLOCK), tl.arange(0, WIDTH)
    real_m, real_r = (m < rows)[:, None], (r < R)[:, None]
    x_ptrs, a_ptrs = x_ptr + m[:, None] * x_stride + k[None, :], a_ptr + r[:, None] * K + k[None, :]
    column, stop = split * iters * WIDTH, tl.minimum((split + 1) * iters * WIDTH, K)
    within = (column + k < stop)[None, :]
    next_x, next_a = tl.load(x_ptrs + column, real_m & within, 0.0), tl.load(a_ptrs + column, real_r & within, 0.0)
    total = tl.zeros([ROWS, R_BLOCK], tl.float32)
    for _ in range(iters):
        part, rows_a = next_x, next_a
        column += WIDTH
        within = (column + k < stop)[None, :]
        next_x, next_a = tl.load(x_ptrs + column, real_m & within, 0.0), tl.load(a_ptrs + column, real_r & within, 0.0)
        total = tl.dot(part, tl.trans(rows_a.to(part.dtype)), total, input_precision="ieee")
    tl.store(t_ptr + (split * rows + m[:, None]) * t_stride + first + r[None, :], total, real_m & (r < R)[None, :])


COUNTS = ["rows", "iters", "thin_iters", "plain_iters", "M0", "M1", "R0", "R1", "R2", "thin", "pieces"]


@triton.jit(do_not_specialize=COUNTS)
def _few_rows(
    x_ptr, y_ptr, t_ptr, code_ptr, code8_ptr,
    w0_ptr, w1_ptr, w2_ptr,  # int32 [N K / 8]
    absmax0_ptr, absmax1_ptr, absmax2_ptr,  # uint8 [N K / 64] if NESTED, else fp32
    outer0_ptr, outer1_ptr, outer2_ptr,  # of the nested absmax, fp32 [blocks / NESTED_BLOCK]
    offset0_ptr, offset1_ptr, offset2_ptr,  # likewise, fp32 []
    a0_ptr, a1_ptr, a2_ptr,  # [R, K] in fp32 or 16 bits
    plain0_ptr, plain1_ptr,  # 16-bit weights [M, K]
    rows, iters, thin_iters, plain_iters, K, N0, N1, N2, M0, M1, y_stride, x_stride, R0, R1, R2, thin, pieces,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, THIN: tl.constexpr, PLAIN: tl.constexpr,
    R_BLOCK: tl.constexpr, WIDTH: tl.constexpr, PLAIN_COLUMNS: tl.constexpr, PLAIN_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PTX: tl.constexpr, WARPS: tl.constexpr, REGISTERS: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program per block of y's columns and split, those of 16-bit weights first; between them and the others
    `pieces` programs per part for the thin product t.

    One variant serves every group of layers, whatever its parts and ranks: none of them is worth compiling another.
    """
    begin(EARLY)
    program, split = tl.program_id(0), tl.program_id(1)
    pieces = pieces if REGISTERS else 1  # known to be: `_base` then fits 96 registers, 5 programs on a multiprocessor
    thin_programs = thin * pieces
    DOT_ROWS: tl.constexpr = max(16, ROWS)
    if PLAIN:
        plain_blocks, row = tl.cdiv(M0, PLAIN_COLUMNS), program * PLAIN_COLUMNS
        plain_ptr, height, before = plain0_ptr, M0, N0 + N1 + N2
        if program >= plain_blocks:
            plain_ptr, height, before, row = plain1_ptr, M1, before + M0, row - plain_blocks * PLAIN_COLUMNS
        program -= plain_blocks + tl.cdiv(M1, PLAIN_COLUMNS)  # of the others
        if program < 0:
            _dense(x_ptr, y_ptr, plain_ptr + row.to(tl.int64) * K, split, rows, plain_iters, K, height - row,
                   before + row, y_stride, x_stride, PLAIN_COLUMNS, DOT_ROWS, PLAIN_WIDTH, EARLY)  # fmt: skip
    if THIN:  # otherwise tl.dot must not be compiled: this is a T4's kernel too  # noqa: SIM102
        if (program >= 0) & (program < thin_programs):
            a_ptr, rank, column = whose(program, pieces, a0_ptr, a1_ptr, a2_ptr, R0, R1, R2)
            _dense(x_ptr, t_ptr, a_ptr, split * pieces + program % pieces, rows, thin_iters, K, rank, column,
                   R0 + R1 + R2, x_stride, R_BLOCK, DOT_ROWS, WIDTH, EARLY)  # fmt: skip
    if program >= thin_programs:
        block = program - thin_programs
        w_ptr, absmax_ptr, outer_ptr, offset_ptr = w0_ptr, absmax0_ptr, outer0_ptr, offset0_ptr
        N, first = N0, 0
        blocks0, blocks1 = tl.cdiv(N0, COLUMNS), tl.cdiv(N1, COLUMNS)
        if block >= blocks0:
            if block < blocks0 + blocks1:
                w_ptr, absmax_ptr, outer_ptr, offset_ptr = w1_ptr, absmax1_ptr, outer1_ptr, offset1_ptr
                N, first = N1, N0
                block -= blocks0
            else:
                w_ptr, absmax_ptr, outer_ptr, offset_ptr = w2_ptr, absmax2_ptr, outer2_ptr, offset2_ptr
                N, first = N2, N0 + N1
                block -= blocks0 + blocks1
        if REGISTERS:
            in_registers(x_ptr, y_ptr, code8_ptr, w_ptr, absmax_ptr, outer_ptr, offset_ptr, block * COLUMNS, split,
                          rows, iters, K, N, first, y_stride, x_stride, NESTED, NESTED_BLOCK, ROWS == 16, WARPS,
                          ASM, CONSTRAINTS, EARLY)  # fmt: skip
        else:
            _base(x_ptr, y_ptr, code_ptr, code8_ptr, w_ptr, absmax_ptr, outer_ptr, offset_ptr, block * COLUMNS, split,
                  rows, iters, K, N, first, y_stride, x_stride, NESTED, NESTED_BLOCK, ROWS, COLUMNS, PTX,
                  EARLY)  # fmt: skip


def serves(x: Tensor, parts: Sequence[Projection]) -> bool:
    """Whether `few_rows_product` supports this product on this card, and is the fastest way to compute it."""
    if tensor_cores(x.device):
        most = MOST_ROWS
    else:
        most = MOST_IN_REGISTERS if turing(x.device) and x.dtype == torch.float16 else 0
    return x.element_size() == 2 and x.shape[0] <= most and fits(x, parts)


def fits(x: Tensor, parts: Sequence[Projection]) -> bool:
    """Whether up to three parts are all NF4 in blocks of 64, quantised alike, and x's rows are whole blocks."""
    states = [part.quant_state for part in parts if part.quant_state is not None]
    if len(states) < len(parts) or len(parts) > 3 or x.shape[1] % 64 or any(s.quant_type != "nf4" for s in states):
        return False
    alike = {(s.blocksize, 0 if s.state2 is None else s.state2.blocksize, s.shape[1]) for s in states}
    return len(alike) == 1 and states[0].blocksize == 64


class Tile(NamedTuple):
    """How a number of rows of x is served, as measured on an H200 and an H100."""

    registers: bool  # by `in_registers`, or by `_base`
    rows: int  # of x per program
    columns: int  # of y per program
    width: int  # columns of K per iteration of the loop
    resident: int  # programs that run on a multiprocessor at once; for 8 rows what fits the timings, of which six do
    iter_cost: int  # time of an iteration, in units of what summing one more split costs


def tile(rows: int) -> Tile:
    """The tile for this many rows of x."""
    if rows <= MOST_IN_REGISTERS and PTX:
        return Tile(True, 8, 16, 128 * WARPS, 8, 2) if rows <= 8 else Tile(True, 16, 16, 128 * WARPS, 6, 2)
    if rows <= 64:  # at least 64 rows: the tile height of Hopper's wgmma
        return Tile(False, 64, 64, 64, 5, 1)
    return Tile(False, 128, 128, 64, 2, 3)


@cache
def instructions(rows: int, dtype: torch.dtype, wide: bool) -> tuple[str, str]:
    """`nf4_mma.product` for a tile of 8 or 16 rows of x."""
    return product(rows // 8, "bf16" if dtype == torch.bfloat16 else "f16", wide)


def splits_for(programs: int, iters: int, slots: int, iter_cost: int) -> int:
    """How many splits the loop's `iters` iterations over K are cut into.

    There should be few waves of programs (`programs` per split) on the card's `slots`, few iterations in each program,
    of which starting and ending count as two, and few splits.
    """

    def cost(splits: int) -> int:
        return ceil_div(programs * splits, slots) * (ceil_div(iters, splits) + 2) * iter_cost + splits

    return min(range(1, min(MOST_SPLITS, iters) + 1), key=cost)


def few_rows_product(
    x: Tensor,
    parts: Sequence[Projection],
    plain: Sequence[Tensor] = (),
    loras: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The base and LoRA-A products of up to three parts, without bias, as sums still to be taken over splits of K.

    Args:
        x (`Tensor`): [rows, K], 16-bit.
        parts (`tuple[Projection, ...]`): One to three for which `fits` is true, NF4 [N_i, K], each with or without a
            LoRA of rank r_i.
        plain (`Sequence[Tensor]`): Up to two weights [M_i, K] in x's dtype, their columns behind those of the parts.
            For more than MOST_IN_REGISTERS rows they are left free, and t is not computed.
        loras (`Sequence[Tensor | None]`, *optional*): A of each layer, if not the parts'.

    Returns y, fp32 [splits, rows, sum of N and M], whose sum over the splits is [x W_1^T, x W_2^T, ..]; and t, fp32
    [splits, rows, sum of r], likewise with x A^T: without elements if there is no LoRA, None where tl.dot has no tensor
    cores.
    """
    x = in_16_bytes(x)
    states = [part.quant_state for part in parts if part.quant_state is not None]
    state, nested = states[0], states[0].state2
    rows, width = x.shape
    outs = [part.out_features for part in parts]
    more = [len(weight) for weight in plain]
    cut, dot = tile(rows), tensor_cores(x.device)
    if plain and rows > MOST_IN_REGISTERS:
        plain, loras = (), ()
    loras = [part.lora_a for part in parts] if loras is None else loras
    ranks = [0 if a is None else a.shape[0] for a in loras]
    thin = len(ranks) if sum(ranks) and dot else 0
    dense = sum(ceil_div(len(weight), PLAIN_COLUMNS) for weight in plain)
    programs = dense + thin + sum(ceil_div(out, cut.columns) for out in outs)
    iters = ceil_div(width, cut.width)
    iters = ceil_div(iters, splits_for(programs, iters, cut.resident * multiprocessors(x.device), cut.iter_cost))
    splits = ceil_div(width, iters * cut.width)
    # Where programs are short, t is split more finely than y, since A is read in fp32; summing it must stay cheap.
    thin_width, pieces = 64, 1
    if cut.registers:
        thin_width, pieces = THIN_WIDTH, max(1, min(ceil_div(width, 2 * THIN_WIDTH), MOST_SPLITS) // splits)
    thin_iters = ceil_div(width, thin_width * pieces * splits)
    y = torch.empty(splits, rows, sum(outs) + sum(more), dtype=torch.float32, device=x.device)
    t = torch.empty(splits * pieces, rows, sum(ranks), dtype=torch.float32, device=x.device)

    words = [part.weight.detach().as_subclass(torch.Tensor).reshape(-1).view(torch.int32) for part in parts]
    absmax = [s.absmax for s in states]
    outer = [s.absmax if s.state2 is None else s.state2.absmax for s in states]
    offset = [s.offset if nested else s.absmax for s in states]
    a = fill_none(loras, x) or [x]
    dense_weights = [weight.detach().contiguous() for weight in plain] or [x]
    _few_rows[(programs + thin * (pieces - 1), splits)](
        x, y, t, state.code, nested.code if nested else state.code,
        *(tensor for tensors in (words, absmax, outer, offset, a) for tensor in pad_to_three(tensors, tensors[0])),
        dense_weights[0], dense_weights[-1], rows, iters, thin_iters, ceil_div(width, PLAIN_WIDTH * splits), width,
        *pad_to_three(outs, 0), *pad_to_three(more, 0)[:2], y.stride(1), x.stride(0), *pad_to_three(ranks, 0), thin,
        pieces, nested is not None, nested.blocksize if nested else 1, thin > 0, dense > 0,
        max(16, power_of_2(max(1, 0, *ranks))), thin_width, PLAIN_COLUMNS, PLAIN_WIDTH, cut.rows, cut.columns, PTX,
        WARPS, cut.registers,
        *(instructions(cut.rows, x.dtype, dot) if cut.registers else ("", "")),
        **early(x.device), num_warps=WARPS,
        num_stages=1,  # pipelined by hand: Triton would stage the absmax table in shared memory as well
        enable_fp_fusion=False,  # a fused multiply-add would round once where nf4.py rounds twice
    )  # fmt: skip
    return y, t if dot else None
