"""Thought and answer in either kind of tags, opened by the model or by its chat template."""

import pytest

from nbhelpers import rewards
from nbhelpers.rewards import REASONING, THINK, Tags, extract_answer, formatted, in_form

GOOD = "<reasoning>\n9 tenths\n</reasoning>\n<answer>\n9.9\n</answer>\n"
BOTH = Tags("<think>", "</think>", "<answer>", "</answer>", opened_by_template=True)


@pytest.mark.parametrize(
    ("text", "form", "answer"),
    [
        (GOOD, True, "9.9"),
        (GOOD.rstrip("\n"), True, "9.9"),
        (GOOD + "\n", False, "9.9"),
        (GOOD + "bye", False, "9.9"),
        ("\n" + GOOD, False, "9.9"),
        (GOOD * 2, False, "9.9"),
        ("", False, None),
        (GOOD.replace("9.9", ""), False, ""),
        (GOOD.replace("\n9.9", ""), False, ""),
        (GOOD.replace("9 tenths", " "), False, "9.9"),
        (GOOD.replace("9 tenths", "9 <answer> tenths"), False, "9.9"),
        (GOOD.replace("</reasoning>\n", "</reasoning>"), False, "9.9"),
        (GOOD.removeprefix("<reasoning>\n"), False, "9.9"),
        ("<answer>1</answer><answer>2", False, None),
        ("<reasoning>\n</reasoning>\n<answer>\n9.9\n</answer>\n", False, "9.9"),
    ],
)
def test_reasoning(text, form, answer):
    assert in_form(text) is REASONING.in_form(text) is formatted(text) is form
    assert REASONING.extract(text) == extract_answer(text) == answer
    assert [0.5 * REASONING.count(text)] == rewards.tag_count([text]) or "</answer>" in text


@pytest.mark.parametrize(
    ("text", "answer", "form", "count"),
    [
        ("<think>\n9 tenths\n</think>\n\n9.9", "9.9", True, 1.0),
        ("<think>9 tenths</think>9.9", "9.9", True, 1.0),
        ("9 tenths\n</think>\n\n9.9\n", "9.9", True, 1.0),  # the template opened it
        ("\n9 tenths</think>9.9", "9.9", True, 1.0),
        ("</think>9.9", "9.9", False, 1.0),  # no thought
        ("<think>\n\n</think>\n\n9.9", "9.9", False, 1.0),  # what Qwen3 writes when it shall not think
        ("<think>9 tenths</think>", None, False, 1.0),
        ("<think>9 tenths", None, False, 0.5),
        ("9 tenths, 9.9", None, False, 0.0),
        ("Well: <think>9 tenths</think>9.9", "9.9", False, 1.0),
        ("<think>9</think>tenths</think>9.9", "9.9", False, 0.5),
        ("a</think>b</think>9.9", "9.9", False, 0.5),
        ("9.9</think><think>", "<think>", False, 1.0),
        ("", None, False, 0.0),
    ],
)
def test_think(text, answer, form, count):
    assert THINK.extract(text) == answer
    assert in_form(text, THINK) is form
    assert THINK.count(text) == count


def test_think_with_answer_tags():
    assert BOTH.in_form("<think>\nwhy\n</think>\n<answer>\n9.9\n</answer>\n")
    assert BOTH.in_form("why\n</think>\n<answer>\n9.9\n</answer>\n")
    assert BOTH.extract("why\n</think>\n<answer>\n9.9\n</answer>\n") == "9.9"
    assert not BOTH.in_form("why\n</think>\n9.9") and BOTH.count("why\n</think>\n9.9") == 0.5
    assert not REASONING.in_form(GOOD.removeprefix("<reasoning>\n"))  # no template opens this one


@pytest.mark.parametrize("text", [
    GOOD.replace("9 tenths", "...").replace("9.9", "..."),
    GOOD.replace("9 tenths", ""),
    GOOD.replace("9 tenths", "…"),
    GOOD.replace("9.9", "..."),
    "<reasoning>\n...\n</reasoning>",
    GOOD.replace("9 tenths", "[your reasoning]").replace("9.9", "[your answer]"),
    GOOD.replace("9.9", "{answer}"),
    GOOD.replace("9.9", "<Your answer here>"),
])  # fmt: skip
def test_a_form_without_content_counts_nothing(text):
    assert REASONING.form(text) == 0.0 and REASONING.form(GOOD) == 1.0


@pytest.mark.parametrize("thought", ["why", "Why", "why and\n\nhow", "Which is bigger? 9.9 or 9.11", "9.9"])
def test_a_thought_that_is_copied_from_the_prompt_counts_nothing(thought):
    prompt = [
        {"role": "system", "content": "Answer as <reasoning>\nwhy and how\n</reasoning>\n<answer>\n9.9\n</answer>"},
        {"role": "user", "content": "Which is bigger? 9.9 or 9.11"},
    ]
    text = GOOD.replace("9 tenths", thought)
    assert REASONING.form(text) == REASONING.form(text, "another prompt") == rewards.form(text) == 1.0
    assert REASONING.form(text, prompt) == rewards.form(text, prompt=prompt[0]["content"] + prompt[1]["content"]) == 0.0
    assert REASONING.form(GOOD, prompt) == 1.0  # a thought of its own; the answer may stand in the question


def test_think_without_content_counts_nothing():
    assert THINK.form("why</think>9.9") == 1.0
    for text in ("...</think>9.9", "</think>9.9", "why</think>...", "<think>\n...\n</think>\n..."):
        assert THINK.form(text) == 0.0


def test_a_model_that_thinks_before_it_begins_with_the_form():
    text = f"Okay: 9.11? No.\n</think>\n\n{GOOD}"
    assert in_form(text) and formatted(text) and rewards.form(text) == 1.0
    assert not in_form(text + "bye") and not in_form(GOOD + text.replace("9.9", ""))


@pytest.mark.parametrize(
    ("text", "pays"),
    [
        ("9 tenths\n</think>\n\n9.9", 1.0),
        ("9 tenths\n</think>\n\n", 0.0),  # no answer
        ("9 tenths\n</think>\n\n...", 0.0),
        ("...\n</think>\n\n9.9", 0.0),
        ("<think>\n\n</think>\n\n9.9", 0.0),  # what Qwen3 writes when it shall not think
        ("9 tenths, so 9.9", 0.0),
        ("<think>\n9 tenths, so 9.9", 1 / 3),
    ],
)
def test_a_form_without_content_pays_nothing(text, pays):
    assert THINK.form(text) == rewards.form(text, THINK) == pytest.approx(pays)


@pytest.mark.parametrize("answer", ["[1, 2]", "{Paris}", "(the answer is 9.9)", "your answer", "<b>here it is</b>"])
def test_brackets_with_content_are_content(answer):
    assert REASONING.form(GOOD.replace("9.9", answer)) == 1.0


@pytest.mark.parametrize("tags", [REASONING, THINK, BOTH], ids=["reasoning", "think", "both"])
def test_the_frame_is_in_form(tags):
    text = tags.frame.format(reasoning="9 tenths", answer="9.9")
    assert tags.in_form(text) and tags.form(text) == 1.0 and tags.extract(text) == "9.9" and not tags.thinks_on(text)


def test_a_thought_that_goes_on():
    assert THINK.thinks_on("9 tenths, so 9.9") and THINK.thinks_on("<think>9 tenths") and THINK.thinks_on("")
    assert not THINK.thinks_on("9 tenths</think>") and not BOTH.thinks_on("<answer>9.9</answer>")
    assert BOTH.thinks_on("9 tenths") and not REASONING.thinks_on("<reasoning>\n9 tenths")


def test_the_tags_in_order():
    assert REASONING.all == rewards.TAGS and THINK.all == ("<think>", "</think>")
