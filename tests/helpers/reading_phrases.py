"""Answers in whole sentences, as people and models write them: what is chosen, what is denied, what is left open."""

import pytest

from nbhelpers.rewards.reading import right

RIGHT = [
    # a comparison: what is said to be more was chosen
    ("9.9 is greater than 9.11.", "9.9"),
    ("The number 9.92 is bigger than the number 9.919", "9.92"),
    ("9.9 > 9.11", "9.9"),
    ("$1,800 is more than $900.", "1800"),
    ("9.9 is much bigger than 9.11.", "9.9"),
    ("9.9 is indeed a bigger number than 9.11.", "9.9"),
    ("9.9 has a higher value than 9.11", "9.9"),
    ("9.9 exceeds 9.11.", "9.9"),
    ("Yes, 9.9 is bigger than 9.11", "9.9"),
    ("<answer>9.9 is the bigger number</answer>", "9.9"),
    ("Between 9.9 and 9.11, 9.9 is larger.", "9.9"),
    ("The larger of 9.11 and 9.9 is 9.9", "9.9"),
    ("9.9 is bigger than 9.11, so 9.9", "9.9"),
    ("9.9 is greater than 9.11, so 9.11 is smaller.", "9.9"),
    ("9.11 is smaller than 9.9, so 9.9 is bigger.", "9.9"),
    ("Comparing tenths: 9 > 1, so 9.9 is bigger.", "9.9"),
    ("9 > 1, so 9.9 > 9.11.", "9.9"),
    ("The maximum is 9.9.", "9.9"),
    # a number among words
    ("18 apples are left", "18"),
    ("18 apples are not eaten.", "18"),
    ("it's 18", "18"),
    ("= 18", "18"),
    ("3 * 6 => 18", "18"),
    ("18 (eighteen)", "18"),
    ("18 is the answer.", "18"),
    ("Half of them is 18.", "18"),
    ("He is 18 at the end.", "18"),
    ("He has 18 left out of 20.", "18"),
    ("He ate 2 out of 20, so 18 are left.", "18"),
    ("If he pays 20, he gets back 18.", "18"),
    # what is denied is another number
    ("The total is $18, not $20", "18"),
    ("The answer is not 17 but 18.", "18"),
    ("The answer isn't 17 apples, but 18 apples.", "18"),
    ("That's not 20. That's 18.", "18"),
]

WRONG = [
    # a comparison that chooses the other number, or none
    ("9.11 > 9.9", "9.9"),
    ("9.11 has a higher value than 9.9", "9.9"),
    ("9.11 exceeds 9.9", "9.9"),
    ("9.9 is smaller than 9.11", "9.9"),
    ("9.9 is less than 9.11", "9.9"),
    ("9.9 < 9.11", "9.9"),
    ("9.11 < 9.9", "9.11"),  # right where the smaller one is asked for, but who knows
    ("9.11 < 9.9", "9.9"),
    ("9.9 is not bigger than 9.11", "9.9"),
    ("9.9 is no bigger than 9.11", "9.9"),
    ("9.9 is hardly bigger than 9.11", "9.9"),
    ("9.9 is bigger than or equal to 9.11", "9.9"),
    ("9.9 is bigger than 9.11?", "9.9"),
    ("It is wrong that 9.9 is bigger than 9.11.", "9.9"),
    ("I wonder whether 9.9 is bigger than 9.11.", "9.9"),
    ("9.11 and 9.9 are equal", "9.9"),
    ("Since 18 is greater than 12", "18"),
    ("the price is greater than 18", "18"),
    # denied
    ("18 is wrong", "18"),
    ("18 is not the answer", "18"),
    ("9.9 is not the bigger number", "9.9"),
    ("18 cannot be right", "18"),
    ("The answer should not be 18.", "18"),
    ("The answer can't be 18", "18"),
    ("The answer can't be Paris", "Paris"),
    ("The total is $20, not $18", "18"),
    ("The answer is not 18 but 17.", "18"),
    # left open
    ("18 or more", "18"),
    ("18 apples at least", "18"),
    ("17 (or 18)", "17"),
    ("18 (maybe 19)", "18"),
    ("x >= 18", "18"),
    ("x != 18", "18"),
    ("18 <= x", "18"),
    # unfinished work
    ("half of 18", "18"),
    ("The answer is twice 18", "18"),
    ("18 squared", "18"),
]


@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_right(text, gold):
    assert right(text, gold)


@pytest.mark.parametrize(("text", "gold"), WRONG)
def test_wrong(text, gold):
    assert not right(text, gold)
