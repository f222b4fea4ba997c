"""What stands in a cell, as text: numbers as they were written, nothing endless, no control token of the model."""

import math
import re
from collections.abc import Collection
from decimal import Decimal
from numbers import Real
from unicodedata import category

from nbhelpers.rewards.answers import written

MOST_CHARACTERS = 200_000  # of a text: no model here reads more, and tokenizing it would take seconds
MOST_DIGITS = 300  # of a number, in which no answer can be given any more
TOO_LONG = object()  # stands for a text that was not even read
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # controls, formats, surrogates, private use, separators of lines
# What chat templates mark turns with, when there is no tokenizer to ask: <|im_start|>, DeepSeek's <｜User｜>
_MARKS = re.compile(r"<[|｜][^<>\s]{1,60}[|｜]>")


class Unusable(Exception):
    """Raised by a `read` function for a row that is left out; its text is the reason."""


def text_of(cell: object, column: str) -> str:
    """A cell as text, "" for None, NaN and infinity. Raises Unusable for what is neither text nor a number, what is
    longer than `MOST_CHARACTERS`, or holds half a character."""
    if isinstance(cell, (list, dict)):
        raise Unusable(f"its {column} is a {type(cell).__name__}, not text")
    if cell is None or cell != cell or (isinstance(cell, (Real, Decimal)) and cell in (math.inf, -math.inf)):
        return ""
    if cell is TOO_LONG:
        raise Unusable(f"its {column} has more than {MOST_CHARACTERS:,} characters")
    try:
        text = (cell if isinstance(cell, str) else _shown(cell)).strip()
    except ValueError:  # Python does not write an int of more than 4,300 digits
        text = "9" * (MOST_DIGITS + 1)
    if len(text) > MOST_CHARACTERS:
        raise Unusable(f"its {column} has more than {MOST_CHARACTERS:,} characters")
    if len(text) > MOST_DIGITS and re.fullmatch(r"[+-]?[\d.,_]+", text):
        raise Unusable(f"its {column} is a number of more than {MOST_DIGITS} digits")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(
            f"its {column} holds half a character ({text[error.start]!a}, a surrogate without its other half)"
        ) from None
    return text


def _shown(cell: object) -> str:
    if isinstance(cell, bool) or str(cell) in ("True", "False"):  # numpy's too
        return str(cell).lower()
    if isinstance(cell, float):
        return as_stored(str(cell))
    return plain(str(cell)) if isinstance(cell, (Real, Decimal)) else str(cell)  # numpy's numbers are Real too


def plain(number: str) -> str:
    """A number without an exponent: "1e16" is "10000000000000000" and "1e-05" is "0.00001", as people write them.

    Anything else, and what would become longer than `MOST_DIGITS`, stays as it is written.
    """
    if "e" not in number.lower():
        return number
    value = Decimal(number)
    if not value.is_finite() or abs(value.adjusted()) + len(value.as_tuple().digits) > MOST_DIGITS:
        return number
    return format(value, "f")


def as_stored(number: str) -> str:
    """The number that became this float: 9.109999656677246 is what 32 bits made of 9.11 (see `answers.written`).

    Where none did, it is `plain`.
    """
    value = float(number)
    short = written(value)
    return plain(number) if Decimal(short) == Decimal(repr(value)) else short


def harmless(text: str, control: Collection[str] = ()) -> tuple[str, list[str]]:
    """A question in which no control token is left, and those that it held: a space in one makes it plain text.

    A `<|im_end|>` in a question would end the user's turn, and what follows would speak as somebody else.

    Args:
        text (`str`): A question.
        control (`Collection[str]`): The tokenizer's special tokens; such as chat templates use count anyhow.
    """
    found = {mark for mark in _MARKS.findall(text)} | {token for token in control if token and token in text}
    for token in sorted(found, key=len, reverse=True):
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text, sorted(found)


def visible(text: str) -> str:
    """The same text with what a terminal would obey (escape sequences) or hide (right-to-left marks) written out, as
    in \\x1b or \\u202e. Line ends and tabs stay, and what joins the parts of an emoji."""
    return "".join(c if c in "\n\t\u200c\u200d" or category(c) not in _UNSEEN else ascii(c)[1:-1] for c in text)
