"""PTX for products of NF4 weights with a few rows of x that never leave registers: undo the four bits, multiply, add.

    y[n, row] += sum_k x[n, k] code[q[row, k]] absmax[row, k // 64]       the weights rounded to 16 bits, as nf4.py does

The tensor cores' own instruction (mma) wants of each thread certain weights of a 16 x 16 tile: thread 4 g + t those of
rows g and g + 8 at four positions k. A sum does not ask for its order, so k may be dealt out otherwise, as long as x is
dealt out alike: here thread 4 g + t takes 32 weights that lie side by side, half a block with one absmax, in one load
of 16 bytes, and the 64 bytes of x's row g that go with them. Nothing passes through shared memory and nobody waits at a
barrier, which tl.dot cannot do: it would take each weight through shared memory, which then is the bottleneck.

Fragments: PTX ISA 9.7.14, "Matrix Fragments for mma.m16n8k16" (and m16n8k8, which a T4 has).
"""

import triton.language as tl

from .nf4_lookup import look_up, selectors, table


def _load(registers: list[str], address: str, read: str) -> str:
    """Fill registers, a multiple of four, from an address on, or with zeros where `read` is 0. Uses the predicate p."""
    lines = [f"setp.ne.b32 p, {read}, 0;", *(f"mov.b32 {register}, 0;" for register in registers)]
    for i in range(0, len(registers), 4):
        lines.append(f"@p ld.global.v4.b32 {{{', '.join(registers[i : i + 4])}}}, [{address} + {4 * i}];")
    return " ".join(lines)


LOAD = tl.constexpr("{.reg .pred p; " + _load(["$0", "$1", "$2", "$3"], "$4", "$5") + "}")


def product(eights: int, kind: str, wide: bool) -> tuple[str, str]:
    """The instructions for 16 rows of W and `eights` times 8 rows of x, and their operands in LLVM's terms.

    Operands, in this order: out, the sums, four for each eight; in, four words of row g and four of row g + 8, their
    two absmax, for each eight the address of x and whether to read it, and the sums so far.
    kind: "bf16" or "f16". wide: sixteen positions k an instruction (Ampere and later), or eight.
    """
    sums = 4 * eights
    words, scales, rows, before = sums, sums + 8, sums + 10, sums + 10 + 2 * eights
    lines = [".reg .pred p;", f".reg .b32 x<{16 * eights}>, g<8>, j<8>, s<2>, e<2>, a<4>, u, v, h, l;"]
    for n in range(eights):
        lines.append(_load([f"x{16 * n + i}" for i in range(16)], f"${rows + 2 * n}", f"${rows + 2 * n + 1}"))
    tables = [[f"{half}{i}" for i in range(8)] for half in "gj"]  # of row g, and of row g + 8
    lines += [table(kind, names, f"${scales + i}", wide) for i, names in enumerate(tables)]
    for step in range(8):  # four positions of this thread: half a word
        for i, names in enumerate(tables):
            s, e = f"s{i}", f"e{i}"
            if step % 2 == 0:
                lines.append(selectors(f"${words + 4 * i + step // 2}", s, e))
            else:
                lines.append(f"shr.u32 {s}, {s}, 16; shr.u32 {e}, {e}, 16;")
            lines.append(look_up(names, s, e, f"a{i}", f"a{i + 2}"))
        for n in range(eights):
            lines += _mma(4 * n, before + 4 * n if step == 0 else 4 * n, 16 * n + 2 * step, kind, wide)
    constraints = ["=&f"] * sums + ["r"] * 8 + ["f"] * 2 + ["l", "r"] * eights + ["f"] * sums
    return "{" + " ".join(lines) + "}", ",".join(constraints)


def _mma(sums: int, before: int, b: int, kind: str, wide: bool) -> list[str]:
    """The sums from $sums on: those from $before on, and the product of a0 to a3 with x{b} and x{b + 1}."""
    to, first = (", ".join(f"${start + i}" for i in range(4)) for start in (sums, before))
    name = f"mma.sync.aligned.m16n8k{16 if wide else 8}.row.col.f32.{kind}.{kind}.f32"
    if wide:
        return [f"{name} {{{to}}}, {{a0, a1, a2, a3}}, {{x{b}, x{b + 1}}}, {{{first}}};"]
    return [
        f"{name} {{{to}}}, {{a0, a1}}, {{x{b}}}, {{{first}}};",
        f"{name} {{{to}}}, {{a2, a3}}, {{x{b + 1}}}, {{{to}}};",
    ]
