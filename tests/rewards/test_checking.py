import asyncio
import itertools
import math
import re
from dataclasses import dataclass

import pytest
from datasets import Dataset
from torch import nn

from nbhelpers import rewards, tasks
from nbhelpers.rewards import checking, text_of
from nbhelpers.rewards.adversarial import (
    BAD_FORM,
    CHARACTERS,
    COPIED,
    EMPTY,
    HEDGES,
    KINDS,
    LONG,
    ONLY_TAGS,
    PLACEHOLDERS,
    REPEATED,
    RIGHT,
    UNTHOUGHT,
    WRONG,
)
from nbhelpers.rewards.countdown_rules import puzzles


@dataclass
class Task:
    train: Dataset


TASK = tasks.decimals(8, 1)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine is no slow reward; the tests of slowness set their own limits."""
    monkeypatch.setattr(checking, "SLOW_MS", 1000.0)
    monkeypatch.setattr(checking, "STOP_MS", 2000.0)


def of_answers(*answers, question="What is it?"):
    return Task(Dataset.from_list([{"prompt": tasks.messages(question), "answer": answer} for answer in answers]))


def right(completions, answer, **_):
    return [float(rewards.is_correct(text_of(c), a)) for c, a in zip(completions, answer, strict=True)]


def in_text(completions, answer, **_):
    return [float(a in text_of(c)) for c, a in zip(completions, answer, strict=True)]


def first_tag(completions, answer, **_):
    inside = [text_of(c).partition("<answer>")[2].partition("</answer>")[0].strip() for c in completions]
    return [float(found == a) for found, a in zip(inside, answer, strict=True)]


def test_a_good_reward_has_nothing_to_warn_about():
    result = rewards.check(right, TASK)
    assert result.warnings == []
    assert list(result.scores) == ["right"] and list(result.scores["right"]) == list(KINDS)
    expected = {RIGHT: 1.0, UNTHOUGHT: 1.0, REPEATED: 1.0}
    for kind, scores in result.scores["right"].items():
        assert scores == [expected.get(kind, 0.0)] * 4, kind
    assert result.slowest["right"][0] == CHARACTERS and 0 < result.slowest["right"][1] < 1000
    assert str(result).endswith("nothing to warn about")


def test_every_row_is_scored_with_its_own_columns():
    data = Dataset.from_list([{"prompt": f"{n}?", "answer": str(n), "bonus": n} for n in range(3)])
    seen = []

    def paid(prompts, completions, completion_ids, answer, bonus, trainer_state, log_extra, log_metric):
        log_extra("column", answer)
        log_metric("metric", 1.0)
        seen.append(trainer_state.global_step)
        assert all(type(completion) is str for completion in completions)  # the prompts are no chats
        assert len(prompts) == len(completion_ids) == len(completions)
        return [b * rewards.is_correct(c, a) for c, a, b in zip(completions, answer, bonus, strict=True)]

    result = rewards.check([paid], Task(data), n=10)
    assert result.scores["paid"][RIGHT] == [0.0, 1.0, 2.0] and result.mean("paid", RIGHT) == 1.0
    assert result.warnings == [] and set(seen) == {0}


def test_wrong_answers_are_wrong_and_hedges_name_the_right_one():
    for task in (TASK, of_answers("yes", "no"), of_answers("yes", "YES"), of_answers("1/2"), of_answers("12", "12")):
        result = rewards.check([right], task)
        assert result.warnings == [], task
        for kind in (RIGHT, BAD_FORM, *HEDGES[1:]):
            assert all(task.train[0]["answer"] in text for text in result.texts[kind]), kind
    assert all(abs(len(text) - CHARACTERS) < 10 for text in result.texts[LONG])


def warning(funcs, task=TASK, **settings):
    (said,) = rewards.check(funcs, task, **settings).warnings
    return said


def test_a_reward_that_looks_anywhere_in_the_text_is_gamed():
    said = warning([in_text])
    assert said.startswith("in_text: it can be gamed: these score at least as much as a right answer (1)")
    assert all(kind in said for kind in HEDGES)


def test_the_order_of_two_answers_does_not_make_a_hole():
    """To take the first answer is no worse than to take the last: neither can be had without knowing."""
    assert rewards.check([first_tag], TASK).warnings == []

    def any_tag(completions, answer, **_):
        found = [re.findall(r"<answer>\s*([^<]*?)\s*</answer>", text_of(c)[:1000]) for c in completions]
        return [float(a in all_of) for all_of, a in zip(found, answer, strict=True)]

    assert "it can be gamed" in warning([any_tag]) and "two answers (1)" in warning([any_tag])


def test_a_reward_by_the_count_of_the_answer_is_gamed_by_repeating_it():
    def counted(completions, answer, **_):
        return [float(text_of(c).count(a)) for c, a in zip(completions, answer, strict=True)]

    assert f"{REPEATED} (5" in warning([counted])


def test_a_constant_reward():
    def polite(completions, **_):
        return [1.0] * len(completions)

    said = rewards.check([right, polite], TASK).warnings
    assert said == ["polite: it is constant: 1 for every text, so all advantages are 0 and it teaches nothing"]


def test_rewards_that_do_not_look_at_the_answer():
    said = rewards.check([rewards.strict_format, rewards.soft_format], TASK).warnings
    hollow = ", ".join(f"{kind} (0.5)" for kind in (ONLY_TAGS, PLACEHOLDERS, COPIED, UNTHOUGHT))
    assert said[0] == f"soft_format: it can be gamed: these score at least as much as a right answer (0.5): {hollow}"
    assert said[1].startswith("all together: a right answer (1) pays no more than a wrong one in the same form (1)")
    assert len(said) == 2


def test_a_hole_that_only_the_sum_has():
    def hedger(completions, **_):
        return [2.0 * (text_of(c).count(", ") > 4) for c in completions]

    said = rewards.check([right, hedger], TASK).warnings
    assert any(text.startswith("all together: it can be gamed") and HEDGES[1] in text for text in said)


def test_pay_for_nothing():
    def short(completions, **_):
        return [1 - len(text_of(c)) / 1e6 for c in completions]

    assert f"(1): {EMPTY} (1), {ONLY_TAGS} (1)" in rewards.check([short], TASK).warnings[0]

    def generous(completions, answer, **_):
        return [0.25 + score for score in right(completions, answer)]

    assert warning([generous]) == "generous: it pays 0.25 for an empty text"

    def no_mistake(completions, answer, **_):
        pairs = zip(completions, answer, strict=True)
        return [-1.0 * ("</answer>" in text_of(c) and not rewards.is_correct(text_of(c), a)) for c, a in pairs]

    assert f"these score at least as much as a right answer (0): {EMPTY} (0)" in warning([no_mistake])


def test_pay_for_the_wrong():
    def inverted(completions, answer, **_):
        return [1.0 - score for score in right(completions, answer)]

    said = rewards.check([inverted], TASK).warnings
    assert any("it pays more for a wrong answer (1) than for the right one (0)" in text for text in said)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda n: [0.5], "it returns 1 scores for 4 completions"),
        (lambda n: [math.nan] * n, "it returns nan, no number"),
        (lambda n: [math.inf] * n, "it returns inf, no number"),
        (lambda n: ["good"] * n, "it fails with ValueError: could not convert string to float: 'good'"),
        (lambda n: None, "it fails with TypeError"),
        (lambda n: 1 / 0, "it fails with ZeroDivisionError: division by zero"),
        (lambda n: [None] * n, "it scores nothing at all"),
    ],
    ids=["length", "nan", "inf", "text", "none", "raises", "nones"],
)
def test_what_is_no_list_of_scores(returned, said):
    def broken(completions, **_):
        return returned(len(completions))

    result = rewards.check([broken], TASK)
    assert any(text.startswith(f"broken: {said}") for text in result.warnings), result.warnings
    assert result.mean("broken", RIGHT) is None and "–" in str(result)


def test_a_function_that_fails_on_one_kind_of_text_keeps_its_other_scores():
    def fragile(completions, answer, **_):
        return [float(text_of(c).split("<answer>")[1].split("</answer>")[0].strip() == a)
                for c, a in zip(completions, answer, strict=True)]  # fmt: skip

    result = rewards.check([fragile], TASK)
    assert result.scores["fragile"][RIGHT] == [1.0] * 4 and result.scores["fragile"][EMPTY] == [None] * 4
    assert "fragile: it fails with IndexError: list index out of range" in result.warnings


def test_a_signature_without_the_rest_is_a_failure():
    def strict(completions, answer):
        return [0.0] * len(completions)

    assert any("strict: it fails with TypeError" in text for text in rewards.check([strict], TASK).warnings)


@pytest.mark.parametrize(
    "pattern",
    [r"<answer>\s*((\d+,?)+)\s*</answer>", r"<answer>((\d+,?)+)</answer>", r"<answer>.*?<answer>.*?<answer>.*?</x>"],
)
def test_a_regular_expression_that_blows_up_is_found_and_does_not_hang(pattern, monkeypatch):
    monkeypatch.setattr(checking, "SLOW_MS", 50.0)
    monkeypatch.setattr(checking, "STOP_MS", 250.0)

    def slow(completions, answer, **_):
        return [float(bool(re.search(pattern, text_of(c), re.DOTALL))) for c in completions]

    result = rewards.check([slow], TASK)
    assert any(text.startswith("slow: it is slow:") for text in result.warnings)
    characters, ms = result.slowest["slow"]
    assert characters < CHARACTERS and ms > 250
    assert LONG not in result.scores["slow"] and f"for {characters:,}" in str(result)


def test_an_async_reward_inside_a_running_loop():
    async def later(completions, answer, **_):
        await asyncio.sleep(0)
        return right(completions, answer)

    async def notebook():
        return rewards.check([later], TASK)

    assert asyncio.run(notebook()).warnings == []


def test_another_form():
    form = "{reasoning}\n</think>\nThe answer is \\boxed{{answer}}"
    assert rewards.check([rewards.math_correctness], TASK, form=form).warnings == []
    assert rewards.check([right], TASK, form=form).mean("right", RIGHT) == 0  # it wants tags
    with pytest.raises(ValueError, match="says where the answer stands"):
        rewards.check([right], TASK, form="\\boxed{}")


def test_the_package_s_rewards_together():
    funcs = [rewards.correctness, rewards.math_correctness, rewards.strict_format, rewards.get_repetition_penalty()]
    funcs += [rewards.get_length_penalty(512, 128), rewards.get_language_consistency("latin")]
    result = rewards.check(funcs, TASK)
    assert result.warnings == []
    assert result.mean("length_penalty", LONG) == -1 and result.mean("repetition_penalty", REPEATED) < -0.8
    assert result.mean("math_correctness", RIGHT) == 2 and result.mean("strict_format", ONLY_TAGS) == 0


def test_countdown_can_be_checked_with_its_solutions():
    rows = [{"numbers": numbers, "target": target, "answer": solution}
            for numbers, target, solution in itertools.islice(puzzles(), 4)]  # fmt: skip
    for row in rows:
        row["prompt"] = tasks.messages(f"Make {row['target']} from {row['numbers']}.")
    result = rewards.check([rewards.countdown], Task(Dataset.from_list(rows)))
    assert result.warnings == []
    assert [kind for kind in KINDS if result.mean("countdown", kind)] == [RIGHT, UNTHOUGHT, REPEATED]


def test_it_shows_itself_as_text_and_as_html():
    def nasty(completions, **_):
        raise ValueError("<script>alert(1)</script>")

    result = rewards.check([right, nasty], TASK, n=1)
    lines = str(result).splitlines()
    assert lines[0].split() == ["right", "nasty"] and lines[1].split() == ["right", "1", "–"]
    assert lines[-1].startswith("! nasty: ")
    page = result._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("<tr>") == len(KINDS) + 2 and all(kind in page for kind in (RIGHT, WRONG, LONG))


def test_what_cannot_be_checked():
    with pytest.raises(ValueError, match="right, right"):
        rewards.check([right, right], TASK)
    with pytest.raises(ValueError, match="none"):
        rewards.check([], TASK)
    with pytest.raises(ValueError, match="columns prompt, gold"):
        rewards.check([right], Task(Dataset.from_list([{"prompt": "?", "gold": "1"}])))
    with pytest.raises(ValueError, match="0 rows"):
        rewards.check([right], Task(Dataset.from_list([])))
    for model in ("org/reward-model", nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="looks at functions only"):
            rewards.check([right, model], TASK)
