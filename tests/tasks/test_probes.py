"""The questions asked before and after: their right answers, and how what models say to them is read."""

import time

import pytest

from nbhelpers import evaluate, panel, tasks
from nbhelpers.evaluate.results import Decoding
from nbhelpers.rewards import is_correct, right

NEAR, PI = "Which is bigger? 9.919 or 9.92?", "Calculate pi."
DIGITS = "3.14159265358979323846…"


def test_every_probe_has_its_answer_and_the_first_are_the_workshop_models():
    assert list(tasks.PROBE_ANSWERS)[: len(tasks.PROBES)] == list(tasks.PROBES)
    assert {tasks.PROBE_ANSWERS[question] for question in tasks.PROBES} == {tasks.PROBE_ANSWER}
    assert tasks.PROBE_ANSWERS[NEAR] == tasks.place_value("9.919", "9.92") and tasks.PROBE_ANSWERS[PI] == DIGITS


def test_no_probe_is_trained_on():
    asked = [row["prompt"][-1]["content"] for row in tasks.decimals().train]
    assert not {*asked} & tasks.PROBE_ANSWERS.keys()
    assert not [question for question in asked if "9.919" in question and "9.92" in question.replace("9.919", "")]


@pytest.mark.parametrize(
    "said",
    [
        "9.92", "9.920", "**9.92**", r"\boxed{9.92}", "<answer>\n9.92\n</answer>", "The answer is 9.92.",
        "9.92 is bigger.", "So 9.920 > 9.919, and 9.92 is bigger.", "The answer is 9.92, since 9.920 > 9.919.",
    ],
)  # fmt: skip
def test_the_bigger_one_is_read(said):
    assert right(said, tasks.PROBE_ANSWERS[NEAR])


@pytest.mark.parametrize("said", ["9.919", "9.919 is bigger because 919 > 92", "9.92 or 9.919", "9.93", ""])
def test_the_smaller_one_both_and_nothing_are_wrong(said):
    assert not right(said, tasks.PROBE_ANSWERS[NEAR])


LARGER = ["is bigger than", "is larger than", "is greater than", "is higher than", "is newer than", "is heavier than"]
SMALLER = ["is smaller than", "is lower than", "is less than", "is lighter than", "is older than", "<"]


@pytest.mark.parametrize("how", LARGER)
def test_of_a_comparison_the_one_that_is_called_larger_is_the_answer(how):
    for said in (f"9.9 {how} 9.11.", f"9.9 {how} the number 9.11"):
        assert right(said, "9.9") and not right(said, "9.11"), said


@pytest.mark.parametrize("how", [*SMALLER, "exceeds", "beats", "versus", "compared with"])
def test_of_any_other_comparison_nobody_knows_which_of_the_two_is_meant(how):
    """ "9.9 is smaller than 9.11" is what a model says that gets it wrong."""
    for said in (f"9.9 {how} 9.11.", f"So **9.9** {how} **9.11**"):
        assert not right(said, "9.9") and not right(said, "9.11"), said


@pytest.mark.parametrize("how", [*LARGER, *SMALLER, "exceeds", "beats"])
def test_the_last_number_of_a_comparison_is_never_the_answer(how):
    for said in (f"Yes, it {how} 9.11", f"9.9 {how} 9.11."):
        assert not right(said, "9.11"), said


@pytest.mark.parametrize(
    "said",
    [
        "The total is 18, which is larger than before.", "Later than 17 is 18.", "It is none other than 18.",
        "The answer is 18, larger than 17.", "He has more pens than her, and they are 18.", "It is 18 rather than 17.",
        "<answer>18</answer> is more than 17.", "The answer is 18, larger than 17.",
    ],
)  # fmt: skip
def test_what_is_stated_beside_a_comparison_is_read(said):
    assert right(said, "18")


@pytest.mark.parametrize(
    "said",
    [
        "3.14", "3.142", "3.1415", "3.1416", "3.14159", "The value of pi is approximately 3.14159.", "π ≈ 3.14159265",
        "Pi is about 3.14159265...", r"\boxed{3.1416}", "<answer>π ≈ 3.14</answer>", "3.1415926535897932384626433",
        "So pi = 3.14159…", "Pi is 3.14159265359, an irrational number whose digits go on.",
    ],
)  # fmt: skip
def test_pi_is_right_with_its_first_digits_cut_off_or_rounded(said):
    assert right(said, tasks.PROBE_ANSWERS[PI])


@pytest.mark.parametrize(
    "said",
    [
        "3", "3.1", "3.15", "3.143", "3.14160", "3.1417", "3.14159265358979323856", "-3.14", "3.14%", "22/7", "π", "",
        "It never ends.", "between 3.14 and 3.15", "3.14 or 3.15", f"{'9' * 60}.14",
    ],
)  # fmt: skip
def test_other_numbers_and_no_number_are_not_pi(said):
    assert not right(said, tasks.PROBE_ANSWERS[PI])


def test_in_the_tags_it_is_the_same_and_nothing_else_may_stand_there():
    for said, good in (("3.14", True), ("3.14159…", True), ("3.1416", True), ("3.15", False), ("about 3.14", False)):
        assert is_correct(f"<answer>\n{said}\n</answer>", DIGITS) is good, said
    assert is_correct("<answer>-0.33</answer>", "-0.333333…") and not is_correct("<answer>0.33</answer>", "-0.333333…")
    long = "123456789.12345678901234567890"  # more digits than decimal's context has
    assert is_correct(f"<answer>{long}</answer>", f"{long}…") and right(f"It is {long}1", f"{long}…")
    assert not is_correct(f"<answer>1000000000.{'0' * 20}</answer>", f"999999999.{'9' * 18}12…")
    assert is_correct("<answer>0.67</answer>", "0.666666...") and not is_correct("<answer>0.68</answer>", "0.666666...")


def test_a_text_that_ends_in_dots_is_a_text():
    assert right("<answer>And so on ...</answer>", "and so on ...") and not right("<answer>18</answer>", "18 or so …")


def test_long_digits_take_no_time():
    start = time.process_time()
    for said in ("3." + "1" * 100_000, "1" * 100_000 + ".14", "3.14" + "…" * 100_000, "bigger than " * 9_000):
        assert not right(said, DIGITS) or said.startswith("3.14…")
        is_correct(f"<answer>{said}</answer>", DIGITS)
    assert time.process_time() - start < 2.0


def test_before_and_after_mark_each_answer_by_its_own_question():
    decoding = Decoding(8, 0.0, 0, 1, "hf")

    def answered(said):
        return [
            evaluate.Answer(question, text, text, 3, True, question, decoding)
            for question, text in zip(tasks.PROBE_ANSWERS, said, strict=True)
        ]

    table = panel.before_after(
        answered(["9.11", "9.11", "9.9", "9.919", "3.15"]), answered(["9.9", "9.9", "9.9", "9.92", "Pi is 3.1416."]),
        list(tasks.PROBE_ANSWERS.values()),
    )  # fmt: skip
    assert [row[1].right for row in table.rows] == [False, False, True, False, False]
    assert all(row[2].right for row in table.rows)
