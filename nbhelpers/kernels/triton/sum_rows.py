"""Rows of x added up in groups, in fp32: the gradient of rows of which some were taken several times.

    y[i] = sum over j in first[i] .. first[i + 1] - 1 of x[places[j]]

One program for a piece of each y[i]: the rows of a group are added in their order, so it gives the same every time,
which atomic additions (torch's index_add_ on a GPU) do not; and what is 16-bit is read and written once, with no fp32
copy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import ceil_div, power_of_2

BLOCK = 1024  # 4 warps, one load of 16 bytes per thread


@triton.jit
def _sum_rows(x_ptr, places_ptr, first_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(tl.load(first_ptr + row), tl.load(first_ptr + row + 1)):
        total += tl.load(x_ptr + tl.load(places_ptr + j) * width + col, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + row * width + col, total.to(y_ptr.dtype.element_ty), mask)


def sum_rows(x: Tensor, places: Tensor, first: Tensor) -> Tensor:
    """The sums of the module's first line, without autograd.

    Args:
        x (`Tensor`): [n, ...].
        places (`Tensor`): int64 [m], rows of x, those of a group side by side.
        first (`Tensor`): int64 [groups + 1], where each group begins in `places`, and the last one ends.

    Returns [groups, ...] in x's dtype; 0 for a group of none.
    """
    x = x.contiguous()
    y = torch.empty(len(first) - 1, *x.shape[1:], dtype=x.dtype, device=x.device)
    width = y[0].numel() if len(y) else 0
    if width:
        block = min(BLOCK, power_of_2(width))
        _sum_rows[(len(y), ceil_div(width, block))](
            x, places, first, y, width, BLOCK=block, num_warps=max(1, block // 256)
        )
    return y
