"""PTX for products of NF4 weights with a few rows of x, all in registers: dequantise, multiply, accumulate.

    y[n, row] += sum_k x[n, k] code[q[row, k]] absmax[row, k // 64]     the weights rounded to 16 bits, as in nf4.py

The tensor core instruction (mma) prescribes which weights of a 16 x 16 tile each thread supplies: thread 4 g + t those
of rows g and g + 8 at four positions k. A sum over k does not depend on the order of its terms, so k may be permuted,
as long as x is permuted in the same way. Here thread 4 g + t takes 32 consecutive weights, half a block with one
absmax, in one load of 16 bytes, and the 64 bytes of x's row g that belong to them. So nothing passes through shared
memory and no thread waits at a barrier. tl.dot cannot do this: it would pass each weight through shared memory, which
then is the bottleneck.

Fragments: PTX ISA 9.7.14, "Matrix Fragments for mma.m16n8k16" (and m16n8k8, which a T4 has).
"""

import triton.language as tl

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
