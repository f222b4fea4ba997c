"""Whether a rollout teaches anything: silent groups weigh exactly nothing, and may be replaced before the update.

A group is silent when its rewards are all equal, compared exactly. Its advantages are then 0 by definition, but
`(r - mean) / (std + 1e-4)` in fp32 gives up to 1e-3 where the mean of equal numbers is rounded, and Adam scales that
noise to full steps. Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2) asks other questions in their place.

The hooks of TRL's GRPOTrainer, all private, and what is done there:

    _calculate_rewards                  remembers the rewards of the rollout; logs what is right, in form, alike
    _generate_and_score_completions     advantages of silent groups become 0, silent groups are replaced
    _metrics, _logs                     the rollout as it was drawn first is what is logged, so curves stay unbiased
    _log_metric, _log_completion_extra  TRL's own way for numbers of a batch and of its rows
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nbhelpers.grpo import silent_groups, total_rewards
from nbhelpers.panel.gaming import alikeness
from nbhelpers.rewards import Tags, in_form, right, text_of

from . import checkpoint
from .hooks import Hooks
from .objective import loss_mask

Batch = dict[str, Any]  # TRL's rollout: tensors by name, B rows of whole groups
Inputs = list[dict[str, Any]]  # rows of the data set, each as often as it is answered
TRIES = 20  # questions drawn for one place before any will do
LEFT_PADDED = ("prompt_ids", "prompt_mask")


def spliced(batch: Batch, rows: list[int], other: Batch, other_rows: list[int], pad_token_id: int) -> Batch:
    """`batch` with its `rows` replaced by `other_rows` of another rollout, padded to a common length."""
    if "tool_mask" in batch or "tool_mask" in other:  # where one rollout has none, all of its tokens take a loss
        batch, other = ({"tool_mask": one["completion_mask"]} | one for one in (batch, other))
    result = dict(batch)
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        new = other[name]
        if value.dim() == 2:
            width = max(value.shape[1], new.shape[1])
            fill = pad_token_id if name.endswith("_ids") else 0
            value, new = (_padded(t, width, fill, name in LEFT_PADDED) for t in (value, new))
        result[name] = value.clone()
        result[name][rows] = new[other_rows].to(value.dtype)
    return result


def _padded(t: Tensor, width: int, fill: int, left: bool) -> Tensor:
    missing = width - t.shape[1]
    return torch.nn.functional.pad(t, (missing, 0) if left else (0, missing), value=fill)


def _question(row: dict[str, Any]) -> Any:
    """What makes a row of the data set the one that it is: its prompt, or all of it where an environment asks."""
    return row.get("prompt", row)


class Difficulty:
    """What is known of each question by now: whether its newest group taught something. Keyed by the prompt's hash."""

    def __init__(self) -> None:
        self.silent: dict[str, bool] = {}

    @staticmethod
    def key(prompt: Any) -> str:
        return checkpoint.hash_of(prompt)[:16]

    def note(self, prompts: list[Any], silent: list[bool]) -> None:
        self.silent.update(zip(map(self.key, prompts), silent, strict=True))

    def was_silent(self, prompt: Any) -> bool:
        return self.silent.get(self.key(prompt), False)


class SignalHooks(Hooks):
    """See the module. `trainer.LeanGRPOTrainer` is what people use.

    Attributes:
        correct (`Callable[[str, str], bool]`): Given a completion and the row's `answer`, whether it is right. It is
            measured and shown, never rewarded.
        tags (`Tags`): The wanted form; how much is in it is measured and shown.
        dynamic_sampling (`int`): Rounds in which silent groups are replaced before the update; 0 for none.
        difficulty (`Difficulty`): Saved with a checkpoint.
    """

    def _begin_signal(self, correct: Callable[[str, str], bool] | None, dynamic_sampling: int, tags: Tags) -> None:
        self.tags = tags
        self.correct = correct or partial(right, tags=tags)
        self.dynamic_sampling = dynamic_sampling
        self.difficulty = Difficulty()
        self._totals = torch.empty(0)  # weighted rewards [B of all processes] of the newest rollout

    # ------------------------------------------------------------------------------------------------------- hooks

    def _calculate_rewards(
        self, inputs: Inputs, prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._totals = total_rewards(rewards * self.reward_weights.to(rewards.device))
        texts = [text_of(completion) for completion in completions]
        self._log_metric("alike", alikeness(texts, self.num_generations))
        if inputs and isinstance(inputs[0].get("answer"), (str, int, float)):
            hits = [bool(self.correct(text, row["answer"])) for text, row in zip(texts, inputs, strict=True)]
            self._log_metric("right", sum(hits) / len(hits))
            self._log_metric("in_form", sum(in_form(text, self.tags) for text in texts) / len(texts))
            self._log_completion_extra("right", hits)
        return rewards

    def _drawn_and_scored(self, inputs: Inputs) -> Batch:
        """TRL's rollout. A method that has other advantages and still knows silent groups puts them there."""
        return super()._generate_and_score_completions(inputs)

    def _generate_and_score_completions(self, inputs: Inputs) -> Batch:
        batch = self._drawn_and_scored(inputs)
        if not self.model.training or self.multi_objective_aggregation != "sum_then_normalize":
            return batch  # "normalize_then_sum" compares rows across groups: no group is silent by itself
        silent = silent_groups(self._totals, self.num_generations)
        self._metrics["train"]["frac_reward_zero_std"][-1] = silent.float().mean().item()
        of_row = silent.repeat_interleave(self.num_generations)
        for i, quiet in enumerate(reversed(of_row.tolist()), start=1):
            if quiet and i <= len(self._logs["advantages"]):
                self._logs["advantages"][-i] = 0.0
        batch["advantages"] = batch["advantages"].masked_fill(self._own(of_row), 0.0)
        return self._with_signal(inputs, batch, self._own(of_row))

    def _write_state(self, position: checkpoint.Position) -> None:
        super()._write_state(position)
        position.extra["difficulty"] = dict(self.difficulty.silent)

    def _read_state(self, position: checkpoint.Position) -> None:
        super()._read_state(position)
        self.difficulty.silent = dict(position.extra.get("difficulty", {}))

    # ------------------------------------------------------------------------------------------ dynamic sampling

    def _with_signal(self, inputs: Inputs, batch: Batch, silent_rows: Tensor) -> Batch:
        """The rollout with its silent groups replaced, as far as `dynamic_sampling` rounds find better ones."""
        size, rounds = self.num_generations, self.dynamic_sampling
        whole = len(inputs) % size == 0 and "pixel_values" not in batch
        silent = silent_rows.view(-1, size)[:, 0].tolist() if whole else []
        if whole:
            self.difficulty.note([_question(row) for row in inputs[::size]], silent)
        if not rounds:
            return batch
        wanting = [group for group, quiet in enumerate(silent) if quiet]
        replaced = 0
        for _ in range(rounds):
            count = self._most_of_all(len(wanting))  # every process must take part in what the others gather
            if count == 0:
                break
            rows = self._drawn(count, {Difficulty.key(_question(row)) for row in inputs[::size]})
            with self._unlogged():
                other = self._drawn_and_scored(rows)
            quiet = self._own(silent_groups(self._totals, size).repeat_interleave(size)).view(-1, size)[:, 0].tolist()
            self.difficulty.note([_question(row) for row in rows[::size]], quiet)
            good = [group for group, is_quiet in enumerate(quiet) if not is_quiet]
            pairs = list(zip(wanting, good, strict=False))
            if pairs:
                to, source = (
                    [g * size + i for g in groups for i in range(size)] for groups in zip(*pairs, strict=True)
                )
                batch = spliced(batch, to, other, source, self._tokenizer.pad_token_id)
            wanting = wanting[len(pairs) :]
            replaced += len(pairs)
        batch["num_items_in_batch"] = self.accelerator.gather(loss_mask(batch).sum()).sum()
        self._metrics["train"]["signal/replaced"].append(replaced / max(1, len(silent)))
        return batch

    def _drawn(self, count: int, taken: set[str]) -> Inputs:
        """Rows of the data set for `count` groups, rather questions that are not in the rollout and did teach."""
        data, rows = self.train_dataset, []
        for _ in range(count):
            for _ in range(TRIES):
                row = data[int(torch.randint(len(data), ()))]
                key = Difficulty.key(_question(row))
                if key not in taken and not self.difficulty.was_silent(_question(row)):
                    break
            taken.add(key)
            rows += [copy(row) for _ in range(self.num_generations)]
        return rows

    def _most_of_all(self, count: int) -> int:
        """The largest of all processes' numbers."""
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        """What is scored within leaves neither numbers nor rows in the logs; tokens are counted."""
        logs = {name: deepcopy(value) for name, value in self._logs.items()}
        metrics = {name: len(values) for name, values in self._metrics["train"].items()}
        try:
            yield
        finally:
            self._logs.update(logs)
            for name, values in self._metrics["train"].items():
                if name != "num_tokens":
                    del values[metrics.get(name, 0) :]
