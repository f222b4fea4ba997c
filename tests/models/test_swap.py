"""Layers that wait on the host: the same numbers bit for bit as without, on every way that reads a matrix.

On a CPU two layers share a place in memory as they do on a card, so a reader that does not ask for its layer reads
another's.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks import harness, random_model
from nbhelpers import presets
from nbhelpers.engines import Sampling
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.hf import HFEngine
from nbhelpers.memory import swapping
from nbhelpers.models import quantize, swap
from nbhelpers.training import packing
from nbhelpers.training.lean_step import LeanStep

SHAPE = replace(harness.small(presets.get("llama-3.1-8b").architecture), num_hidden_layers=5)


def made(count: int, quantise: bool = True, shape=SHAPE):
    return random_model.make(shape, torch.device("cpu"), torch.float32, 4, quantise, swapped=count)


def gradients(model, budget_gb=None):
    """Those of log-probabilities of six completions, and the log-probabilities."""
    generator = torch.Generator().manual_seed(5)
    ids, answers = (torch.randint(3, 300, (6, n), generator=generator) for n in (7, 12))
    batch = packing.unpad(ids, torch.ones_like(ids), answers, torch.ones_like(answers))
    step = LeanStep(model.train(), budget_gb=budget_gb)
    step.differentiate(batch, lambda logps, entropies, packed: -logps.sum())
    logps, _ = step.score(batch, (6, 12))
    saved = {micro_batch.saved for micro_batch in step.micro_batches}
    return [p.grad for p in model.parameters() if p.requires_grad], logps, saved


@pytest.mark.parametrize("quantise", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("budget", [None, 3e-4])
def test_the_training_half_is_the_same_bit_for_bit(count, quantise, budget):
    wanted, logps, saved = gradients(made(0, quantise), budget)
    assert saved == ({5} if budget is None else saved) and (budget is None or min(saved) < 5)
    got, swapped_logps, _ = gradients(made(count, quantise), budget)
    assert torch.equal(logps, swapped_logps)
    assert all(torch.equal(one, two) for one, two in zip(wanted, got, strict=True))


@pytest.mark.parametrize("engine", [GraphEngine, HFEngine])
def test_an_engine_writes_the_same(engine):
    prompts, sampling = [[5, 6, 7], [8, 9, 10, 11]], Sampling(max_tokens=9, num_generations=2, seed=1)
    wanted, got = ([c.token_ids for c in engine(made(count)).generate(prompts, sampling)] for count in (0, 3))
    assert got == wanted


def test_each_layer_is_copied_once_for_each_use_and_the_next_one_ahead():
    model = made(3)
    swapped = swap.of(model)
    each = swapped.host[0].nbytes
    assert swapped.host_bytes == 3 * each and len(swapped.places) == 2
    assert quantize.nbytes(model) == quantize.nbytes(made(0)) - sum(
        parameter.nbytes for parameter in swap.large(made(0, shape=replace(SHAPE, num_hidden_layers=1)))
        if parameter.dtype == torch.uint8
    )  # fmt: skip
    swapped.need(0, 1)
    assert swapped.holds == [0, 1] and swapped.moved == 2 * each
    swapped.need(1, 2)
    assert swapped.holds == [2, 1]
    swapped.need(2, 0)  # would stand where 2 is being used
    assert swapped.holds == [2, 1] and swapped.moved == 3 * each
    swapped.need(4, 0)  # is not swapped: 0 can come meanwhile
    assert swapped.holds == [0, 1] and swapped.moved == 4 * each


def test_a_copy_that_was_cut_short_is_made_again(monkeypatch):
    """Ctrl-C may fall between any two lines, and the next cell goes on with the same model."""
    model = made(4)
    swapped = swap.of(model)
    swapped.need(2)
    before, copy = swapped.places[0].clone(), torch.Tensor.copy_

    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", cut)
        with pytest.raises(KeyboardInterrupt):
            swapped.need(0)
    assert torch.Tensor.copy_ is copy and torch.equal(swapped.places[0], before)
    swapped.need(0)
    assert torch.equal(swapped.places[0][: len(swapped.host[0])], swapped.host[0])


def test_the_planner_counts_as_many_places():
    assert swap.PLACES == swapping.PLACES


def test_addresses_never_change():
    model = made(4)
    before = [p.data_ptr() for p in model.parameters()]
    gradients(model)
    assert before == [p.data_ptr() for p in model.parameters()]


def test_what_leaves_the_model_is_what_it_was():
    from nbhelpers.export import merge

    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        wanted, got = (merge.Merged(made(count)).read(name) for count in (0, 3))
        assert torch.equal(wanted, got)


def test_a_backward_of_transformers_own_and_trained_weights_are_refused():
    model = made(2)
    with pytest.raises(RuntimeError, match="only the lean step can train"):
        model(torch.tensor([[5, 6]]))
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[5, 6]])).logits, made(0)(torch.tensor([[5, 6]])).logits)
    whole = random_model.make(SHAPE, torch.device("cpu"), torch.float32, 0, False).requires_grad_(True)
    with pytest.raises(ValueError, match="trained cannot wait on the host"):
        swap.attach(whole, 2, torch.device("cpu"))
