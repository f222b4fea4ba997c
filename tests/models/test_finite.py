"""NaN and infinity in a checkpoint's tensors: the first one is named, and a tensor may be gone by then."""

import pytest
import torch

from nbhelpers.models.finite import Extremes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_is_named_in_the_end(value):
    extremes = Extremes()
    for name in ("a", "b", "c"):
        tensor = torch.zeros(4, 3, dtype=torch.bfloat16)
        if name != "a":
            tensor[2, 1] = value
        extremes.add(tensor, name)
        tensor.zero_()
    with pytest.raises(ValueError, match="b holds NaN or infinity"):
        extremes.refuse()


def test_what_has_no_such_numbers_is_fine():
    extremes = Extremes()
    for tensor in (torch.ones(3), torch.ones(2, dtype=torch.uint8), torch.empty(0), torch.empty(2, device="meta")):
        extremes.add(tensor, "fine")
    extremes.refuse()
