"""The peer's training half is measured as its users run it."""

from types import SimpleNamespace

import torch

from benchmarks import harness, random_model
from benchmarks.step import trl
from nbhelpers import presets


def test_the_peer_checkpoints_its_layers(tmp_path):
    shape = harness.small(presets.get("qwen2.5-1.5b").architecture)
    model = random_model.make(shape, torch.device("cpu"), torch.float32, quantise=False)
    one = trl.trainer(SimpleNamespace(group=2, cuda=False), model)
    layers = one.model.get_base_model().model.layers
    assert one.model.training and all(layer.gradient_checkpointing for layer in layers)
