"""Stories that are right, that say all that is needed, and whose test questions training never sees."""

import doctest
import random
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import pytest
from story_solvers import SOLVERS, third_then_quarter

from nbhelpers import tasks
from nbhelpers.models import smoke
from nbhelpers.tasks import problems
from nbhelpers.tasks.problems import drawing

STORIES = {story.__name__: (level, story) for level, stories in problems.LEVELS.items() for story in stories}
NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
CLOCK = re.compile(r"(\d):0(\d)\b")  # 9:05 is 9 and 5


def numbers(text: str) -> list[Fraction]:
    return [Fraction(number.replace(",", "")) for number in NUMBER.findall(CLOCK.sub(r"\1:\2", text))]


FIRST = (
    "phone_bill",
    "Jorge pays $25 a month for the phone, 200 minutes included. Every further minute costs 22 cents. Last month Jorge "
    "was on the phone for 216 minutes. How many dollars is the bill?",
    "28.52",
)


def drawn(name: str, n: int = 200) -> list[tuple[str, str]]:
    draw = drawing.Draw(random.Random(name))
    return [STORIES[name][1](draw) for _ in range(n)]


def text(row: dict) -> str:
    return row["prompt"][-1]["content"]


def keys(dataset) -> set:
    return {(row["template"], *numbers(text(row))) for row in dataset}


def test_the_example_in_the_docstring():
    result = doctest.testmod(problems)
    assert result.attempted == 2 and result.failed == 0


def test_how_many_there_are():
    assert len(STORIES) == sum(map(len, problems.LEVELS.values())) == 72
    assert STORIES.keys() > problems.HELD_OUT
    assert Counter(STORIES[name][0] for name in problems.HELD_OUT) == {1: 4, 2: 4, 3: 4, 4: 4}


@pytest.mark.parametrize("name", STORIES)
def test_a_second_solution_from_the_text_alone_agrees(name):
    for question, answer in drawn(name):
        given = numbers(question)
        other = third_then_quarter(question, *given) if name == "third_then_quarter" else SOLVERS[name](*given)
        assert other == Fraction(answer), question
        assert other > 0


@pytest.mark.parametrize("name", STORIES)
def test_how_a_question_and_its_answer_are_written(name):
    money = "dollars" in drawn(name, 1)[0][0]
    for question, answer in drawn(name):
        assert not re.search(r"[{}]|\s\s|Decimal|None|\d\.\d*0{3}|\$\d+\.\d(?!\d)|[a-z][A-Z]", question), question
        assert question.endswith("?") and (question[0].isupper() or question[0].isdigit())
        assert not re.search(r"(?<![\d.,:])1 [a-z]+s\b", question), question  # one thing is no plural
        assert not re.search(r"\ba [aeio]\w+|\ban [^aeiouh]", question, re.I), question
        assert re.fullmatch(r"[1-9]\d*|\d+\.\d*[1-9]|\d+\.\d\d" if money else r"[1-9]\d*|\d+\.\d*[1-9]", answer)
        assert len(question) < 450


@pytest.mark.parametrize("name", STORIES)
def test_names_things_and_numbers_change(name):
    questions = {question for question, _ in drawn(name)}
    assert len(questions) >= 160
    assert len({tuple(numbers(question)) for question in questions}) >= 70
    assert len({answer for _, answer in drawn(name)}) >= 10


def test_people():
    names = [str(person) for person in drawing.PEOPLE]
    assert len(set(names)) == len(names) == 60
    assert all(len(set(map(str, drawing.Draw(random.Random(i)).people(3)))) == 3 for i in range(50))


def test_numbers_in_words():
    assert [drawing.count(n, "metre") for n in (1, 2, Decimal("0.5"), Decimal("1.0"), 1200)] == [
        "1 metre", "2 metres", "0.5 metres", "1 metre", "1,200 metres"
    ]  # fmt: skip
    assert drawing.count(2, "child", "children") == "2 children"
    assert [drawing.usd(n) for n in (12, Decimal("12.5"), 1200, Decimal("1200.05"))] == [
        "$12", "$12.50", "$1,200", "$1,200.05"
    ]  # fmt: skip
    assert (drawing.whole(Decimal("7.00")), drawing.exact(Decimal("7.50")), drawing.cents(7)) == ("7", "7.5", "7.00")
    for wrong in (lambda: drawing.whole(Decimal("2.5")), lambda: drawing.whole(-1), lambda: drawing.exact(0),
                  lambda: drawing.exact(Decimal(1) / 3), lambda: drawing.cents(Decimal("0.005"))):  # fmt: skip
        with pytest.raises(ValueError):
            wrong()


@pytest.fixture(scope="module")
def by_templates():
    return tasks.word_problems(1500, 300)


@pytest.fixture(scope="module")
def by_numbers():
    return tasks.word_problems(1500, 300, held_out="numbers")


def test_rows(by_templates):
    assert (len(by_templates.train), len(by_templates.test), by_templates.dropped) == (1500, 300, [])
    row = by_templates.train[0]
    assert sorted(row) == ["answer", "prompt", "steps", "template"]
    assert row["prompt"] == tasks.messages(text(row))
    assert {row["steps"] for row in by_templates.test} == {2, 3, 4, 5}
    used = Counter(by_templates.train["template"])
    assert len(used) == 56 and max(used.values()) < 2 * min(used.values())


def test_templates_held_out(by_templates):
    assert set(by_templates.test["template"]) == problems.HELD_OUT
    assert not set(by_templates.train["template"]) & problems.HELD_OUT


def test_numbers_held_out(by_templates, by_numbers):
    assert by_numbers.train[:] == by_templates.train[:]  # so that one training has both tests
    assert set(by_numbers.test["template"]) <= set(by_numbers.train["template"])
    assert not keys(by_numbers.train) & keys(by_numbers.test)
    other = tasks.word_problems(3000, 1, seed=7, held_out="numbers")
    assert not keys(other.train) & keys(by_numbers.test)  # another seed and more rows bring none of them in
    share = sum(map(problems.numbers_held_out, by_templates.test["template"], map(text, by_templates.test))) / 300
    assert 0.12 < share < 0.28


@pytest.mark.parametrize("kind", ["by_templates", "by_numbers"])
def test_no_question_twice(kind, request):
    task = request.getfixturevalue(kind)
    questions = [text(row) for row in (*task.train, *task.test)]
    assert len(set(questions)) == len(questions) == 1800


def test_the_same_seed_makes_the_same_rows(by_templates):
    again, other, fewer = (
        tasks.word_problems(1500, 300),
        tasks.word_problems(50, 300, seed=1),
        tasks.word_problems(9, 9),
    )
    assert again.train[:] == by_templates.train[:] and again.test[:] == by_templates.test[:]
    assert fewer.train[:] == by_templates.train[:9] and fewer.test[:] == by_templates.test[:9]
    assert other.train[:] != by_templates.train[:50] and other.test[:] != by_templates.test[:]


def test_these_rows_on_every_machine():
    row = tasks.word_problems(1, 1).train[0]
    assert (row["template"], text(row), row["answer"]) == FIRST


@pytest.mark.parametrize("level", [1, 2, 3, 4, (1, 3), [4, 4]])
def test_levels(level):
    wanted = {level} if isinstance(level, int) else set(level)
    task = tasks.word_problems(60, 20, level=level)
    for row in (*task.train, *task.test):
        assert STORIES[row["template"]][0] in wanted and row["steps"] - 1 in wanted
    assert {row["steps"] - 1 for row in task.test} == wanted


def test_system_prompt():
    assert [m["role"] for m in tasks.word_problems(1, 1, system_prompt=None).train[0]["prompt"]] == ["user"]
    assert tasks.word_problems(1, 1, system_prompt="Be brief.").test[0]["prompt"][0]["content"] == "Be brief."


def test_long_prompts_are_left_out():
    tokenizer = smoke.make_tokenizer()
    whole = tasks.word_problems(40, 5, tokenizer=tokenizer, max_prompt_length=100_000)
    assert whole.train[:] == tasks.word_problems(40, 5).train[:]
    lengths = sorted(len(tokenizer.apply_chat_template(row["prompt"], return_dict=False)) for row in whole.train)
    short = tasks.word_problems(40, 5, tokenizer=tokenizer, max_prompt_length=lengths[20])
    assert {text(row) for row in short.train} != {text(row) for row in whole.train}
    assert (
        max(len(tokenizer.apply_chat_template(row["prompt"], return_dict=False)) for row in short.train) <= lengths[20]
    )
    with pytest.raises(ValueError, match="0 different questions of at most 3 tokens were found for train, not 5"):
        tasks.word_problems(5, 5, level=1, tokenizer=tokenizer, max_prompt_length=3)


def test_what_is_refused():
    for level in (0, 5, (), (1, 9)):
        with pytest.raises(ValueError, match="level is among"):
            tasks.word_problems(1, 1, level=level)
    with pytest.raises(ValueError, match='held_out is "templates" or "numbers", not \'rows\''):
        tasks.word_problems(1, 1, held_out="rows")
