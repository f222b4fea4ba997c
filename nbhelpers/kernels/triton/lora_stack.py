"""The LoRA matrices of layers that read the same x, stacked into one pair in the dtype of the products, in one launch.

    A = [A1; A2; ..]                    [sum of r, in]                x A^T of all layers in one product
    B = diag(s1 B1, s2 B2, ..)          [sum of out, sum of r]        all outputs side by side in one product

s is the layers' scale. The master weights are mostly fp32, the products 16-bit; in torch this takes a cast, a
multiplication and a copy per matrix, and at these sizes (a few hundred kB) a launch costs more than moving the bytes.
The zeros off the diagonal cost next to nothing in a product that is bound by reading its wide side.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import Projection
from .common import ceil_div, pad_to_three, power_of_2

A_BLOCK = 2048  # elements of A, and of B, that each program writes
MOST_PARTS = 3  # Q, K and V


@triton.jit
def _stack(
    a0_ptr, a1_ptr, a2_ptr, b0_ptr, b1_ptr, b2_ptr,  # A_i [r_i, in], B_i [out_i, r_i], contiguous
    a_ptr, b_ptr, scale0, scale1, scale2, inputs,
    o1, o2, o3,  # where the rows of B_0, B_1, B_2 end in b
    r1, r2, r3,  # and their columns (the rows of A_0, A_1, A_2 in a)
    RANKS: tl.constexpr, ROWS: tl.constexpr, A_BLOCK: tl.constexpr,
):  # fmt: skip
    """A_BLOCK elements of the stacked A, and ROWS rows of the stacked B, per program."""
    i = tl.program_id(0) * A_BLOCK + tl.arange(0, A_BLOCK)
    e1, e2, e3 = r1 * inputs, r2 * inputs, r3 * inputs
    value = tl.load(a0_ptr + i, i < e1, 0.0).to(tl.float32)
    value += tl.load(a1_ptr + i - e1, (i >= e1) & (i < e2), 0.0).to(tl.float32)
    value += tl.load(a2_ptr + i - e2, (i >= e2) & (i < e3), 0.0).to(tl.float32)
    tl.store(a_ptr + i, value.to(a_ptr.dtype.element_ty), i < e3)

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, RANKS)[None, :]
    value = tl.load(b0_ptr + row * r1 + col, (row < o1) & (col < r1), 0.0).to(tl.float32) * scale0
    mask = (row >= o1) & (row < o2) & (col >= r1) & (col < r2)
    value += tl.load(b1_ptr + (row - o1) * (r2 - r1) + col - r1, mask, 0.0).to(tl.float32) * scale1
    mask = (row >= o2) & (row < o3) & (col >= r2) & (col < r3)
    value += tl.load(b2_ptr + (row - o2) * (r3 - r2) + col - r2, mask, 0.0).to(tl.float32) * scale2
    tl.store(b_ptr + row * r3 + col, value.to(b_ptr.dtype.element_ty), (row < o3) & (col < r3))


@triton.jit
def whose(program, pieces, a0_ptr, a1_ptr, a2_ptr, R0, R1, R2):
    """Of the programs of a thin product, `pieces` for each of three parts: A, its rank, and where its columns begin."""
    a_ptr, rank, column = a0_ptr, R0, 0
    if program >= pieces:
        if program < 2 * pieces:
            a_ptr, rank, column = a1_ptr, R1, R0
        else:
            a_ptr, rank, column = a2_ptr, R2, R0 + R1
    return a_ptr, rank, column


def stack_adapters(parts: Sequence[Projection], dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(A, B) of the parts in `dtype`, or (None, None) if no part has a LoRA. No autograd.

    A part without a LoRA has rows of zeros in B. More than three parts are stacked by torch.
    """
    if all(part.lora_a is None for part in parts):
        return None, None
    if len(parts) > MOST_PARTS:
        return reference.stack_adapters(parts, dtype)
    first = next(part.lora_a for part in parts if part.lora_a is not None)
    a_list, b_list, scales, outs, ranks, out, rank = [], [], [], [], [], 0, 0
    for part in parts:
        a_list.append(first if part.lora_a is None else part.lora_a.contiguous())
        b_list.append(first if part.lora_b is None else part.lora_b.contiguous())
        scales.append(float(part.scale))
        out, rank = out + part.out_features, rank + (0 if part.lora_a is None else len(part.lora_a))
        outs.append(out)
        ranks.append(rank)
    inputs = first.shape[1]
    a = torch.empty(rank, inputs, dtype=dtype, device=first.device)
    b = torch.empty(out, rank, dtype=dtype, device=first.device)
    # what three parts of such ranks would take, also for one or two of them: fewer kernels to compile
    columns = power_of_2(MOST_PARTS * max(0 if part.lora_a is None else len(part.lora_a) for part in parts))
    rows = max(1, A_BLOCK // columns)
    values = (a_list, b_list, scales, outs, ranks)
    padded = [pad_to_three(each, each[-1]) for each in values]  # the last repeated: a part of no rows and no columns
    _stack[(max(ceil_div(rank * inputs, A_BLOCK), ceil_div(out, rows)),)](
        *padded[0], *padded[1], a, b, *padded[2], inputs, *padded[3], *padded[4],
        RANKS=columns, ROWS=rows, A_BLOCK=A_BLOCK,
    )  # fmt: skip
    return a, b
