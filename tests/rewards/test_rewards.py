import doctest
import time

import pytest

from nbhelpers import rewards
from nbhelpers.rewards import (
    correctness,
    countdown,
    get_language_consistency,
    get_length_penalty,
    get_repetition_penalty,
    integer_answer,
    math_correctness,
    penalties,
    reward,
    soft_format,
    spelling,
    strict_format,
    tag_count,
)

GOOD = "<reasoning>\n9 tenths is more than 1 tenth\n</reasoning>\n<answer>\n9.9\n</answer>\n"


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(rewards)
    assert result.attempted >= 8 and result.failed == 0


def test_the_example_of_the_signature():
    result = doctest.testmod(reward)
    assert result.attempted == 3 and result.failed == 0


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


def test_strict_format_is_all_or_nothing():
    assert strict_format([GOOD.replace("9 tenths is more than 1 tenth", "...")]) == strict_format([""]) == [0.0]
    assert strict_format([GOOD, GOOD + "bye", "<answer>9.9</answer>"]) == [0.5, 0.0, 0.0]


def test_soft_format_wants_the_order():
    assert soft_format(["<answer>1</answer><reasoning>2</reasoning>"]) == [0.0]
    assert soft_format(["a<reasoning>b</reasoning>c<answer>d</answer>e"]) == [0.5]


def test_a_message_without_text_scores_zero():
    assert correctness([[{"role": "assistant", "content": None}]], answer=["1"]) == [0.0]


def test_a_column_of_the_wrong_length_is_an_error():
    with pytest.raises(ValueError):
        correctness([GOOD, GOOD], answer=["9.9"])


def test_math_correctness_reads_the_tag_or_the_last_box():
    half = [r"<answer>\frac12</answer>", r"\boxed{3} no, \boxed{0.5}", r"\boxed{0.5} no, \boxed{3}", "0.5", ""]
    assert math_correctness(half, answer=["1/2"] * 5) == [2.0, 2.0, 0.0, 0.0, 0.0]
    both = [r"\boxed{1/2} <answer>3</answer>", r"\boxed{3} <answer>1/2</answer>"]  # the tag counts
    assert math_correctness(both, answer=["0.5", "0.5"]) == [0.0, 2.0]
    assert math_correctness([GOOD, GOOD, GOOD], answer=[None, 9.9, "9.11"]) == [None, 2.0, 0.0]
    with pytest.raises(ValueError):
        math_correctness([GOOD, GOOD], answer=["9.9"])


def test_countdown_pays_for_a_solution_in_the_answer_tag():
    texts = ["<answer>(19 - 3) * 5</answer>", "(19 - 3) * 5", "<answer>(19 - 3) * 5 = 80</answer>", "<answer></answer>"]
    scores = countdown(texts, numbers=[[3, 5, 19]] * 4, target=[80] * 4, answer=["(19 - 3) * 5"] * 4)
    assert scores == [2.0, 0.0, 0.0, 0.0]
    assert countdown([[{"role": "assistant", "content": "<answer>9/3</answer>"}]], numbers=[[3, 9]], target=[3]) == [
        2.0
    ]
    with pytest.raises(ValueError):
        countdown(texts, numbers=[[3, 5, 19]], target=[80])


def test_the_examples_of_the_penalties():
    result = doctest.testmod(penalties)
    assert result.attempted == 3 and result.failed == 0


def test_language_consistency_counts_the_letters_of_the_reasoning():
    latin, han = get_language_consistency("latin"), get_language_consistency("han")
    assert latin.__name__ == "language_consistency"
    texts = ["<think>nine九</think>六六六", "<reasoning>九</reasoning>", "9 = 9 \\frac{1}{2}", "", "déjà vu, ØΩ"]
    assert latin(completions=texts) == [0.8, 0.0, 0.0, 0.0, pytest.approx(7 / 8)]
    assert han(completions=texts) == [pytest.approx(0.2), 1.0, 0.0, 0.0, 0.0]
    assert get_language_consistency("han", "kana")(
        completions=[[{"role": "assistant", "content": "日本のカメラ"}]]
    ) == [1.0]
    for wrong in ((), ("english",), ("latin", "klingon")):
        with pytest.raises(ValueError, match="latin, greek"):
            get_language_consistency(*wrong)


def test_every_script_knows_its_own_letters_and_no_others():
    words = {
        "latin": "Größe", "greek": "λόγος", "cyrillic": "слово", "hebrew": "מילה", "arabic": "كلمة",
        "devanagari": "नमस्ते", "thai": "คำ", "han": "汉字", "kana": "かなカナ", "hangul": "한글",
    }  # fmt: skip
    assert words.keys() == penalties.SCRIPTS.keys()
    for script in words:
        scores = get_language_consistency(script)(completions=list(words.values()))
        assert scores == [float(name == script) for name in words]


def test_length_penalty_is_dapo_s():
    penalty = get_length_penalty(100, cache=40)
    lengths = [0, 60, 70, 80, 100, 500]
    scores = penalty(completion_ids=[[1] * n for n in lengths], completions=["x"] * 6, answer=["9"] * 6)
    assert scores == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert all(str(score) != "-0.0" for score in scores)
    for cache in (0, 101):
        with pytest.raises(ValueError, match=f"cache={cache}"):
            get_length_penalty(100, cache)


def test_repetition_penalty_counts_n_grams():
    penalty = get_repetition_penalty(3, max_penalty=-2.0)
    texts = ["one two three four", "A b c a B C", "two words", "", "九九九九九", "wait " * 102]
    assert penalty(completions=texts) == [0.0, -0.5, 0.0, 0.0, pytest.approx(-4 / 3), pytest.approx(-1.98)]
    for settings in ({"ngram_size": 0}, {"max_penalty": 0.5}):
        with pytest.raises(ValueError):
            get_repetition_penalty(**settings)


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
    "boxes": r"\boxed{",
    "half boxes": r"\boxed ",
    "backslashes": "\\",
    "braces": "{",
    "spaces": " ",
    "words": "a ",
    "tags": "</a",
    "letters": "aé九",
}
FUNCS = [correctness, countdown, math_correctness, integer_answer, strict_format, soft_format, tag_count]
FUNCS += [get_language_consistency("latin"), get_length_penalty(512, 128), get_repetition_penalty(), spelling({"a"})]


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("func", FUNCS, ids=lambda func: func.__name__)
def test_hostile_text_costs_linear_time(func, unit):
    """100,000 characters in under 50 ms, and twice as many in about twice the time."""

    def seconds(length: int) -> float:
        text = (unit * (length // len(unit) + 1))[:length]
        texts = [text, f"<answer>{text}</answer>", f"<reasoning>\n{text}\n</reasoning>\n<answer>\n{text}\n</answer>"]
        columns = {"completion_ids": [list(text.encode()) for text in texts], "answer": ["1000"] * 3}
        columns |= {"numbers": [[9, 1]] * 3, "target": [10] * 3}
        best = float("inf")
        for _ in range(5):
            start = time.process_time()  # of this process alone: other work on the machine does not count
            func(completions=texts, **columns)
            best = min(best, time.process_time() - start)
        return best / 3

    single, double = seconds(100_000), seconds(200_000)
    assert single < 0.05
    assert double < 3 * single + 0.005  # 5 ms: below it the clock and the machine's other work decide
