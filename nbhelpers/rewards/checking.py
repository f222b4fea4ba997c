"""Try rewards before any training: good, bad and dishonest answers in a table of scores, and warnings in plain words.

What a reward pays for is what a model learns. A hole in it is found by the model within a few hundred steps, and by
`check` within a second.
"""

import html
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nbhelpers.html import cell, framed, table
from nbhelpers.progress import interruptible

from .adversarial import (
    ANY,
    CHARACTERS,
    EMPTY,
    FORM,
    HEDGES,
    HOLLOW,
    KINDS,
    LONG,
    LONGER,
    NO_NUMBERS,
    REPEATED,
    RIGHT,
    UNTHOUGHT,
    WRONG,
    hostile,
    texts_for,
)
from .calling import by_name, call
from .guard import LARGEST
from .reward import Questions, Reward

SLOW_MS, STOP_MS = 50.0, 250.0  # a reward may take SLOW_MS for CHARACTERS
_CELL = "padding:3px 10px;border:1px solid rgba(128,128,128,.4);text-align:"


@dataclass(frozen=True)
class Check:
    """What `check` found; a notebook shows it as a table, a terminal as text.

    Args:
        scores (`dict[str, dict[str, list[float | None]]]`): By reward function, then by kind of text: one score for
            each row of the task, None where there is none.
        slowest (`dict[str, tuple[int, float]]`): By reward function the characters of the hostile text that took
            longest, and the milliseconds for it.
        warnings (`list[str]`): What to repair, each beginning with the name of the function.
        texts (`dict[str, list[str]]`): By kind, the texts of the first row.
    """

    scores: dict[str, dict[str, list[float | None]]]
    slowest: dict[str, tuple[int, float]]
    warnings: list[str]
    texts: dict[str, list[str]]

    def mean(self, name: str, kind: str) -> float | None:
        """The mean score of one function for one kind of text; None if it gave no score."""
        return _mean(self.scores[name].get(kind, []))

    def rows(self) -> list[list[str]]:
        """The table as text: the names of the functions, their mean score for each kind of text, and their time."""
        names = list(self.scores)
        head = ["", *names]
        means = [[kind, *(_shown(self.mean(name, kind)) for name in names)] for kind in KINDS]
        times = (self.slowest[name] for name in names)
        cost = [f"{ms:.1f} ms" + (f" for {n:,}" if n < CHARACTERS else "") for n, ms in times]
        return [head, *means, [f"slowest, {CHARACTERS:,} characters", *cost]]

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(rest, widths[1:], strict=True))]).rstrip()
            for first, *rest in rows
        ]
        said = [f"! {warning}" for warning in self.warnings] or ["nothing to warn about"]
        return "\n".join([*lines, "", *said])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(texts: list[str], tag: str) -> list[str]:
            sides = ["left", *["right"] * (len(texts) - 1)]
            pairs = zip(texts, sides, strict=True)
            return [cell(html.escape(text), _CELL + side, tag=tag) for text, side in pairs]

        head, *rows = self.rows()
        said = "".join(f"<li>⚠ {html.escape(warning)}</li>" for warning in self.warnings)
        said = f"<ul style='list-style:none;padding-left:0'>{said}</ul>" if said else "<p>nothing to warn about</p>"
        return framed(table(line(head, "th"), [line(row, "td") for row in rows]) + said)


@interruptible("the rewards were tried", "nothing is changed; run this again")
def check(reward_funcs: Reward | Sequence[Reward], task: Questions, *, n: int = 4, form: str = FORM) -> Check:
    """Score right, wrong, empty and dishonest answers to a task's questions, and say what is wrong with the rewards.

    Dishonest are answers that name every candidate, the question itself, the bare form, the example in the prompt, a
    thought that is empty, "nan" (to which no number is unequal by more than a little), and the like. Where the order
    matters (two answers, the right one first or last) both orders are tried and the lower score counts: only a reward
    that pays for both can be had without knowing the answer. Speed is measured on texts that are hard for regular
    expressions, from 16 characters up to 100,000, and no further once a call takes a quarter of a second.

    The reward functions get what TRL gives them, with stand-ins for what only training has: `completion_ids` holds one
    number for every four characters, `trainer_state` is at step 0, `log_extra` and `log_metric` do nothing.

    Args:
        reward_funcs (`Reward` or `Sequence[Reward]`): Functions with TRL's signature, as for the trainer.
        task (`tasks.Task`): Its `train` has the columns `prompt` and `answer`; all others are passed on.
        n (`int`): How many rows of it to use.
        form (`str`): A well-formed completion, with `{reasoning}` and `{answer}` where these stand; for a model that
            thinks by itself `THINK.frame`.

    Returns:
        `Check`

    Raises:
        ValueError: If there is nothing to check, two functions have one name, the task has no rows or no column
            `answer`, or `form` has no `{answer}`.
        TypeError: For a reward model: only functions can be checked.
    """
    rewards = by_name(reward_funcs)
    rows = rows_of(task, n)
    if "{answer}" not in form:
        raise ValueError(f"form says where the answer stands, as {{answer}}: {form!r}")
    texts = [texts_for(row, rows, form) for row in rows]
    scores, slowest, warnings = {}, {}, []
    for name, reward in rewards.items():
        trial = Trial(reward)
        slowest[name] = trial.slowest(rows[0], form)
        # what hangs on long texts is not given one
        kinds = [kind for kind in KINDS if kind != LONG or slowest[name][0] == CHARACTERS]
        scores[name] = {kind: trial.scores(rows, [row[kind] for row in texts], kind in ANY) for kind in kinds}
        warnings += [f"{name}: {text}" for text in (*trial.problems, *_suspicions(scores[name]))]
    return Check(scores, slowest, warnings + _suspicions_of_all(scores), texts[0])


def rows_of(task: Questions, n: int) -> list[dict]:
    """The first n rows of a task; the errors of `check` if they cannot be used."""
    rows = [task.train[i] for i in range(min(n, len(task.train)))]
    if not rows or "answer" not in rows[0] or "prompt" not in rows[0]:
        raise ValueError(
            f"task.train has {len(rows)} rows to check with and the columns {', '.join(rows[0]) if rows else 'none'}: "
            "it needs a row and the columns prompt and answer"
        )
    return rows


# ---- calling them ----


class Trial:
    """One reward function on trial: how it is called, and what went wrong so far."""

    def __init__(self, reward: Reward):
        self.reward = reward
        self.problems: dict[str, None] = {}  # in order, each once

    def scores(self, rows: list[dict], texts: list[list[str]], highest: bool) -> list[float | None]:
        """The lowest score of each row's texts, or the highest; None where one of them has none."""
        tries = [self.numbers(rows, list(batch)) for batch in zip(*texts, strict=True)]
        return [_extreme(of_one_row, highest) for of_one_row in zip(*tries, strict=True)]

    def numbers(self, rows: list[dict], texts: list[str]) -> list[float | None]:
        """Its scores, one for each text, None for what the guard would not take as a number."""
        try:
            values = [None if value is None else float(value) for value in call(self.reward, rows, texts)]
        except Exception as error:
            self.problems[f"it fails with {type(error).__name__}: {error}"] = None
            return [None for _ in texts]
        if len(values) != len(texts):
            said = f"it returns {len(values)} scores for {len(texts)} completions; one is wanted for each"
            self.problems[said] = None
            return [None for _ in texts]
        if bad := [value for value in values if value is not None and not abs(value) <= LARGEST]:
            self.problems[f"it returns {bad[0]}, no number within {LARGEST:g}"] = None
        return [value if value is not None and abs(value) <= LARGEST else None for value in values]

    def slowest(self, row: dict, form: str) -> tuple[int, float]:
        """The characters and the milliseconds of the slowest hostile text, of the largest size that was tried."""
        size = 16.0
        while True:
            length = min(round(size), CHARACTERS)
            worst = max((self.milliseconds(row, text) for text in hostile(form, length)), default=0.0)
            if worst > STOP_MS or (length == CHARACTERS and worst > SLOW_MS):
                said = (
                    f"it is slow: {worst:,.0f} ms for one text of {length:,} characters (at most {SLOW_MS:.0f} ms for "
                    f"{CHARACTERS:,} is wanted); look for a regular expression that tries again and again, like "
                    "(a+)+ or several .* in a row"
                )
                self.problems[said] = None
            if worst > STOP_MS or length == CHARACTERS:
                return length, worst
            size *= 1.25 if size < 200 else 2  # in small steps while an exponential cost could hide

    def milliseconds(self, row: dict, text: str) -> float:
        """The time of one call; of several if it was long."""
        best = math.inf
        for _ in range(3):  # other work on the machine makes one measurement long, hardly all three
            start = time.perf_counter()
            try:
                call(self.reward, [row], [text])
            except Exception as error:
                self.problems[f"it fails on unusual text with {type(error).__name__}: {str(error)[:200]}"] = None
            best = min(best, 1e3 * (time.perf_counter() - start))
            if best <= SLOW_MS or best > 4 * STOP_MS:
                break
        return best


def _extreme(scores: Sequence[float | None], highest: bool) -> float | None:
    known = [score for score in scores if score is not None]
    return (max if highest else min)(known) if len(known) == len(scores) else None


# ---- judging them ----


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def _shown(mean: float | None) -> str:
    return "–" if mean is None else f"{mean:.3f}".rstrip("0").rstrip(".")


def _suspicions(scores: dict[str, list[float | None]]) -> Iterator[str]:
    """What is suspicious about one function's scores."""
    means = {kind: mean for kind, values in scores.items() if (mean := _mean(values)) is not None}
    if not means:
        yield "it scores nothing at all (None everywhere, or failures)"
        return
    right, wrong = means.get(RIGHT), means.get(WRONG)
    values = {value for kind in scores.values() for value in kind if value is not None}
    if len(values) == 1:
        yield f"it is constant: {_shown(values.pop())} for every text, so all advantages are 0 and it teaches nothing"
        return
    if right is None or wrong is None:
        return
    if wrong > right:
        yield f"it pays more for a wrong answer ({_shown(wrong)}) than for the right one ({_shown(right)})"
    if 0 < means.get(EMPTY, 0) < right:
        yield f"it pays {_shown(means[EMPTY])} for an empty text"
    yield from _gamed(means)


def _gamed(means: dict[str, float]) -> Iterator[str]:
    """The texts without a right answer of one's own that pay as much as one."""
    right, judges = means[RIGHT], means[RIGHT] > means[WRONG]
    holes = []
    for kind in (*HOLLOW, UNTHOUGHT, REPEATED, NO_NUMBERS, LONGER, *HEDGES):
        if judges and kind == UNTHOUGHT:
            continue  # it is right all the same, and who pays right answers for brevity pays it most
        # what does not judge answers (a form, a penalty) may pay the same for all of them, but not for none
        too_much = kind != REPEATED if judges else kind in (*HOLLOW, UNTHOUGHT) and right > 0
        score = means.get(kind, -math.inf)
        if score > right or (score == right and too_much):
            holes.append(f"{kind} ({_shown(score)})")
    if holes:
        yield f"it can be gamed: these score at least as much as a right answer ({_shown(right)}): {', '.join(holes)}"


def _suspicions_of_all(scores: dict[str, dict[str, list[float | None]]]) -> list[str]:
    """What is suspicious about the sum of all functions, which is what a model is trained on."""
    means = {kind: [_mean(values.get(kind, [])) or 0.0 for values in scores.values()] for kind in KINDS}
    total = {kind: sum(parts) for kind, parts in means.items()}
    if total[RIGHT] <= total[WRONG]:
        return [
            f"all together: a right answer ({_shown(total[RIGHT])}) pays no more than a wrong one in the same form "
            f"({_shown(total[WRONG])}), so being right cannot be learned"
        ]
    return [f"all together: {text}" for text in _gamed(total)] if len(scores) > 1 else []
