"""Reading one completion: where the answer stands, what number it is, whether it is right.

Model text is hostile: nothing here takes more than linear time in it.
"""

import re
import struct
from decimal import ROUND_DOWN, ROUND_HALF_UP, Context, Decimal, InvalidOperation
from numbers import Real

from nbhelpers.models.tags import REASONING, Tags

_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # an escaped brace is none
_CURRENCY = re.compile(r"\s*([-+]?)\s*\\?[$€£¥₹]\s*(?=[-+.\d])")
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}", re.ASCII)  # as JSON and CSV files have numbers
_GOES_ON = re.compile(r"-?\d{1,9}\.\d{2,20}(?:\.\.\.|…)", re.ASCII)  # 3.14159…
_EXACT = Context(prec=40)  # decimal's own 28 digits are fewer than those have
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


def form(text: str, tags: Tags = REASONING, prompt: str | list[dict[str, str]] = "") -> float:
    """`Tags.form` as a function: how much of the form is there, 0.0 to 1.0, with nothing for a copy of the prompt."""
    return tags.form(text, prompt)


def written(cell: object) -> str:
    """A cell of a data set as a person would write it: a number in plain digits, without what storing it added.

    JSON and CSV files have 1e-05 for 0.00001. A column of 32 bits comes back as 9.109999656677246, a sum as
    0.30000000000000004: numbers that nobody would answer with. They are read as the short decimal that was stored, if
    there is one: of at most 7 digits in 32 bits (all that those can keep apart), of at most 12 in 64.

    Args:
        cell (`object`): A number, a text, or anything else, which is taken as `str` has it.

    Example:
    >>> written(1e-05), written(9.109999656677246), written(0.1 + 0.2), written(1 / 3), written("1E3"), written(" 18")
    ('0.00001', '9.11', '0.3', '0.3333333333333333', '1000', '18')
    """
    text = str(cell).strip()
    if isinstance(cell, str):
        return f"{Decimal(text):f}" if _EXPONENT.fullmatch(text) else text
    if isinstance(cell, bool) or not isinstance(cell, (Real, Decimal)):
        return text
    try:
        number = Decimal(text)
    except InvalidOperation:  # a Fraction
        return text
    if isinstance(cell, float) and not cell.is_integer():
        number = _as_stored(cell, number)
    return f"{number:f}" if number.is_finite() else text


def _as_stored(value: float, number: Decimal) -> Decimal:
    """The short decimal that became `value`, whose shortest spelling is `number`; `number` itself if there is none."""
    digits = len(number.as_tuple().digits)
    if digits > 10:
        (kept,) = struct.unpack("f", struct.pack("f", value))
        (again,) = struct.unpack("f", struct.pack("f", float(f"{value:.7g}")))
        if kept == value == again:
            return Decimal(f"{value:.7g}")
    short = Decimal(f"{value:.12g}")
    return short if digits > 15 and abs(short - number) <= abs(number) * Decimal("4e-16") else number


def number_of(text: str) -> Decimal | None:
    """A plain decimal number (sign, currency sign, thousands commas, decimals, a full stop; no exponent), or None."""
    text = _CURRENCY.sub(r"\1", text, count=1).strip() if _CURRENCY.match(text) else text.strip()
    if text[-2:-1].isdigit():
        text = text.removesuffix(".")
    digits = text.removeprefix("-") if text.startswith("-") else text.removeprefix("+")
    whole, point, decimals = digits.partition(".")
    if not grouped(whole) or (point and not decimals):
        return None
    joined = whole.replace(",", "") + decimals
    if not (joined.isascii() and joined.isdigit()):
        return None
    return Decimal(text.replace(",", ""))


def grouped(whole: str) -> bool:
    """Whether the commas of a whole number, if it has any, stand between its thousands."""
    first, *groups = whole.split(",")
    return not groups or (1 <= len(first) <= 3 and first[0] != "0" and all(len(group) == 3 for group in groups))


def is_correct(text: str, answer: str, tags: Tags = REASONING) -> bool:
    """Whether the right answer, and nothing else, stands in the place of the answer.

    Two decimals are compared by value ("9.90" is 9.9, "1,000" is 1000, "$18." is 18), anything else as text, without
    regard to case and to how much white space there is. `rewards.right` reads more, as "18 dollars" and "x = 18".

    Args:
        text (`str`): What the model wrote, tags included.
        answer (`str`): The right answer; a number is read as `written` has it. One whose digits go on ends in "…":
            of "3.14159265…" two decimals are enough, and as many as are given must be its own, cut off or rounded.
        tags (`Tags`): What encloses the answer, or ends the thought before it.

    Returns:
        `bool`

    Example:
    >>> is_correct("<answer>9.90</answer>", "9.9"), is_correct("9.9", "9.9")
    (True, False)
    """
    given = tags.extract(text)
    return given is not None and same(given, written(answer))


def same(given: str, wanted: str) -> bool:
    """Whether two answers are equal: as decimals if both are, otherwise as text without regard to case and spacing.
    `wanted` may be a number whose digits go on, see `is_correct`."""
    if _GOES_ON.fullmatch(wanted):
        return _begins(given.rstrip(".…"), Decimal(wanted.rstrip(".…")))
    numbers = number_of(given), number_of(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return given.casefold().split() == wanted.casefold().split()


def _begins(given: str, digits: Decimal) -> bool:
    """Whether two decimals at least of a number are given, cut off or rounded; `digits` are its first ones."""
    number = number_of(given)
    if number is None or abs(number - digits) >= 1:
        return False
    places, known = (-int(n.as_tuple().exponent) for n in (number, digits))
    shorter = Decimal(1).scaleb(-min(places, known))
    roundings = (ROUND_DOWN, ROUND_HALF_UP) if places < known else (ROUND_DOWN,)
    begun = [digits.quantize(shorter, how, _EXACT) for how in roundings]
    return places >= 2 and number.quantize(shorter, ROUND_DOWN, _EXACT) in begun
