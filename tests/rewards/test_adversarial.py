"""Holes that `rewards.check` finds by the texts of adversarial.py, and rewards without a hole that it leaves alone."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from nbhelpers import rewards, tasks
from nbhelpers.rewards import checking, text_of
from nbhelpers.rewards.adversarial import COPIED, LONGER, NO_NUMBERS, ONLY_TAGS, PLACEHOLDERS, UNTHOUGHT

TASK = tasks.decimals(8, 1)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine is no slow reward."""
    monkeypatch.setattr(checking, "SLOW_MS", 1000.0)
    monkeypatch.setattr(checking, "STOP_MS", 2000.0)


def task_of(*rows):
    """A task of (question, answer) or (question, answer, system prompt)."""
    return SimpleNamespace(
        train=Dataset.from_list([{"prompt": tasks.messages(q, *more), "answer": a} for q, a, *more in rows])
    )


def is_right(completions, answer, **_):
    return [float(rewards.is_correct(text_of(c), a)) for c, a in zip(completions, answer, strict=True)]


def warning(reward, task=TASK):
    (said,) = rewards.check([reward], task).warnings
    return said


def number_in_tag(completion):
    try:
        return float(rewards.extract_answer(text_of(completion)) or "x")
    except ValueError:
        return -1e9


def test_nan_is_unequal_to_nothing_by_more_than_a_little():
    def not_far(completions, answer, **_):
        pairs = zip(map(number_in_tag, completions), answer, strict=True)
        return [0.0 if abs(given - float(gold)) > 1e-6 else 1.0 for given, gold in pairs]

    def at_least(completions, answer, **_):
        pairs = zip(map(number_in_tag, completions), answer, strict=True)
        return [float(given >= float(gold)) for given, gold in pairs]

    def close(completions, answer, **_):  # pays by nearness, and most for the right one
        pairs = zip(map(number_in_tag, completions), answer, strict=True)
        return [max(0.0, 1 - abs(given - float(gold))) for given, gold in pairs]

    assert f"(1): {NO_NUMBERS} (1)" in warning(not_far)
    assert f"{NO_NUMBERS} (1)" in warning(at_least)
    assert rewards.check([close], TASK).warnings == []


@pytest.mark.parametrize("method", ["startswith", "endswith"])
def test_a_longer_answer_is_another_one(method):
    def begins(completions, answer, **_):
        inside = [rewards.extract_answer(text_of(c)) or "" for c in completions]
        return [
            float(found.startswith(a) if method == "startswith" else found.endswith(a))
            for found, a in zip(inside, answer, strict=True)
        ]

    for task in (TASK, task_of(("Is it?", "yes"), ("Is it not?", "no")), task_of(("0?", "0"), ("7?", "7"))):
        assert f"{LONGER} (1" in warning(begins, task)


def test_a_hollow_form_is_no_form():
    def tags(completions, **_):
        return [rewards.REASONING.count(text_of(c)) for c in completions]

    def by_parts(completions, **_):
        return [rewards.form(text_of(c)) for c in completions]

    def by_parts_of_its_own(prompts, completions, **_):
        return [rewards.form(text_of(c), prompt=p) for c, p in zip(completions, prompts, strict=True)]

    said = rewards.check([is_right, tags], TASK).warnings
    assert len(said) == 1 and all(kind in said[0] for kind in (ONLY_TAGS, PLACEHOLDERS, COPIED, UNTHOUGHT))
    assert rewards.check([is_right, by_parts, by_parts_of_its_own], TASK).warnings == []
    shown = "Write <reasoning>\nyour thoughts\n</reasoning>\n<answer>\nyour answer\n</answer>"
    own = task_of(*((f"{n} + 1?", str(n + 1), shown) for n in range(5)))
    said = rewards.check([is_right, by_parts, by_parts_of_its_own], own).warnings
    assert said == [f"by_parts: it can be gamed: these score at least as much as a right answer (1): {COPIED} (1)"]


def test_a_right_answer_may_be_paid_for_brevity():
    def brief(completions, answer, **_):
        lengths = [len(text_of(c)) for c in completions]
        return [
            good * max(0.0, 1 - length / 1000)
            for good, length in zip(is_right(completions, answer), lengths, strict=True)
        ]

    for funcs in ([brief], [is_right, brief]):
        assert rewards.check(funcs, TASK).warnings == []
