"""A model's modules and parameters, found as torch finds them."""

import pytest
from step_cases import make_model
from torch import nn

from nbhelpers.models import each


def shared():
    """A module that stands twice, a parameter of two modules, and a child that is none."""
    one, two = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    two.weight = one.weight
    model = nn.Sequential(one, nn.Sequential(two, one), nn.Dropout(), nn.ParameterList([two.weight, nn.Parameter()]))
    model.register_module("none", None)
    return model


@pytest.mark.parametrize("make", [make_model, shared])
def test_in_torchs_order_and_each_once(make):
    model = make()
    assert list(map(id, each.modules(model))) == list(map(id, model.modules()))
    assert list(map(id, each.parameters(model))) == list(map(id, model.parameters()))
