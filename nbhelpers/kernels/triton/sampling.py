"""A sample from softmax(z) by the exponential race: the logits are read once, and nothing of their size is written.

    token = argmax_i z_i - log E_i        E_i = -log(1 - u_i), u_i a hash of (seed, counter, i)        arXiv:1611.01144
    logp  = z_token - log sum_i exp(z_i)

Each program takes BLOCK words of a row and writes that part's maximum, sum of exponentials, and winner; a second kernel
combines the parts. The hash is the one of reference.py, bit for bit.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _race(logits, seeds, counters, most, total, best, word, step, words, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum, sum of exponentials, and winner of one part of a row."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * step + i, i < words, float("-inf"))

    key = tl.load(seeds + row) + tl.load(counters + row) * -0x61C8864680B583EB  # int64, products wrap around
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    key = key ^ ((key >> 31) & 0x1FFFFFFFF)
    h = (i + key.to(tl.int32)) * ((key >> 32) | 1).to(tl.int32)
    h = (h ^ ((h >> 16) & 0xFFFF)) * -0x7A143595
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -0x3D4D51CB
    h = (h ^ (h >> 16)) & 0x7FFFFFFF
    u = (h.to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    exponential = tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - u))

    highest = tl.max(z, axis=0)
    score = tl.where(z == float("-inf"), float("-inf"), z - tl.log(exponential))
    winner = tl.argmax(score, axis=0)
    out = row * PARTS + part
    tl.store(most + out, highest)
    tl.store(total + out, tl.sum(tl.where(z == float("-inf"), 0.0, tl.exp(z - highest)), axis=0))
    tl.store(best + out, tl.max(score, axis=0))
    tl.store(word + out, part * BLOCK + winner)


@triton.jit
def _winner(logits, most, total, best, word, token, logp, step, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr):
    """The winner of a row's parts, and its log-probability."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PARTS_BLOCK)
    here = row * PARTS + p
    highest = tl.load(most + here, p < PARTS, float("-inf"))
    top = tl.max(highest, axis=0)
    sums = tl.load(total + here, p < PARTS, 0.0)
    log_total = top + tl.log(tl.sum(tl.where(highest == float("-inf"), 0.0, sums * tl.exp(highest - top)), axis=0))
    winner = tl.argmax(tl.load(best + here, p < PARTS, float("-inf")), axis=0)
    chosen = tl.load(word + row * PARTS + winner)
    tl.store(token + row, chosen.to(tl.int64))
    tl.store(logp + row, tl.load(logits + row * step + chosen) - log_total)


def draw(logits, seeds, counters):
    """See nbhelpers.kernels.draw."""
    rows, words = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    parts = triton.cdiv(words, BLOCK)
    most, total, best = torch.empty(3, rows, parts, dtype=torch.float32, device=logits.device)
    word = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    step = logits.stride(0)
    _race[(rows, parts)](
        logits,
        seeds.contiguous(),
        counters.contiguous(),
        most,
        total,
        best,
        word,
        step,
        words,
        parts,
        BLOCK,
        num_warps=8,
    )
    _winner[(rows,)](
        logits, most, total, best, word, token, logp, step, parts, triton.next_power_of_2(parts), num_warps=1
    )
    return token, logp
