"""Text in, score out: what an answer is, whether it is right, and the classic five rewards of GSM8K-GRPO.

A reward function has TRL's signature: it is called with keyword arguments only (`prompts`, `completions`,
`completion_ids`, one list for every other column of the dataset, and a few helpers) and returns one number, or None
for "does not apply", for each completion. Model text is hostile: nothing here takes more than linear time in it.
"""

from dataclasses import dataclass
from decimal import Decimal

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Sample:
    """One answer of the newest rollout, as a panel shows it.

    Args:
        prompt (`str`): The question, as a person would read it.
        completion (`str`): What the model wrote.
        rewards (`dict[str, float]`): Score by reward function; a function that did not apply is missing or None.
        advantage (`float`, *optional*): Its advantage over its group, in the units of the loss.
    """

    prompt: str
    completion: str
    rewards: dict[str, float]
    advantage: float | None = None


# ---- reading one completion ----


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The text of one completion as TRL hands it over: a plain string, or chat messages, of which the last counts."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def extract_answer(text: str) -> str | None:
    """The text inside the answer tag, without the white space around it.

    The last `<answer>` counts: of several answers the final one, of nested tags the innermost. It must be closed; an
    answer that was cut off is no answer.

    Args:
        text (`str`): What the model wrote.

    Returns:
        `str` or `None`: The answer, possibly empty; None without a closed answer tag.

    Example:
    >>> extract_answer("<reasoning>\\n9 tenths\\n</reasoning>\\n<answer>\\n9.9\\n</answer>\\n")
    '9.9'
    >>> extract_answer("<answer>9.11</answer> no: <answer>9.9</answer>")
    '9.9'
    >>> extract_answer("9.9") is None
    True
    """
    _, opened, rest = text.rpartition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return inside.strip() if opened and closed else None


def formatted(text: str) -> bool:
    """Whether a text is exactly the wanted form: each tag once, on its own line, and nothing before or after.

    Reasoning and answer may have several lines, but neither may be blank. One line end after the last tag is allowed.

    Args:
        text (`str`): What the model wrote.

    Returns:
        `bool`

    Example:
    >>> formatted("<reasoning>\\n9 tenths\\n</reasoning>\\n<answer>\\n9.9\\n</answer>\\n")
    True
    >>> formatted("<reasoning>9 tenths</reasoning><answer>9.9</answer>")
    False
    """
    reasoning, between, answer = text.removesuffix("\n").partition("\n</reasoning>\n<answer>\n")
    return bool(
        between
        and reasoning.startswith("<reasoning>\n")
        and answer.endswith("\n</answer>")
        and reasoning.removeprefix("<reasoning>").strip()
        and answer.removesuffix("</answer>").strip()
        and all(text.count(tag) == 1 for tag in TAGS)
    )


def number_of(text: str) -> Decimal | None:
    """A plain decimal number (sign, thousands commas and decimals allowed, no exponent), or None."""
    digits = text.strip().removeprefix("-") if text.strip().startswith("-") else text.strip().removeprefix("+")
    whole, point, decimals = digits.partition(".")
    first, *groups = whole.split(",")
    if groups and not (1 <= len(first) <= 3 and all(len(group) == 3 for group in groups)):
        return None
    if point and not decimals:
        return None
    joined = "".join([first, *groups]) + decimals
    if not (joined.isascii() and joined.isdigit()):
        return None
    return Decimal(text.strip().replace(",", ""))


def is_correct(text: str, answer: str) -> bool:
    """Whether the answer tag of a text holds the right answer.

    Two decimals are compared by value ("9.90" is 9.9, "1,000" is 1000), anything else as text, without regard to
    case and to how much white space there is.

    Args:
        text (`str`): What the model wrote, tags included.
        answer (`str`): The right answer.

    Returns:
        `bool`
    """
    found, wanted = extract_answer(text), str(answer)
    if found is None:
        return False
    numbers = number_of(found), number_of(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return found.casefold().split() == wanted.casefold().split()


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
            _, found, text = text.partition(tag)
            if not found:
                return 0.0
        return 0.5

    return [score(text_of(completion)) for completion in completions]


def strict_format(completions: list, **_) -> list[float]:
    """0.5 when the text is exactly the wanted form (see `formatted`), else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): What the model wrote.

    Returns:
        `list[float]`

    Example:
    >>> strict_format(["<reasoning>\\n9 tenths\\n</reasoning>\\n<answer>\\n9.9\\n</answer>\\n", "<answer>9.9</answer>"])
    [0.5, 0.0]
    """
    return [0.5 * formatted(text_of(completion)) for completion in completions]


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
        found = extract_answer(text) or ""
        return 0.5 if "." not in found and number_of(found) is not None else 0.0

    return [score(text_of(completion)) for completion in completions]
