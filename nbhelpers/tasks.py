"""Questions and answers to train and test on: generated decimals, and the reader's own file.

A task is two `datasets.Dataset`s, train and test. A row holds `prompt`, a list of chat messages (system, user), and
`answer`, the right answer as a string; TRL hands both to the reward functions.
"""

import csv
import hashlib
import json
import random
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from nbhelpers.chat import prompt_ids

SYSTEM_PROMPT = "Think first. Answer as <reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"

BIGGER = (
    "Which is bigger? {a} or {b}?",
    "Which is bigger, {a} or {b}?",
    "Which number is larger: {a} or {b}?",
    "Is {a} or {b} the greater number?",
)

# Asked before and after training, always with the same prompt and the same decoding.
PROBES = ("Which is bigger? 9.11 or 9.9?", "Which is bigger, 9.11 or 9.9?", "Is 9.9 or 9.11 the greater number?")
PROBE_ANSWER = "9.9"


@dataclass
class Task:
    """Train and test rows of one task, and what was left out of them and why."""

    name: str
    train: "datasets.Dataset"  # noqa: F821  columns: prompt (list of messages), answer (str)
    test: "datasets.Dataset"  # noqa: F821
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.train)} questions to train on, {len(self.test)} held out"]
        return "\n".join(lines + self.dropped)


def messages(question: str, system_prompt: str | None = SYSTEM_PROMPT) -> list[dict[str, str]]:
    """One question as the chat messages that training, evaluation and probes all use."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


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


# ---- the reader's own questions ----


def from_file(
    path: str | Path, *, tokenizer=None, max_prompt_length: int | None = None, test_share: float = 0.2
) -> Task:
    """The reader's own questions from a .csv, .jsonl or .json file with the columns `question` and `answer`.

    Rows that cannot be used are left out, and `Task.dropped` says which and why: no question, no answer, a question
    that occurs twice, and, with a `tokenizer`, a prompt of more than `max_prompt_length` tokens (default: all that the
    tokenizer's model takes). `test_share` of the rest, chosen by hash of the question, is held out.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file, broken JSON (with the line), a missing
        column (with those found), or fewer than two usable rows.
    """
    from datasets import Dataset

    path = Path(path)
    rows = _read(path)
    dropped: dict[str, list[int]] = {}
    if max_prompt_length is None and tokenizer is not None:
        max_prompt_length = tokenizer.model_max_length
    chats: dict[str, dict] = {}
    for number, row in rows:
        question, answer = (
            str(row.get(key) if row.get(key) is not None else "").strip() for key in ("question", "answer")
        )
        if not question or not answer:
            reason = f"no {'answer' if question else 'question'}"
        elif question in chats:
            reason = "the question occurs twice"
        elif tokenizer and len(prompt_ids(tokenizer, messages(question))) > max_prompt_length:
            reason = f"the prompt is longer than {max_prompt_length} tokens"
        else:
            chats[question] = {"prompt": messages(question), "answer": answer}
            continue
        dropped.setdefault(reason, []).append(number)
    notes = [f"left out {_rows(numbers)} of {path.name}: {reason}" for reason, numbers in dropped.items()]
    if len(chats) < 2:
        raise ValueError(
            f"{path} has {len(chats)} usable questions, and at least 2 are needed (one to train on, one to test): "
            + ("; ".join(notes) or "the file is empty")
        )
    ordered = sorted(chats.values(), key=lambda row: hashlib.sha256(row["prompt"][-1]["content"].encode()).digest())
    held_out = min(max(1, round(test_share * len(ordered))), len(ordered) - 1)
    return Task(path.stem, Dataset.from_list(ordered[held_out:]), Dataset.from_list(ordered[:held_out]), notes)


def _read(path: Path) -> list[tuple[int, dict]]:
    """The rows of a file with their line numbers, the first line being 1."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (looked in {path.resolve().parent}): check DATA")
    text = path.read_text(encoding="utf-8-sig")  # -sig: Excel writes a byte order mark
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True))
        rows = [(reader.line_num, row) for row in reader]
        found = reader.fieldnames or []
    elif path.suffix == ".jsonl":
        rows = [(i, _parse(path, i, line)) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        found = sorted({key for _, row in rows for key in row})
    elif path.suffix == ".json":
        rows = list(enumerate(_parse(path, 1, text) if text.strip() else [], 1))
        found = sorted({key for _, row in rows for key in row})
    else:
        raise ValueError(f"{path} is not a .csv, .jsonl or .json file: save your questions as one of these")
    if not rows:
        raise ValueError(f"{path} is empty: one question and answer a line are needed")
    missing = [column for column in ("question", "answer") if column not in found]
    if missing:
        raise ValueError(
            f"{path} has no column {' and no column '.join(map(repr, missing))}; it has {', '.join(map(repr, found))}. "
            "Rename the columns of your file to question and answer"
        )
    return rows


def _clean(cell) -> str:
    return "" if cell is None else str(cell).strip()


def _parse(path: Path, line: int, text: str):
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}: not valid JSON ({error.msg}): {text[:60]!r}"
        ) from None
    wanted, name = (list, "a list of objects") if path.suffix == ".json" else (dict, "an object")
    rows = value if isinstance(value, list) else [value]
    if not isinstance(value, wanted) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f'{path}, line {line}: {name} is wanted, like {{"question": "...", "answer": "..."}}: {text[:60]!r}'
        )
    return value


def _rows(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
    return f"{len(numbers)} row{'s' if len(numbers) > 1 else ''} (line {shown})"
