"""Rows taken out of a tensor, some of them several times, as the keys of a prompt that several completions share.

Their gradients are summed in fp32 and rounded once, and in the same order every time.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.cuda import device_of

from . import _for


class Taken(NamedTuple):
    """Which rows of T are taken, and where each of them goes."""

    rows: Tensor  # int64 [n]
    places: Tensor  # int64 [n], where in `rows` each row is, the places of one row side by side
    first: Tensor  # int64 [T + 1], where those of each row begin in `places`, and the last ones end

    @classmethod
    def of(cls, rows: Tensor, total: int) -> "Taken":
        """Of rows int64 [n] out of `total`."""
        return cls(rows, rows.argsort(stable=True), F.pad(rows.bincount(minlength=total).cumsum(0), (1, 0)))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Taken) -> Tensor:
        ctx.taken = taken  # indices, which have no gradient: autograd need not know them
        return x.index_select(0, taken.rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with device_of(grad):
            return _for(grad).sum_rows(grad, ctx.taken.places, ctx.taken.first), None


def take(x: Tensor, taken: Taken) -> Tensor:
    """The rows of x [T, ...] that `taken` names: [n, ...]."""
    return _Take.apply(x, taken)
