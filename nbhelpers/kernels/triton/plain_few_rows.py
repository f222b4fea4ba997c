"""Products of a few rows with 16-bit weights and with LoRA's A, all layers of a group in one launch.

    y_s = x[:, K_s] W[:, K_s]^T        s: the splits of K
    t_s = x[:, K_s] A[:, K_s]^T        by additional programs that run at the same time

The same sums, in the same places, as those of nf4_few_rows.py. A decoding step reads every weight once, so what counts
is that the card always has loads under way, and that a layer is few launches: cuBLAS takes one for each matrix. The
head's logits are such a product too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference_step
from ..reference import Projection
from .common import begin, ceil_div, early, fill_none, in_16_bytes, pad_to_three, power_of_2, tensor_cores, wait
from .lora_stack import whose
from .nf4 import multiprocessors
from .nf4_few_rows import splits_for

MOST_ROWS = 128  # for more: cuBLAS
MOST_RANKS, THIN_WIDTH = 32, 64  # of a program of the thin product, and its columns of K per iteration


@triton.jit
def _block(x_ptr, y_ptr, w_ptr, first_row, split, rows, span, K, N, first, y_stride, x_stride, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """COLUMNS columns of y_split from `first + first_row` on: x by as many rows of W."""
    m, k = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    n = first_row + tl.arange(0, COLUMNS)
    real_m, real_n = (m < rows)[:, None], (n < N)[:, None]
    start = split * span
    stop = tl.minimum(start + span, K)
    x_ptrs = x_ptr + m[:, None] * x_stride + k[None, :]
    w_ptrs = w_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for column in range(start, stop, WIDTH):
        within = (column + k < stop)[None, :]
        w = tl.load(w_ptrs + column, real_n & within, 0.0)
        part = tl.load(x_ptrs + column, real_m & within, 0.0)
        total = tl.dot(part, tl.trans(w.to(part.dtype)), total, input_precision="ieee")
    y_ptrs = y_ptr + (split * rows + m[:, None]) * y_stride + first + n[None, :]
    tl.store(y_ptrs, total, real_m & (n < N)[None, :])


@triton.jit(do_not_specialize=["rows", "R0", "R1", "R2", "thin", "pieces"])
def _few_rows(
    x_ptr, y_ptr, t_ptr,
    w0_ptr, w1_ptr, w2_ptr,  # [N, K] in fp32 or 16 bits
    a0_ptr, a1_ptr, a2_ptr,  # [R, K] likewise
    rows, span, K, N0, N1, N2, y_stride, x_stride, R0, R1, R2, thin, pieces,
    R_BLOCK: tl.constexpr, THIN_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program per block of y's columns and split, preceded by `pieces` programs per LoRA for the thin product t."""
    begin(EARLY)
    wait(EARLY)
    program, split = tl.program_id(0), tl.program_id(1)
    if program < thin * pieces:
        a_ptr, rank, column = whose(program, pieces, a0_ptr, a1_ptr, a2_ptr, R0, R1, R2)
        _block(x_ptr, t_ptr, a_ptr, program % pieces * R_BLOCK, split, rows, span, K, rank, column, R0 + R1 + R2,
               x_stride, ROWS, R_BLOCK, THIN_WIDTH)  # fmt: skip
    else:
        block = program - thin * pieces
        w_ptr, N, first = w0_ptr, N0, 0
        blocks0, blocks1 = tl.cdiv(N0, COLUMNS), tl.cdiv(N1, COLUMNS)
        if block >= blocks0:
            if block < blocks0 + blocks1:
                w_ptr, N, first = w1_ptr, N1, N0
                block -= blocks0
            else:
                w_ptr, N, first = w2_ptr, N2, N0 + N1
                block -= blocks0 + blocks1
        _block(x_ptr, y_ptr, w_ptr, block * COLUMNS, split, rows, span, K, N, first, y_stride, x_stride, ROWS, COLUMNS,
               WIDTH)  # fmt: skip


def serves(x: Tensor, parts: Sequence[Projection]) -> bool:
    """Whether `few_rows_product` supports this product on this card, and is the fastest way to compute it."""
    return x.shape[0] <= MOST_ROWS and suits(x) and fits(x, parts)


def suits(x: Tensor) -> bool:
    """Whether x can be multiplied here, by weights or by A alone: in 16 bits, on tensor cores, 16 bytes at a time."""
    return x.element_size() == 2 and x.shape[1] % 8 == 0 and tensor_cores(x.device)


def fits(x: Tensor, parts: Sequence[Projection]) -> bool:
    """Whether up to three parts all have weights of x's dtype."""
    return len(parts) <= 3 and all(part.quant_state is None and part.weight.dtype == x.dtype for part in parts)


class Tile(NamedTuple):
    """How a number of rows of x is served, measured on an H100, within a gaming card's 99 KiB of shared memory."""

    rows: int  # of x per program
    columns: int  # of y per program
    width: int  # columns of K per iteration of the loop
    stages: int  # iterations whose loads are under way
    warps: int
    resident: int  # programs that run on a multiprocessor at once


def tile(rows: int) -> Tile:
    """The tile for this many rows of x."""
    if rows <= 32:
        return Tile(max(16, power_of_2(rows)), 64, 256, 3, 4, 4)
    return Tile(64, 64, 128, 4, 4, 2) if rows <= 64 else Tile(128, 128, 64, 3, 8, 2)


def few_rows_product(
    x: Tensor, weights: Sequence[Tensor], loras: Sequence[Tensor | None], y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The products with up to three weights and with up to three LoRAs' A, as sums still to be taken over splits of K.

    Args:
        x (`Tensor`): [rows, K], 16-bit.
        weights (`Sequence[Tensor]`): [N_i, K]; may be none.
        loras (`Sequence[Tensor | None]`): A of each layer of the group, [r_i, K], or None for a layer without a LoRA.
        y (`Tensor`, *optional*): fp32 [splits, rows, N], where the result is wanted; the columns may be part of wider
            rows. Otherwise it is made, with as many splits as suit the card.

    Returns y, fp32 [splits, rows, sum of N], whose sum over the splits is [x W_1^T, x W_2^T, ..]; and t, fp32 [splits,
    rows, sum of r], likewise with x A^T, without elements if there is no LoRA.
    """
    x = in_16_bytes(x)
    rows, width = x.shape
    cut = tile(rows)
    outs = [len(weight) for weight in weights]
    ranks = [0 if a is None else len(a) for a in loras]
    thin = len(ranks) if sum(ranks) else 0
    r_block = min(MOST_RANKS, max(16, power_of_2(max(1, *ranks))))
    pieces = ceil_div(max(1, *ranks), r_block)
    blocks, programs = ceil_div(rows, cut.rows), thin * pieces + sum(ceil_div(out, cut.columns) for out in outs)
    iters = ceil_div(width, cut.width)
    if y is None:
        splits = splits_for(programs * blocks, iters, cut.resident * multiprocessors(x.device), 2)
        splits = ceil_div(iters, ceil_div(iters, splits))
        y = torch.empty(splits, rows, sum(outs), dtype=torch.float32, device=x.device)
    splits = len(y)
    t = torch.empty(splits, rows, sum(ranks), dtype=torch.float32, device=x.device)
    w = [weight.detach().contiguous() for weight in weights] or [x]
    a = fill_none(loras, x) or [x]
    _few_rows[(programs, splits, blocks)](
        x, y, t, *pad_to_three(w, w[0]), *pad_to_three(a, a[0]), rows,
        ceil_div(iters, splits) * cut.width, width, *pad_to_three(outs, 0), y.stride(1), x.stride(0),
        *pad_to_three(ranks, 0), thin, pieces, r_block, THIN_WIDTH, cut.rows, cut.columns, cut.width, **early(x.device),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return y, t


def decode_head(x: Tensor, weight: Tensor) -> Tensor:
    """See nbhelpers.kernels.decode_step.decode_head."""
    if not serves(x, (Projection(weight),)):
        return reference_step.decode_head(x, weight)
    logits = torch.empty(1, len(x), len(weight), dtype=torch.float32, device=x.device)
    return few_rows_product(x, (weight,), (None,), logits)[0][0]
