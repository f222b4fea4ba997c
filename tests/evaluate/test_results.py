"""Intervals, the estimate of pass@k, and rows: arithmetic, without a model."""

import itertools
from dataclasses import replace

import pytest

from nbhelpers import evaluate
from nbhelpers.evaluate import Answer, Decoding, Proportion, Row


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # by hand: z²/(n + z²) = 3.8415 / 13.8415
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_intervals(hits, n, low, high):
    share = Proportion.of(hits, n)
    assert (round(share.low, 4), round(share.high, 4)) == (low, high)
    assert share.value == hits / n and share.n == n
    mirrored = Proportion.of(n - hits, n)
    assert mirrored.low == pytest.approx(1 - share.high) and mirrored.high == pytest.approx(1 - share.low)


def test_the_ends_are_exact_and_nonsense_is_refused():
    assert all(Proportion.of(0, n).low == 0.0 and Proportion.of(n, n).high == 1.0 for n in range(1, 500))
    for hits, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            Proportion.of(hits, n)


def test_the_unbiased_estimate_is_the_share_of_all_choices():
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 1), (6, 5, 2), (7, 3, 7)):
        right = [True] * c + [False] * (n - c)
        chosen = [any(choice) for choice in itertools.combinations(right, k)]
        assert evaluate.unbiased_pass_at_k(n, c, k) == pytest.approx(sum(chosen) / len(chosen))
    assert evaluate.unbiased_pass_at_k(10, 3, 1) == 0.3
    assert 0 < evaluate.unbiased_pass_at_k(5000, 1, 500) < 0.11  # no overflow
    for n, c, k in ((4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)):
        with pytest.raises(ValueError):
            evaluate.unbiased_pass_at_k(n, c, k)


def test_a_row_is_an_answer():
    decoding = Decoding(8, 0.0, 0, 1)
    answer = Answer("q?", "text", None, 4, True, "u:q?", decoding)
    row = Row(**vars(answer), gold="1", correct=False, formatted=False)
    assert isinstance(row, Answer) and replace(row, gold="2").completion == "text"
    evaluate.check_comparable([row], [answer])
