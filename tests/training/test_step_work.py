"""What a step does beside its arithmetic, counted: before its first launch the GPU waits for it."""

import torch
from step_cases import make_model, rollout
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nbhelpers.training import lean_step, packed_attention
from nbhelpers.training.packing import pack


def test_a_step_asks_for_no_names_of_a_models_modules(monkeypatch):
    # torch's walk, which makes them, took 15 ms of a step of an 8B in all
    model = make_model()
    (rows, weights), step, walks = rollout(), lean_step.LeanStep(model), []
    named = nn.Module.named_modules

    def counted(module, *args, **more):
        walks.append(module)
        return named(module, *args, **more)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    step.retried(lambda: step.differentiate(rows, lambda logps, *_: logps.sum()))
    step.score(rows, weights.shape)
    assert not walks


def test_no_gradient_of_a_sequence_is_as_long_as_all():
    rows, _ = rollout()
    packed = pack(rows, rows.rows, "cpu")
    tokens = packed.ids.shape[1]
    q, k, v = (torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        packed_attention.attend(q, k, v, packed, 1.0, "rows").sum().backward()
    assert len(packed.sequences) > 2
    assert not any(event.key == "aten::slice_backward" for event in recorded.key_averages())
