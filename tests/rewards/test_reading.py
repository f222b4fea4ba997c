"""Answers in any form: read as a careful person would, in linear time, and what looks right but is not."""

import doctest
import time

import pytest
import reading_phrases

from nbhelpers import rewards
from nbhelpers.rewards import REASONING, THINK, Tags, is_correct, reading
from nbhelpers.rewards.reading import read, right

RIGHT = [
    # a plain number, dressed up
    ("18", "18"),
    ("18.", "18"),
    ("$18", "18"),
    ("18 dollars", "18"),
    ("US$18", "18"),
    ("€ 18.00", "18"),
    ("**18**", "18"),
    ("*18*", "18"),
    ("`18`", "18"),
    ("**$18.**", "18"),
    ("__18__", "18"),
    ("1,800", "1800"),
    ("1800", "1,800"),
    ("1\u202f800", "1800"),
    ("1\u00a0234\u00a0567", "1234567"),
    (r"1{,}800", "1800"),
    (r"1\,800", "1800"),
    ("18.00", "18"),
    ("12.5", "12.50"),
    ("$12.50", "12.50"),
    (".5", "0.5"),
    ("１８", "18"),
    ("− 7".replace(" ", ""), "-7"),
    ("–7", "-7"),
    ("-$7", "-7"),
    ("18 thousand", "18000"),
    ("2 dozen", "24"),
    ("18!", "18"),
    ("18 (that is 20 minus 2)", "18"),
    ("18cm", "18"),
    ("18 m²", "18"),
    ("18 km/h", "18"),
    ("25°", "25"),
    # powers of ten
    ("1e-5", "0.00001"),
    ("0.00001", "1e-05"),
    ("1e3", "1000"),
    (r"1.6\times 10^{-19}", "1.6e-19"),
    ("5 × 10³", "5000"),
    ("The answer is 2E3 apples.", "2000"),
    # fractions and percentages
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"-\frac{3}{4}", "-0.75"),
    ("½", "0.5"),
    ("2½", "2.5"),
    (r"2\frac{1}{2}", "2.5"),
    ("50%", "50"),
    ("50 %", "50%"),
    (r"50\%", "50"),
    ("50 percent", "50%"),
    # equations and LaTeX
    ("x = 18", "18"),
    (r"$18$", "18"),
    (r"\(18\)", "18"),
    (r"\[ x = 18 \]", "18"),
    (r"$18\text{ apples}$", "18"),
    (r"18^\circ", "18"),
    (r"\text{Paris}", "Paris"),
    # the tag
    ("<reasoning>\n17?\n</reasoning>\n<answer>\n18\n</answer>\n", "18"),
    ("<answer>17</answer> no: <answer>18</answer>", "18"),
    ("<answer>The answer is 18 apples</answer>", "18"),
    ("<answer>The answer is 18 apples in 3 boxes.</answer>", "18"),
    (r"<answer>So we get \boxed{18}</answer>", "18"),
    ("<answer>3 * 6 = 18</answer>", "18"),
    ("<answer>18 = 3 * 6</answer>", "18"),
    ("<answer>She has 18 left.</answer> She had 20.", "18"),
    ("<answer>18, because 3 times 6 is 18</answer>", "18"),
    ("<answer>18</answer> and <answer>19", "18"),  # the last one that is closed
    ("<answer>18", "18"),  # never closed: read like a text
    # a box
    (r"First 17, then \boxed{18}. That was 3 steps.", "18"),
    (r"$\boxed{\$18}$", "18"),
    (r"\boxed{17} no, \boxed{18}", "18"),
    (r"\boxed{18\text{ km}}", "18"),
    # after #### and the usual phrases
    ("20 - 2 = 18\n#### 18", "18"),
    ("#### $1,800", "1800"),
    ("#### Step 2\n3 * 6 = 18", "18"),
    ("The answer is 18.", "18"),
    ("The answer is: 18. I needed 3 steps.", "18"),
    ("Answer: 18\nChecked 2 times.", "18"),
    ("**Answer:** 18 apples", "18"),
    ("**Final Answer**\n\n18", "18"),
    ("Final answer: x = 18", "18"),
    ("The final answer is $18$. I hope it is correct.", "18"),
    ("The answer to the question is therefore 18, not 17.", "18"),
    ("The answer is 17. No: the answer is 18.", "18"),
    ("The answer in dollars is $12.50.", "12.5"),
    # the last line, the last number
    ("20 - 2 = 18 apples, which is more than 3.", "18"),
    ("First there are 20.\nThen 2 go.\nSo 18 are left.", "18"),
    ("She sold 3 for $2. She has $18 left.", "18"),
    ("I counted it: -18", "-18"),
    ("It is not 17 but 18.", "18"),
    ("- 5 apples\n- 18 pears", "18"),
    ("The 3 of them share. Each gets 18.", "18"),
    # a thought in between
    ("<think>The answer is 17.</think>\n\nThe answer is 18.", "18"),
    ("it is 17</think>18", "18"),
    ("<think><answer>17</answer></think><answer>18</answer>", "18"),
    # text
    ("The answer is Paris.", "Paris"),
    ("<answer>paris.</answer>", "Paris"),
    ("**Yes**", "yes"),
    ("Yes.", "Yes"),
    ("Answer: Yes, because 18 > 17", "Yes"),
    ("(B)", "B"),
    ("<answer>Cafe\u0301</answer>", "Café"),
    ("<answer>Ｐａｒｉｓ</answer>", "Paris"),
    ("<answer>9:15</answer>", "9:15"),
]

WRONG = [
    # other numbers that look alike
    ("18", "180"),
    ("180", "18"),
    ("118", "18"),
    ("1.8", "18"),
    ("18.01", "18"),
    ("-18", "18"),
    ("−18", "18"),
    ("18", "-18"),
    ("18 thousand", "18"),
    ("18k", "18"),
    ("18 dozen", "18"),
    ("1,800", "1.8"),
    ("1,80", "180"),
    ("1,8000", "18000"),
    ("1 800", "1800"),
    ("12,50", "1250"),
    ("1e3", "1"),
    ("18e2", "18"),
    ("1e3x", "1000"),
    ("0x1e3", "1000"),
    ("1,5e3", "5000"),
    ("1.2.3e1", "12"),
    ("3 * 10^2 * 2", "300"),
    ("18th", "18"),
    ("18x", "18"),
    ("x18", "18"),
    ("18²", "182"),
    ("18²", "18"),
    ("18^2", "18"),
    (r"\sqrt{18}", "18"),
    ("√18", "18"),
    ("1½", "5.5"),
    ("18 and a half", "18"),
    ("18/0", "18"),
    ("0/0", "0"),
    ("1/3", "0.333"),
    ("1/2", "12"),
    (r"\frac{1}{2}", "12"),
    ("0.5", "50%"),
    ("50%", "0.5"),
    ("1.2.3", "1.2"),
    ("...18", "0.18"),
    # hedges, denials, ranges, unfinished work
    ("18 or 19", "18"),
    ("<answer>18 or 19</answer>", "19"),
    ("<answer>18, 19</answer>", "18"),
    ("<answer>17 18 19</answer>", "18"),
    ("<answer>either 18 or something else</answer>", "18"),
    ("The answer is 17 or 18.", "18"),
    ("The answer is 17, 18", "17"),
    ("The answer is 18 to 20.", "18"),
    ("The answer is 18 minutes and 30 seconds.", "18"),
    ("It is not 18.", "18"),
    ("The answer is not 18.", "18"),
    ("The answer isn't 18", "18"),
    ("<answer>not 18</answer>", "18"),
    ("It lies between 17 and 18.", "18"),
    ("between 17 and 18", "17"),
    ("17-18", "18"),
    ("17–18", "-18"),
    ("17–18", "18"),
    ("at least 18", "18"),
    ("more than 18", "18"),
    ("x > 18", "18"),
    ("x ≠ 18", "18"),
    (r"x \neq 18", "18"),
    ("18 ± 1", "18"),
    (r"\boxed{- 18}", "18"),
    ("- 18", "18"),
    ("3 * 6", "18"),
    ("<answer>20 - 2</answer>", "18"),
    ("The rest is 20 - 18", "18"),
    ("<answer>18 - 3</answer>", "18"),
    ("2**3", "23"),
    # what stands elsewhere rescues nothing
    ("<answer>17</answer> The answer is 18.", "18"),
    (r"<answer>17</answer> \boxed{18}", "18"),
    ("18 <answer></answer>", "18"),
    ("18 <answer>...</answer>", "18"),
    ("<answer>18</answer><answer>17</answer>", "18"),
    ("<answer>I do not know</answer> 18", "18"),
    (r"18, or \boxed{17}", "18"),
    (r"\boxed{} 18", "18"),
    ("The answer is 17. 18", "18"),
    ("18\n#### 17", "18"),
    ("<think>18</think> 17", "18"),
    ("<think>The answer is 18</think> I cannot say.", "18"),
    ("<answer>18</answer></think>17", "18"),
    ("20 - 2 = 18, then 18 - 1 = 17", "18"),
    ("Step 18: there are 17", "18"),
    ("18 were there. 17 are left.", "18"),
    # nothing
    ("", "18"),
    ("", ""),
    ("<answer></answer>", ""),
    ("I have no idea.", "18"),
    ("eighteen", "18"),
    # text
    ("The answer is London.", "Paris"),
    ("The answer is not Paris.", "Paris"),
    ("Yes or No", "Yes"),
    ("<answer>Paris or London</answer>", "Paris"),
    ("<answer>London</answer> Paris", "Paris"),
    ("Paris, London", "Paris"),
    ("<answer>A</answer>", "B"),
    ("9:15", "9"),
    ("<answer>9:16</answer>", "9:15"),
    ("No", "Yes"),
    ("18", "Yes"),
]


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(reading)
    assert result.attempted == 3 and result.failed == 0


@pytest.mark.parametrize(("text", "gold"), RIGHT + reading_phrases.RIGHT)
def test_right(text, gold):
    assert right(text, gold)


@pytest.mark.parametrize(("text", "gold"), WRONG + reading_phrases.WRONG)
def test_wrong(text, gold):
    assert not right(text, gold)


def test_the_table_is_long_and_even():
    assert min(len(RIGHT), len(WRONG)) >= 90 and len({*RIGHT, *WRONG}) == len(RIGHT) + len(WRONG)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>\n$1,800.00\n</answer>", "1800.00"),
        ("The answer is 50 %.", "50%"),
        (r"\boxed{-\frac{1}{2}}", "-1/2"),
        ("The answer is Paris, because 3 people said so.", "Paris"),
        ("so we get\n3 * 6 = 18 apples", "18"),
        ("5 1/2", "11/2"),
        ("2 thousand", "2000"),
        ("<answer>...</answer>", None),
        ("<answer>17 or 18</answer> 18", None),
        ("", None),
    ],
)
def test_read(text, answer):
    assert read(text) == answer


def test_from_the_room():
    assert (rewards.read, rewards.right) == (read, right)
    assert right("9.90", 9.9)  # a column of floats
    assert right("0.00001", 1e-05) and right("9.11", 9.109999656677246) and not right("9.12", 9.109999656677246)


HOSTILE = (
    "9", "1,", "1,234", "9.", ".", "/", "1/", "-", "- ", "=", "1=", "3 * ", "a ", " ", "\n", "\n ", "{", "}", "(",
    "((18", "$", "^ ", "^{ ", "**", "*a", "<answer>", "</answer>", "<answer></answer>", "<answer>1", "<think>",
    "</think>", "\\boxed{", "\\boxed{}", "\\text{", "\\text {a", "\\frac{", "\\frac{1}{", "\\frac 1", "\\", "answer ",
    "answer: ", "the answer is ", "final answer\n", "####", "#### \n", "not ", " or 1", ", not", ", ", "½", "²",
    "\u0301\u0316", "\ufdfa", "−", "１", "\u2009", "1\u2009", "m2", "m ^", "18. ", "x=", "\"'", "A",
    "1e", "1e3", "1e3 ", "1 * 10^", "1*10^{", "10^3", "=>", "<", "> 1, so ", "than 1, so ", "not 1 but ", " out of 1",
    "1 is bigger than ", "1 is not ", "1 or ", "half of ",
)  # fmt: skip


@pytest.mark.parametrize("part", HOSTILE, ids=repr)
def test_hostile_text_takes_linear_time(part):
    many = part * (100_000 // len(part))
    for text in (many, f"<answer>{many}</answer>", f"\\boxed{{{many}}}", f"The answer is {many}", f"18 {many} 18"):
        best = float("inf")
        for _ in range(3):  # the machine may be busy with other things
            start = time.process_time()
            right(text, "18")
            best = min(best, time.process_time() - start)
            if best < 1.0:
                break
        assert best < 1.0, text[:40]  # what hangs takes minutes; a busy machine is slow


SOLUTION = Tags("<thought>", "</thought>", "<solution>", "</solution>")


@pytest.mark.parametrize(
    ("text", "tags", "is_right"),
    [
        ("3 * 6 = 18\n</think>\n\nThe answer is \\boxed{18}.", THINK, True),
        ("<think>\n3 * 6 = 18\n</think>\n\n18", THINK, True),
        ("3 * 6 = 18\n</think>\n\n17", THINK, False),
        ("3 * 6 = 18, so the answer is 18. But wait", THINK, False),  # cut off in its thought
        ("<think>\n3 * 6 = 18", THINK, False),
        ("The answer is 18.", REASONING, True),
        ("<reasoning>\n3 * 6 = 18", REASONING, True),
        ("<thought>\n17\n</thought>\n<solution>\n18\n</solution>", SOLUTION, True),
        ("<solution>18</solution> 17", SOLUTION, True),
        ("<solution>17</solution> The answer is 18", SOLUTION, False),
        ("It is 18", SOLUTION, True),
    ],
)
def test_right_follows_the_tags(text, tags, is_right):
    assert right(text, "18", tags) is is_right


@pytest.mark.parametrize(("form", "tags"), [("why\n</think>\n\n{}", THINK), ("<solution>{}</solution>", SOLUTION)])
def test_is_correct_wants_the_answer_alone_in_its_place(form, tags):
    assert is_correct(form.format("18"), "18", tags) and not is_correct(form.format("It is 18"), "18", tags)
    assert not is_correct("<answer>18</answer>", "18", tags)
