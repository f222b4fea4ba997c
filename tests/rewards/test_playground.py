"""An answer that is typed by hand: what every reward pays for it, and what is read of it."""

import pytest
from datasets import Dataset

from nbhelpers import rewards, tasks
from nbhelpers.rewards import REASONING, THINK, by_hand

ROWS = [{"prompt": tasks.messages(f"How many are {n} and 7 <b>?", None), "answer": str(n + 7)} for n in range(2, 6)]
TASK = tasks.Task("sums", Dataset.from_list(ROWS), Dataset.from_list(ROWS))
RIGHT = REASONING.frame.replace("{reasoning}", "2 and 7 are 9").replace("{answer}", "9")


def read(text: str, *funcs, tags=REASONING) -> by_hand.Reading:
    return by_hand.reading_of({func.__name__: func for func in funcs}, ROWS[0], text, tags)


@pytest.mark.parametrize(
    "text, paid, answer, place, counts, form",
    [
        (RIGHT, [2.0, 0.5], "9", "9", "right", "exact"),
        (RIGHT.replace("9\n", "8\n"), [0.0, 0.5], "8", "8", "not right", "exact"),
        ("It is $9.00.", [0.0, 0.0], "9.00", "(nothing)", "right, but not where it belongs", "0% of it"),
        ("<answer>9</answer>", [2.0, 0.0], "9", "9", "right", "33% of it"),
        ("<answer>9 or 8</answer>", [0.0, 0.0], "(nothing)", "9 or 8", "not right", "33% of it"),
        ("", [0.0, 0.0], "(nothing)", "(nothing)", "not right", "0% of it"),
    ],
)
def test_every_reward_and_the_reading_at_once(text, paid, answer, place, counts, form):
    seen = read(text, rewards.correctness, rewards.strict_format)
    assert list(seen.scores.values()) == paid and seen.total == sum(paid) and not seen.problems
    assert list(seen.reading.values()) == [answer, place, counts, form]
    assert ("together", f"{sum(paid):.3g}") in seen.rows()
    assert seen.question == "How many are 2 and 7 <b>?" and seen.wanted == "9"


def test_a_thought_that_goes_on_has_no_answer():
    assert read("first 9, then", rewards.correctness, tags=THINK).reading["the answer that is read"] == "(nothing)"
    seen = read("first 8</think>\n9", rewards.correctness, tags=THINK)
    assert seen.reading["counts as"] == "right" and "together" not in dict(seen.rows())


@pytest.mark.parametrize(
    "text, counts",
    [
        (REASONING.frame.format(reasoning="I add.", answer="7 + 2"), "right"),
        ("I think it is 2 + 7", "right, but not where it belongs"),
        (REASONING.frame.format(reasoning="I see it.", answer="9"), "not right"),
    ],
)
def test_what_is_right_is_for_a_function_of_yours_to_say(text, counts):
    """As for the trainer and `evaluate.accuracy`: the answer to a puzzle is no number, and one of many expressions."""
    puzzle = tasks.Task("puzzle", Dataset.from_list([ROWS[0] | {"answer": "2 + 7"}]), TASK.test)
    ground = rewards.playground(rewards.correctness, puzzle, correct=rewards.solved)
    reading = ground.show(text).reading
    assert reading["counts as"] == counts and "the answer that is read" not in reading


def test_a_reward_that_fails_or_hangs_says_so_and_the_others_go_on(monkeypatch):
    def boom(completions, **_):
        raise KeyError("x")

    def hangs(completions, **_):
        while True:
            pass

    def huge(completions, **_):
        return [float("nan")]

    monkeypatch.setattr(by_hand, "SECONDS", 0.2)
    seen = read(RIGHT, boom, hangs, huge, rewards.correctness)
    assert seen.scores == {"boom": None, "hangs": None, "huge": None, "correctness": 2.0} and seen.total == 2.0
    assert seen.problems[0] == "boom: it fails with KeyError: 'x'" and seen.problems[1].startswith("hangs: no answer")
    assert seen.problems[2].startswith("huge: it returns nan") and "! boom: it fails" in str(seen)
    assert "boom: it fails with KeyError: &#x27;x&#x27;" in seen._repr_html_()


def test_what_is_typed_is_no_html():
    page = read("<script>alert(1)</script> <answer><b>9</b></answer>", rewards.correctness)._repr_html_()
    assert "<script" not in page and "&lt;b&gt;9&lt;/b&gt;" in page and "7 &lt;b&gt;?" in page


def test_the_playground_types_moves_and_has_a_static_page():
    ground = rewards.playground([rewards.correctness, rewards.strict_format], TASK)
    assert [example["text"] for example in ground.examples][-2:] == ["I think it is 9", ""]
    assert "right answer: 9" in str(ground) and "right answer: 9" in str(ground.show(ground.examples[0]["text"]))
    box = ground.widget()
    (question, text), follows = box.children[0].children, box.children[1]
    assert (
        question.children[0].max == 3 and text.value == ground.examples[0]["text"] and "How many are 2" in follows.value
    )
    question.children[0].value, text.value = 1, "<answer>10</answer>"
    assert "How many are 3" in follows.value and ">2</pre>" in follows.value


def test_it_refuses_what_check_refuses():
    with pytest.raises(TypeError, match="is no function"):
        rewards.playground("correctness", TASK)
    with pytest.raises(ValueError, match="columns prompt and answer"):
        rewards.playground(rewards.correctness, tasks.Task("none", Dataset.from_list([{"a": 1}]), TASK.test))
