"""How many launches a decoding step has beside its layers, counted on a card that is not there."""

from collections import Counter
from importlib import import_module

import interpreter
import pytest
import torch
from engine_models import make
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if interpreter.ON:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import no_card

from nbhelpers import kernels
from nbhelpers.engines import Sampling
from nbhelpers.engines.cuda_graphs import ModelRunner
from nbhelpers.engines.forward import Decoder
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.kv_cache import KVCache
from nbhelpers.kernels import ahead, decode_step
from nbhelpers.kernels.decode_step import Rows

FREE = {"empty", "empty_strided", "promote_types"}  # besides views


class Operations(TorchDispatchMode):
    """Notes PyTorch's operations, but not those that launch nothing: views and new memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        if not operation.is_view and name not in FREE:
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


@torch.no_grad()
def launches(layers, sampling, bits=16, name="qwen2"):
    """(Triton's, the names of PyTorch's) of one step."""
    model = make(name, four_bit=True, dtype=torch.bfloat16, layers=layers)
    decoder = Decoder(model)
    runner = ModelRunner(decoder, KVCache(decoder, bits), 4)
    runner.prepare(decoder, sampling)
    runner.cache.allocate(4, 32, 10**9)
    import_module("nbhelpers.kernels.triton.decode_attention").counters(decoder.device)  # made once
    with pytest.MonkeyPatch.context() as patch, no_card.played() as card, kernels.use("triton"):
        patch.setattr(ahead, "dry", lambda: True)  # what is not launched is noise
        with Operations() as operations:
            runner._step(4, 32)
    return card.launches, operations.names


def beside_the_layers(*case):
    """The same, without what another layer adds."""
    (one, names), (two, more) = launches(1, *case), launches(2, *case)
    return 2 * one - two, Counter(names) - (Counter(more) - Counter(names))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3"])
def test_a_step_has_five_kernels_beside_its_layers(name, bits, temperature):
    """The beginning, the last norm, the head's product, the race, the end."""
    sampling = Sampling(temperature=temperature, stop_ids=(5, 7))
    assert beside_the_layers(sampling, bits, name) == (5, {})


def test_other_draws_end_in_one_launch_too():
    triton, _ = beside_the_layers(Sampling(temperature=0.0))
    assert triton == 4  # no race


def test_a_step_begins_and_ends_in_one_variant_for_every_batch_and_its_stops():
    with no_card.played() as card, kernels.use("triton"):
        for count, stops in ((1, 0), (2, 1), (3, 2), (16, 16)):
            state, stops = torch.zeros(5, 16, dtype=torch.int64)[:, :count], torch.zeros(stops, dtype=torch.int64)
            results = torch.zeros(8, 16)[:, :count]
            rows = Rows(state, stops, torch.zeros(1, dtype=torch.int64), results.long(), results)
            decode_step.embed(rows, torch.zeros(97, 64), torch.zeros(48, 16), torch.zeros(6, dtype=torch.int64), 8)
            decode_step.append_drawn(rows, torch.zeros(count, 97), 0.5 + count)
    assert len(card.launched) == 3


def test_a_hooked_rotation_is_asked_in_each_step():
    model, seen = make("qwen2"), []
    wanted = GraphEngine(model).generate([[3, 4, 5]], Sampling(max_tokens=6, seed=1))
    model.get_base_model().model.rotary_emb.register_forward_hook(lambda *call: seen.append(call[1][1].tolist()))
    assert GraphEngine(model).generate([[3, 4, 5]], Sampling(max_tokens=6, seed=1)) == wanted
    assert seen[1:] == [[[0, 1, 2]], *([[position]] for position in range(3, 8))]  # behind the slot's own
