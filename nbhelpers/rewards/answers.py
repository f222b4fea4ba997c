"""Reading one completion: where the answer stands, what number it is, whether it is right.

Model text is hostile: nothing here takes more than linear time in it.
"""

import re
from decimal import Decimal

from nbhelpers.models.tags import REASONING, Tags

_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # an escaped brace is none
TAGS = REASONING.all


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The text of one completion as TRL hands it over: a plain string, or chat messages, of which the last counts."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def question_of(prompt: str | list[dict[str, str]]) -> str:
    """What a prompt asks: a plain string, or the last chat message that is not the beginning of the answer."""
    if isinstance(prompt, str):
        return prompt
    return next((turn for turn in reversed(prompt) if turn["role"] != "assistant"), prompt[-1])["content"] or ""


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
    return REASONING.extract(text)


def extract_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` of a text, without the white space around it.

    Of nested boxes it is the innermost. The box must be closed: one that was cut off is no answer.

    Args:
        text (`str`): What the model wrote, or a data set's solution.

    Returns:
        `str` or `None`

    Example:
    >>> extract_boxed(r"so \\boxed{9}, no: \\boxed{\\frac{99}{10}}.")
    '\\\\frac{99}{10}'
    """
    start, end, depth = None, None, 0
    for match in _BRACE.finditer(text):
        token = match[0]
        if token.startswith(r"\boxed"):
            start, end, depth = match.end(), None, 1
        elif token in ("{", "}"):
            depth += 1 if token == "{" else -1
            end = match.start() if depth == 0 and end is None else end
    return None if start is None or end is None else text[start:end].strip()


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
    return in_form(text)


def in_form(text: str, tags: Tags = REASONING) -> bool:
    """`Tags.in_form` as a function: whether a text is exactly the wanted form."""
    return tags.in_form(text)


def form(text: str, tags: Tags = REASONING) -> float:
    """`Tags.form` as a function: how much of the form is there, 0.0 to 1.0."""
    return tags.form(text)


def number_of(text: str) -> Decimal | None:
    """A plain decimal number (sign, thousands commas and decimals allowed, no exponent), or None."""
    digits = text.strip().removeprefix("-") if text.strip().startswith("-") else text.strip().removeprefix("+")
    whole, point, decimals = digits.partition(".")
    if not grouped(whole) or (point and not decimals):
        return None
    joined = whole.replace(",", "") + decimals
    if not (joined.isascii() and joined.isdigit()):
        return None
    return Decimal(text.strip().replace(",", ""))


def grouped(whole: str) -> bool:
    """Whether the commas of a whole number, if it has any, stand between its thousands."""
    first, *groups = whole.split(",")
    return not groups or (1 <= len(first) <= 3 and all(len(group) == 3 for group in groups))


def is_correct(text: str, answer: str, tags: Tags = REASONING) -> bool:
    """Whether the right answer, and nothing else, stands in the place of the answer.

    Two decimals are compared by value ("9.90" is 9.9, "1,000" is 1000), anything else as text, without regard to
    case and to how much white space there is.

    Args:
        text (`str`): What the model wrote, tags included.
        answer (`str`): The right answer.
        tags (`Tags`): What encloses the answer, or ends the thought before it.

    Returns:
        `bool`

    Example:
    >>> is_correct("<answer>9.90</answer>", "9.9"), is_correct("9.9", "9.9")
    (True, False)
    """
    given = tags.extract(text)
    return given is not None and same(given, str(answer))


def same(given: str, wanted: str) -> bool:
    """Whether two answers are equal: as decimals if both are, otherwise as text without regard to case and spacing."""
    numbers = number_of(given), number_of(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return given.casefold().split() == wanted.casefold().split()
