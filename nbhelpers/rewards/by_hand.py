"""One answer, typed by hand, and at once what every reward pays for it and what is read of it."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nbhelpers.hands_on import HandsOn, Slider, Text
from nbhelpers.html import BOX, cell, framed, pre, table
from nbhelpers.models.tags import REASONING, Tags

from .adversarial import BAD_FORM, EMPTY, RIGHT, WRONG, texts_for
from .answers import is_correct, question_of, written
from .calling import by_name
from .checking import Trial, rows_of
from .reading import read, right
from .reward import Questions, Reward
from .time_limit import Late, limited

ROWS = 100  # of the task that can be chosen
SECONDS = 2.0  # that one reward may take for one answer: somebody is waiting


@dataclass(frozen=True)
class Reading:
    """What is made of one answer.

    Args:
        question (`str`), wanted (`str`): What was asked, and its right answer.
        scores (`dict[str, float | None]`): By reward function; None where it gave none.
        problems (`list[str]`): Why it gave none, each beginning with the name of the function.
        reading (`dict[str, str]`): What is read of the answer, by what it is.
    """

    question: str
    wanted: str
    scores: dict[str, float | None]
    problems: list[str]
    reading: dict[str, str]

    @property
    def total(self) -> float:
        """The sum of the scores that there are, which is what a model is trained on."""
        return sum(score for score in self.scores.values() if score is not None)

    def rows(self) -> list[tuple[str, str]]:
        """What the table shows, line by line."""
        paid = [(name, "none" if score is None else f"{score:.3g}") for name, score in self.scores.items()]
        return [*paid, *([("together", f"{self.total:.3g}")] if len(paid) > 1 else []), *self.reading.items()]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        lines = [f"{name:<{width}}  {value}" for name, value in self.rows()]
        asked = f"question: {self.question}\nright answer: {self.wanted}"
        return "\n".join([asked, *lines, *(f"! {problem}" for problem in self.problems)])

    def _repr_html_(self) -> str:
        lines = [[cell(html.escape(name), BOX, tag="th"), cell(pre(html.escape(value)))] for name, value in self.rows()]
        said = "".join(f"<p>⚠ {html.escape(problem)}</p>" for problem in self.problems)
        asked = f"<b>Question</b>{pre(html.escape(self.question))}<b>Right answer</b>{pre(html.escape(self.wanted))}"
        return framed(asked + table((), lines) + said)


def playground(
    reward_funcs: Reward | Sequence[Reward],
    task: Questions,
    *,
    tags: Tags = REASONING,
    correct: Callable[[str, str], bool] | None = None,
) -> HandsOn:
    """A text to type an answer in: as the last line of a cell it shows, at every key, what each reward pays for it, and
    what is read of it. Where nobody can type it shows four answers: right and wrong, in form and not.

    Args:
        reward_funcs (`Reward` or `Sequence[Reward]`): Functions with TRL's signature, as for the trainer.
        task (`tasks.Task`): Its `train` has the columns `prompt` and `answer`. A slider chooses one of the first 100.
        tags (`Tags`): The form that is asked for; a preset's own are `preset.tags`.
        correct (`Callable[[str, str], bool]`, *optional*): Given the text and the right answer, whether it is right, as
            for the trainer and `evaluate.accuracy`; `rewards.right` if not given.

    Raises ValueError and TypeError as `check` does.
    """
    rewards, rows = by_name(reward_funcs), rows_of(task, ROWS)
    texts = texts_for(rows[0], rows, tags.frame)
    first, *others = (texts[kind][0] for kind in (RIGHT, WRONG, BAD_FORM, EMPTY))

    def show(text: str, row: int = 0) -> Reading:
        return reading_of(rewards, rows[row], text, tags, correct)

    several: dict[str, Slider | Text] = {"row": Slider("question", 0, len(rows) - 1, 1, 0)} if len(rows) > 1 else {}
    return HandsOn(show, several | {"text": Text("an answer", first)}, [{"text": text} for text in others])


def reading_of(
    rewards: Mapping[str, Reward], row: dict, text: str, tags: Tags, correct: Callable[[str, str], bool] | None = None
) -> Reading:
    """What each function pays for one text, and what is read of it."""
    scores: dict[str, float | None] = {}
    problems: list[str] = []
    for name, reward in rewards.items():
        trial = Trial(reward)
        try:
            with limited(SECONDS, name):
                (scores[name],) = trial.numbers([row], [text])
        except Late:
            scores[name] = None
            trial.problems[f"no answer within {SECONDS:g} s"] = None
        problems += [f"{name}: {problem}" for problem in trial.problems]
    wanted = written(row["answer"])
    inside = tags.extract(text)
    if correct:  # it reads the text in its own way, which nobody here knows
        found, placed = {}, inside is not None and correct(inside, wanted)
    else:
        found = {"the answer that is read": _named(None if tags.thinks_on(text) else read(text))}
        placed = is_correct(text, wanted, tags)
    counts = "right" if (correct(text, wanted) if correct else right(text, wanted, tags)) else "not right"
    if counts == "right" and not placed:
        counts += ", but not where it belongs"
    form = tags.form(text, row["prompt"])
    return Reading(question_of(row["prompt"]), wanted, scores, problems, found | {
        "in the place of the answer": _named(inside),
        "counts as": counts,
        "form": "exact" if tags.in_form(text) and form else f"{form:.0%} of it",
    })  # fmt: skip


def _named(text: str | None) -> str:
    return text or "(nothing)"
