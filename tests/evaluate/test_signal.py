"""The check before training: what each kind of model and of rewards is told, and that it counts as training would."""

import math

import pytest
import tiny_model
from datasets import Dataset
from told import Told

from nbhelpers import rewards
from nbhelpers.evaluate import check_signal
from nbhelpers.rewards import REASONING, THINK
from nbhelpers.tasks import Task, messages

GOOD = "<reasoning>\nwhy\n</reasoning>\n<answer>\n{}\n</answer>\n"
ROWS = [{"prompt": messages(f"q{i}?", None), "answer": "18"} for i in range(20)]
TASK = Task("numbers", Dataset.from_list(ROWS), Dataset.from_list(ROWS[:2]))


def correct(completions, answer, **_):
    return [float(rewards.right(rewards.text_of(c), gold)) for c, gold in zip(completions, answer, strict=True)]


def in_form(completions, **_):
    return [0.3 * rewards.form(rewards.text_of(completion)) for completion in completions]


def in_tags(completions, answer, **_):
    """The rewards of the notebook that wasted a night: nothing but the exact form was paid."""
    return [float(rewards.is_correct(rewards.text_of(c), gold)) for c, gold in zip(completions, answer, strict=True)]


def unscored(completions, **_):
    return [None] * len(completions)


@pytest.fixture(scope="module")
def asked():
    model, tokenizer = tiny_model.model(), tiny_model.tokenizer()

    def ask(text, funcs=(correct, in_form), **options):
        engine = Told(tokenizer, text)
        return check_signal(model, tokenizer, TASK, list(funcs), engine=engine, **({"max_new_tokens": 120} | options))

    return ask


def test_a_model_with_something_to_learn(asked):
    found = asked(lambda prompt, i: GOOD.format(18 if i < 2 else 17) if i % 2 else f"I say {i}")
    assert (found.right, found.in_form, found.cut_off, found.with_signal) == (1 / 8, 1 / 2, 0, 1)
    assert found.advice == []
    lines = str(found).splitlines()
    assert lines[1:5] == [
        "right, in any form      12%   8 of 64 answers",
        "in form                 50%   32 of 64",
        "cut off                  0%   0 of 64, at 120 tokens",
        "groups with a signal   100%   8 of 8 questions",
    ]
    assert lines[-1] == "→ Go on: there is something to learn from."
    assert "8 of 64 answers" in found._repr_html_() and "Go on" in found._repr_html_()


def easy_or_hard(prompt, i):
    return "It is 18" if any(digit in prompt for digit in "02468") else "It is 17"


@pytest.mark.parametrize(
    ("text", "funcs", "says"),
    [
        (lambda prompt, i: f"no {'a' * i}", (correct, in_form), ["Another prompt"]),
        (lambda prompt, i: f"I say {i}", (in_tags,), ["Another prompt"]),
        (lambda prompt, i: GOOD.format(i), (correct, in_form), ["Easier questions"]),
        (lambda prompt, i: GOOD.format(i) if i else "<answer>", (correct, in_form), ["Easier questions"]),
        (lambda prompt, i: GOOD.format(18), (correct, in_form), ["Harder questions"]),
        (lambda prompt, i: f"It is {17 + i % 2}", (in_tags,), ["Other rewards"]),  # the night that was wasted
        (easy_or_hard, (correct, in_form), ["Questions in between"]),
        (lambda prompt, i: "and so on " * 90, (correct, in_form), ["Longer answers"]),
        (lambda prompt, i: GOOD.format(17) if i == 0 else "so on " * 90, (correct, in_form), ["Longer answers"]),
        (lambda prompt, i: f"I say {17 + i % 2}" + " ok" * 40 * (i > 4), (correct, in_form), ["Longer answers"]),
        (lambda prompt, i: GOOD.format(18), (unscored,), ["Other rewards"]),
    ],
    ids=["prompt", "prompt, night", "easier", "easier, form alone", "harder", "rewards", "between", "longer",
         "longer, one in form", "longer, partly", "no score"],
)  # fmt: skip
def test_what_to_do(asked, text, funcs, says):
    found = asked(text, funcs)
    assert [advice.partition(":")[0] for advice in found.advice] == says
    assert all(f"→ {advice}" in str(found) for advice in found.advice)


def test_silence_is_exact(asked):
    """The rounding of a mean is no signal, and a millionth is one; sums are those of fp32, as in training."""

    def tenth(completions, **_):
        return [0.1 + 0.2 * (i % 2) for i in range(len(completions))]

    def rest(completions, **_):
        return [0.2 * (1 - i % 2) for i in range(len(completions))]

    assert asked(lambda prompt, i: f"I say {i}", [tenth, rest]).with_signal == 0

    def nearly(completions, **_):
        return [0.1 + 1e-6 * (i % 8 == 0) for i in range(len(completions))]

    assert asked(lambda prompt, i: f"I say {i}", [nearly]).with_signal == 1


def test_the_form_is_that_of_the_tags(asked):
    def text(prompt, i):
        return f"six times three\n</think>\n\nSo {17 + i % 2}." if i < 6 else "Let me see. The answer is 18, or"

    def thinking(completions, **_):
        return [rewards.form(rewards.text_of(completion), THINK) for completion in completions]

    found = asked(text, [thinking], tags=THINK)
    assert (found.in_form, found.right, found.advice) == (6 / 8, 3 / 8, [])  # a thought that goes on has no answer
    assert asked(text, [thinking], tags=REASONING).in_form == 0


def test_a_length_is_seen_by_rewards_and_a_row_without_a_score_counts_for_nothing(asked):
    def brief(completion_ids, **_):
        return [None if len(ids) > 8 else -float(len(ids)) for ids in completion_ids]

    found = asked(lambda prompt, i: "18" + "!" * i, [brief], n=3, num_generations=8)
    assert found.rewards[0][:3] == [-3, -4, -5] and all(map(math.isnan, found.rewards[0][6:]))
    assert len(found.rows) == 3 and found.silent == [False] * 3 and found.widest == 0


def test_a_task_with_few_questions_is_asked_them_all(asked):
    assert len(asked(lambda prompt, i: "18", n=50).rows) == 20


def test_what_is_refused(asked):
    with pytest.raises(ValueError, match="num_generations=1"):
        asked(lambda prompt, i: "18", num_generations=1)
    with pytest.raises(ValueError, match="different names"):
        asked(lambda prompt, i: "18", [correct, correct])
    with pytest.raises(rewards.guard.RewardError, match="'short' returned 1 rewards for 64"):

        def short(completions, **_):
            return [1.0]

        asked(lambda prompt, i: "18", [short])
    with pytest.raises(TypeError, match="functions only"):
        asked(lambda prompt, i: "18", ["org/reward-model"])
