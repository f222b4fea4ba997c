"""Weights that are no numbers: NaN or infinity in one tensor reaches every answer, and every update after it."""

from collections.abc import Iterable

import torch


def first_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if all are finite. Waits for a GPU once."""
    floats = [(name, tensor.detach()) for name, tensor in named if tensor.is_floating_point() and tensor.numel()]
    if not floats:
        return None
    largest = torch._foreach_norm([tensor for _, tensor in floats], torch.inf)
    finite = torch.stack([value.float() for value in largest]).isfinite()
    return None if bool(finite.all()) else floats[int(finite.logical_not().int().argmax())][0]


def refuse_non_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises ValueError for NaN or infinity in a tensor of floating point numbers: they reach every answer."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:  # on meta there are no numbers
        return
    if not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise ValueError(
            f"{name} holds NaN or infinity, so the model would write nonsense: the run that saved it had learned "
            "none, or float16 was too narrow for it. Take an earlier checkpoint, or another dtype"
        )
