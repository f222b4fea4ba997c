"""What the stories draw from: people, numbers and things; and how numbers stand in a question and in an answer."""

import random
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeVar

Number = int | Decimal
Choice = TypeVar("Choice")

WOMEN = (
    "Adaeze", "Aigerim", "Aroha", "Ayşe", "Beatriz", "Chiara", "Dilnoza", "Eilidh", "Esi", "Freya", "Giulia", "Halima",
    "Hinewai", "Ingrid", "Jadwiga", "Kalpana", "Katya", "Lan", "Leilani", "Makena", "Mei", "Nayeli", "Noor", "Oksana",
    "Paloma", "Roxane", "Sakura", "Shirin", "Thandiwe", "Yael",
)  # fmt: skip
MEN = (
    "Arjun", "Bogdan", "Chidi", "Dawit", "Emre", "Farid", "Gaspard", "Haruto", "Idris", "Jorge", "Kwame", "Lorenzo",
    "Mateus", "Minh", "Nikos", "Olav", "Pavel", "Qasim", "Ravi", "Sang-woo", "Sipho", "Tadeusz", "Temur", "Uzoma",
    "Vikram", "Wiremu", "Xavier", "Yusuf", "Zoltan", "Aleksi",
)  # fmt: skip


@dataclass(frozen=True)
class Person:
    """Somebody in a story: in an f-string the name; `she` and `her` are the pronouns (`her` is the possessive)."""

    name: str
    she: str
    her: str

    def __str__(self) -> str:
        return self.name


PEOPLE = (*(Person(name, "she", "her") for name in WOMEN), *(Person(name, "he", "his") for name in MEN))


class Draw:
    """Everything random in one question, from one `random.Random`, so that a seed decides it on every machine."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def number(self, low: int, high: int, step: int = 1) -> int:
        """One of low, low + step, ... up to `high` itself."""
        return self.rng.randrange(low, high + 1, step)

    def decimal(self, low: str, high: str, step: str) -> Decimal:
        """One of low, low + step, ... up to `high`, exactly; given as text, as in "0.25"."""
        steps = int((Decimal(high) - Decimal(low)) / Decimal(step))
        return Decimal(low) + self.rng.randrange(steps + 1) * Decimal(step)

    def pick(self, *choices: Choice) -> Choice:
        """One of the choices."""
        return self.rng.choice(choices)

    def people(self, n: int) -> list[Person]:
        """So many different people."""
        return self.rng.sample(PEOPLE, n)

    def person(self) -> Person:
        """Somebody."""
        return self.rng.choice(PEOPLE)


# ---- numbers in a question ----


def plain(number: Number) -> str:
    """A number with thousands commas and without trailing zeros: 1,250 or 0.5."""
    return f"{number:,}" if isinstance(number, int) else f"{number.normalize():,f}"


def count(number: Number, one: str, many: str | None = None) -> str:
    """A number and its noun, which is singular after 1 alone; `many` where the plural is not `one` + s."""
    return f"{plain(number)} {one if number == 1 else many or one + 's'}"


def usd(amount: Number) -> str:
    """An amount of dollars as a price tag has it: $12 or $12.50. Raises ValueError for parts of a cent."""
    return f"${amount:,}" if isinstance(amount, int) else f"${Decimal(cents(amount)):,}"


# ---- answers ----


def whole(number: Number) -> str:
    """A whole number above 0 as an answer. Raises ValueError for any other: then the story's numbers are wrong."""
    if number != int(number) or number <= 0:
        raise ValueError(f"{number} is no whole number above 0")
    return str(int(number))


def exact(number: Number) -> str:
    """A number above 0 of at most three decimals as an answer, no trailing zeros. Raises ValueError for any other."""
    value = Decimal(number)
    if value <= 0 or value != value.quantize(Decimal("0.001")):
        raise ValueError(f"{number} is not above 0, or has more than three decimals")
    return f"{value.normalize():f}"


def cents(amount: Number) -> str:
    """An amount of dollars above 0 as an answer, with its cents: 12.50. Raises ValueError for parts of a cent."""
    value = Decimal(amount).quantize(Decimal("0.01"))
    if value != amount or value <= 0:
        raise ValueError(f"{amount} dollars are not above 0, or not whole cents")
    return str(value)
