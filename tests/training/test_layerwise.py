"""The walk through a decoder on Triton's own kernels, which write over what they are given: in the interpreter."""

import interpreter  # first: before anything that imports triton
import pytest
import torch
from step_cases import difference, make_model, rollout, through

from nbhelpers import kernels
from nbhelpers.memory import micro_batches


class TestOnTheKernels:
    """The kernels write over what they were given where they may: the walk must not need it any more."""

    __test__ = interpreter.ON

    @pytest.mark.parametrize("family", ["qwen2", "phi3"])
    def test_gradients_are_those_of_plain_torch(self, family, monkeypatch):
        model = make_model(family, num_hidden_layers=2)
        rows, weights = rollout(groups=1, size=3)
        wanted_logps, wanted, _ = through(model, rows, weights)
        monkeypatch.setattr(micro_batches, "TILES", (8, 8))
        for gb in (None, 0.5e-4):
            with kernels.use("triton"):
                logps, got, parts = through(model, rows, weights, budget_gb=gb)
            assert (parts[0].saved == 2) == (gb is None), parts
            torch.testing.assert_close(logps, wanted_logps, rtol=1e-5, atol=1e-5)
            assert difference(got, wanted) < 1e-5


def test_in_the_interpreter():
    interpreter.run(__file__)
