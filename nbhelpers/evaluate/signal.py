"""Will this model learn anything from these questions and rewards? Asked before a training that may take a night."""

import html
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from nbhelpers.html import cell, framed, table
from nbhelpers.rewards import REASONING, Tags
from nbhelpers.rewards.calling import by_name, call
from nbhelpers.rewards.guard import guard

from .asking import answering, scored
from .results import Decoding, Row

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nbhelpers.engines import Engine
    from nbhelpers.rewards import Reward
    from nbhelpers.tasks import Task

FEW = 0.25  # of the groups with a signal: fewer are too few
MANY_CUT = 0.25  # of the answers cut off: more are too many
ALMOST_NONE, ALMOST_ALL = 0.05, 0.95  # of the answers right


@dataclass(frozen=True)
class Signal:
    """What a model's answers before any training would teach it; a notebook shows it as a table, a terminal as text.

    Args:
        rows (`list[list[Row]]`): The answers to each question, a group.
        rewards (`list[list[float]]`): The reward of each, the sum over the functions; NaN where none applied.
        silent (`list[bool]`): Whether the rewards of a group are all equal, exactly: it teaches nothing.
    """

    rows: list[list[Row]] = field(repr=False)
    rewards: list[list[float]] = field(repr=False)
    silent: list[bool]

    @property
    def right(self) -> float:
        """The share of right answers, in any form."""
        return fmean(row.correct for group in self.rows for row in group)

    @property
    def in_form(self) -> float:
        """The share of answers in exactly the wanted form, right or wrong."""
        return fmean(row.formatted for group in self.rows for row in group)

    @property
    def cut_off(self) -> float:
        """The share of answers that reached the limit of tokens before they ended."""
        return fmean(not row.finished for group in self.rows for row in group)

    @property
    def with_signal(self) -> float:
        """The share of groups that teach something."""
        return 1 - fmean(self.silent)

    @property
    def widest(self) -> int:
        """The question whose answers' rewards lie furthest apart."""
        known = [[reward for reward in group if not math.isnan(reward)] or [0.0] for group in self.rewards]
        return max(range(len(known)), key=lambda i: max(known[i]) - min(known[i]))

    @property
    def advice(self) -> list[str]:
        """What to change before training, a sentence or two each; empty where nothing has to be."""
        limit = self.rows[0][0].decoding.max_new_tokens
        if all(math.isnan(reward) for group in self.rewards for reward in group):
            return ["Other rewards: no function gave any answer a number, so nothing could be learned."]
        said = []
        if self.cut_off > MANY_CUT:
            said.append(
                f"Longer answers: {self.cut_off:.0%} were cut off at {limit} tokens, and those are hardly ever right. "
                "Raise max_completion_length; memory.plan says how far."
            )
        if self.right == 0 and self.cut_off > 0.5:
            return said  # nobody can know what whole answers would be like
        if self.right == self.in_form == 0:
            said.append(
                "Another prompt: no answer is right, and none is in the form that is asked for. Try another system "
                "prompt, or the tags that this model knows; then easier questions."
            )
        elif self.right == 0 or (self.with_signal < FEW and self.right < ALMOST_NONE):
            said.append(
                f"Easier questions: {self.right:.0%} of the answers are right, so hardly more than the form could be "
                "learned. Take easier questions or a larger model."
            )
        elif self.with_signal < FEW:
            said.append(self._why_silent())
        return said

    def _why_silent(self) -> str:
        """Some answers are right, and their rewards are equal all the same."""
        mixed = fmean(0 < sum(row.correct for row in group) < len(group) for group in self.rows)
        if self.right > ALMOST_ALL:
            return f"Harder questions: {self.right:.0%} of the answers are right, so there is little left to learn."
        if mixed > self.with_signal:
            return (
                f"Other rewards: to {mixed:.0%} of the questions some answers are right and others are not, and they "
                "get the same reward. Let a right answer pay in any form (rewards.right)."
            )
        return (
            "Questions in between: those here are answered always right or never. Leave out the easiest and the "
            "hardest, or answer each more often (num_generations)."
        )

    def lines(self) -> list[tuple[str, str, str]]:
        """Each number: its name, the share, and what was counted."""
        groups, answers = len(self.rows), sum(map(len, self.rows))
        limit = self.rows[0][0].decoding.max_new_tokens
        return [
            ("right, in any form", f"{self.right:.0%}", f"{round(self.right * answers)} of {answers} answers"),
            ("in form", f"{self.in_form:.0%}", f"{round(self.in_form * answers)} of {answers}"),
            ("cut off", f"{self.cut_off:.0%}", f"{round(self.cut_off * answers)} of {answers}, at {limit} tokens"),
            ("groups with a signal", f"{self.with_signal:.0%}", f"{self.silent.count(False)} of {groups} questions"),
        ]

    @property
    def verdict(self) -> list[str]:
        """`advice`, or that nothing has to be changed."""
        return self.advice or ["Go on: there is something to learn from."]

    def __str__(self) -> str:
        shown = [f"{name:<22}{share:>5}   {counted}" for name, share, counted in self.lines()]
        return "\n".join(["before training, at temperature 1:", *shown, *(f"→ {text}" for text in self.verdict)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [[cell(name, tag="th"), cell(share), cell(counted)] for name, share, counted in self.lines()]
        said = "".join(f"<p>→ {html.escape(text)}</p>" for text in self.verdict)
        return framed("<p>before training, at temperature 1:</p>" + table((), rows) + said)


@answering
def check_signal(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: "Task",
    reward_funcs: "Reward | Sequence[Reward]",
    *,
    tags: Tags = REASONING,
    n: int = 8,
    num_generations: int = 8,
    max_new_tokens: int = 256,
    correct: Callable[[str, str], bool] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    engine: "str | Engine" = "auto",
) -> Signal:
    """Answer some training questions several times each, as the first steps of a training would, and judge what comes.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`), tokenizer
            (`transformers.PreTrainedTokenizerBase`): See `ask`.
        task (`tasks.Task`): Its `train` has the columns `prompt` and `answer`.
        reward_funcs (`Reward` or `Sequence[Reward]`): As for the trainer. Of `completion_ids` the lengths are true.
        tags (`rewards.Tags`): The wanted form.
        n (`int`): Questions, drawn with `seed`.
        num_generations (`int`): Answers to each; best as many as in the training.
        max_new_tokens (`int`): As `max_completion_length` in the training.
        correct (`Callable[[str, str], bool]`, *optional*), seed (`int`), batch_size (`int`), engine (`str` or
            `engines.Engine`): See `accuracy`.

    Returns:
        `Signal`

    Raises:
        ValueError: Without training rows or one of the two columns, for fewer than two answers each, and for reward
            functions that cannot be called or do not return one number for each completion.
        TypeError: For a reward model.
    """
    import torch

    from nbhelpers.grpo import silent_groups, total_rewards

    if num_generations < 2:
        raise ValueError(f"num_generations={num_generations}: answers are compared, so it takes at least 2")
    funcs = [guard(func) for func in by_name(reward_funcs).values()]
    chosen = random.Random(seed).sample(range(len(task.train)), min(n, len(task.train)))
    questions = [task.train[i] for i in chosen]
    decoding = Decoding(max_new_tokens, 1.0, seed, batch_size, num_generations=num_generations)
    rows = scored(model, tokenizer, questions, None, correct, decoding, engine, tags)
    flat = [row for group in rows for row in group]
    asked = [question for question in questions for _ in range(num_generations)]
    texts, lengths = [row.completion for row in flat], [row.tokens for row in flat]
    given = torch.tensor(
        [[torch.nan if score is None else score for score in call(func, asked, texts, lengths)] for func in funcs]
    )
    totals = total_rewards(given.T)  # in fp32, as TRL adds them
    return Signal(rows, totals.view(len(rows), -1).tolist(), silent_groups(totals, num_generations).tolist())
