"""Every weight trained in bf16: the optimizer that is taken, exact clipping, one set of weights, a run that goes on."""

import pytest
import torch
from resume_cases import PLAIN, At, curve, make, same, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbhelpers.presets import WORKSHOP
from nbhelpers.training.rounded_adam import RoundedAdamW
from nbhelpers.training.whole_hooks import gradient_norm

WHOLE = {**PLAIN, "optim": "adamw_8bit", "learning_rate": 1e-4, "beta": 0.0, "engine": "graph"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


def run_of(tokenizer, folder, *callbacks, dtype=torch.bfloat16, **changes):
    model = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=dtype)
    return make(tokenizer, folder, *callbacks, model=model, **{**WHOLE, **changes})


def test_a_stopped_run_goes_on_bit_for_bit(tokenizer, tmp_path, capsys):
    whole = run_of(tokenizer, tmp_path / "whole")
    start = weights(whole)
    addresses = [p.data_ptr() for p in whole.model.parameters()]
    whole.train()
    ours = whole.optimizer.optimizer
    assert isinstance(ours, RoundedAdamW) and ours.bits == 8 and whole.lean
    assert all(p.dtype == torch.bfloat16 for p in whole.model.parameters())
    assert addresses == [p.data_ptr() for p in whole.model.parameters()], "the engine reads the very same tensors"
    assert not any(torch.equal(start[name], p) for name, p in weights(whole).items() if "proj.weight" in name)
    run_of(tokenizer, tmp_path / "cut", At(4, KeyboardInterrupt)).train()
    resumed = run_of(tokenizer, tmp_path / "cut")
    resumed.train(resume_from_checkpoint="auto")
    assert same(weights(resumed), weights(whole)) and curve(resumed)[-3:] == curve(whole)[-3:]
    assert {value.dtype for value in resumed.optimizer.optimizer.state[resumed.model.lm_head.weight].values()} == {
        torch.uint8, torch.float32,
    }  # fmt: skip


def test_the_clipping_is_that_of_fp32(tokenizer, tmp_path):
    run = run_of(tokenizer, tmp_path, max_grad_norm=0.25)
    run.create_optimizer()
    for parameter in run.model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
    kept = [p.grad.clone() for p in run.model.parameters()]
    wanted = sum(p.grad.double().square().sum() for p in run.model.parameters()).sqrt().item()
    assert gradient_norm(run.model).item() == pytest.approx(wanted, rel=1e-5)
    norm = run._clip_grad_norm(run.model)
    assert norm.item() == pytest.approx(wanted, rel=1e-5)
    assert all(torch.equal(p.grad, k) for p, k in zip(run.model.parameters(), kept, strict=True)), "not rounded again"
    assert {group["gradient_factor"] for group in run.optimizer.param_groups} == {0.25 / (norm.item() + 1e-6)}


def test_an_update_without_gradients_is_skipped_and_counts_for_nothing(tokenizer, tmp_path):
    """A step whose gradients are not finite loses them all, and transformers clips and steps all the same."""
    run = run_of(tokenizer, tmp_path, max_steps=3)
    before, left = weights(run), []
    ours = run._check_gradients

    def overflowed():
        if run.state.global_step == 0:
            next(p for p in run.model.parameters() if p.grad is not None).grad.fill_(torch.inf)
        ours()
        left.append(sum(p.grad is not None for p in run.model.parameters()))

    run._check_gradients = overflowed
    run.train()
    assert left[0] == 0 and run.skipped_steps == 1
    assert not same(weights(run), before), "the other two learned"
    assert {group["updates"] for group in run.optimizer.param_groups} == {2}


def test_the_optimizers_memory_counts_as_coming_until_its_first_update(tokenizer, tmp_path):
    run = run_of(tokenizer, tmp_path)
    coming = run._pending_optimizer_bytes()
    run.optimizer = run.accelerator.prepare(run.create_optimizer())  # accelerate loads its empty state once
    assert coming > 0 and run._pending_optimizer_bytes() == coming


def test_fp32_weights_keep_their_optimizer_and_others_than_adamw_are_refused(tokenizer, tmp_path):
    assert not isinstance(run_of(tokenizer, tmp_path, dtype=torch.float32, optim="adamw_torch").create_optimizer(),
                          RoundedAdamW)  # fmt: skip
    assert run_of(tokenizer, tmp_path, optim="adamw_torch").create_optimizer().bits == 32
    with pytest.raises(ValueError, match="optim='sgd' would round small steps away: set optim='adamw_8bit'"):
        run_of(tokenizer, tmp_path, optim="sgd").create_optimizer()


def test_a_card_without_bf16_refuses_weights_in_it(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"trainable parameters are torch\.bfloat16, the first is model\.embed"):
        run_of(tokenizer, tmp_path, fp16=True, bf16=False)
