import doctest
import time

import pytest

from nbhelpers import rewards
from nbhelpers.rewards import (
    correctness,
    extract_answer,
    formatted,
    integer_answer,
    is_correct,
    number_of,
    soft_format,
    strict_format,
    tag_count,
)

GOOD = "<reasoning>\n9 tenths is more than 1 tenth\n</reasoning>\n<answer>\n9.9\n</answer>\n"


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(rewards)
    assert result.attempted >= 9 and result.failed == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "9.9"),
        ("<answer>9.9</answer>", "9.9"),
        ("<answer>\n two\n lines \n</answer>", "two\n lines"),
        ("<answer>1</answer><answer>2</answer>", "2"),  # several: the last
        ("<answer><answer>1</answer></answer>", "1"),  # nested: the innermost
        ("<answer>1</answer></answer>", "1"),
        ("<answer></answer>", ""),
        ("<answer>1", None),  # cut off
        ("<answer>1</answer> and <answer>2", None),  # the last one was cut off
        ("1</answer>", None),
        ("</answer>1<answer>", None),
        ("9.9", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("found", "gold", "right"),
    [
        ("9.90", "9.9", True),
        ("9.9", "9.90", True),
        ("1,000", "1000", True),
        ("1,234,567.50", "1234567.5", True),
        ("-3", "-3.0", True),
        ("+3", "3", True),
        (".5", "0.5", True),
        ("0.1", "0.10000000000000000000000000001", False),  # exact, not as floats
        ("-3", "3", False),
        ("9.11", "9.9", False),
        ("10,00", "1000", False),
        ("1_000", "1000", False),
        ("1e3", "1000", False),
        ("9.", "9", False),
        ("", "0", False),
        ("New  York", "new york", True),
        ("A", "B", False),
        ("9.9 is bigger", "9.9", False),
        ("٩", "9", False),
        ("nan", "nan", True),  # as text
        ("9.9", 9.9, True),  # a column of floats
    ],
)
def test_is_correct(found, gold, right):
    assert is_correct(f"<answer>\n{found}\n</answer>", gold) is right


def test_an_empty_answer_is_not_the_answer():
    assert not is_correct("9.9", "9.9") and not is_correct("", "")


@pytest.mark.parametrize("text", ["", "-", "+", ".", ",", "--1", "+-1", "1,", ",123", "1234,567", "1.2.3", "1,2", "²"])
def test_what_is_no_number(text):
    assert number_of(text) is None


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (GOOD, True),
        (GOOD.rstrip("\n"), True),
        (GOOD.replace("9 tenths", "9 tenths\n\nor so"), True),  # several lines
        (GOOD + "\n", False),
        (GOOD + "bye", False),
        ("\n" + GOOD, False),
        (GOOD.replace("9 tenths", "9 <answer> tenths"), False),
        (GOOD.replace("</reasoning>\n", "</reasoning>"), False),
        (GOOD.replace("\n9.9\n", "9.9"), False),
        (GOOD.replace("9.9", ""), False),
        (GOOD.replace("\n9.9", ""), False),
        ("<reasoning>\n</reasoning>\n<answer>\n9.9\n</answer>\n", False),
        ("<answer>\n9.9\n</answer>\n<reasoning>\nwhy\n</reasoning>\n", False),
        (GOOD * 2, False),
        ("", False),
    ],
)
def test_formatted(text, right):
    assert formatted(text) is right
    assert strict_format([text]) == [0.5 if right else 0.0]


def test_the_classic_rewards_on_one_good_answer():
    chat = [[{"role": "assistant", "content": GOOD}]]
    for completions in ([GOOD], chat):
        assert correctness(completions, answer=["9.9"]) == [2.0]
        assert correctness(completions, answer=["9.11"]) == [0.0]
        assert correctness(completions, answer=[None]) == [None]
        assert tag_count(completions) == [0.5]
        assert soft_format(completions) == [0.5]
        assert strict_format(completions) == [0.5]
        assert integer_answer(completions) == [0.0]
    whole = GOOD.replace("9.9", "-12")
    assert integer_answer([whole, whole.replace("-12", "twelve")]) == [0.5, 0.0]


def test_tag_count_pays_for_each_tag_and_takes_for_what_follows():
    steps = ["", "<reasoning>", "<reasoning></reasoning>", "<reasoning></reasoning><answer>", GOOD]
    assert tag_count(steps) == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert tag_count([GOOD + "x" * 99 + "\n"]) == [pytest.approx(0.4)]
    assert tag_count([GOOD + "x" * 10_000]) == [0.0]  # never negative
    assert tag_count(["<answer>" * 2]) == [0.0]  # repeated tags pay nothing


def test_soft_format_wants_the_order():
    assert soft_format(["<answer>1</answer><reasoning>2</reasoning>"]) == [0.0]
    assert soft_format(["a<reasoning>b</reasoning>c<answer>d</answer>e"]) == [0.5]


def test_a_message_without_text_scores_zero():
    assert correctness([[{"role": "assistant", "content": None}]], answer=["1"]) == [0.0]


def test_a_column_of_the_wrong_length_is_an_error():
    with pytest.raises(ValueError):
        correctness([GOOD, GOOD], answer=["9.9"])


HOSTILE = {
    "open tags": "<answer>",
    "closed tags": "</answer>",
    "pairs": "<answer></answer>",
    "nearly": "<reasoning>\n</reasoning>\n<answer>\n",
    "brackets": "<",
    "newlines": "\n",
    "digits": "9",
    "commas": "1,",
    "groups": "123,",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("func", [correctness, tag_count, soft_format, strict_format, integer_answer])
def test_hostile_text_costs_linear_time(func, unit):
    """The goal is 50 ms for 100,000 characters; the limits are wide, for a slow and busy machine."""

    def seconds(length: int) -> float:
        text = (unit * (length // len(unit) + 1))[:length]
        texts = [text, f"<answer>{text}</answer>", f"<reasoning>\n{text}\n</reasoning>\n<answer>\n{text}\n</answer>"]
        best = float("inf")
        for _ in range(5):
            start = time.process_time()  # of this process alone: other work on the machine does not count
            func(completions=texts, answer=["1000"] * 3)
            best = min(best, time.process_time() - start)
        return best / 3

    single, double = seconds(100_000), seconds(200_000)
    assert single < 1
    assert double < 3 * single + 0.005  # 5 ms: below it the clock and the machine's other work decide
