"""The trainer on the workshop model: defaults, refusals, guarded rewards, interrupts, and TRL's advantages."""

import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from nbhelpers import grpo, host, tasks, trainer
from nbhelpers.guard import RewardError
from nbhelpers.presets import WORKSHOP
from nbhelpers.rewards import correctness, tag_count

TASK = tasks.decimals(n_train=64, n_test=4)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


def make(model, tokenizer, folder, reward_funcs, **changes):
    callbacks = changes.pop("callbacks", None)
    args = trainer.LeanGRPOConfig(
        str(folder), max_steps=3, per_device_train_batch_size=8, num_generations=4, max_completion_length=48,
        learning_rate=1e-4, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, **changes,
    )  # fmt: skip
    return trainer.LeanGRPOTrainer(
        model, reward_funcs, args, TASK.train, processing_class=tokenizer, callbacks=callbacks
    )


class At(TrainerCallback):
    """Does something at the end of one step, and remembers that the run was closed."""

    def __init__(self, step, action):
        self.step, self.action, self.ended = step, action, 0

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()

    def on_train_end(self, args, state, control, **_):
        self.ended += 1


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise OSError("the disk is full")


def test_the_defaults_fit_this_machine(tmp_path):
    args = trainer.LeanGRPOConfig(str(tmp_path))
    assert (args.use_cpu, args.bf16, args.fp16) == (not torch.cuda.is_available(), torch.cuda.is_available(), False)
    assert args.report_to == [] and args.logging_steps == 1
    assert not trainer.LeanGRPOConfig(str(tmp_path), bf16=False).bf16  # what is asked for is left alone


@pytest.mark.parametrize("capability, bf16", [((7, 5), False), ((8, 0), True)])
def test_a_t4_gets_fp16_and_an_a100_bf16(monkeypatch, capability, bf16):
    monkeypatch.setattr(host, "cards", lambda: [host.Card("a card", 16 * 10**9, 15 * 10**9, capability)])
    assert trainer.precision() == {"bf16": bf16, "fp16": not bf16, "use_cpu": False}


def test_what_would_fail_late_is_refused_at_once(model):
    rows = TASK.train
    for data, message in [
        (None, "is empty"),
        (rows.select([]), "is empty"),
        (rows.rename_column("prompt", "q"), "no 'prompt'"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer.check(model, data, None)
    model.half()
    with pytest.raises(ValueError, match=r"fp32 master weights.*model\.embed_tokens\.weight"):
        trainer.check(model, rows, SimpleNamespace(fp16=True))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        trainer.check(model, rows, None)


def test_samples_carry_the_rollout_and_its_group_advantages(model, tokenizer, tmp_path):
    run = make(model, tokenizer, tmp_path, [correctness, tag_count])
    assert run.train().global_step == 3
    samples = run.state.samples
    assert len(samples) == 8 and {s.prompt for s in samples} <= {row["prompt"][-1]["content"] for row in TASK.train}
    assert all(set(s.rewards) == {"correctness", "tag_count"} for s in samples)
    total = torch.tensor([sum(s.rewards.values()) for s in samples])
    wanted = grpo.group_advantages(total, 4)
    torch.testing.assert_close(torch.tensor([s.advantage for s in samples]), wanted, atol=1e-4, rtol=1e-4)


def test_one_exception_does_not_end_the_run(model, tokenizer, tmp_path):
    calls = []

    def moody(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("division by zero")
        return [float(i % 2) for i in range(len(completions))]

    with pytest.warns(RuntimeWarning, match="'moody' failed with ZeroDivisionError"):
        assert make(model, tokenizer, tmp_path, [moody, tag_count]).train().global_step == 3
    assert len(calls) == 3


def test_a_wrong_length_is_refused_by_name_and_loses_nothing(model, tokenizer, tmp_path, capsys):
    steps = []

    def short(completions, **_):
        steps.append(1)
        return [1.0] * (len(completions) - (len(steps) == 3))

    with pytest.raises(RewardError, match="'short' returned 7 rewards for 8 completions"):
        make(model, tokenizer, tmp_path, short).train()
    assert "Step 3 failed. What was learned until then is in" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None


def test_an_interrupt_keeps_what_was_learned_and_the_next_cell_works(model, tokenizer, tmp_path, capsys):
    stop = At(2, interrupt)
    run = make(model, tokenizer, tmp_path, [correctness, tag_count], callbacks=[stop])
    result = run.train()
    assert result.metrics == {"interrupted": True} and result.global_step == 2 and stop.ended == 1
    assert "Stopped by you after step 2" in capsys.readouterr().out
    assert len([entry for entry in run.state.log_history if "reward" in entry]) >= 1
    kept = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, kept.state_dict()[name]), name
    assert (tmp_path / "trainer_state.json").exists()
    ids = tokenizer("9.11", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=2).shape == (1, ids.shape[1] + 2)
    stop.step = None
    assert run.train().global_step == 3  # and it can be started again


def test_an_error_keeps_what_was_learned_and_is_not_swallowed(model, tokenizer, tmp_path, capsys):
    with pytest.raises(OSError, match="the disk is full"):
        make(model, tokenizer, tmp_path, correctness, callbacks=[At(1, fail)]).train()
    assert "Step 2 failed" in capsys.readouterr().out and (tmp_path / "model.safetensors").exists()


def test_an_untested_trl_is_named(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "version", lambda _: "1.20.0")
    with pytest.warns(UserWarning, match=r"trl 1\.20\.0 is outside the tested range"):
        make(model, tokenizer, tmp_path, correctness)


def test_plain_text_prompts_work_too(model, tokenizer, tmp_path):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    data = Dataset.from_dict({"prompt": ["Which is bigger? 3.4 or 3.41?"] * 8, "answer": ["3.41"] * 8})
    args = trainer.LeanGRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    run = trainer.LeanGRPOTrainer(model, [correctness], args, data, processing_class=tokenizer)
    run.train()
    assert run.state.samples[0].prompt == "Which is bigger? 3.4 or 3.41?"
