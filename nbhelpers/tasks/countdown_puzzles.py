"""Countdown as a task: reach a target with given numbers and + - * /. Rules and puzzles are rewards.countdown_rules."""

from collections.abc import Sequence
from itertools import islice

from nbhelpers.rewards.countdown_rules import puzzles

from .task import SYSTEM_PROMPT, Task, messages


def countdown(
    n_train: int = 8192,
    n_test: int = 512,
    *,
    numbers: Sequence[int] = (3, 4),
    seed: int = 0,
    system_prompt: str | None = SYSTEM_PROMPT,
) -> Task:
    """Reach a target with given numbers and + - * /, each number exactly once, as in TinyZero and mini-R1.

    Every puzzle has a solution; `answer` is one of them, and others are as right: score with `rewards.countdown`, or
    with `rewards.solved`, which reads any form. The columns `numbers` (list of int) and `target` (int) go to the reward
    functions beside `answer`. No test puzzle has both numbers and target of a training one.

    Args:
        n_train (`int`), n_test (`int`): Rows.
        numbers (`Sequence[int]`): How many numbers a puzzle has, drawn from these.
        seed (`int`): The same seed makes the same rows.
        system_prompt (`str`, *optional*): Stands before each question; a preset's own is `preset.system_prompt`.

    Raises ValueError if there are not so many puzzles, which happens with one or two numbers.
    """
    from datasets import Dataset

    def row(given: list[int], target: int, solution: str) -> dict:
        listed = f"{', '.join(map(str, given[:-1]))} and {given[-1]}"
        question = (
            f"Write an expression that equals {target}. It uses each of the numbers {listed} exactly once, no other "
            "number, and only + - * / and brackets. The answer is the expression alone."
        )
        return {"prompt": messages(question, system_prompt), "answer": solution, "target": target, "numbers": given}

    rows = [row(*puzzle) for puzzle in islice(puzzles(numbers, seed), n_train + n_test)]
    return Task("countdown", Dataset.from_list(rows[:n_train]), Dataset.from_list(rows[n_train:]))
