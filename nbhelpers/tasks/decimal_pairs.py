"""Which of two decimals is bigger: pairs made without end, the right rule and the wrong one, and the probes."""

import hashlib
import random
from decimal import Decimal

from .task import SYSTEM_PROMPT, Task, messages, worked

BIGGER = (
    "Which is bigger? {a} or {b}?",
    "Which is bigger, {a} or {b}?",
    "Which number is larger: {a} or {b}?",
    "Is {a} or {b} the greater number?",
)

# Asked before and after training, always with the same prompt and the same decoding.
PROBES = ("Which is bigger? 9.11 or 9.9?", "Which is bigger, 9.11 or 9.9?", "Is 9.9 or 9.11 the greater number?")
PROBE_ANSWER = "9.9"
# With what others ask before and after such a run: question -> right answer, as `rewards.right` reads it. The workshop
# model, which only compares decimals, is asked PROBES alone.
PROBE_ANSWERS = dict.fromkeys(PROBES, PROBE_ANSWER) | {
    "Which is bigger? 9.919 or 9.92?": "9.92",
    "Calculate pi.": "3.14159265358979323846…",
}
PLACES = ("tenths", "hundredths", "thousandths")


def is_held_out(number: str) -> bool:
    """Whether a number is kept for testing: a fifth of all numbers by hash of their value, and 9.11 and 9.9 always.

    The value decides, not the spelling: 9.9 and 9.90 are on the same side. Nothing that the workshop model was trained
    on, and no GRPO prompt, contains a held-out number.
    """
    value = str(Decimal(number).normalize())
    return value in ("9.11", "9.9") or hashlib.sha256(value.encode()).digest()[0] % 5 == 0


def as_version(number: str) -> list[int]:
    """A decimal read as a software version: "9.11" is [9, 11]."""
    return [int(part) for part in number.split(".")]


def version_rule(a: str, b: str) -> str:
    """The bigger of two decimals if the parts beside the point were whole numbers, as in software versions (wrong!)."""
    return max(a, b, key=as_version)


def place_value(a: str, b: str) -> str:
    """The bigger of two decimals."""
    return max(a, b, key=Decimal)


def in_order(a: str, b: str) -> str:
    """Two whole numbers with the sign between them: '1 < 9'."""
    return f"{a} {'<' if int(a) < int(b) else '>' if int(a) > int(b) else '='} {b}"


def by_place(a: str, b: str) -> str:
    """'Place by place: 9 = 9, tenths 1 < 9.' A missing digit counts as 0; it stops at the first difference."""
    (a_whole, a_right), (b_whole, b_right) = a.split("."), b.split(".")
    steps = [in_order(a_whole, b_whole)]
    for i, place in enumerate(PLACES):
        if "=" not in steps[-1]:
            break
        digits = (right[i] if i < len(right) else "0" for right in (a_right, b_right))
        steps.append(f"{place} {in_order(*digits)}")
    return f"Place by place: {', '.join(steps)}."


def decimal_number(rng: random.Random, held_out: bool, whole: int | None = None) -> str:
    """A number from 0.01 to 99.999 of one, two or three decimals, no trailing zero, on the wanted side of the split.

    `whole` is the part before the point; drawn if not given.
    """
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


def decimals(
    n_train: int = 8192,
    n_test: int = 512,
    *,
    tricky_share: float = 0.8,
    seed: int = 0,
    system_prompt: str | None = SYSTEM_PROMPT,
    texts: bool = False,
) -> Task:
    """Which of two decimals is bigger, from 9.11 and 9.9 to 47.083 and 47.3.

    Tricky pairs are those where the version rule is wrong ("9.11 is bigger since 11 > 9"): all test pairs and a share
    of the training pairs. Test pairs are distinct, and their numbers occur in no training row.

    Args:
        n_train (`int`), n_test (`int`): Rows.
        tricky_share (`float`): Of the training pairs, from 0 to 1.
        seed (`int`): The same seed makes the same rows.
        system_prompt (`str`, *optional*): Stands before each question. None for no system message.
        texts (`bool`): Training rows have a `completion` too, place by place in the form of SYSTEM_PROMPT, for
            LeanSFTTrainer.
    """
    from datasets import Dataset

    rng = random.Random(seed)

    def row(a: str, b: str) -> dict:
        return {"prompt": messages(rng.choice(BIGGER).format(a=a, b=b), system_prompt), "answer": place_value(a, b)}

    train = []
    for _ in range(n_train):
        a, b = decimal_pair(rng, held_out=False, tricky=rng.random() < tricky_share)
        train.append(row(a, b))
        if texts:
            best = place_value(a, b)
            train[-1]["completion"] = worked(f"{by_place(a, b)} So {best} is bigger.", best)
    pairs: dict[tuple[str, str], None] = {}  # a dict, not a set: the order must be the same in every process
    while len(pairs) < n_test:
        pairs[decimal_pair(rng, held_out=True, tricky=True)] = None
    return Task("decimals", Dataset.from_list(train), Dataset.from_list([row(a, b) for a, b in pairs]))
