"""Products of a few rows with NF4 weights, all layers of a group in one launch, the weights undone in registers.

    y_s = x[:, K_s] W[:, K_s]^T        s: the splits of K, W = code[q] absmax as in nf4.py, rounded to x's dtype first

For a step of decoding the weights are all that is read, at half a byte each, and a product is over before a large tile
has got going. So the tile's long side is the weight's (64 of its rows by all of x's), K is cut until the card is full,
and what the splits give, [splits, rows, sum of out] in fp32, is added up by whoever reads it (decode_linear.py).

A byte holds two neighbours of a row, the first in the high half: the even columns and the odd ones are two products.
tl.dot: Ampere or later; a T4 takes bitsandbytes' kernel.
"""

from functools import cache

import torch
import triton
import triton.language as tl

MOST_ROWS = 128  # beyond, dequantising once and cuBLAS (not timed yet)
COLUMNS = 64  # rows of W that a program takes
UNROLL = 2  # blocks of 64 weights whose loads are under way together
PROGRAMS, MOST_SPLITS = 528, 16  # four programs on each of 132 multiprocessors (registers counted, not timed)


@triton.jit(do_not_specialize=["rows", "turns"])
def _few_rows(
    x, y, code, code8,
    w0, w1, w2,  # uint8 [N K / 2]
    absmax0, absmax1, absmax2,  # uint8 [N K / 64] if NESTED, else fp32
    outer0, outer1, outer2, offset0, offset1, offset2,  # of the nested absmax: fp32 [blocks / NESTED_BLOCK], fp32 []
    rows, turns, K, N0, N1, N2, x_step,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    w, absmax, outer, offset, N, first = w0, absmax0, outer0, offset0, N0, 0
    blocks0, blocks1 = tl.cdiv(N0, COLUMNS), tl.cdiv(N1, COLUMNS)
    if block >= blocks0:
        if block < blocks0 + blocks1:
            w, absmax, outer, offset, N, first = w1, absmax1, outer1, offset1, N1, N0
            block -= blocks0
        else:
            w, absmax, outer, offset, N, first = w2, absmax2, outer2, offset2, N2, N0 + N1
            block -= blocks0 + blocks1
    n, m = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    byte, column = tl.arange(0, 32), tl.arange(0, 64)
    blocks = K // 64  # of a row of W
    shift = 0.0
    if NESTED:
        shift = tl.load(offset)
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for turn in range(split * turns, split * turns + turns):
        for u in tl.static_range(UNROLL):
            at = turn * UNROLL + u  # which block of 64
            real = (n < N) & (at < blocks)
            which = n * blocks + at
            if NESTED:
                q8 = tl.load(absmax + which, real, 0).to(tl.int32)
                scale = tl.load(code8 + q8) * tl.load(outer + which // NESTED_BLOCK, real, 0.0) + shift
            else:
                scale = tl.load(absmax + which, real, 0.0)
            scale = tl.where(real, scale, 0.0)[:, None]
            q = tl.load(w + which[:, None].to(tl.int64) * 32 + byte[None, :], real[:, None], 0).to(tl.int32)
            even = (tl.load(code + (q >> 4)) * scale).to(x.dtype.element_ty)  # [COLUMNS, 32]
            odd = (tl.load(code + (q & 15)) * scale).to(x.dtype.element_ty)
            here = x + m[:, None] * x_step + at * 64 + column[None, :]
            part = tl.load(here, (m < rows)[:, None] & (at < blocks), 0.0)
            x_even, x_odd = tl.split(tl.reshape(part, [ROWS, 32, 2]))
            total = tl.dot(even, tl.trans(x_even), total, input_precision="ieee")
            total = tl.dot(odd, tl.trans(x_odd), total, input_precision="ieee")
    out = y + (split * rows + m[None, :]) * (N0 + N1 + N2) + first + n[:, None]
    tl.store(out, total, (m < rows)[None, :] & (n < N)[:, None])


@cache
def _tensor_cores(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def serves(x, parts) -> bool:
    """Whether `few_rows_product` can, and should, do this on this card."""
    if not x.is_cuda or x.element_size() != 2 or x.shape[0] > MOST_ROWS or not _tensor_cores(x.device):
        return False
    return fits(x, parts)


def fits(x, parts) -> bool:
    """Whether the parts are NF4 in blocks of 64, nested or not all alike, and x's rows whole blocks."""
    states = [part.quant_state for part in parts]
    if len(parts) > 3 or x.shape[1] % 64 or any(s is None or s.quant_type != "nf4" for s in states):
        return False
    alike = {(s.blocksize, s.nested, s.state2.blocksize if s.nested else 0, s.shape[1]) for s in states}
    return len(alike) == 1 and states[0].blocksize == 64


def few_rows_product(x, parts) -> torch.Tensor:
    """x [rows, K] 16-bit, up to three NF4 parts [N_i, K] -> fp32 [splits, rows, sum of N]; their sum over splits is
    [x W_1^T, x W_2^T, ..]. No bias."""
    states = [part.quant_state for part in parts]
    state, nested = states[0], states[0].state2
    rows, width = x.shape
    outs = [s.shape[0] for s in states]
    blocks = sum(triton.cdiv(out, COLUMNS) for out in outs)
    all_turns = triton.cdiv(width // 64, UNROLL)
    splits = max(1, min(MOST_SPLITS, all_turns, triton.cdiv(PROGRAMS, blocks)))
    turns = triton.cdiv(all_turns, splits)
    splits = triton.cdiv(all_turns, turns)
    y = torch.empty(splits, rows, sum(outs), dtype=torch.float32, device=x.device)

    def three(values, filler):
        return (*values, *[filler] * (3 - len(values)))

    packed = [part.weight.detach().as_subclass(torch.Tensor).reshape(-1).view(torch.uint8) for part in parts]
    absmax = [s.absmax for s in states]
    outer = [s.state2.absmax if nested else s.absmax for s in states]
    offset = [s.offset if nested else s.absmax for s in states]
    _few_rows[(blocks, splits)](
        x, y, state.code, nested.code if nested else state.code,
        *(t for tensors in (packed, absmax, outer, offset) for t in three(tensors, tensors[0])),
        rows, turns, width, *three(outs, 0), x.stride(0),
        nested is not None, nested.blocksize if nested else 1, max(16, triton.next_power_of_2(rows)), COLUMNS, UNROLL,
        num_warps=4,
        num_stages=1,  # pipelined, even the look-ups in the code table would go through shared memory, 94 kB of it
        enable_fp_fusion=False,  # a fused multiply-add would round once where nf4.py rounds twice
    )  # fmt: skip
    return y
