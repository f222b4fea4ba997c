"""A group that teaches nothing weighs exactly nothing, and is replaced where another one can be had."""

import pytest
import torch
from datasets import Dataset
from step_cases import make_model
from tiny_model import tokenizer

from nbhelpers import LeanGRPOConfig, LeanGRPOTrainer
from nbhelpers.training.signal_hooks import Difficulty, silent_groups, spliced
from nbhelpers.training.stop_when import StopWhen

G = 4


def trainer_of(folder, reward, rows=None, steps=2, stop_when=None, **settings):
    data = Dataset.from_dict(rows or {"prompt": [c * 3 for c in "abcdefgh"]})
    args = LeanGRPOConfig(
        str(folder), max_steps=steps, per_device_train_batch_size=2 * G, num_generations=G, max_completion_length=6,
        learning_rate=1e-2, save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, seed=3, **settings,
    )  # fmt: skip
    model = make_model()
    return LeanGRPOTrainer(
        model, [reward], args, data, processing_class=tokenizer(), engine="graph", stop_when=stop_when
    )


def test_silence_is_exact():
    """0.2 and 1.2 in fp32: their mean is rounded, so TRL's own advantages of such groups are not 0."""
    equal = torch.full((8,), 1.2)
    assert (equal - equal.mean()).abs().max() > 0  # else this test shows nothing
    nearly = torch.tensor([1.0] * 7 + [1.0 + 2**-20])
    unscored = torch.tensor([torch.nan] * 7 + [1.0])
    nothing = torch.full((8,), torch.nan)
    rewards = torch.cat([equal, nearly, unscored, nothing])
    assert silent_groups(rewards, 8).tolist() == [True, False, True, True]


@pytest.mark.parametrize("value", [0.2, 1.2])
def test_an_update_of_silent_groups_moves_nothing(tmp_path, value):
    def reward(completions, **_):
        return [value] * len(completions)

    one = trainer_of(tmp_path, reward)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    one.train()
    assert all(torch.equal(p, before[name]) for name, p in one.model.named_parameters())
    assert all(log["frac_reward_zero_std"] == 1.0 for log in one.state.log_history if "reward" in log)
    assert set(one._logs["advantages"]) == {0.0}


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_that_learns_nothing_is_ended_and_says_why(tmp_path, capsys, rounds):
    def reward(completions, **_):
        return [0.0] * len(completions)

    rows = {"prompt": ["abc", "bcd"] * 4, "answer": ["18"] * 8}
    one = trainer_of(tmp_path, reward, rows, steps=9, stop_when=StopWhen(silent_steps=3), dynamic_sampling=rounds)
    one.train()
    said = capsys.readouterr().out
    assert one.state.global_step == 3 and (tmp_path / "checkpoint-3").is_dir()  # nothing is lost
    assert "Stopped after step 3. For 3 steps all answers to a question got the same reward" in said
    assert "none is right, in whatever form" in said and 1 <= said.count("  the answer ") <= 3


@pytest.mark.parametrize("answer", ["18", 18, None])
def test_what_the_panel_watches_is_logged(tmp_path, answer):
    def reward(completions, **_):
        return [float(len(c)) for c in completions]

    one = trainer_of(tmp_path, reward, {"prompt": ["abc", "bcd"] * 4, "answer": [answer] * 8}, steps=1)
    one.train()
    log = one.state.log_history[0]
    assert 0.0 <= log["alike"] <= 1.0
    assert ("right" in log) == ("in_form" in log) == (answer is not None)


def test_silent_groups_are_replaced_before_the_update(tmp_path):
    """Only prompts of "a" have a signal: after a few rounds every group of the update is one of theirs."""

    def reward(prompts, completions, **_):
        return [float(len(c)) + hash(c) % 7 if p[0] == "a" else 1.0 for p, c in zip(prompts, completions, strict=True)]

    one = trainer_of(tmp_path, reward, {"prompt": ["aaa", "aab", "aac", "bbb", "ccc", "ddd"]}, dynamic_sampling=8)
    rollouts = []
    update = one._compute_loss
    one._compute_loss = lambda model, inputs: rollouts.append(inputs) or update(model, inputs)
    one.train()
    logs = [log for log in one.state.log_history if "reward" in log]
    assert sum(log["signal/replaced"] for log in logs) > 0
    for batch in rollouts:
        groups = batch["advantages"].view(-1, G)
        assert (groups.abs().amax(1) > 0).all(), "a silent group was left though others could be had"
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    # what is logged is the rollout as it was drawn first
    assert any(log["frac_reward_zero_std"] > 0 for log in logs)


def test_without_rounds_nothing_is_asked_twice(tmp_path):
    calls = []

    def reward(completions, **_):
        calls.append(len(completions))
        return [1.0] * len(completions)

    trainer_of(tmp_path, reward).train()
    assert calls == [2 * G, 2 * G]


def test_right_is_measured_and_not_rewarded(tmp_path):
    def reward(completions, **_):
        return [float(len(c)) for c in completions]

    rows = {"prompt": ["abc", "bcd"] * 4, "answer": ["x"] * 8}
    one = trainer_of(tmp_path, reward, rows)
    one.correct = lambda text, answer: answer == "x" and len(text) > 0
    one.train()
    logs = [log for log in one.state.log_history if "reward" in log]
    assert all(0 < log["right"] <= 1 and log["in_form"] == 0 for log in logs)


def test_rollouts_of_different_lengths_are_put_together():
    batch = {
        "prompt_ids": torch.arange(8).view(4, 2), "prompt_mask": torch.ones(4, 2), "completion_ids": torch.ones(4, 3),
        "completion_mask": torch.ones(4, 3), "advantages": torch.zeros(4), "num_items_in_batch": torch.tensor(12),
    }  # fmt: skip
    other = {
        "prompt_ids": torch.full((2, 3), 9), "prompt_mask": torch.ones(2, 3), "completion_ids": torch.full((2, 5), 7.0),
        "completion_mask": torch.ones(2, 5), "advantages": torch.tensor([1.0, -1.0]),
        "num_items_in_batch": torch.tensor(10),
    }  # fmt: skip
    made = spliced(batch, [2, 3], other, [0, 1], pad_token_id=5)
    assert made["prompt_ids"].tolist() == [[5, 0, 1], [5, 2, 3], [9, 9, 9], [9, 9, 9]]  # padded on the left
    assert made["prompt_mask"].tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert made["completion_ids"].tolist() == [[1, 1, 1, 5, 5]] * 2 + [[7] * 5] * 2
    assert made["completion_mask"].sum(1).tolist() == [3, 3, 5, 5]
    assert made["advantages"].tolist() == [0, 0, 1, -1]
    assert batch["advantages"].tolist() == [0, 0, 0, 0]  # the first rollout stays as it was


def test_a_replaced_group_takes_its_tools_mask_along():
    batch = {"completion_ids": torch.ones(2, 3), "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    other = {"completion_ids": torch.ones(1, 4), "completion_mask": torch.ones(1, 4, dtype=torch.long),
             "tool_mask": torch.tensor([[1, 0, 1, 1]])}  # fmt: skip
    made = spliced(batch, [1], other, [0], pad_token_id=5)
    assert (made["completion_mask"] * made["tool_mask"]).tolist() == [[1, 1, 1, 0], [1, 0, 1, 1]]
    made = spliced(other, [0], batch, [1], pad_token_id=5)
    assert (made["completion_mask"] * made["tool_mask"]).tolist() == [[1, 1, 0, 0]]


def test_what_was_silent_is_remembered():
    known = Difficulty()
    known.note(["one", [{"role": "user", "content": "two"}]], [True, False])
    assert known.was_silent("one") and not known.was_silent([{"role": "user", "content": "two"}])
    assert not known.was_silent("three")
