"""Spelling and helpfulness: what is a word, what is a mistake, and a judge that may do anything."""

import doctest
import random
import re
import time
import warnings

import pytest

from nbhelpers import rewards, tasks
from nbhelpers.rewards import helpfulness, prose, spelling
from nbhelpers.rewards.guard import RewardError, guard_all
from nbhelpers.training import identity

WORDS = {"the", "cat", "sat", "on", "a", "mat", "do", "can", "it", "they", "is", "café", "well", "known", "Paris", "we"}


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(prose)
    assert result.attempted == 3 and result.failed == 0


@pytest.mark.parametrize("text, mistakes", [
    ("The cat sat on the mat.", 0),
    ("Teh cat", 0),  # a capital letter: it may be a name
    ("the CAT, THE Cat; tHe cat", 0),
    ("hte cat saat", 2),
    ("hte hte hte", 3),
    ("", 0), ("   \n", 0), ("...!?", 0),
    ("Natalia sat on Møller. NASA is known in McDonald", 1),  # "in" is not in the list
    ("the cat is 3.5 on, 9.11 > 9.9, 1,000 x2 3rd 4th", 0),
    ("don't can't it's they're cat's cats' we'd we'll we've", 1),  # cats is another word
    ("don’t it’s 'the cat' ‘the mat’ the cats’", 1),
    ("don't' 'cat", 0),
    ("dont", 1), ("isn't", 0), ("wasn't", 1), ("n't 's", 0),
    ("a well-known cat, a wel-known cat", 1),
    ("the cat—sat/on,the;mat(the cat)", 0),
    ("<reasoning>\nthe cat\n</reasoning>\n<answer>\nthe mat\n</answer>\n", 0),
    ("<think>the cat</think>", 0), ("</answr>", 0),
    ("the `for i in rnge(3)` cat", 0),
    ("the\n```python\nfor xyz in qwe: prnt(xyz)\n```\ncat saat", 1),
    ("the ```prnt(xyz)", 0),  # cut off
    ("the ` cat saat", 1),
    (r"\frac{abc}{def} \sqrt \alpha the", 0),
    ("see_this foo.py https://exmple.org/pge mee@exmple.org www.exmple.org forEach", 0),
    ("x y z a b", 0),
    ("cafe\u0301 café CAFÉ", 0), ("caffé", 1),
    ("paris and PARIS", 1),  # and
    ("кот sat 猫", 1),  # a letter alone is none
    ("w" * 65, 1), ("W" * 65, 1), ("w" * 100_000, 1),
])  # fmt: skip
def test_what_counts_as_a_mistake(text, mistakes):
    assert spelling(WORDS)(completions=[text]) == [round(-0.1 * mistakes, 9) + 0.0]
    chat = [[{"role": "assistant", "content": text}]]
    assert spelling(WORDS, penalty=-1)(completions=chat) == [-mistakes]


def test_a_word_of_the_question_is_right_in_its_own_row_alone():
    prompts = [tasks.messages("what is a zorgle?", "be breif"), "the gribble"]
    assert spelling(WORDS)(prompts=prompts, completions=["a zorgle is", "the Zorgle zorgle gribble"]) == [0.0, -0.1]
    assert spelling(WORDS)(prompts=prompts, completions=["breif", ""]) == [-0.1, 0.0]


def test_the_words_of_a_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeffthe\r\nCat\r\n\r\n  sat \r\n".encode())
    for given in (file, str(file)):
        assert spelling(given)(completions=["the cat sat", "te cat sat"]) == [0.0, -0.1]


@pytest.mark.parametrize("words, said", [
    ("no/such/file", "cannot be read"), ("", "cannot be read"), ([], "words is empty"), (["", " "], "words is empty"),
    (["the", 3], "has 3, which is no text"), ([None], "has None"),
])  # fmt: skip
def test_a_list_that_is_none_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        spelling(words)


def test_a_file_that_is_no_text_and_a_penalty_that_pays_are_refused(tmp_path):
    (tmp_path / "words.bin").write_bytes(b"\xff\xfe\x00\x80")
    for wrong in (tmp_path / "words.bin", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            spelling(wrong)
    for penalty in (0.1, 0, float("nan"), float("-inf"), "-0.1"):
        with pytest.raises(ValueError, match="penalty="):
            spelling(WORDS, penalty=penalty)


def test_spelling_takes_linear_time_of_anything():
    rng = random.Random(0)
    texts = ["'" * 100_000, "a'" * 50_000, "`" * 100_001, "a`\n" * 33_333, "é\u0301" * 50_000, "</" * 50_000,
             "\u0301\u0323" * 50_000, "".join(rng.choice("ab' `-\n") for _ in range(100_000))]  # fmt: skip
    reward = spelling(WORDS)
    start = time.perf_counter()
    assert len(reward(completions=texts)) == len(texts)
    assert time.perf_counter() - start < 5, "a busy machine takes long, a quadratic cost minutes"


def test_another_list_is_another_run():
    one, same, other = (identity.code_of(spelling(words)) for words in (["the", "cat"], {"cat", "the"}, ["the"]))
    assert one == same != other


# ---- helpfulness ----


def ask(judge, *answers, **settings):
    return helpfulness(judge, **settings)(prompts=["?"] * len(answers), completions=list(answers))


def test_a_judges_score_is_held_between_its_limits():
    assert ask(lambda question, answer: float(answer), "-3", "0.25", "7") == [0.0, 0.25, 1.0]
    assert ask(lambda question, answer: float(answer), "-3", "0.25", "70", low=-1, high=10) == [-1.0, 0.25, 10.0]
    assert ask(lambda question, answer: answer == "yes", "yes", "no") == [1.0, 0.0]
    assert ask(lambda question, answer: None, "yes") == [None]


def test_the_judge_gets_question_and_answer_as_texts():
    seen = []
    prompts = [tasks.messages("How?", "Be kind."), "Why?"]
    completions = [[{"role": "assistant", "content": "So."}], "Thus."]
    helpfulness(lambda *pair: seen.append(pair) or 1)(prompts=prompts, completions=completions)
    assert seen == [("How?", "So."), ("Why?", "Thus.")]


def test_nothing_is_not_helpful_and_nobody_is_asked():
    def judge(question, answer):
        raise AssertionError("asked")

    assert ask(judge, "", " \n") == [0.0, 0.0] and ask(judge, "", low=-2.0) == [-2.0]


def test_a_judge_that_fails_costs_one_answer_and_is_named_once():
    def judge(question, answer):
        if answer == "bad":
            raise OSError("no answer from the judge")
        return {"nan": float("nan"), "text": "0.7", "inf": float("inf"), "list": [1]}.get(answer, 0.5)

    reward = helpfulness(judge)
    with pytest.warns(UserWarning, match="the judge failed with OSError: no answer from the judge") as caught:
        scores = reward(prompts=["?"] * 6, completions=["good", "bad", "nan", "text", "inf", "list"])
    assert scores == [0.5, None, None, None, None, None] and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward(prompts=["?"], completions=["bad"]) == [None]
    with pytest.raises(KeyboardInterrupt):
        ask(lambda question, answer: (_ for _ in ()).throw(KeyboardInterrupt), "good")


def test_a_judge_that_always_fails_stops_the_run():
    (reward,) = guard_all([helpfulness(lambda question, answer: 1 / 0)])
    with pytest.raises(RewardError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            reward(prompts=["?"], completions=["so"])


async def later(question, answer):
    return 1.0


@pytest.mark.parametrize("judge, settings", [
    (None, {}), ("gpt", {}), (later, {}), (len, {"low": 1.0}), (len, {"low": 2, "high": 1}),
    (len, {"high": float("inf")}), (len, {"low": float("nan")}),
])  # fmt: skip
def test_what_is_no_judge_is_refused(judge, settings):
    with pytest.raises(ValueError):
        helpfulness(judge, **settings)


# ---- both ----


def test_check_has_nothing_to_say_about_them_and_names_what_can_be_gamed():
    task = tasks.decimals(4, 4)
    said = "First I look at what is asked, then I work it out step by step. I think it is. The answer is."
    spells = spelling({*WORDS, *re.findall(r"\w+", said)})
    funcs = [rewards.correctness, spells, helpfulness(lambda question, answer: "step by step" in answer)]
    assert [said for said in rewards.check(funcs, task).warnings if "it is slow" not in said] == []
    holes = rewards.check([helpfulness(lambda question, answer: len(answer) / 1000)], task).warnings
    assert any("helpfulness: it can be gamed" in hole for hole in holes)
