"""A sample from softmax(z) by the exponential race: the logits are read once, and nothing of their size is written.

    token = argmax_i z_i - log E_i        E_i = -log(1 - u_i), u_i a hash of (seed, counter, i)        arXiv:1611.01144
    logp  = z_token - log sum_i exp(z_i)

Each program takes BLOCK words of a row and writes that part's maximum, sum of exponentials, and winner; a second kernel
combines the parts. The hash is the one of reference.py, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ahead
from .common import begin, early, wait

BLOCK = 4096
Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # [B, parts] of `_race`: maximum, sum, best score, its word


@triton.jit(do_not_specialize_on_alignment=["seeds_ptr", "counters_ptr"])  # read one by one
def _race(logits_ptr, seeds_ptr, counters_ptr, max_ptr, sum_ptr, best_ptr, word_ptr, logits_stride, words, temperature,
          PARTS: tl.constexpr, BLOCK: tl.constexpr, DIVIDED: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Maximum, sum of exponentials, and winner of one part of a row, of logits or of logits / temperature."""
    begin(EARLY)
    wait(EARLY)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits_ptr + row * logits_stride + i, i < words, float("-inf"))
    if DIVIDED:
        z = tl.div_rn(z, temperature)  # as torch rounds it on a CPU

    key = tl.load(seeds_ptr + row) + tl.load(counters_ptr + row) * -0x61C8864680B583EB  # int64, products wrap around
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    key = key ^ ((key >> 31) & 0x1FFFFFFFF)
    h = (i + key.to(tl.int32)) * ((key >> 32) | 1).to(tl.int32)
    h = (h ^ ((h >> 16) & 0xFFFF)) * -0x7A143595
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -0x3D4D51CB
    h = (h ^ (h >> 16)) & 0x7FFFFFFF
    u = (h.to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    u = tl.minimum(u, 0.999999940395355)  # 1 - 2^-24; at 1 E were infinite, and a word that is alone would lose
    exponential = tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - u))

    highest = tl.max(z, axis=0)
    score = tl.where(z == float("-inf"), float("-inf"), z - tl.log(exponential))
    winner = tl.argmax(score, axis=0)
    out = row * PARTS + part
    tl.store(max_ptr + out, highest)
    tl.store(sum_ptr + out, tl.sum(tl.where(z == float("-inf"), 0.0, tl.exp(z - highest)), axis=0))
    tl.store(best_ptr + out, tl.max(score, axis=0))
    tl.store(word_ptr + out, tl.minimum(part * BLOCK + winner, words - 1))  # of NaN argmax may take what is masked


@triton.jit
def _best(row, logits_ptr, max_ptr, sum_ptr, best_ptr, word_ptr, logits_stride, temperature, PARTS: tl.constexpr,
          PARTS_BLOCK: tl.constexpr, DIVIDED: tl.constexpr):  # fmt: skip
    """The winner of a row's parts, int64, and its log-probability."""
    p = tl.arange(0, PARTS_BLOCK)
    index = row * PARTS + p
    highest = tl.load(max_ptr + index, p < PARTS, float("-inf"))
    top = tl.max(highest, axis=0)
    sums = tl.load(sum_ptr + index, p < PARTS, 0.0)
    log_total = top + tl.log(tl.sum(tl.where(highest == float("-inf"), 0.0, sums * tl.exp(highest - top)), axis=0))
    winner = tl.argmax(tl.load(best_ptr + index, p < PARTS, float("-inf")), axis=0)
    chosen = tl.load(word_ptr + row * PARTS + tl.minimum(winner, PARTS - 1)).to(tl.int64)  # as in _race
    z = tl.load(logits_ptr + row * logits_stride + chosen)
    if DIVIDED:
        z = tl.div_rn(z, temperature)
    return chosen, z - log_total


@triton.jit
def _winner(logits_ptr, max_ptr, sum_ptr, best_ptr, word_ptr, token_ptr, logp_ptr, logits_stride, PARTS: tl.constexpr,
            PARTS_BLOCK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """The winner of a row's parts, and its log-probability."""
    begin(EARLY)
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    token, logp = _best(
        row, logits_ptr, max_ptr, sum_ptr, best_ptr, word_ptr, logits_stride, 1.0, PARTS, PARTS_BLOCK, False
    )
    tl.store(token_ptr + row, token)
    tl.store(logp_ptr + row, logp)


def race(logits: Tensor, seeds: Tensor, counters: Tensor, temperature: float = 1.0) -> Parts:
    """The parts of `_race`; logits fp32 [B, V] with adjacent words, seeds and counters int64 [B]."""
    rows, words = logits.shape
    parts = triton.cdiv(words, BLOCK)
    # each on its own, not parts of one tensor: their alignment, which is compiled in, would depend on the rows
    most, total, best = (torch.empty(rows, parts, dtype=torch.float32, device=logits.device) for _ in range(3))
    word = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    _race[(rows, parts)](
        logits, seeds.contiguous(), counters.contiguous(), most, total, best, word, logits.stride(0), words,
        temperature, parts, BLOCK, temperature != 1.0, num_warps=8, **early(logits.device),
    )  # fmt: skip
    return most, total, best, word


def draw(logits: Tensor, seeds: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
    """See nbhelpers.kernels.draw."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    parts = race(logits, seeds, counters)
    rows, count = parts[0].shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _winner[(rows,)](
        logits, *parts, token, logp, logits.stride(0), count, triton.next_power_of_2(count), num_warps=1,
        **early(logits.device),
    )  # fmt: skip
    if ahead.dry():  # nothing was drawn, and others index with it
        token.zero_()
    return token, logp
