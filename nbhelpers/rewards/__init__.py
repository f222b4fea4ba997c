"""Completion in, score out: the classic five rewards of GSM8K-GRPO, equal mathematics, Countdown.

A reward function has TRL's signature: it is called with keyword arguments only (`prompts`, `completions`,
`completion_ids`, one list for every other column of the dataset, and a few helpers) and returns one number, or None
for "does not apply", for each completion. Model text is hostile: nothing here takes more than linear time in it, and
what can take longer (`math_correctness`) is cut short from outside.

The signature is in reward.py, how a completion is read in answers.py, penalties for language, length and repetition are
in penalties.py, rewards for spelling and by a judge in prose.py, and checking.py tries rewards before any training; all
of it can be imported from this package.
"""

from dataclasses import dataclass, field

from nbhelpers.models.tags import REASONING, THINK, Tags

from . import math_equal
from .answers import (
    TAGS,
    extract_answer,
    extract_boxed,
    form,
    formatted,
    in_form,
    is_correct,
    number_of,
    question_of,
    same,
    text_of,
    written,
)
from .by_hand import playground
from .checking import check
from .countdown_rules import solved, verify
from .penalties import get_language_consistency, get_length_penalty, get_repetition_penalty
from .prose import helpfulness, spelling
from .reading import read, right
from .reward import Reward
from .sandbox import sandboxed

__all__ = [
    "REASONING", "TAGS", "THINK", "Reward", "Sample", "Tags", "check", "correctness", "countdown", "extract_answer",
    "extract_boxed", "form", "formatted", "get_language_consistency", "get_length_penalty", "get_repetition_penalty",
    "helpfulness", "in_form", "integer_answer", "is_correct", "math_correctness", "number_of", "playground",
    "question_of", "read", "right", "same", "sandboxed", "soft_format", "solved", "spelling", "strict_format",
    "tag_count", "text_of",
]  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One answer of the newest rollout, as a panel shows it.

    Args:
        prompt (`str`): The question, as a person would read it.
        completion (`str`): What the model wrote.
        rewards (`dict[str, float | None]`): Score by reward function; a function that did not apply is missing or None.
        advantage (`float`, *optional*): Its advantage over its group, in the units of the loss.
        used (`dict[str, float]`): What a method learns from that has no such advantage, by name.
    """

    prompt: str
    completion: str
    rewards: dict[str, float | None]
    advantage: float | None = None
    used: dict[str, float] = field(default_factory=dict)


# ---- the classic five rewards ----


def correctness(completions: list, answer: list[str], **_) -> list[float | None]:
    """2.0 when the answer tag holds the right answer (see `is_correct`), else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): What the model wrote.
        answer (`list[str]`): The right answers, a column of the dataset. Where it is None the reward does not apply.

    Returns:
        `list[float | None]`

    Example:
    >>> completions = [[{"role": "assistant", "content": "<answer>9.90</answer>"}]]
    >>> correctness(completions, answer=["9.9"])
    [2.0]
    """
    return [
        None if gold is None else 2.0 * is_correct(text_of(completion), gold)
        for completion, gold in zip(completions, answer, strict=True)
    ]


def tag_count(completions: list, **_) -> list[float]:
    """0.125 for each of the four tags that occurs exactly once, less 0.001 for each character after `</answer>`.

    It pays for every step towards the form, so it rises first. One line end after the last tag is free, and the score
    never falls below 0.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): What the model wrote.

    Returns:
        `list[float]`: 0.0 to 0.5

    Example:
    >>> tag_count(["<reasoning>9 tenths</reasoning>", "<answer>9.9</answer> because"])
    [0.25, 0.242]
    """

    def score(text: str) -> float:
        tags = sum(text.count(tag) == 1 for tag in TAGS)
        _, closed, after = text.rpartition("</answer>")
        extra = len(after.removeprefix("\n")) if closed else 0
        return max(0.0, 0.125 * tags - 0.001 * extra)

    return [score(text_of(completion)) for completion in completions]


def soft_format(completions: list, **_) -> list[float]:
    """0.5 when the four tags occur in the right order, whatever stands around and between them, else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): What the model wrote.

    Returns:
        `list[float]`

    Example:
    >>> soft_format(["Well: <reasoning>9 tenths</reasoning><answer>9.9</answer>", "<answer>9.9</answer>"])
    [0.5, 0.0]
    """

    def score(text: str) -> float:
        for tag in TAGS:
            _, present, text = text.partition(tag)
            if not present:
                return 0.0
        return 0.5

    return [score(text_of(completion)) for completion in completions]


def strict_format(completions: list, **_) -> list[float]:
    """0.5 when the text is exactly the wanted form (see `formatted`) and not hollow (see `Tags.form`), else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): What the model wrote.

    Returns:
        `list[float]`

    Example:
    >>> strict_format(["<reasoning>\\n9 tenths\\n</reasoning>\\n<answer>\\n9.9\\n</answer>\\n", "<answer>9.9</answer>"])
    [0.5, 0.0]
    """
    return [0.5 * (form(text_of(completion)) == 1.0) for completion in completions]


def integer_answer(completions: list, **_) -> list[float]:
    """0.5 when the answer tag holds a whole number, right or wrong, else 0.0. For tasks whose answers are whole.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): What the model wrote.

    Returns:
        `list[float]`

    Example:
    >>> integer_answer(["<answer>1,000</answer>", "<answer>9.9</answer>", "42"])
    [0.5, 0.0, 0.0]
    """

    def score(text: str) -> float:
        answer = (extract_answer(text) or "").removesuffix(".")
        return 0.5 if "." not in answer and number_of(answer) is not None else 0.0

    return [score(text_of(completion)) for completion in completions]


# ---- equal mathematics, and Countdown ----


def math_correctness(completions: list, answer: list[str], **_) -> list[float | None]:
    r"""2.0 when the answer is the same mathematics as the right one, else 0.0: \frac12, 0.5, 50\% and 1/2 are equal.

    The answer is what stands in the answer tag or, without a closed one, in the last `\boxed{...}`. math-verify reads
    it, in a process of its own, at most `math_equal.SECONDS` for a batch and 0.03 s more for each answer; one that is
    late, longer than 200 characters or no mathematics scores 0.0. What counts as equal is said at `math_equal.equal`.
    An answer need not be worked out: 17*23 is equal to 391. Where the question is itself an expression that a model
    could copy, use `correctness`.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): What the model wrote.
        answer (`list[str]`): The right answers as LaTeX or plain numbers. Where it is None the reward does not apply.

    Returns:
        `list[float | None]`

    Raises:
        host.CannotRun: If math-verify is not installed.

    Example:
    >>> math_correctness([r"so \boxed{\frac12}", "<answer>0.5</answer>", "0.5"], answer=["1/2", "1/2", "1/2"])
    [2.0, 2.0, 0.0]
    """
    pairs = {}
    for row, (completion, gold) in enumerate(zip(completions, answer, strict=True)):
        text = text_of(completion)
        given = extract_answer(text)
        if given is None:
            given = extract_boxed(text)
        if gold is not None and given is not None:
            pairs[row] = (written(gold), given)
    right = dict(zip(pairs, math_equal.equal(list(pairs.values())), strict=True))
    return [None if gold is None else 2.0 * right.get(row, False) for row, gold in enumerate(answer)]


def countdown(completions: list, numbers: list[list[int]], target: list[int], **_) -> list[float]:
    """2.0 when the answer tag holds an expression that reaches the target with each number used once, else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): What the model wrote.
        numbers (`list[list[int]]`), target (`list[int]`): Columns of `tasks.countdown`'s data, one entry a completion.

    Returns:
        `list[float]`

    Example:
    >>> countdown(["<answer>(19 - 3) * 5</answer>", "<answer>80</answer>"], numbers=[[3, 5, 19]] * 2, target=[80, 80])
    [2.0, 0.0]
    """
    return [
        2.0 * verify(extract_answer(text_of(completion)) or "", given, wanted)
        for completion, given, wanted in zip(completions, numbers, target, strict=True)
    ]
