"""The lean step however the batch is cut: the same log-probabilities and gradients, within the budget."""

from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import LoraLayer
from step_cases import FAMILIES, difference, make_model, rollout, through

from nbhelpers import gpu, kernels
from nbhelpers.memory import micro_batches
from nbhelpers.memory.seconds import card_of, launch_tokens
from nbhelpers.models import families, patch
from nbhelpers.training import lean_step, packing, rehearsal


@pytest.mark.parametrize("family", FAMILIES)
def test_any_cut_gives_the_same(family):
    """Budgets from plenty to the least: all layers saved, some saved, inputs on the device, inputs offloaded, tiles."""
    model = make_model(family)
    rows, weights = rollout(groups=3, size=3)
    wanted_logps, wanted, (whole,) = through(model, rows, weights)
    assert whole.saved == 3
    seen = set()
    for share in (True, False):
        for gb in (6e-4, 2e-4, 1.2e-4, 0.9e-4, 0.7e-4):
            logps, got, parts = through(model, rows, weights, budget_gb=gb, share_prompts=share)
            assert difference(got, wanted) < 1e-5
            torch.testing.assert_close(logps, wanted_logps, rtol=1e-5, atol=1e-5)
            assert sorted(i for part in parts for i in part.rows) == list(range(9))
            assert max(part.peak for part in parts) <= gb * 1e9
            for part in parts:
                seen |= {("parts", len(parts) > 1), ("saved", min(part.saved, 1)), ("device", min(part.on_device, 1))}
                seen.add(("offloaded", part.saved + part.on_device < 3))
    assert seen == {("parts", True), ("parts", False), ("saved", 0), ("saved", 1), ("device", 0),
                    ("device", 1), ("offloaded", True), ("offloaded", False)}  # fmt: skip


def test_tiles_of_the_mlp_change_nothing(monkeypatch):
    model = make_model("phi3", intermediate_size=512)
    rows, weights = rollout(groups=2, size=4)
    _, wanted, _ = through(model, rows, weights)
    monkeypatch.setattr(micro_batches, "TILES", (16, 5))
    monkeypatch.setattr(lean_step, "TILES", (16, 5))
    _, got, parts = through(model, rows, weights, budget_gb=2e-4)
    assert {part.tile for part in parts} & {16, 5}, parts
    assert difference(got, wanted) < 1e-5
    logps, _ = lean_step.LeanStep(model).score(rows, weights.shape)
    whole, _, _ = through(model, rows, weights)
    torch.testing.assert_close(logps, whole, rtol=1e-5, atol=1e-5)


def test_a_shared_prompt_is_computed_once():
    rows, _ = rollout(groups=1, size=4)
    length, own = rows.rows[0].prompt_length, [row.completion_length - 1 for row in rows.rows]
    shared = packing.pack(rows, rows.rows, "cpu")
    apart = packing.pack(rows, rows.rows, "cpu", share=False)
    assert shared.ids.shape[1] == length + sum(own) and apart.ids.shape[1] == 4 * length + sum(own)
    assert shared.keys is not None and apart.keys is None
    lengths = [(r.prompt, r.prompt_length, r.completion_length) for r in rows.rows]
    for packed, share in ((shared, True), (apart, False)):
        keys = packed.ids.shape[1] if packed.keys is None else len(packed.keys.rows)
        assert micro_batches.count(lengths, share) == (packed.ids.shape[1], len(packed.source.rows), keys)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_model_on_the_kernels_already_and_under_autocast(family, hooked):
    """Qwen3's norms over the heads are fp32 here, and what they make of 16-bit heads has to meet 16-bit values."""
    model = make_model(family)
    patch.with_kernels(model)
    if hooked:
        for name, module in model.named_modules():
            if name.endswith(("q_norm", "k_norm", "input_layernorm")):
                module.register_forward_hook(lambda *_: None)
    rows, weights = rollout()
    _, wanted, _ = through(model, rows, weights)
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    _, got, _ = through(model, rows, weights, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert 1e-4 < difference(got, wanted) < 0.05
    with half:  # HF's Trainer has autocast on around the loss
        _, inside, _ = through(model, rows, weights, autocast=nullcontext)
    assert difference(inside, got) < 1e-6


def test_autocasts_cache_does_not_swallow_gradients():
    """A weight cast to bf16 while no gradient was wanted must not serve the part that wants one."""
    model = make_model("llama", lora=False)
    rows, weights = rollout(size=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lean_step.LeanStep(model).score(rows, weights.shape)
        _, got, _ = through(model, rows, weights, budget_gb=0.6e-4)
    assert all(gradient.norm() > 0 for gradient in got.values())


def test_what_cannot_fit_is_refused_with_the_numbers():
    one = lean_step.LeanStep(make_model(), budget_gb=1e-5)
    with pytest.raises(
        lean_step.CannotFit, match=r"completion of 12 tokens after a prompt of \d+ needs .* GB.*budget_gb"
    ):
        one.plan(rollout()[0].rows)
    for device in ("cpu", "cuda"):  # where launches are timed on a few tokens first
        one.device = torch.device(device)
        with pytest.raises(lean_step.CannotFit, match="completion of 200 tokens after a prompt of 100 "):
            rehearsal.rehearse(one, 4, 4, 100, 200)


@pytest.mark.parametrize("asked", ["plan", "available"])
def test_the_buffer_for_weights_counts_as_taken_when_the_room_is_measured(asked, monkeypatch):
    """Also where a generation has freed it since the step was made."""
    pytest.importorskip("triton")
    from nbhelpers.kernels.triton.lora_linear import _scratch

    one, there = lean_step.LeanStep(make_model()), []
    monkeypatch.setattr(one, "_scratch", 48)  # numbers; 0 on a CPU
    monkeypatch.setattr(one.room, "for_step", lambda coming: there.append(dict(_scratch)) or 1e9)
    kernels.free_scratch(one.device)
    one.plan(rollout()[0].rows) if asked == "plan" else one.available()
    assert [buffers[one.device, torch.float32].numel() for buffers in there] == [48]
    kernels.free_scratch(one.device)


def test_a_rehearsal_leaves_no_trace():
    model = make_model()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = torch.nn.Dropout(0.1)  # draws
    one, draws = lean_step.LeanStep(model, budget_gb=4e-4), torch.get_rng_state()
    parts = rehearsal.rehearse(one, 4, 2, 6, 10)
    assert sum(len(part.rows) for part in parts) == 4
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), draws)


def test_launches_are_timed_for_the_card_and_leave_no_trace(monkeypatch):
    """What is timed decides how batches are cut, not what comes out."""
    model = make_model()
    one = lean_step.LeanStep(model)
    assert one.cost.launches == 0  # a CPU
    assert rehearsal.time_launches(one) > 0 and one.cost.launches == 0
    monkeypatch.setattr(gpu, "cards", lambda: [gpu.Card("Tesla T4", int(15.8e9), (7, 5))])
    seconds = rehearsal.time_launches(one)
    wanted = launch_tokens(one.cost.architecture, card_of(15.8, "Tesla T4"), seconds)
    assert one.cost.launches == wanted > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_rehearsal_that_runs_out_of_memory_is_done_again_in_less_room(monkeypatch, capsys):
    model = make_model()
    one = lean_step.LeanStep(model, budget_gb=3e-4)
    planned, backward, calls = rehearsal.rehearse(one, 4, 2, 6, 10), one.decoder._differentiate, []

    def short_of_memory(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        backward(*arguments)

    monkeypatch.setattr(one.decoder, "_differentiate", short_of_memory)
    smaller = rehearsal.rehearse(one, 4, 2, 6, 10)
    assert "Out of memory" in capsys.readouterr().out and one.room.share == 0.8
    assert max(part.peak for part in smaller) < max(part.peak for part in planned)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("config, why", [
    ({"attention_dropout": 0.1}, "dropout"),
    ({"hidden_act": "gelu"}, "activation is gelu"),
    ({"sliding_window": 8}, "sliding window"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope"),
])  # fmt: skip
def test_models_that_it_refuses(config, why):
    model = make_model("mistral", lora=False, **config)
    assert why in families.why_not(model, "training")
    with pytest.raises(ValueError, match=why):
        lean_step.LeanStep(model)
