"""Weights that are no numbers: NaN or infinity in one tensor reaches every answer, and every update after it."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch


def stored(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each in a safetensors file, one in memory at a time. SafetensorError if it is cut off."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is no dict
            yield name, tensors.get_tensor(name)


def first_not_finite(named: Iterable[tuple[str, torch.Tensor]], order: float = torch.inf) -> str | None:
    """The name of the first tensor whose norm of that order is not finite; None if all are. Waits for a GPU once.

    Of infinite order it is the largest number, so what is found holds NaN or infinity.
    """
    floats = [(name, tensor.detach()) for name, tensor in named if tensor.is_floating_point() and tensor.numel()]
    if not floats:
        return None
    norms = torch._foreach_norm([tensor for _, tensor in floats], order)
    finite = torch.stack([value.float() for value in norms]).isfinite()
    return None if bool(finite.all()) else floats[int(finite.logical_not().int().argmax())][0]


class Extremes:
    """NaN and infinity in many tensors, looked for where each is and asked about once: a card is waited for once."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._finite: list[torch.Tensor] = []  # of each, a bool on its device

    def add(self, tensor: torch.Tensor, name: str) -> None:
        """Look at a tensor, which may be changed or gone afterwards."""
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:  # on meta there are no numbers
            return
        self._names.append(name)
        self._finite.append(torch.stack(torch.aminmax(tensor)).isfinite().all())

    def refuse(self) -> None:
        """Raises ValueError for NaN or infinity in one of the tensors: they reach every answer."""
        if not self._names or bool((finite := torch.stack(self._finite)).all()):
            return
        raise ValueError(
            f"{self._names[int(finite.logical_not().int().argmax())]} holds NaN or infinity, so the model would write "
            "nonsense: the run that saved it had learned none, or float16 was too narrow for it. Take an earlier "
            "checkpoint, or another dtype"
        )


def refuse_non_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises ValueError for NaN or infinity in a tensor of floating point numbers."""
    extremes = Extremes()
    extremes.add(tensor, name)
    extremes.refuse()
