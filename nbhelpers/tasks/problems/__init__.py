"""Word problems of the project's own, made without end: 72 stories of 2 to 5 steps of arithmetic, in four levels.

A story is a function that draws names, things and numbers and gives a question and its exact answer. Level 1 has two
steps, level 4 has five. What is held out for testing depends on nothing but the story and the numbers, so that neither
another seed nor more rows bring it into training.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nbhelpers.models.chat import prompt_ids

from ..task import SYSTEM_PROMPT, Task, messages
from . import five_steps, four_steps, three_steps, two_steps
from .drawing import Draw

Story = Callable[[Draw], tuple[str, str]]

LEVELS: dict[int, tuple[Story, ...]] = {
    1: two_steps.STORIES, 2: three_steps.STORIES, 3: four_steps.STORIES, 4: five_steps.STORIES
}  # fmt: skip
HELD_OUT = frozenset({
    "fewer_points", "ribbon_left", "bags_of_rolls", "not_on_foot",
    "more_flour", "money_backwards", "minibuses", "green_paint",
    "family_ticket", "closing_gap", "third_then_quarter", "ages_backwards",
    "half_price_evening", "average_speed", "paper_packs", "prize_shares",
})  # fmt: skip
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_PATIENCE = 2000  # questions in a row that are not wanted, before it is said that there are no more


def word_problems(
    n_train: int = 2000,
    n_test: int = 200,
    *,
    level: int | Sequence[int] | None = None,
    seed: int = 0,
    tokenizer=None,
    max_prompt_length: int | None = None,
    system_prompt: str | None = SYSTEM_PROMPT,
    held_out: str = "templates",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Task:
    """School word problems without a download: whole, decimal and money answers, all distinct, for every seed others.

    16 of the 72 stories are never trained on, and neither is a fifth of the numbers of each other story, chosen by
    hash. Test rows are of the first kind or of the second, as `held_out` says; the training rows are the same for both.
    Beside `prompt` and `answer` a row has `template` (str, the story's name) and `steps` (int, 2 to 5).

    Args:
        n_train (`int`), n_test (`int`): Rows.
        level (`int` or `Sequence[int]`, *optional*): 1 to 4: two to five steps, and larger numbers. None for all.
        seed (`int`): The same seed makes the same rows on every machine.
        tokenizer (*optional*): The model's; then prompts of more than `max_prompt_length` tokens are left out
            (default: all that its model takes).
        max_prompt_length (`int`, *optional*): Tokens.
        system_prompt (`str`, *optional*): Stands before each question. None for no system message.
        held_out (`str`): "templates": test rows tell stories that training lacks. "numbers": they tell the stories of
            training with numbers that training lacks.
        chat_template_kwargs (`dict`, *optional*): What the chat template is given besides, where prompts are measured;
            that of the run (GRPOConfig).

    Raises ValueError for a level or `held_out` that is not known, and if there are not so many questions.

    Example:
    >>> task = word_problems(4, 2, level=1)
    >>> [(row["steps"], row["template"] in HELD_OUT) for row in task.test]
    [(2, True), (2, True)]
    """
    from datasets import Dataset

    levels = sorted(LEVELS) if level is None else [level] if isinstance(level, int) else sorted(set(level))
    if not levels or not set(levels) <= set(LEVELS):
        raise ValueError(f"level is among {sorted(LEVELS)}, or several of them, or None for all; not {level!r}")
    if held_out not in ("templates", "numbers"):
        raise ValueError(f'held_out is "templates" or "numbers", not {held_out!r}')
    known = [(story, n + 1) for n in levels for story in LEVELS[n] if story.__name__ not in HELD_OUT]
    new = [(story, n + 1) for n in levels for story in LEVELS[n] if story.__name__ in HELD_OUT]
    longest = max_prompt_length or (0 if tokenizer is None else tokenizer.model_max_length)

    def rows(part: str, stories: list[tuple[Story, int]], n: int, wanted: Callable[[str, str], bool]) -> list[dict]:
        made = questions(stories, f"word problems {part} {seed}")
        taken: list[dict] = []
        seen: set[str] = set()
        missed = 0
        while len(taken) < n:
            question, answer, template, steps = next(made)
            prompt = messages(question, system_prompt)
            fits = tokenizer is None or len(prompt_ids(tokenizer, prompt, chat_template_kwargs)) <= longest
            missed = 0 if fits and question not in seen and wanted(template, question) else missed + 1
            if missed > _PATIENCE:
                short = f" of at most {longest} tokens" if tokenizer is not None else ""
                raise ValueError(f"{len(taken)} different questions{short} were found for {part}, not {n}")
            if not missed:
                seen.add(question)
                taken.append({"prompt": prompt, "answer": answer, "template": template, "steps": steps})
        return taken

    train = rows("train", known, n_train, lambda template, question: not numbers_held_out(template, question))
    if held_out == "templates":
        test = rows("test", new, n_test, lambda template, question: True)
    else:
        test = rows("test", known, n_test, numbers_held_out)
    return Task("word problems", Dataset.from_list(train), Dataset.from_list(test))


def questions(stories: Sequence[tuple[Story, int]], seed: str) -> Iterator[tuple[str, str, str, int]]:
    """Without end: question, answer, name of the story, steps. The stories take turns, in a new order each turn."""
    rng = random.Random(seed)
    draw = Draw(rng)
    while True:
        for story, steps in rng.sample(list(stories), len(stories)):
            question, answer = story(draw)
            yield question, answer, story.__name__, steps


def numbers_held_out(template: str, question: str) -> bool:
    """Whether the numbers of a question are kept for testing: a fifth of each story's, by hash of their digits."""
    numbers = " ".join([template, *_NUMBER.findall(question)])
    return hashlib.sha256(numbers.encode()).digest()[0] % 5 == 0
