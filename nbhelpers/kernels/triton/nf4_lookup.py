"""Eight NF4 weights from one 32-bit word without a memory access, by `prmt`, PTX's byte permutation.

    W[i] = code[q[i]] * absmax[i // 64]       rounded to 16 bits, bit for bit as in nf4.py

A block of 64 weights has only 16 possible values: they are computed once, and each weight is one of them. Stored as
bytes they fill eight registers, four with the high bytes and four with the low ones. `prmt` selects four of eight bytes
by four 3-bit indices, which covers half of the table; one more `prmt` selects between the two halves.

Triton's interpreter does not execute PTX; there the same values come from the code table in memory.
"""

import os
import struct

import triton
import triton.language as tl

PTX = os.environ.get("TRITON_INTERPRET") != "1"
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip


def table(kind: str, names: list[str], absmax: str, pairs: bool = True) -> str:
    """PTX that computes a block's 16 possible weights.

    Args:
        kind (`str`): "bf16" or "f16".
        names (`list[str]`): Eight registers to write: four for the high bytes, then four for the low ones.
        absmax (`str`): The register with the block's absmax, fp32.
        pairs (`bool`): Convert two numbers per instruction, which a T4 cannot.
    """
    lines = [".reg .f32 f<16>;", ".reg .b32 p<8>;", ".reg .b16 q, r;"]
    for i, level in enumerate(NF4):  # .rn: never fused with another operation
        lines.append(f"mul.rn.f32 f{i}, {absmax}, 0f{struct.unpack('<I', struct.pack('<f', level))[0]:08X};")
    for i in range(8):
        if pairs:
            lines.append(f"cvt.rn.{kind}x2.f32 p{i}, f{2 * i + 1}, f{2 * i};")  # the second operand is the low half
        else:
            lines.append(f"cvt.rn.{kind}.f32 q, f{2 * i}; cvt.rn.{kind}.f32 r, f{2 * i + 1}; mov.b32 p{i}, {{q, r}};")
    for i in range(4):
        lines.append(f"prmt.b32 {names[i]}, p{2 * i}, p{2 * i + 1}, 0x7531;")
        lines.append(f"prmt.b32 {names[4 + i]}, p{2 * i}, p{2 * i + 1}, 0x6420;")
    return "{" + " ".join(lines) + "}"


def selectors(word: str, s: str, e: str) -> str:
    """PTX that splits `word`'s nibbles: s gets their three low bits; nibble i of e is i, plus 4 if bit 3 is set."""
    return (
        f"and.b32 {s}, {word}, 0x77777777; shr.u32 {e}, {word}, 1; "
        f"lop3.b32 {e}, {e}, 0x44444444, 0x32103210, 0xEA; "  # (e & 0x4..) | 0x3..
    )


def look_up(names: list[str], s: str, e: str, first: str, second: str) -> str:
    """PTX that looks up the weights of the four low nibbles, in row order: two in `first`, two in `second`.

    A byte's first weight is in its high half, so h and l have each pair in the wrong order: the last two `prmt` swap
    them. It overwrites the registers u, v, h and l.

    Args:
        names (`list[str]`): The eight registers of `table`.
        s (`str`): Register with the low bits, from `selectors`.
        e (`str`): Register with the halves, from `selectors`.
        first (`str`): Register to write the first two weights to.
        second (`str`): Register to write the other two to.
    """
    n = names
    return (
        f"prmt.b32 u, {n[0]}, {n[1]}, {s}; prmt.b32 v, {n[2]}, {n[3]}, {s}; prmt.b32 h, u, v, {e}; "
        f"prmt.b32 u, {n[4]}, {n[5]}, {s}; prmt.b32 v, {n[6]}, {n[7]}, {s}; prmt.b32 l, u, v, {e}; "
        f"prmt.b32 {first}, l, h, 0x4051; prmt.b32 {second}, l, h, 0x6273; "
    )


def _weights() -> str:
    """PTX from a word of nibbles $8 and the table $9 to $16 to the weights $0 to $7, in their order in the row."""
    names = [f"${i}" for i in range(9, 17)]
    four = look_up(names, "s", "e", "o", "p") + "mov.b32 {{${}, ${}}}, o; mov.b32 {{${}, ${}}}, p; "
    return (
        "{.reg .b32 s, e, u, v, h, l, o, p; " + selectors("$8", "s", "e") + four.format(0, 1, 2, 3)
        + "shr.u32 s, s, 16; shr.u32 e, e, 16; " + four.format(4, 5, 6, 7) + "}"
    )  # fmt: skip


TABLE_BF16 = tl.constexpr(table("bf16", [f"${i}" for i in range(8)], "$8"))
TABLE_FP16 = tl.constexpr(table("f16", [f"${i}" for i in range(8)], "$8"))
WEIGHTS = tl.constexpr(_weights())


@triton.jit
def eight_weights(words, absmax, code_ptr, dtype: tl.constexpr, PTX: tl.constexpr):
    """The weights in int32 words [C, W] with one absmax per row, fp32 [C]: eight tensors [C, W] of `dtype`."""
    if PTX:
        table: tl.constexpr = TABLE_BF16 if dtype == tl.bfloat16 else TABLE_FP16
        h0, h1, h2, h3, l0, l1, l2, l3 = tl.inline_asm_elementwise(
            table, "=r,=r,=r,=r,=r,=r,=r,=r,r", [absmax], dtype=[tl.int32] * 8, is_pure=True, pack=1
        )
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            WEIGHTS, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r",
            [words, h0[:, None], h1[:, None], h2[:, None], h3[:, None],
             l0[:, None], l1[:, None], l2[:, None], l3[:, None]],
            dtype=[tl.int16] * 8, is_pure=True, pack=1,
        )  # fmt: skip
        return (
            w0.to(dtype, bitcast=True), w1.to(dtype, bitcast=True), w2.to(dtype, bitcast=True),
            w3.to(dtype, bitcast=True), w4.to(dtype, bitcast=True), w5.to(dtype, bitcast=True),
            w6.to(dtype, bitcast=True), w7.to(dtype, bitcast=True),
        )  # fmt: skip
    else:
        a = absmax[:, None]
        return (
            (tl.load(code_ptr + (words >> 4 & 15)) * a).to(dtype),
            (tl.load(code_ptr + (words & 15)) * a).to(dtype),
            (tl.load(code_ptr + (words >> 12 & 15)) * a).to(dtype),
            (tl.load(code_ptr + (words >> 8 & 15)) * a).to(dtype),
            (tl.load(code_ptr + (words >> 20 & 15)) * a).to(dtype),
            (tl.load(code_ptr + (words >> 16 & 15)) * a).to(dtype),
            (tl.load(code_ptr + (words >> 28 & 15)) * a).to(dtype),
            (tl.load(code_ptr + (words >> 24 & 15)) * a).to(dtype),
        )
