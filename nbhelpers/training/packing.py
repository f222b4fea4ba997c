"""Completions of any length laid end to end, a group's prompt once: no work is done on padding.

    prompt 1 | completion 1a | completion 1b | ... | prompt 2 | completion 2a | ...        T tokens, one row

Every layer but attention treats tokens one by one, so a packed row is all it needs. Attention sees sequences: the
prompt by itself, then each completion as queries whose keys are the prompt's and its own. A completion's last token
predicts nothing and is left out; its first is predicted by the prompt's last token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One completion of a padded batch: its number there, which of the distinct prompts it has, and lengths."""

    number: int
    prompt: int
    prompt_length: int
    completion_length: int


@dataclass
class Rows:
    """A padded batch without its padding. prompts: the distinct ones; completions: {row number: ids}, all int64 [n]."""

    rows: list[Row]
    prompts: list[Tensor]
    completions: dict[int, Tensor]


def unpad(prompt_ids, prompt_mask, completion_ids, completion_mask, keep=None) -> Rows:
    """The rows of a batch as TRL has it: prompts padded on the left, completions on the right; masks are 1 on tokens.

    prompt_ids, prompt_mask [B, P]; completion_ids, completion_mask [B, T]; keep bool [B]: rows to take (None: all).
    Rows without a completion token are left out: nothing of them is scored.
    """
    prompt_ids, completion_ids = prompt_ids.cpu(), completion_ids.cpu()
    prompt_mask, completion_mask = prompt_mask.bool().cpu(), completion_mask.bool().cpu()
    lengths = completion_mask.sum(1).tolist()
    keep = [True] * len(lengths) if keep is None else keep.tolist()
    numbers: dict[bytes, int] = {}
    found = Rows([], [], {})
    for number, length in enumerate(lengths):
        if not length or not keep[number]:
            continue
        prompt = prompt_ids[number][prompt_mask[number]]
        which = numbers.setdefault(prompt.numpy().tobytes(), len(numbers))
        if which == len(found.prompts):
            found.prompts.append(prompt)
        found.rows.append(Row(number, which, len(prompt), length))
        found.completions[number] = completion_ids[number][completion_mask[number]]
    return found


@dataclass
class Packed:
    """T tokens of several completions and what attention and the vocabulary have to know about them.

    ids, positions: int64 [1, T]. source, target: int64 [S], the token whose output predicts, and what it should
    predict. number, column: int64 [S], where in the padded [B, T] batch that stands. sequences: (first query, end,
    first key, end) of each. keys: int64 [K], the tokens whose keys and values lie end to end in the order of
    `sequences`, or None where those are the T tokens as they are. q_ends, k_ends: int32 [sequences + 1].
    """

    ids: Tensor
    positions: Tensor
    source: Tensor
    target: Tensor
    number: Tensor
    column: Tensor
    sequences: list[tuple[int, int, int, int]]
    keys: Tensor | None
    q_ends: Tensor
    k_ends: Tensor

    @property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a sequence."""
        return max(b - a for a, b, _, _ in self.sequences), max(d - c for _, _, c, d in self.sequences)


def pack(batch: Rows, rows: list[Row], device, share: bool = True) -> Packed:
    """Some rows of a batch as one packed row on `device`; share=False computes every completion's prompt anew."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.prompt if share else row, []).append(row)
    ids, positions, source, target, number, column, sequences, keys = [], [], [], [], [], [], [], []
    total = total_keys = 0

    def sequence(tokens, first_position, new_keys):
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
            n = len(completion)
            if alone:
                start = first + length
                sequence(torch.cat((prompt, completion[:-1])), 0, torch.arange(first, start + n - 1))
            else:
                start = total
                if n > 1:
                    sequence(completion[:-1], length, torch.cat((of_prompt, torch.arange(start, start + n - 1))))
            source += [torch.tensor([first + length - 1]), torch.arange(start, start + n - 1)]
            target.append(completion)
            number.append(torch.full((n,), row.number))
            column.append(torch.arange(n))
    shared = total_keys != total
    ends = [torch.tensor([0, *(s[i] for s in sequences)], dtype=torch.int32) for i in (1, 3)]

    def there(parts):
        return torch.cat(parts).to(device, non_blocking=True)

    return Packed(
        there(ids)[None], there(positions)[None], there(source), there(target), there(number), there(column),
        sequences, there(keys) if shared else None, ends[0].to(device), ends[1].to(device),
    )  # fmt: skip


class Take(torch.autograd.Function):
    """x[index] along the first dimension; what comes back to a row that was taken several times is summed in fp32."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


def take(x: Tensor, index: Tensor) -> Tensor:
    return Take.apply(x, index)
