"""What a decoding step does before its first layer and behind its head, in one launch each: see kernels/decode_step.py.

Each program has a row, or a piece of its embedding, to itself. The number of the step is read by all rows in the last
launch of a step and written by one of them in the first: in the same launch some would read it before, some after.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_step import SEED, WRITTEN, Rows
from .common import begin, ceil_div, early, power_of_2, wait
from .sampling import _best, race

BLOCK = 1024  # channels of an embedding that a program copies


@triton.jit(do_not_specialize=["state_stride"])
def _embed(state_ptr, tick_ptr, weight_ptr, table_ptr, x_ptr, cos_ptr, sin_ptr, state_stride, weight_stride,
           H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, R_BLOCK: tl.constexpr,
           EARLY: tl.constexpr):  # fmt: skip
    """A piece of a token's embedding; the first piece's program also copies cosines and sines, each frequency twice."""
    begin(EARLY)
    wait(EARLY)
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, position = tl.load(state_ptr + row), tl.load(state_ptr + state_stride + row)
    col = piece * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + row * H + col, tl.load(weight_ptr + token * weight_stride + col, col < H), col < H)
    if piece == 0:
        angles_ptr = tl.load(table_ptr + 5).to(tl.pointer_type(cos_ptr.dtype.element_ty)) + position * D
        r = tl.arange(0, R_BLOCK)
        real, out = r < 2 * HALF, row * 2 * HALF + r
        tl.store(cos_ptr + out, tl.load(angles_ptr + r % HALF, real), real)
        tl.store(sin_ptr + out, tl.load(angles_ptr + HALF + r % HALF, real), real)
        if row == 0:
            tl.store(tick_ptr, tl.load(tick_ptr) + 1)


@triton.jit(do_not_specialize=["state_stride", "tokens_stride", "logprobs_stride", "stops"])
def _append(logits_ptr, logp_ptr, sum_ptr, best_ptr, token_ptr, state_ptr, stops_ptr, tick_ptr, tokens_ptr,
            logprobs_ptr, logits_stride, temperature, state_stride, tokens_stride, logprobs_stride, stops,
            PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, STOPS_BLOCK: tl.constexpr, DIVIDED: tl.constexpr,
            EARLY: tl.constexpr):  # fmt: skip
    """A row's token and log-probability, or with PARTS those of the race's winner, and the row's state after it."""
    begin(EARLY)
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    if PARTS:
        new, logp = _best(
            row, logits_ptr, logp_ptr, sum_ptr, best_ptr, token_ptr, logits_stride, temperature, PARTS, PARTS_BLOCK,
            DIVIDED,
        )  # fmt: skip
    else:
        new, logp = tl.load(token_ptr + row), tl.load(logp_ptr + row)
    at = tl.load(tick_ptr) - 1
    tl.store(tokens_ptr + at * tokens_stride + row, new)
    tl.store(logprobs_ptr + at * logprobs_stride + row, logp)

    i = tl.arange(0, STOPS_BLOCK)
    stopped = tl.max((tl.load(stops_ptr + i, i < stops, -1) == new).to(tl.int32), axis=0) > 0
    # the rows of the state: token, position, seed, written, left
    token_ptr, position_ptr = state_ptr + row, state_ptr + state_stride + row
    written_ptr, left_ptr = state_ptr + 3 * state_stride + row, state_ptr + 4 * state_stride + row
    left = tl.load(left_ptr)
    going = left > 0
    tl.store(token_ptr, new, going)
    tl.store(position_ptr, tl.load(position_ptr) + 1, going)
    tl.store(written_ptr, tl.load(written_ptr) + 1, going)
    tl.store(left_ptr, tl.where(stopped, 0, tl.maximum(left - 1, 0)))


def embed(rows: Rows, weight: Tensor, angles: Tensor, table: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """See nbhelpers.kernels.decode_step.embed."""
    count, hidden = rows.state.shape[1], weight.shape[1]
    x = torch.empty(count, 1, hidden, dtype=weight.dtype, device=weight.device)
    cos, sin = (torch.empty(count, 1, 2 * half, dtype=angles.dtype, device=weight.device) for _ in range(2))
    _embed[(count, ceil_div(hidden, BLOCK))](
        rows.state, rows.tick, weight, table, x, cos, sin, rows.state.stride(0), weight.stride(0), hidden,
        angles.shape[1], half, BLOCK, power_of_2(2 * half), num_warps=4, **early(weight.device),
    )  # fmt: skip
    return x, cos, sin


def append_drawn(rows: Rows, logits: Tensor, temperature: float) -> None:
    """See nbhelpers.kernels.decode_step.append_drawn."""
    logits, temperature = logits if logits.stride(1) == 1 else logits.contiguous(), float(temperature)
    most, total, best, word = race(logits, rows.state[SEED], rows.state[WRITTEN], temperature)
    _launch(rows, logits, most, total, best, word, temperature, most.shape[1])


def append(rows: Rows, token: Tensor, logp: Tensor) -> None:
    """See nbhelpers.kernels.decode_step.append."""
    token, logp = token.contiguous(), logp.contiguous()
    _launch(rows, logp, logp, logp, logp, token, 1.0, 0)


def _launch(
    rows: Rows, logits: Tensor, logp: Tensor, total: Tensor, best: Tensor, token: Tensor, temperature: float, parts: int
) -> None:
    """`_append` of each row; without parts only logp and token are read."""
    state, stops, tick, tokens, logprobs = rows
    _append[(state.shape[1],)](
        logits, logp, total, best, token, state, stops, tick, tokens, logprobs, logits.stride(0), temperature,
        state.stride(0), tokens.stride(0), logprobs.stride(0), len(stops), parts, power_of_2(max(parts, 1)),
        power_of_2(max(len(stops), 32)), temperature != 1.0, num_warps=1, **early(logp.device),
    )  # fmt: skip
