"""Countdown's verifier: right, wrong and hostile answers; puzzles that can be solved."""

import time
from itertools import islice

import pytest

from nbhelpers.rewards import THINK, countdown_rules


@pytest.mark.parametrize(
    "expression, numbers, target",
    [
        ("(19 - 3) * 5", [3, 5, 19], 80),
        ("19+3-5", [19, 3, 5], 17),
        ("1 / 3 * 3 * 7", [1, 3, 3, 7], 7),  # exact: not 6.999...
        ("2 - 3 - 4", [2, 3, 4], -5),  # from the left
        ("8 / 4 / 2", [2, 4, 8], 1),
        ("2 + 3 * 4", [2, 3, 4], 14),  # products first
        ("-3 + 2 * -(4 - 9)", [2, 3, 4, 9], 7),
        ("+ - -3 + 4", [3, 4], 7),
        ("\n ((((7))))\t*(2)\n", [2, 7], 14),
        ("5 + 5", [5, 5], 10),
    ],
)  # fmt: skip
def test_what_is_right(expression, numbers, target):
    assert countdown_rules.verify(expression, numbers, target)


@pytest.mark.parametrize(
    "expression",
    [
        "", " ", "46", "3 + 7", "3 + 7 + 25", "7 * 3 + 25 * 1", "3 * 7 + 25 + 25", "21 + 25", "3 7 25", "37 + 25",
        "3 * 7 + 25 = 46", "3 * 7 + 25.0", "3 * 7 + 25 // 1", "3 ** 7 + 25", "3 * 7 + 25 +", "* 3 * 7 + 25",
        "3 * 7 + 25)", "(3 * 7 + 25", "()3 * 7 + 25", "3 (* 7) + 25", "3 * (7) 25", ")(", "03 * 7 + 25", "3*7+25;1",
        "٣ * 7 + 25", "３ * 7 + 25", "3² * 7 + 25", "3 × 7 + 25", "3 * 7 + 25\0", "3 * 7 + 2_5", "3e0 * 7 + 25",
        "__import__('os')", "3 * 7 / (25 - 25)", "\ud800", "3 * 7 + 25 # 46", "0x3 * 7 + 25",
    ],
)  # fmt: skip
def test_what_is_not(expression):
    assert countdown_rules.verify("3 * 7 + 25", [3, 7, 25], 46)
    assert not countdown_rules.verify(expression, [3, 7, 25], 46)


SOLUTION = "5 * (19 - 3)"


@pytest.mark.parametrize(
    "text",
    [
        "<answer>\n(19 - 3) * 5\n</answer>", "<answer>80 = (19-3)*5</answer>", "<answer>(19-3)*5 = 16*5 = 80</answer>",
        "So (19 − 3) × 5 = 80.", r"thus \boxed{(19 - 3) \times 5 = 80}", r"\[ \left(19-3\right) \cdot 5 = 80 \]",
        "**(19 - 3) * 5**", "- (19 - 3) * 5 = 80", "2. (19 - 3) x 5 = 80\n", "`5*(19-3)` =", "$(19-3)*5 = 80$",
        "(19-3)*5 = 80. It uses 3, 5 and 19, each once.", "19 * 5 - 15 = 80? No: (19 - 3) * 5 = 80",
    ],
)  # fmt: skip
def test_what_solves_a_puzzle_in_whatever_form(text):
    assert countdown_rules.solved(text, SOLUTION)


@pytest.mark.parametrize(
    "text",
    [
        "", "80", "<answer>80</answer> (19-3)*5", "<answer></answer>(19-3)*5", "19 * 5 - 15 = 80", "(19-3)*5 = 81",
        "(19-3)*5 or 19+3-5", "(19-3)*5.0", "(19-3)*5*x", "(19-3)*5*1", "(19-3)**5", "((19-3)*5", "1(19-3)*5",
        "(19-3)*5 = 80 = 79", "(19-3)*5" + " + 0" * 400,
    ],
)  # fmt: skip
def test_what_does_not(text):
    assert not countdown_rules.solved(text, SOLUTION)


@pytest.mark.parametrize("place", ["<answer>\n{}\n</answer>", r"So \boxed{{{}}}."])
def test_in_the_place_of_the_answer_a_dash_is_a_sign_and_no_point_of_a_list(place):
    assert countdown_rules.solved(place.format("- 3 + 83"), "83 - 3")
    assert not countdown_rules.solved(place.format("- 5 * (19 - 3)"), SOLUTION)
    assert countdown_rules.solved(place.format("1. (19 - 3) * 5"), SOLUTION)


def test_other_tags_enclose_the_answer_too():
    text = "<think>19 - 3 * 5</think>\n(19 - 3) * 5 = 80"
    assert countdown_rules.solved(text, SOLUTION, THINK)
    assert not countdown_rules.solved("<think>(19 - 3) * 5</think>\n19 - 3 * 5", SOLUTION, THINK)


def test_division_by_zero_is_wrong():
    assert not countdown_rules.verify("7 / (3 - 3)", [3, 3, 7], 0)
    assert not countdown_rules.verify("0 / 0", [0, 0], 0)


N = 100_000
HOSTILE = {
    "brackets": "(" * N,
    "nested": "(" * (N // 2) + "3" + ")" * (N // 2),
    "nested, all numbers": "(" * (N // 2) + "3+7+25" + ")" * (N // 2),
    "signs": "-" * N + "3+7+25",
    "signed brackets": "-(" * (N // 3) + "3+7+25" + ")" * (N // 3),
    "one number": "9" * N,
    "numbers": "3+" * (N // 2),
    "zeros": "0" * N + "3+7+25",
    "spaces": "3+7+25" + " " * N + "x",
    "unicode": "٣" * N,
    "powers": "9**" * (N // 3) + "9",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_wrong_and_fast(text):
    started = time.perf_counter()
    assert not countdown_rules.verify(text, [3, 7, 25], 99)
    assert time.perf_counter() - started < 0.05
    started = time.perf_counter()
    assert not any(countdown_rules.solved(one, "(3 + 7) * 25") for one in (text, f"<answer>{text}</answer>"))
    assert time.perf_counter() - started < 0.1


def test_nesting_to_the_limit_is_evaluated():
    deep = (countdown_rules.LONGEST - 1) // 2
    assert countdown_rules.verify("(" * deep + "3" + ")" * deep, [3], 3)
    assert countdown_rules.verify("-" * (countdown_rules.LONGEST - 1) + "3", [3], -3)


def test_evaluate_agrees_with_python():
    for _, target, solution in islice(countdown_rules.puzzles((2, 3, 4, 5), seed=3), 500):
        assert eval(solution) == pytest.approx(target)  # our own text: eval is safe here


def test_puzzles_can_be_solved_are_distinct_and_repeatable():
    some = list(islice(countdown_rules.puzzles(seed=1), 400))
    for numbers, target, solution in some:
        assert countdown_rules.verify(solution, numbers, target)
        assert len(numbers) in (3, 4) and all(1 <= n <= 99 for n in numbers) and 10 <= target <= 100
    assert len({(tuple(sorted(numbers)), target) for numbers, target, _ in some}) == 400
    assert {len(numbers) for numbers, _, _ in some} == {3, 4}
    assert (
        some == list(islice(countdown_rules.puzzles(seed=1), 400)) != list(islice(countdown_rules.puzzles(seed=2), 400))
    )


def test_puzzles_of_too_few_numbers_run_out_with_a_word():
    few = countdown_rules.puzzles((1,))
    assert len(list(islice(few, 80))) == 80
    with pytest.raises(ValueError, match=r"no new puzzle of 1 numbers .* after \d\d: ask for fewer \(n_train"):
        list(few)


def test_another_solution_is_a_solution():
    assert countdown_rules.solves("25 + 7 * 3", "3 * 7 + 25")
    assert not countdown_rules.solves("3 * 25 - 7", "3 * 7 + 25")
    assert not countdown_rules.solves("46", "3 * 7 + 25")
