"""Countdown: reach a target with given numbers and + - * /, as in TinyZero and mini-R1; the puzzles and their verifier.

The rule is that of the published task: each given number exactly once, however it is bracketed. Values are exact
fractions on the way, so 1 / 3 * 3 is 1. A sign before a number or a bracket is allowed; decimals, powers and an equals
sign are not.

The text comes from a model, so it is never handed to `eval`: what is too long, or holds a number that was not given,
is refused as text before anything is computed; the rest is evaluated with two stacks, in linear time.

`verify` takes an expression and nothing else. `solved` looks for one in a completion, as a person would who is careful.
"""

import random
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from nbhelpers.models.tags import REASONING, Tags

from .answers import extract_boxed

_ALLOWED = re.compile(r"[0-9+\-*/()\s]*", re.ASCII)
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_BINDS = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "sign+": 3, "sign-": 3}
_TARGETS = range(10, 101)
_TRIES = 100_000  # without a new puzzle: there are hardly any left
LONGEST = 1000  # characters: no honest answer about a handful of numbers comes near
_SPELLINGS = (
    (re.compile(r"\\(?:times|cdot)\b|[×·]|(?<=[0-9)]) ?x ?(?=[0-9(])"), "*"),
    (re.compile(r"\\div\b|÷"), "/"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\[()\[\]]|\\(?:left|right)\b|\*\*|[`$]"), " "),
)
_POINT = re.compile(r"^ *(?:[-+*]|[0-9]{1,2}[.)]) ", re.MULTILINE)  # of a list
_PIECE = re.compile(r"(?<![\w.])[0-9+\-*/()= ]+")
_GOES_ON = re.compile(r"\w|\.[0-9]")  # 3 * x, 3 * 2.5


def verify(expression: str, numbers: Sequence[int], target: int | Fraction) -> bool:
    """Whether the expression reaches `target` and uses each of `numbers` exactly once.

    Never raises for any text: what is not an expression, divides by zero or is longer than `LONGEST` is False.

    Args:
        expression (`str`): What a model wrote.
        numbers (`Sequence[int]`): The given ones, none negative.
        target (`int` or `Fraction`): The value to reach.

    Example:
    >>> verify("(19 - 3) * 5", [3, 5, 19], 80)
    True
    >>> verify("19 * 5 - 15", [3, 5, 19], 80)
    False
    """
    if len(expression) > LONGEST or not _ALLOWED.fullmatch(expression):
        return False
    tokens = _TOKEN.findall(expression)
    if sorted(filter(str.isdigit, tokens)) != sorted(map(str, numbers)):  # as text: int() of a huge number takes long
        return False
    return evaluate(tokens) == target


def solves(expression: str, solution: str) -> bool:
    """Whether the expression solves the puzzle that `solution`, a row's `answer`, solves: its numbers, its value."""
    tokens = _TOKEN.findall(solution)
    target = evaluate(tokens)
    return target is not None and verify(expression, [int(token) for token in tokens if token.isdigit()], target)


def solved(text: str, solution: str, tags: Tags = REASONING) -> bool:
    """Whether a completion solves the puzzle that `solution`, a row's `answer`, solves, whatever its form.

    The expression is read between the answer tags, else in the last `\\boxed{}`, else in all of the text; of several
    the last counts. `×`, `\\div` and markdown are read as a person would, and "= 80" may stand on either side of it if
    that is true.

    Args:
        text (`str`): What a model wrote.
        solution (`str`): An expression that uses the given numbers and reaches the target.
        tags (`Tags`): What encloses the answer.

    Example:
    >>> solved("So (19 − 3) × 5 = 80.", "5 * (19 - 3)"), solved("19 * 5 - 15 = 80", "5 * (19 - 3)")
    (True, False)
    """
    inside = tags.extract(text)
    if inside is None:
        inside = extract_boxed(text)
    said = (text if inside is None else inside)[-4 * LONGEST :]  # the last expression stands at the end
    for pattern, new in _SPELLINGS:
        said = pattern.sub(new, said)
    if inside is None:  # in the place of the answer "- 3" is a sign
        said = _POINT.sub("", said)
    last = ""
    for match in _PIECE.finditer(said):
        signs = set(match[0])
        if signs & set("+-*/") and signs & set("0123456789") and not _GOES_ON.match(said, match.end()):
            last = match[0]
    sides = last.strip("= ").split("=")
    target = evaluate(_TOKEN.findall(solution))
    if len(last) > LONGEST or target is None or not any(solves(side, solution) for side in sides):
        return False
    return all(evaluate(_TOKEN.findall(side)) == target for side in sides)


def evaluate(tokens: Sequence[str]) -> Fraction | None:
    """The exact value of an expression in tokens (whole numbers, + - * /, brackets), None if it has none.

    Dijkstra's shunting yard: one stack of values, one of operators that wait; nothing recurses.
    """
    values: list[Fraction] = []
    waiting: list[str] = []
    operand_next = True
    try:
        for token in tokens:
            if operand_next:
                if token.isdigit():
                    values.append(Fraction(int(token)))
                    operand_next = False
                elif token in "+-":
                    waiting.append(f"sign{token}")
                elif token == "(":
                    waiting.append(token)
                else:
                    return None
            elif token == ")":
                while waiting[-1] != "(":
                    _apply(waiting.pop(), values)
                waiting.pop()
            elif token in "+-*/":
                while waiting and _BINDS[waiting[-1]] >= _BINDS[token]:
                    _apply(waiting.pop(), values)
                waiting.append(token)
                operand_next = True
            else:
                return None
        while waiting:
            _apply(waiting.pop(), values)
    except (IndexError, KeyError, ZeroDivisionError):  # a bracket without its partner, an operator without a value
        return None
    return None if operand_next else values[0]


def _apply(operator: str, values: list[Fraction]) -> None:
    right = values.pop()
    if operator in ("sign+", "sign-"):
        values.append(-right if operator == "sign-" else right)
        return
    left = values.pop()
    values.append({"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[operator](right))


def puzzles(counts: Sequence[int] = (3, 4), seed: int = 0) -> Iterator[tuple[list[int], int, str]]:
    """(numbers, target, solution), one after the other: as many numbers as one of `counts` says, each from 1 to 99, and
    a target from 10 to 100.

    Made backwards from a random expression, so each has a solution; no two share both numbers and target.

    Args:
        counts (`Sequence[int]`): How many numbers a puzzle may have.
        seed (`int`): The same seed makes the same puzzles.

    Raises ValueError when no new puzzle is left: of one number there are 90, of two about 6,800.
    """
    rng = random.Random(seed)
    seen: set[tuple[tuple[int, ...], Fraction]] = set()
    tries = 0
    while tries < _TRIES:
        tries += 1
        numbers = [rng.randrange(1, 100) for _ in range(rng.choice(counts))]
        solution = _random_expression(rng, [str(number) for number in numbers])
        value = evaluate(_TOKEN.findall(solution))
        if value is None or value not in _TARGETS:
            continue
        puzzle = (tuple(sorted(numbers)), value)
        if puzzle not in seen:
            seen.add(puzzle)
            tries = 0
            yield numbers, int(value), solution
    raise ValueError(
        f"no new puzzle of {' or '.join(map(str, counts))} numbers in {_TRIES:,} tries, after {len(seen)}: "
        "ask for fewer (n_train, n_test), or for 3 to 6 numbers"
    )


def _random_expression(rng: random.Random, parts: list[str]) -> str:
    """Two parts at a time are joined by a random operator until one is left."""
    parts = list(parts)
    while len(parts) > 1:
        left, right = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        joined = f"{left} {rng.choice('+-*/')} {right}"
        parts.append(f"({joined})" if parts else joined)
    return parts[0]
