"""The LoRA matrices of layers that read the same x, stacked into one pair in the dtype of the products, in one launch.

    A = [A1; A2; ..]                    [sum of r, in]                x A^T of all layers in one product
    B = diag(s1 B1, s2 B2, ..)          [sum of out, sum of r]        all outputs side by side in one product

s is the layers' scale. The master weights are mostly fp32, the products 16-bit; in torch this takes a cast, a
multiplication and a copy per matrix, and at these sizes (a few hundred kB) a launch costs more than moving the bytes.
The zeros off the diagonal cost next to nothing in a product that is bound by reading its wide side.

A prompt goes through all layers while the adapters do not change: `LayerAdapters` looks their matrices up in a table
that is made once, and stacks those of a whole layer in one launch.
"""

import struct
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import Projection, Stacked
from .common import MOST_PARTS, ceil_div, pad_to_three, power_of_2

ALIGNED = 64  # elements: where a matrix in the buffer may begin
A_BLOCK = 2048  # elements of A, and of B, that each program writes


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


@triton.jit(do_not_specialize=["layer"])
def _stack_layer(table_ptr, layer, like_ptr, out_ptr, PARTS: tl.constexpr, FIELDS: tl.constexpr,
                 EVEN: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, A_BLOCK: tl.constexpr):  # fmt: skip
    """A_BLOCK elements of A, and ROWS rows of B, of one part of the layer; like_ptr: one of the A's and B's."""
    entry = table_ptr + (layer * PARTS + tl.program_id(1)) * FIELDS
    a_ptr = tl.load(entry).to(tl.pointer_type(like_ptr.dtype.element_ty))
    b_ptr = tl.load(entry + 1).to(tl.pointer_type(like_ptr.dtype.element_ty))
    size, out, rank, column, columns = (
        tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    )  # fmt: skip
    a_at, b_at = tl.load(entry + 7), tl.load(entry + 8)
    scale = tl.load(entry + 9).to(tl.int32).to(tl.float32, bitcast=True)
    if EVEN:  # said to the compiler, for loads and stores of 16 bytes: an address that is looked up tells it nothing
        a_ptr, b_ptr = tl.multiple_of(a_ptr, 16), tl.multiple_of(b_ptr, 16)
        size, rank, column, columns = (
            tl.multiple_of(size, 8), tl.multiple_of(rank, 8), tl.multiple_of(column, 8), tl.multiple_of(columns, 8)
        )  # fmt: skip
        a_at, b_at = tl.multiple_of(a_at, 8), tl.multiple_of(b_at, 8)

    i = tl.program_id(0) * A_BLOCK + tl.arange(0, A_BLOCK)
    value = tl.load(a_ptr + i, i < size, 0.0).to(tl.float32)
    tl.store(out_ptr + a_at + i, value.to(out_ptr.dtype.element_ty), i < size)

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, RANKS)[None, :]
    own = (row < out) & (col >= column) & (col < column + rank)
    value = tl.load(b_ptr + row * rank + col - column, own, 0.0).to(tl.float32) * scale
    tl.store(out_ptr + b_at + row * columns + col, value.to(out_ptr.dtype.element_ty), (row < out) & (col < columns))


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


def stack_adapters(parts: Sequence[Projection], dtype: torch.dtype) -> Stacked:
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


class LayerAdapters:
    """The stacked LoRA matrices of one decoder layer after the other, in one buffer: those of a layer are valid until
    the next one's are asked for, on one stream.

    Args:
        layers (`Sequence[Sequence[Sequence[Projection]]]`): Of each layer the groups, of each group the parts.
        dtype (`torch.dtype`): Of the products.

    Tensors that are replaced need a new one of these; new numbers in them do not.
    """

    FIELDS = 10  # of a part, see _stack_layer

    def __init__(self, layers: Sequence[Sequence[Sequence[Projection]]], dtype: torch.dtype):
        tensors = _matrices(layers)
        self.like = tensors[0]
        places = [_Place(groups) for groups in layers]
        most = max(len(place.parts) for place in places)
        table = [place.parts + [(0,) * self.FIELDS] * (most - len(place.parts)) for place in places]
        device = self.like.device
        self.table = torch.tensor(table, dtype=torch.int64, device=device)  # [layers, parts, FIELDS]
        self.buffer = torch.empty(max(place.size for place in places), dtype=dtype, device=device)
        views = {place.views: place.of(self.buffer) for place in places}  # mostly the same for all layers
        self.views = [views[place.views] for place in places]
        self.columns = power_of_2(max(part[6] for place in places for part in place.parts))
        self.rows = max(1, A_BLOCK // self.columns)
        rest = [number for place in places for part in place.parts for number in (part[2], *part[4:9])]
        self.even = not any(t.data_ptr() % 16 for t in tensors) and not any(number % 8 for number in rest)
        sizes = [(ceil_div(part[2], A_BLOCK), ceil_div(part[3], self.rows)) for p in places for part in p.parts]
        self.grid = (max(map(max, sizes)), most)

    def of(self, layer: int) -> list[Stacked]:
        """What `stack_adapters` gives for each of the layer's groups. No autograd."""
        _stack_layer[self.grid](
            self.table, layer, self.like, self.buffer, self.grid[1], self.FIELDS, self.even, self.columns, self.rows,
            A_BLOCK,
        )  # fmt: skip
        return self.views[layer]


def _matrices(layers: Sequence[Sequence[Sequence[Projection]]]) -> list[Tensor]:
    """All A's and B's."""
    each = (part for groups in layers for parts in groups for part in parts)
    return [t for part in each for t in (part.lora_a, part.lora_b) if t is not None]


class _Place:
    """Where the stacked matrices of a layer's groups stand in the buffer."""

    def __init__(self, groups: Sequence[Sequence[Projection]]):
        self.parts: list[tuple[int, ...]] = []  # their entries in the table
        views: list[tuple[int, ...]] = []  # of each group: rank, in, out, and where A and B begin; () without a LoRA
        self.size = 0  # of the buffer so far, in elements
        for parts in groups:
            ranks = [0 if part.lora_a is None else len(part.lora_a) for part in parts]
            if not (rank := sum(ranks)):
                views.append(())
                continue
            out, inputs = sum(part.out_features for part in parts), parts[0].in_features
            a_at = self.size
            b_at = a_at + ALIGNED * ceil_div(rank * inputs, ALIGNED)
            self.size = b_at + ALIGNED * ceil_div(out * rank, ALIGNED)
            views.append((rank, inputs, out, a_at, b_at))
            column = 0
            for part, own in zip(parts, ranks, strict=True):
                (bits,) = struct.unpack("<i", struct.pack("<f", part.scale))
                a, b = (0 if t is None else t.data_ptr() for t in (part.lora_a, part.lora_b))
                self.parts.append(
                    (a, b, own * inputs, part.out_features, own, column, rank, a_at + column * inputs, b_at, bits)
                )
                column, b_at = column + own, b_at + part.out_features * rank
        self.views = tuple(views)

    def of(self, buffer: Tensor) -> list[Stacked]:
        """(A, B) of each group, as views."""
        pairs: list[Stacked] = []
        for view in self.views:
            if not view:
                pairs.append((None, None))
                continue
            rank, inputs, out, a_at, b_at = view
            a, b = buffer[a_at : a_at + rank * inputs], buffer[b_at : b_at + out * rank]
            pairs.append((a.view(rank, inputs), b.view(out, rank)))
        return pairs


def layer_adapters(
    layers: Sequence[Sequence[Sequence[Projection]]], dtype: torch.dtype
) -> Callable[[int], list[Stacked]] | None:
    """See nbhelpers.kernels.adapters.by_layer."""
    tensors = _matrices(layers)
    alike = len({(t.dtype, t.device) for t in tensors}) == 1 and all(t.is_contiguous() for t in tensors)
    return LayerAdapters(layers, dtype).of if alike else None
