"""What ends a run: silence, a task that is solved, a reward that is gamed; on logs as runs have left them."""

from dataclasses import replace

import pytest
from transformers import TrainerControl, TrainerState

from nbhelpers.rewards import Sample
from nbhelpers.training.stop_when import SILENCE, Stopper, StopWhen

PLACEHOLDER = "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"


def logs(steps, **series):
    """`steps` logged steps; a pair goes in a straight line from one value to the other, a number stays."""
    base = {"reward": 0.5, "frac_reward_zero_std": 0.2, "right": 0.4, "in_form": 0.5, "completions/mean_length": 150.0}
    return [
        {
            name: value[0] + (value[1] - value[0]) * i / max(1, steps - 1) if isinstance(value, tuple) else value
            for name, value in (base | {key.replace("__", "/"): v for key, v in series.items()}).items()
        }
        for i in range(steps)
    ]


def first_stop(history, samples=(), rules=None):
    """(the step at which the run ends, why); (None, None) if it goes on to its end."""
    rules = rules or StopWhen()
    for step in range(1, len(history) + 1):
        if (reason := rules.reason(history[:step], samples)) is not None:
            return step, reason
    return None, None


def test_the_notebook_that_wasted_a_night_ends_within_twelve_steps():
    """As it was seen: reward 0.00 at every step, though 30 % of the answers were right, none of them in the tags."""
    step, reason = first_stop(logs(100, reward=0.0, frac_reward_zero_std=1.0, right=0.3, in_form=0.0))
    assert step == 10
    assert "30% of them are right, but not in a form that the rewards read (0% in form)" in reason


def test_silence_says_too_hard_or_too_easy():
    assert "too hard" in first_stop(logs(20, frac_reward_zero_std=1.0, right=0.0, reward=0.0))[1]
    assert "too easy" in first_stop(logs(20, frac_reward_zero_std=1.0, right=1.0, reward=1.0))[1]


def test_one_group_with_a_signal_breaks_the_silence():
    history = logs(40, frac_reward_zero_std=1.0, right=0.02)
    for i in range(0, 40, 9):
        history[i]["frac_reward_zero_std"] = 0.75
    assert first_stop(history) == (None, None)
    assert first_stop(history, rules=StopWhen(silent_steps=5))[0] == 6


def test_a_task_that_is_solved():
    step, reason = first_stop(logs(60, right=(0.9, 1.0), reward=(0.9, 1.0), frac_reward_zero_std=0.6))
    assert "The task is solved" in reason and step > 40


def test_a_model_that_learned_the_placeholder():
    """SmolLM2-135M with form paid by parts, as it was seen: reward 0 to 0.30, form 99 %, right 0 %, 22 tokens."""
    history = logs(70, reward=(0.0, 0.3), right=0.0, in_form=(0.0, 0.99), completions__mean_length=(180.0, 22.0),
                   rewards__correct__mean=0.0, rewards__in_form__mean=(0.0, 0.3))  # fmt: skip
    step, reason = first_stop(history, [Sample("q", PLACEHOLDER, {"in_form": 0.3})] * 8)
    assert 40 <= step <= 60
    assert "right answers did not" in reason and "8 of the newest 8 are the same text" in reason
    assert "close the hole in in_form" in reason


@pytest.mark.parametrize("changes", [
    {"right": (0.3, 0.6), "in_form": (0.2, 1.0)},  # it learns
    {"right": (0.3, 0.34), "in_form": (0.2, 1.0)},  # it learns slowly
    {"right": 0.3, "in_form": (0.2, 0.6)},  # the form first: no sign of gaming yet
    {"right": 0.3, "in_form": 0.5, "reward": 0.5},  # flat
    {"right": 0.85, "in_form": (0.8, 1.0), "completions/mean_length": (1500.0, 400.0)},  # a reasoner learns to be brief
])  # fmt: skip
def test_an_honest_run_goes_on(changes):
    assert first_stop(logs(80, **({"reward": (0.3, 0.7)} | changes))) == (None, None)


def test_brevity_at_the_price_of_right_answers_is_gaming():
    history = logs(80, reward=(0.3, 0.7), right=(0.9, 0.6), in_form=1.0, completions__mean_length=(1500.0, 100.0))
    step, reason = first_stop(history)
    assert step < 80 and "right answers did not (86% before, 79% now)" in reason


def test_each_rule_can_be_switched_off():
    history = logs(100, reward=0.0, frac_reward_zero_std=1.0, right=0.0, in_form=0.0)
    assert first_stop(history, rules=replace(StopWhen(), silent_steps=None)) == (None, None)
    with pytest.raises(ValueError, match="silent_steps=1"):
        StopWhen(silent_steps=1)


def test_silence_without_known_answers_says_nothing_of_right_ones():
    history = [{k: v for k, v in log.items() if k not in ("right", "in_form")} for log in logs(20)]
    _, reason = first_stop([log | {"frac_reward_zero_std": 1.0} for log in history])
    assert "rewards tell better answers from worse ones" in reason and "right, in" not in reason


def test_a_run_without_rules_is_told_once_and_goes_on(capsys):
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    told = Stopper(SILENCE, ends=False)
    told.on_train_begin(None, state, control)
    for step, log in enumerate(logs(40, frac_reward_zero_std=1.0, right=0.0), start=1):
        state.global_step, state.log_history = step, [*state.log_history, log]
        told.on_log(None, state, control)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("Step 15: For 15 steps all answers to a question got the same reward")
    assert said[0].endswith("The run goes on; stop_when=StopWhen() would end it.")
    assert not control.should_training_stop and not control.should_save


def test_only_silence_is_told_without_rules():
    assert first_stop(logs(60, right=1.0, reward=1.0, frac_reward_zero_std=0.9), rules=SILENCE) == (None, None)
    gamed = logs(80, reward=(0.3, 0.7), right=(0.9, 0.6), in_form=1.0, completions__mean_length=(1500.0, 100.0))
    assert first_stop(gamed, rules=SILENCE) == (None, None)
