"""Products of NF4 weights with up to 16 rows of x by PTX, all in registers: dequantise, multiply, accumulate.

    y[n, row] += sum_k x[n, k] code[q[row, k]] absmax[row, k // 64]     the weights rounded to 16 bits, as in nf4.py

The tensor core instruction (mma) prescribes which weights of a 16 x 16 tile each thread supplies: thread 4 g + t those
of rows g and g + 8 at four positions k. A sum over k does not depend on the order of its terms, so k may be permuted,
as long as x is permuted in the same way. Here thread 4 g + t takes 32 consecutive weights, half a block with one
absmax, in one load of 16 bytes, and the 64 bytes of x's row g that belong to them. So nothing passes through shared
memory and no thread waits at a barrier. tl.dot cannot do this: it would pass each weight through shared memory, which
then is the bottleneck.

Fragments: PTX ISA 9.7.14, "Matrix Fragments for mma.m16n8k16" (and m16n8k8, which a T4 has).
"""

import triton
import triton.language as tl

from .common import wait
from .nf4_lookup import look_up, selectors, table

LOAD = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
NEIGHBOUR = tl.constexpr("shfl.sync.bfly.b32 $0, $1, 1, 31, 0xffffffff;")  # what the thread beside this one has


def product(eights: int, kind: str, wide: bool) -> tuple[str, str]:
    """The instructions for 16 rows of W and `eights` times 8 rows of x, and the constraints of their operands for LLVM.

    Operands, in this order. Output: the sums, four per eight rows. Input: four words of row g and four of row g + 8,
    their two absmax; for each eight rows the address of x; the sums so far.

    Args:
        eights (`int`): Rows of x divided by 8.
        kind (`str`): "bf16" or "f16".
        wide (`bool`): Sixteen positions k per instruction (Ampere and later), otherwise eight.
    """
    sums = 4 * eights
    words, scales, rows, before = sums, sums + 8, sums + 10, sums + 10 + eights
    lines = [f".reg .b32 x<{16 * eights}>, g<8>, j<8>, s<2>, e<2>, a<4>, u, v, h, l;"]
    for i in range(0, 16 * eights, 4):
        four = ", ".join(f"x{j}" for j in range(i, i + 4))
        lines.append(f"ld.global.v4.b32 {{{four}}}, [${rows + i // 16} + {4 * (i % 16)}];")
    tables = [[f"{half}{i}" for i in range(8)] for half in "gj"]  # of row g, and of row g + 8
    lines += [table(kind, names, f"${scales + i}", wide) for i, names in enumerate(tables)]
    for step in range(8):  # four of this thread's positions: half a word
        for i, names in enumerate(tables):
            s, e = f"s{i}", f"e{i}"
            if step % 2 == 0:
                lines.append(selectors(f"${words + 4 * i + step // 2}", s, e))
            else:
                lines.append(f"shr.u32 {s}, {s}, 16; shr.u32 {e}, {e}, 16;")
            lines.append(look_up(names, s, e, f"a{i}", f"a{i + 2}"))
        for n in range(eights):
            lines += _mma(4 * n, before + 4 * n if step == 0 else 4 * n, 16 * n + 2 * step, kind, wide)
    constraints = ["=&f"] * sums + ["r"] * 8 + ["f"] * 2 + ["l"] * eights + ["f"] * sums
    return "{" + " ".join(lines) + "}", ",".join(constraints)


def _mma(sums: int, before: int, b: int, kind: str, wide: bool) -> list[str]:
    """PTX for the sums from $sums on: those from $before on plus the product of a0 to a3 with x{b} and x{b + 1}."""
    to, first = (", ".join(f"${start + i}" for i in range(4)) for start in (sums, before))
    name = f"mma.sync.aligned.m16n8k{16 if wide else 8}.row.col.f32.{kind}.{kind}.f32"
    if wide:
        return [f"{name} {{{to}}}, {{a0, a1, a2, a3}}, {{x{b}, x{b + 1}}}, {{{first}}};"]
    return [
        f"{name} {{{to}}}, {{a0, a1}}, {{x{b}}}, {{{first}}};",
        f"{name} {{{to}}}, {{a2, a3}}, {{x{b + 1}}}, {{{to}}};",
    ]


@triton.jit
def _fetch(w_ptr, absmax_ptr, outer_ptr, row, block, half, blocks, stop, N, NESTED: tl.constexpr,
           NESTED_BLOCK: tl.constexpr):  # fmt: skip
    """Each thread's half blocks of W's rows `row` and `row + 8`, four words each; and one of their two scales, still
    quantised: the first row's in threads with the first halves, the other row's in the others.

    Threads beyond the end read what is there: their row is not stored, or the scale is made 0.
    """
    w_ptr += tl.minimum(block, stop - 1) * 8 + half * 4
    first = (w_ptr + tl.minimum(row, N - 1) * blocks * 8).to(tl.int64)
    other = (w_ptr + tl.minimum(row + 8, N - 1) * blocks * 8).to(tl.int64)
    w0, w1, w2, w3 = tl.inline_asm_elementwise(LOAD, "=r,=r,=r,=r,l", [first], [tl.int32] * 4, is_pure=False, pack=1)
    v0, v1, v2, v3 = tl.inline_asm_elementwise(LOAD, "=r,=r,=r,=r,l", [other], [tl.int32] * 4, is_pure=False, pack=1)
    row += half * 8
    real, index = (row < N) & (block < stop), row * blocks + block
    scale = tl.load(absmax_ptr + index, real, 0)
    outer_scale = tl.load(outer_ptr + index // NESTED_BLOCK, real, 0.0) if NESTED else scale
    return w0, w1, w2, w3, v0, v1, v2, v3, scale, outer_scale


@triton.jit
def _scales(fetched, half, real, code8_ptr, shift, NESTED: tl.constexpr):
    """The fp32 absmax of both rows that `_fetch` loaded for each thread, 0 where they are not real."""
    scale = fetched[8]
    if NESTED:
        scale = tl.load(code8_ptr + scale.to(tl.int32)) * fetched[9] + shift
    scale = tl.where(real, scale, 0.0)
    neighbour = tl.inline_asm_elementwise(NEIGHBOUR, "=f,f", [scale], tl.float32, is_pure=False, pack=1)
    return tl.where(half == 0, scale, neighbour), tl.where(half == 0, neighbour, scale)


@triton.jit
def _put(y_ptr, sums, first_row, m, n, rows, N, first, y_stride, WARPS: tl.constexpr):
    """Store the sum of the warps' sums [WARPS * 32] at row m and column n of y_split."""
    total = tl.sum(tl.reshape(sums, [WARPS, 32]), axis=0)
    tl.store(y_ptr + (first_row + m) * y_stride + first + n, total, (m < rows) & (n < N))


@triton.jit
def in_registers(x_ptr, y_ptr, code8_ptr, w_ptr, absmax_ptr, outer_ptr, offset_ptr, first_row, split, rows, iters, K,
                  N, first, y_stride, x_stride, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, SIXTEEN: tl.constexpr,
                  WARPS: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """16 columns of y_split from `first + first_row` on, for up to 8 rows of x, or 16 if SIXTEEN (nf4_mma.py).

    Each warp takes a part of K. Every tensor has one element per thread, in the threads' order.
    """
    i = tl.arange(0, WARPS * 32)
    warp, g, t = i // 32, i % 32 // 4, i % 4
    row, half, blocks = first_row + g, t % 2, K // 64
    block = (split * iters * WARPS + warp) * 2 + t // 2
    stop = tl.minimum(blocks, (split + 1) * iters * WARPS * 2)
    x_ptr += half * 32
    x_ptrs, other_x_ptrs = x_ptr + tl.minimum(g, rows - 1) * x_stride, x_ptr + tl.minimum(g + 8, rows - 1) * x_stride
    shift = tl.load(offset_ptr) if NESTED else 0.0
    following = _fetch(w_ptr, absmax_ptr, outer_ptr, row, block, half, blocks, stop, N, NESTED, NESTED_BLOCK)
    wait(EARLY)
    s0 = tl.zeros([WARPS * 32], tl.float32)
    s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
    for _ in range(iters):
        w, this_block = following, block
        block += WARPS * 2
        following = _fetch(w_ptr, absmax_ptr, outer_ptr, row, block, half, blocks, stop, N, NESTED, NESTED_BLOCK)
        scale_w, scale_v = _scales(w, half, this_block < stop, code8_ptr, shift, NESTED)
        at = tl.minimum(this_block, blocks - 1) * 64
        if SIXTEEN:
            s0, s1, s2, s3, s4, s5, s6, s7 = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS,
                [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], scale_w, scale_v, (x_ptrs + at).to(tl.int64),
                 (other_x_ptrs + at).to(tl.int64), s0, s1, s2, s3, s4, s5, s6, s7],
                dtype=[tl.float32] * 8, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            s0, s1, s2, s3 = tl.inline_asm_elementwise(
                ASM, CONSTRAINTS,
                [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], scale_w, scale_v, (x_ptrs + at).to(tl.int64),
                 s0, s1, s2, s3], dtype=[tl.float32] * 4, is_pure=False, pack=1,
            )  # fmt: skip
    lane = tl.arange(0, 32)
    m, n = lane % 4 * 2, first_row + lane // 4
    _put(y_ptr, s0, split * rows, m, n, rows, N, first, y_stride, WARPS)
    _put(y_ptr, s1, split * rows, m + 1, n, rows, N, first, y_stride, WARPS)
    _put(y_ptr, s2, split * rows, m, n + 8, rows, N, first, y_stride, WARPS)
    _put(y_ptr, s3, split * rows, m + 1, n + 8, rows, N, first, y_stride, WARPS)
    if SIXTEEN:
        _put(y_ptr, s4, split * rows, m + 8, n, rows, N, first, y_stride, WARPS)
        _put(y_ptr, s5, split * rows, m + 9, n, rows, N, first, y_stride, WARPS)
        _put(y_ptr, s6, split * rows, m + 8, n + 8, rows, N, first, y_stride, WARPS)
        _put(y_ptr, s7, split * rows, m + 9, n + 8, rows, N, first, y_stride, WARPS)
