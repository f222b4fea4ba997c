"""What an evaluation brings: answers with all that they came from, shares with intervals, and comparisons of two.

A comparison is worth something only if nothing but the weights differs, so every answer carries the exact prompt and
the decoding that it came from, and answers that differ in these are not compared.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nbhelpers.html import cell, table
from nbhelpers.rewards import REASONING, Tags

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


# ---- answers ----


@dataclass(frozen=True)
class Decoding:
    """How completions were drawn: all that could make two runs differ apart from the weights and the prompts.

    Args:
        max_new_tokens (`int`): A completion is cut off there.
        temperature (`float`): 0.0 is greedy.
        seed (`int`): Of the drawing.
        batch_size (`int`): Questions at a time.
        engine (`str`): The name of what wrote; another one rounds otherwise.
        num_generations (`int`): Completions of each question.
        stop_strings (`tuple[str, ...]`): What ends a completion besides end tokens.
        chat_template_kwargs (`dict`, *optional*): What the chat template was given besides the messages; None for those
            that are kept with the tokenizer.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    batch_size: int
    engine: str = ""
    num_generations: int = 1
    stop_strings: tuple[str, ...] = ()
    chat_template_kwargs: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self):
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))  # JSON has lists alone


@dataclass(frozen=True)
class Answer:
    """One question and what the model wrote.

    Args:
        question (`str`): The last message of the prompt, or the one before where that begins the answer.
        completion (`str`): What the model wrote, without special tokens.
        answer (`str` or `None`): What stands in the place of the answer (see `rewards.Tags.extract`).
        tokens (`int`): Number of tokens written, the end token included.
        finished (`bool`): Whether it ended by itself; False when it was cut off at `max_new_tokens`.
        prompt (`str`): All that the model was given: chat template, system prompt and question.
        decoding (`Decoding`): How the completion was drawn.
        messages (`list[dict]`): The prompt as chat messages, to ask the same again.
        tags (`rewards.Tags`): The form that was asked for.
    """

    question: str
    completion: str
    answer: str | None
    tokens: int
    finished: bool
    prompt: str = field(repr=False)
    decoding: Decoding = field(repr=False)
    messages: list[dict] = field(repr=False, hash=False, kw_only=True, default_factory=list)
    tags: Tags = field(repr=False, kw_only=True, default=REASONING)


@dataclass(frozen=True)
class Row(Answer):
    """An answer to a question whose right answer is known.

    Args:
        gold (`str`): The right answer.
        correct (`bool`): Whether the completion has it.
        formatted (`bool`): Whether the completion has exactly the wanted form (see `rewards.in_form`).
    """

    gold: str
    correct: bool
    formatted: bool


@dataclass(frozen=True)
class Proportion:
    """A share of n with its Wilson 95 % interval, all three between 0 and 1.

    The interval (Wilson 1927, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22) is never empty and never leaves [0, 1], not even at 0 of n or n of n.
    """

    value: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, n: int) -> "Proportion":
        """The share hits / n. Raises ValueError unless 0 <= hits <= n and n is at least 1."""
        if not 0 <= hits <= n or n < 1:
            raise ValueError(f"{hits} of {n} is no proportion")
        p, z2 = hits / n, Z95**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        # at the ends the bound is exact on paper, and one rounding error off here
        return cls(p, n, 0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half)

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%}, n = {self.n})"


@dataclass(frozen=True)
class Score:
    """The outcome of `accuracy`.

    Args:
        accuracy (`Proportion`): The share of right answers.
        format (`Proportion`): The share of answers in exactly the wanted form, right or wrong.
        mean_length (`float`): Tokens of a completion.
        rows (`list[Row]`): The answers themselves.
    """

    accuracy: Proportion
    format: Proportion
    mean_length: float
    rows: list[Row] = field(repr=False)

    def __str__(self) -> str:
        return f"accuracy {self.accuracy} · format {self.format} · mean length {self.mean_length:.1f} tokens"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shown = {"accuracy": self.accuracy, "format": self.format, "mean length": f"{self.mean_length:.1f} tokens"}
        rows = [[cell(name, "text-align:left", tag="th"), cell(str(shown[name]), "")] for name in shown]
        return table((), rows, "")


@dataclass(frozen=True)
class Paired:
    """The same questions before and after: of how many the answer became right, became wrong, or stayed as it was."""

    both_right: int
    gained: int
    lost: int
    both_wrong: int

    def __str__(self) -> str:
        return f"both right {self.both_right} · gained {self.gained} · lost {self.lost} · both wrong {self.both_wrong}"


@dataclass(frozen=True)
class PassAtK:
    """How often at least one of k completions of a question is right, for each k asked for.

    Args:
        values (`dict[int, float]`): k to pass@k, between 0 and 1: the mean over the questions. pass@1 is the accuracy.
        num_generations (`int`): Completions of each question that the estimate is made from.
        correct (`list[int]`): How many of them are right, question by question.
        rows (`list[list[Row]]`): The completions themselves, by question.
    """

    values: dict[int, float]
    num_generations: int
    correct: list[int] = field(repr=False)
    rows: list[list[Row]] = field(repr=False)

    def __str__(self) -> str:
        shares = " · ".join(f"pass@{k} {value:.1%}" for k, value in self.values.items())
        return f"{shares} ({len(self.rows)} questions, {self.num_generations} completions each)"

    __repr__ = __str__


def unbiased_pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n completions, c of them right, drawn without putting back, hold a right one.

    1 - C(n - c, k) / C(n, k), an unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1); that of
    1 - (1 - c/n)^k is too low. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.

    >>> unbiased_pass_at_k(10, 3, 1)
    0.3
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} of {n} completions with {c} right: k is between 1 and {n}, and so are the right ones"
        )
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


# ---- comparing ----


def check_comparable(before: Sequence[Answer], after: Sequence[Answer]) -> None:
    """Raises ValueError unless both lists hold the same prompts in the same order, decoded in the same way."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} answers before and {len(after)} after: ask the same questions both times")
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.question != new.question:
            raise ValueError(f"question {i} differs: {old.question[:80]!r} before, {new.question[:80]!r} after")
        if old.prompt != new.prompt:
            raise ValueError(
                f"question {i} is the same, but its prompt is not (system prompt or chat template): "
                f"{old.prompt[:200]!r} before, {new.prompt[:200]!r} after"
            )
        if old.decoding != new.decoding:
            raise ValueError(f"the decoding differs: {old.decoding} before, {new.decoding} after")


def paired(before: Score, after: Score) -> Paired:
    """Count what became of each question.

    Args:
        before (`Score`), after (`Score`): From `accuracy`, on the same rows with the same settings.

    Returns:
        `Paired`

    Raises:
        ValueError: If questions, prompts, right answers or decoding differ.
    """
    check_comparable(before.rows, after.rows)
    pairs: Counter[tuple[bool, bool]] = Counter()
    for i, (old, new) in enumerate(zip(before.rows, after.rows, strict=True)):
        if old.gold != new.gold:
            raise ValueError(f"the right answer to question {i} was {old.gold!r} before and is {new.gold!r} after")
        pairs[old.correct, new.correct] += 1
    return Paired(
        both_right=pairs[True, True],
        gained=pairs[False, True],
        lost=pairs[True, False],
        both_wrong=pairs[False, False],
    )
