"""Sizes of launches, and whether a card has tensor cores for tl.dot.

triton.cdiv and triton.next_power_of_2 do the same at 2 us a call, as they also serve inside kernels; a decoder layer
makes some hundred such calls, and small models wait for Python more than for the GPU.
"""

from functools import cache

import torch


def ceil_div(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The card's compute capability; (0, 0) where there is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def tensor_cores(device: torch.device) -> bool:
    """Whether Triton's tl.dot has tensor cores there: from Ampere on; below, it becomes scalar multiplications."""
    return capability(device) >= (8, 0)


def turing(device: torch.device) -> bool:
    """Whether the card has tensor cores at all that inline PTX can use: a T4's, or later ones."""
    return capability(device) >= (7, 5)


def three(values, filler) -> tuple:
    """The values, filled up to three: a launch for one, two or three layers takes three of everything."""
    return (*values, *[filler] * (3 - len(values)))
