"""Layers that wait on the host (models/swap.py): the bytes that this frees, and those that it moves."""

from math import ceil

from nbhelpers.architecture import Architecture

PLACES = 2  # layers that stand on the card, as models/swap.py has them: it needs torch, and the planner none


def layer_bytes(a: Architecture, quantization: str) -> int:
    """Bytes of a layer that is swapped: its matrices, without the scales of NF4; "dynamic" as if all were in 4 bits."""
    numbers = sum(m.out_features * m.in_features for m in a.linears())
    return 2 * numbers if quantization == "none" else ceil(numbers / 2)


def freed_bytes(a: Architecture, quantization: str, swapped: int) -> int:
    """Bytes that the card has more when the first `swapped` layers wait on the host."""
    return max(0, swapped - PLACES) * layer_bytes(a, quantization)


def moved_bytes(a: Architecture, quantization: str, swapped: int, walks: int) -> int:
    """Bytes that `walks` walks through all layers copy to the card. Two layers have a place each, and stay there."""
    return walks * swapped * layer_bytes(a, quantization) if swapped > PLACES else 0
