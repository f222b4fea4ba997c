import doctest
from decimal import Decimal
from fractions import Fraction

import pytest

from nbhelpers.rewards import answers
from nbhelpers.rewards.answers import extract_answer, extract_boxed, formatted, is_correct, number_of, written

GOOD = "<reasoning>\n9 tenths is more than 1 tenth\n</reasoning>\n<answer>\n9.9\n</answer>\n"


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(answers)
    assert result.attempted >= 6 and result.failed == 0


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
        ("9.", "9", True),  # a full stop
        ("$9", "9", True),
        (r"\$9.00", "9", True),
        ("-$9", "-9", True),
        ("$9", "-9", False),
        ("9..", "9", False),
        ("$$9", "9", False),
        ("0,123", "123", False),  # a decimal comma
        ("00,123", "123", False),
        ("0.00001", "1e-05", True),  # as JSON and CSV have it
        ("0.00001", 1e-05, True),
        ("9.11", 9.109999656677246, True),  # 9.11 in 32 bits
        ("9.109999656677246", 9.109999656677246, False),
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


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (1e-05, "0.00001"),
        (1e16, "10000000000000000"),
        ("1e-05", "0.00001"),
        ("-2.5E+3", "-2500"),
        (Decimal("1E+3"), "1000"),
        (9.109999656677246, "9.11"),  # 32 bits
        (0.10000000149011612, "0.1"),
        (-1000.0999755859375, "-1000.1"),
        (12345.669921875, "12345.67"),
        (0.1 + 0.2, "0.3"),
        (1 - 0.9, "0.1"),
        (1 / 3, "0.3333333333333333"),  # no short decimal
        (9.11, "9.11"),
        (2.0**-13, "0.0001220703125"),
        (1234567936.0, "1234567936.0"),  # whole: as it is
        (3, "3"),
        (True, "True"),
        (Fraction(1, 2), "1/2"),
        (float("inf"), "inf"),
        (" Paris ", "Paris"),
        ("1e5x", "1e5x"),
    ],
)
def test_written(cell, text):
    assert written(cell) == text


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


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{9.9}", "9.9"),
        (r"\boxed{ \frac{1}{2} } and more }", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace closes nothing
        (r"\boxed {7}", "7"),
        (r"a \\ \boxed{6}", "6"),
        (r"\\boxed{5}", None),  # a line break and a word
        (r"{ \boxed{3}", "3"),
        (r"} \boxed{3} }", "3"),
        (r"\boxed{\text{\boxed{4}}}", "4"),
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{\boxed{1}}", "1"),
        (r"\boxed{}", ""),
        (r"\boxed{1} \boxed{2", None),  # the last one was cut off
        (r"\boxed 1", None),
        ("{1}", None),
        ("", None),
    ],
)
def test_extract_boxed(text, inside):
    assert extract_boxed(text) == inside
