"""Questions and answers to train and test on, each task a function: `tasks.gsm8k(tokenizer)` and its siblings.

GSM8K, Countdown and decimals are here; `from_data` reads the reader's own questions, `reasoning` the data sets that
people distilled from DeepSeek-R1. A row holds `prompt`, a list of chat messages, and `answer`, the right answer.
"""

import hashlib
import random
from collections.abc import Sequence
from decimal import Decimal
from itertools import islice
from pathlib import Path

from nbhelpers.models import smoke
from nbhelpers.rewards.countdown_rules import puzzles

from .own_data import from_data, from_file
from .problems import word_problems
from .reasoning_sets import reasoning
from .sources import open_source
from .task import SYSTEM_PROMPT, Task, Unusable, collect, messages, text_of

__all__ = [
    "BIGGER", "PROBES", "PROBE_ANSWER", "SYSTEM_PROMPT", "Task", "countdown", "decimals", "from_data", "from_file",
    "gsm8k", "messages", "reasoning", "word_problems",
]  # fmt: skip

BIGGER = (
    "Which is bigger? {a} or {b}?",
    "Which is bigger, {a} or {b}?",
    "Which number is larger: {a} or {b}?",
    "Is {a} or {b} the greater number?",
)

# Asked before and after training, always with the same prompt and the same decoding.
PROBES = ("Which is bigger? 9.11 or 9.9?", "Which is bigger, 9.11 or 9.9?", "Is 9.9 or 9.11 the greater number?")
PROBE_ANSWER = "9.9"


# ---- decimals: made here, without end ----


def is_held_out(number: str) -> bool:
    """Whether a number is kept for testing: a fifth of all numbers by hash of their value, and 9.11 and 9.9 always.

    The value decides, not the spelling: 9.9 and 9.90 are on the same side. Nothing that the workshop model was trained
    on, and no GRPO prompt, contains a held-out number.
    """
    value = str(Decimal(number).normalize())
    return value in ("9.11", "9.9") or hashlib.sha256(value.encode()).digest()[0] % 5 == 0


def as_version(number: str) -> list[int]:
    return [int(part) for part in number.split(".")]


def version_rule(a: str, b: str) -> str:
    """The bigger of two decimals if the parts beside the point were whole numbers, as in software versions (wrong!)."""
    return max(a, b, key=as_version)


def place_value(a: str, b: str) -> str:
    """The bigger of two decimals."""
    return max(a, b, key=Decimal)


def decimal_number(rng: random.Random, held_out: bool, whole: int | None = None) -> str:
    """A number from 0.01 to 99.999 of one, two or three decimals, no trailing zero, on the wanted side of the split."""
    while True:
        left = rng.randrange(100) if whole is None else whole
        digits = rng.choices((1, 2, 3), weights=(4, 5, 1))[0]
        right = "".join(rng.choice("0123456789") for _ in range(digits - 1)) + rng.choice("123456789")
        number = f"{left}.{right}"
        if is_held_out(number) == held_out:
            return number


def decimal_pair(rng: random.Random, *, held_out: bool, tricky: bool) -> tuple[str, str]:
    """Two numbers of one side of the split. `tricky`: of the kind where the version rule picks the wrong one."""
    while True:
        a = decimal_number(rng, held_out)
        same_whole = tricky or rng.random() < 0.6
        b = decimal_number(rng, held_out, int(a.split(".")[0]) if same_whole else None)
        if as_version(a) == as_version(b):
            continue  # the same number, or 3.05 and 3.5: the version rule has no answer there
        if (version_rule(a, b) != place_value(a, b)) == tricky:
            return a, b


def decimals(n_train: int = 8192, n_test: int = 512, *, tricky_share: float = 0.8, seed: int = 0) -> Task:
    """Which of two decimals is bigger, from 9.11 and 9.9 to 47.083 and 47.3.

    `tricky_share` of the training pairs and all test pairs are of the kind where the version rule is wrong ("9.11 is
    bigger since 11 > 9"). Test pairs are distinct, and their numbers occur in no training row.
    """
    from datasets import Dataset

    rng = random.Random(seed)

    def row(a: str, b: str) -> dict:
        return {"prompt": messages(rng.choice(BIGGER).format(a=a, b=b)), "answer": place_value(a, b)}

    train = [row(*decimal_pair(rng, held_out=False, tricky=rng.random() < tricky_share)) for _ in range(n_train)]
    pairs: dict[tuple[str, str], None] = {}  # a dict, not a set: the order must be the same in every process
    while len(pairs) < n_test:
        pairs[decimal_pair(rng, held_out=True, tricky=True)] = None
    return Task("decimals", Dataset.from_list(train), Dataset.from_list([row(a, b) for a, b in pairs]))


# ---- GSM8K ----


def gsm8k(
    tokenizer=None,
    *,
    source: str | Path = "openai/gsm8k",
    max_prompt_length: int | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
) -> Task:
    """Grade-school word problems (Cobbe et al. 2021): 7,473 to train on, 1,319 to test, answers that are numbers.

    The right answer is what follows the last "####", without thousands commas; a row that has none is left out.
    The data set on the hub has not been read here, its schema has.

    Args:
        tokenizer (*optional*): The model's; then prompts of more than `max_prompt_length` tokens are left out
            (default: all that its model takes).
        source (`str` or `Path`): The hub id, or a folder with train and test as .jsonl, .json, .parquet or .csv.
        n_train, n_test (`int`, *optional*): Only the first so many.

    Raises:
        ConnectionError: the hub is out of reach. ValueError: the columns question and answer are not there, or no row
        is usable. FileNotFoundError: the folder lacks one of the two.
    """
    from datasets import Dataset

    folder = smoke.make_dataset() if source == smoke.DATASET else source
    parts, dropped = {}, []
    for part, n in (("train", n_train), ("test", n_test)):
        opened = open_source(folder, ("question", "answer"), config="main", split=part)
        parts[part], notes = collect(
            opened.rows, _gsm8k_row, f"{part} of {source}", unit=opened.unit, tokenizer=tokenizer,
            max_prompt_length=max_prompt_length, n=n,
        )  # fmt: skip
        dropped += notes
        if not parts[part]:
            raise ValueError(f"no usable question in {part} of {source}: " + ("; ".join(notes) or f"n_{part} is {n}"))
    return Task("gsm8k", Dataset.from_list(parts["train"]), Dataset.from_list(parts["test"]), dropped)


def _gsm8k_row(row: dict) -> tuple[str, str]:
    _, marked, gold = text_of(row["answer"], "answer").rpartition("####")
    if not marked:
        raise Unusable("no #### before the final answer")
    return text_of(row["question"], "question"), gold.strip().replace(",", "")


# ---- Countdown ----


def countdown(n_train: int = 8192, n_test: int = 512, *, numbers: Sequence[int] = (3, 4), seed: int = 0) -> Task:
    """Reach a target with given numbers and + - * /, each number exactly once, as in TinyZero and mini-R1.

    Every puzzle has a solution; `answer` is one of them, and others are as right: score with
    `nbhelpers.countdown.verify(expression, numbers, target)`. The columns `numbers` (list of int) and `target` (int)
    go to the reward functions beside `answer`. No test puzzle has both numbers and target of a training one.

    Args:
        numbers (`Sequence[int]`): How many numbers a puzzle has, drawn from these.

    Raises:
        ValueError: If there are not so many puzzles, which happens with one or two numbers.
    """
    from datasets import Dataset

    def row(given: list[int], target: int, solution: str) -> dict:
        listed = f"{', '.join(map(str, given[:-1]))} and {given[-1]}"
        question = (
            f"Reach {target} with the numbers {listed}, each used exactly once, and + - * / and brackets. "
            "The answer is the expression alone."
        )
        return {"prompt": messages(question), "answer": solution, "target": target, "numbers": given}

    rows = [row(*puzzle) for puzzle in islice(puzzles(numbers, seed), n_train + n_test)]
    return Task("countdown", Dataset.from_list(rows[:n_train]), Dataset.from_list(rows[n_train:]))
