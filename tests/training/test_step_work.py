"""What a step does beside its arithmetic, counted: before its first launch the GPU waits for it."""

import order
import torch
from peft import LoraConfig
from step_cases import make_model, rollout
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nbhelpers.models import each
from nbhelpers.training import lean_step, packed_attention
from nbhelpers.training.packing import pack


def test_no_module_is_looked_at_before_the_first_launch(monkeypatch):
    # 15 ms of a step of an 8B with LoRA went into torch's walks through its 2,700 modules, with names, before that
    model = make_model()
    (rows, weights), step = rollout(), lean_step.LeanStep(model)
    seen = order.of_calls(monkeypatch, (nn.Module, "named_modules"), (each, "modules"), (step.decoder, "start"))
    step.retried(lambda: step.differentiate(rows, lambda logps, *_: logps.sum()))
    assert seen == ["start", "modules", "modules"]  # what is trained, and its hooks, once the GPU is at work
    seen.clear()
    step.score(rows, weights.shape)
    assert seen == ["start", "modules"]


def test_an_adapter_that_is_added_later_is_trained():
    model = make_model()
    (rows, _), step = rollout(), lean_step.LeanStep(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    model.set_adapter("second")
    step.retried(lambda: step.differentiate(rows, lambda logps, entropies, packed: logps.sum()))
    named = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert named and all(".second." in name for name in named)
    assert named == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_no_gradient_of_a_sequence_is_as_long_as_all():
    rows, _ = rollout()
    packed = pack(rows, rows.rows, "cpu")
    tokens = packed.ids.shape[1]
    q, k, v = (torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        packed_attention.attend(q, k, v, packed, 1.0, "rows").sum().backward()
    assert len(packed.sequences) > 2
    assert not any(event.key == "aten::slice_backward" for event in recorded.key_averages())
