"""Completions of any length laid end to end, a group's prompt once: nothing is computed for padding.

    prompt 1 | completion 1a | completion 1b | ... | prompt 2 | completion 2a | ...        T tokens, one row

Every layer but attention treats tokens one by one, so a packed row is all it needs. Attention sees sequences: the
prompt by itself, then each completion as queries whose keys are the prompt's and its own. A completion's last token
predicts nothing and is left out; its first is predicted by the prompt's last token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from nbhelpers.kernels.taken import Taken

P = ParamSpec("P")
T = TypeVar("T")


def on_one_thread(function: Callable[P, T]) -> Callable[P, T]:
    """Torch's operations on the host take one thread in it: to wake all of many cores takes longer than to sort or
    index a batch's tokens, and meanwhile the GPU waits."""

    @wraps(function)
    def alone(*args: P.args, **options: P.kwargs) -> T:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **options)
        finally:
            torch.set_num_threads(threads)

    return alone


class Row(NamedTuple):
    """The size of one completion and of its prompt, and where both stand: no tokens."""

    number: int  # its row in the padded batch
    prompt: int  # index into Rows.prompts
    prompt_length: int  # tokens
    completion_length: int  # tokens, those that take no loss included


@dataclass
class Rows:
    """A batch on the host without its padding: the rows, and the token ids that they refer to."""

    rows: list[Row]
    prompts: list[Tensor]  # int64 [tokens], each distinct prompt once
    completions: dict[int, Tensor]  # int64 [tokens], by Row.number
    scored: dict[int, Tensor]  # int64 [n], by Row.number: which of the completion's tokens take a loss


@on_one_thread
def unpad(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    keep: Tensor | None = None,
    loss_mask: Tensor | None = None,
) -> Rows:
    """The rows of a batch as TRL has it: prompts padded on the left, completions on the right.

    Args:
        prompt_ids (`Tensor`), prompt_mask (`Tensor`): [B, P], int64 and 1 on tokens.
        completion_ids (`Tensor`), completion_mask (`Tensor`): [B, T], int64 and 1 on tokens.
        keep (`Tensor`, *optional*): bool [B], rows to take; None for all.
        loss_mask (`Tensor`, *optional*): [B, T], 1 on tokens that take a loss; None: `completion_mask`. The others, the
            result of a tool say, are read by the model and not scored.

    Rows of which nothing is scored are left out.
    """
    prompt_ids, completion_ids = prompt_ids.cpu(), completion_ids.cpu()
    prompt_mask, completion_mask = prompt_mask.bool().cpu(), completion_mask.bool().cpu()
    scored = completion_mask if loss_mask is None else completion_mask & loss_mask.bool().cpu()
    kept = scored.any(1) if keep is None else scored.any(1) & keep.cpu()
    numbers: dict[bytes, int] = {}
    batch = Rows([], [], {}, {})
    for number in kept.nonzero().flatten().tolist():
        prompt = prompt_ids[number][prompt_mask[number]]
        index = numbers.setdefault(prompt.numpy().tobytes(), len(numbers))
        if index == len(batch.prompts):
            batch.prompts.append(prompt)
        completion = completion_ids[number][completion_mask[number]]
        batch.rows.append(Row(number, index, len(prompt), len(completion)))
        batch.completions[number] = completion
        batch.scored[number] = scored[number].nonzero().flatten()
    return batch


@dataclass
class Packed:
    """Some rows of a batch as one row of T tokens on the device: what goes through the model in one micro-batch.

    S of its tokens are scored. A "sequence" is what attention sees: queries that attend to a stretch of keys.
    """

    ids: Tensor  # int64 [1, T]
    positions: Tensor  # int64 [1, T], of each token in its own text
    source: Taken  # S, the tokens whose outputs predict
    target: Tensor  # int64 [S], the id that it should predict
    number: Tensor  # int64 [S], row of the predicted token in the padded [B, T] batch
    column: Tensor  # int64 [S], and its column
    rows: Tensor  # int64 [n], the padded batch's rows that are here, ascending
    local: Tensor  # int64 [S], which of these `number` is
    width: int  # columns of the padded batch up to the last one that is scored here
    sequences: list[tuple[int, int, int, int]]  # (first query, end, first key, end) of each
    keys: Taken | None  # K, tokens whose keys and values lie end to end by sequence; None: the T tokens
    q_ends: Tensor  # int32 [sequences + 1], where the queries of each sequence begin, and the last ones end
    k_ends: Tensor  # int32 [sequences + 1], the same of its keys

    @property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a sequence."""
        queries = max(end - first for first, end, _, _ in self.sequences)
        return queries, max(end - first for _, _, first, end in self.sequences)


@on_one_thread
def pack(batch: Rows, rows: list[Row], device: torch.device | str, share: bool = True) -> Packed:
    """Some rows of a batch laid end to end on `device`.

    Args:
        batch (`Rows`): Where the tokens are.
        rows (`list[Row]`): At least one of `batch.rows`.
        device (`torch.device` or `str`): Where the result goes.
        share (`bool`): Compute a prompt once for all of its completions; False: once for each.
    """
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.prompt if share else row, []).append(row)
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    source: list[Tensor] = []
    target: list[Tensor] = []
    number: list[Tensor] = []
    column: list[Tensor] = []
    sequences: list[tuple[int, int, int, int]] = []
    keys: list[Tensor] = []
    total = total_keys = 0

    def sequence(tokens: Tensor, first_position: int, new_keys: Tensor) -> None:
        nonlocal total, total_keys
        ids.append(tokens)
        positions.append(torch.arange(first_position, first_position + len(tokens)))
        keys.append(new_keys)
        sequences.append((total, total + len(tokens), total_keys, total_keys + len(new_keys)))
        total, total_keys = total + len(tokens), total_keys + len(new_keys)

    for members in groups.values():
        prompt = batch.prompts[members[0].prompt]
        first, length = total, len(prompt)
        of_prompt = torch.arange(first, first + length)
        alone = len(members) == 1
        if not alone:
            sequence(prompt, 0, of_prompt)
        for row in members:
            completion = batch.completions[row.number]
            n, scored = len(completion), batch.scored[row.number]
            if alone:
                start = first + length
                sequence(torch.cat((prompt, completion[:-1])), 0, torch.arange(first, start + n - 1))
            else:
                start = total
                if n > 1:
                    sequence(completion[:-1], length, torch.cat((of_prompt, torch.arange(start, start + n - 1))))
            # a token is predicted by the one before it, the first by the prompt's last
            source.append(torch.where(scored == 0, first + length - 1, start + scored - 1))
            target.append(completion[scored])
            number.append(torch.full((len(scored),), row.number))
            column.append(scored)
    shared = total_keys != total
    here, local = torch.cat(number).unique(return_inverse=True)  # on the host: the device need not be waited for
    ends = [torch.tensor([0, *(s[i] for s in sequences)], dtype=torch.int32) for i in (1, 3)]
    pinned = torch.device(device).type == "cuda"  # from other memory a copy would wait for what is queued before it

    def on_device(tensors: list[Tensor]) -> Tensor:
        joined = torch.cat(tensors)
        return (joined.pin_memory() if pinned else joined).to(device, non_blocking=True)

    def taken(tensors: list[Tensor]) -> Taken:
        return Taken(*(on_device([t]) for t in Taken.of(torch.cat(tensors), total)))

    return Packed(
        on_device(ids)[None], on_device(positions)[None], taken(source), on_device(target), on_device(number),
        on_device(column), on_device([here]), on_device([local]), int(torch.cat(column).max()) + 1, sequences,
        taken(keys) if shared else None, on_device(ends[:1]), on_device(ends[1:]),
    )  # fmt: skip
