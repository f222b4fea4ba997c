"""A reward that is gamed is seen, by logs as runs have left them; an honest run is left alone."""

# ruff: noqa: F811  (fixtures)

import json
from types import SimpleNamespace

import pytest
from panel_cases import newest, run, shown  # noqa: F401
from transformers import TrainerControl, TrainerState

from nbhelpers import panel
from nbhelpers.panel import gaming, history, replay
from nbhelpers.rewards import Sample
from nbhelpers.training.stop_when import StopWhen

PLACEHOLDER = "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"
COPIES = [Sample(f"q{i}", PLACEHOLDER, {"correct": 0.0, "in_form": 0.3}) for i in range(8)]


def steps(count=80, **series):
    """Logged steps; a pair goes in a straight line from one value to the other, a number stays, None is left out."""
    base = {"reward": (0.3, 0.7), "right": 0.3, "in_form": 0.5, "alike": 0.25, "completions/mean_length": 150.0}
    base |= {"frac_reward_zero_std": 0.2} | {name.replace("__", "/"): value for name, value in series.items()}
    along = [i / (count - 1) for i in range(count)]
    return [
        {
            name: value[0] + (value[1] - value[0]) * x if isinstance(value, tuple) else value
            for name, value in base.items()
            if value is not None
        }
        for x in along
    ]


def first_seen(logs, samples=()):
    """The step at which it is seen, and what is said; (None, None) if it never is."""
    for step in range(1, len(logs) + 1):
        if (said := gaming.why(logs[:step], samples)) is not None:
            return step, said
    return None, None


# SmolLM2-135M with form paid by parts, as it was seen: reward 0 to 0.30, form 99 %, right 0 %, 22 tokens
SMOLLM = {
    "count": 70, "reward": (0.0, 0.3), "right": 0.0, "in_form": (0.0, 0.99), "completions__mean_length": (180.0, 22.0),
    "alike": (0.05, 0.98), "rewards__correct__mean": 0.0, "rewards__in_form__mean": (0.0, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("unlogged", [(), ("alike",), ("alike", "in_form"), ("alike", "completions__mean_length")])
def test_a_model_that_learned_the_placeholder(unlogged):
    step, said = first_seen(steps(**SMOLLM | dict.fromkeys(unlogged)), COPIES)
    assert step == 40
    assert "right answers did not (0% before, 0% now)" in said and "8 of the newest 8 are the same text" in said
    assert "close the hole in in_form, which carries 100% of the rise" in said


@pytest.mark.parametrize(("changes", "sign"), [
    ({"alike": (0.2, 1.0)}, "they have grown alike"),  # as right as always, with one answer for all
    ({"right": (0.4, 0.1), "completions__mean_length": (150.0, 20.0)}, "they shrank from"),
    ({"right": (0.9, 0.5), "completions__mean_length": (900.0, 60.0), "in_form": 1.0}, "of the answers are in form"),
    ({"right": (0.4, 0.05), "in_form": (0.9, 1.0)}, "of the answers are in form"),
    ({"right": 0.01, "in_form": (0.2, 1.0)}, "of the answers are in form"),
    ({"right": None, "alike": (0.2, 1.0)}, "they have grown alike"),  # nothing there that says what is right
])  # fmt: skip
def test_the_signs(changes, sign):
    step, said = first_seen(steps(**changes))
    assert step >= 40 and sign in said
    assert ("right answers did not" in said) == (changes.get("right", 0.0) is not None)


def test_gaming_that_begins_late_is_seen():
    """It learned, then found the hole: against the whole run right answers are no fewer than in the beginning."""
    learned = steps(60, right=(0.1, 0.6), reward=(0.1, 0.6))
    gamed = steps(60, right=(0.6, 0.1), reward=(0.6, 1.5), alike=(0.25, 0.95))
    assert first_seen(learned) == (None, None)
    step, said = first_seen(learned + gamed)
    assert step > 80 and "they have grown alike" in said


@pytest.mark.parametrize("changes", [
    {"right": (0.3, 0.6), "in_form": (0.2, 1.0)},  # it learns
    {"right": (0.3, 0.34), "in_form": (0.2, 1.0)},  # it learns slowly
    {"right": 0.3, "in_form": (0.2, 1.0)},  # the form first
    {"right": 0.3, "in_form": 0.9, "completions__mean_length": (300.0, 60.0)},  # and brevity
    {"right": 0.85, "in_form": (0.2, 1.0), "completions__mean_length": (1500.0, 200.0)},  # it was right before
    {"right": (0.3, 0.28), "in_form": (0.2, 1.0)},  # noise
    {"alike": (0.2, 0.5)},  # the same phrases
    {"alike": 0.9},  # as alike as ever: short answers to questions of one kind
    {"reward": 0.5, "alike": (0.2, 1.0)},  # flat: nothing is paid for it
    {"right": (0.3, 0.9), "alike": (0.2, 0.9)},
    {"reward": None, "alike": (0.2, 1.0)},
    {"reward": float("nan"), "alike": (0.2, 1.0)},
    {"right": None, "in_form": (0.0, 1.0), "completions__mean_length": (150.0, 20.0)},  # nobody knows
])  # fmt: skip
def test_an_honest_run_is_left_alone(changes):
    assert first_seen(steps(**changes)) == (None, None)


def test_answers_to_one_question_may_be_the_same():
    """With one group a step nobody can tell."""
    assert first_seen(steps(alike=0.0), COPIES) == (None, None)
    assert first_seen(steps(alike=None), COPIES)[0] == 40


@pytest.mark.parametrize("flat", [False, True])
def test_the_recorded_run_raises_no_alarm(flat):
    """Not even with samples that are all the same, nor where its right answers are taken for the few they were."""
    recorded = json.loads(replay.RECORDED.read_text(encoding="utf-8"))
    logs = [
        {key: row[name] for name, key in history.METRICS.items() if row.get(name) is not None}
        | {f"rewards/{name}/mean": value for name, value in row["rewards"].items()}
        | {"right": 0.3 if flat else row["rewards"]["correct"], "in_form": row["format"]}
        for row in recorded["history"]
    ]
    assert len(logs) == 90 and first_seen(logs, () if flat else COPIES) == (None, None)


def test_one_rule_for_the_panel_and_for_what_ends_a_run():
    logs = steps(**SMOLLM)
    assert StopWhen().reason(logs, COPIES) == gaming.why(logs, COPIES)
    assert StopWhen(gaming_steps=None).reason(logs, COPIES) is None
    silent = [log | {"frac_reward_zero_std": 1.0} for log in logs[:30]]  # where all do the same, nothing is learned
    assert "in_form" in StopWhen().reason(silent, COPIES) and "too hard" not in StopWhen().reason(silent, COPIES)
    assert "too hard" in StopWhen(gaming_steps=None).reason(silent, COPIES)


def test_alikeness():
    same, other = "one two three four", "five six seven eight"
    assert gaming.alikeness([same] * 8, 2) == 1.0
    assert gaming.alikeness([same, other]) == 0.0
    assert gaming.alikeness([same] * 4 + [other] * 4, 4) == 0.0  # answers to one question may be alike
    assert gaming.alikeness([same, same, other, same], 2) == pytest.approx(0.5)
    assert gaming.alikeness(["", ""]) == gaming.alikeness(["yes", "yes"]) == 1.0
    assert gaming.alikeness([]) == gaming.alikeness([same] * 8, 8) == 0.0


# ---- in the panel ----


def watched(samples=COPIES):
    """A panel that has seen SmolLM's run."""
    logs = [log | {"step": i} for i, log in enumerate(steps(**SMOLLM), 1)]
    live = run(panel.Live(), [], end=False)
    args = SimpleNamespace(num_generations=4, reward_weights=None)
    for i, log in enumerate(logs, 1):
        state = TrainerState(max_steps=70, global_step=i, log_history=logs[:i])
        vars(state)["samples"] = samples
        live.on_log(args, state, TrainerControl(), logs=log)
    return live


def test_a_terminal_is_told_once_with_two_real_answers(capsys, tmp_path):
    live = watched()
    said = capsys.readouterr().out
    assert said.count("the model has found a way to be paid without being right") == 1
    assert said.count("  the answer ") == 1 and repr(PLACEHOLDER) in said  # they are all the same
    assert live.line().count("THE REWARD IS GAMED") == 1
    shown_again = replay.Replay(live.save(tmp_path / "run.json", "a model"))
    for step in (39, 40):
        shown_again.show_at(step)
        assert ("THE REWARD IS GAMED" in shown_again.line()) == (step == 40)


def test_a_notebook_is_told_with_two_real_answers(shown):
    watched([Sample("q", "<b>another</b>", {"correct": 0.0, "in_form": 0.3}), *COPIES]).show()
    html = newest(shown, "head")["text/html"]
    assert "the model has found a way to be paid" in html and html.count("  the answer ") == 2
    assert "<b>another</b>" not in html and "&lt;b&gt;another" in html
