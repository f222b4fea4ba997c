"""Which request is in which row of the batch, step by step, until each has ended or has filled its slot.

    waiting requests -> a free row: the prompt is computed once for its group and copied to the group's rows
    rows             -> CHUNK steps at a time; the host reads the chunk before while the next one runs
    finished rows    -> leave; a waiting request takes the row, or the last rows move into the holes: a smaller batch
    turns            -> where long texts wait for rows, some of the first leave early and go on later, so that the last
                        ones do not write almost alone: a step of few rows takes as long as one of many

A Scheduler serves one stage of a generation (graph.py says what a stage is).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from nbhelpers.kernels.decode_step import LEFT, advance
from nbhelpers.memory.kv import prefill_tokens

from .base import Sampling, Writer
from .cuda_graphs import CHUNK, ModelRunner, batch_for, to_host
from .sampler import next_token

STEP_TOKENS = 100  # of a long text, computed in the seconds that a step takes: about as many on a T4 as on an H100


@dataclass(eq=False)
class Request:
    """One completion to be written, from the call of `generate` to its last token, through all stages."""

    prompt: list[int]  # the same list object in its whole group
    seed: int
    writer: Writer
    text: list[int] = field(default_factory=list)  # prompt and completion as they were when the stage began
    goal: int = 0  # tokens of the completion at which the request leaves its row, unless it ends before
    asked: int = 0  # tokens of the completion that the device has been asked for so far, in all stages

    @property
    def left(self) -> int:
        """Tokens that are still to come before it leaves its row."""
        return 0 if self.writer.ended else self.goal - len(self.writer.completion.token_ids)

    def enter(self, length: int, max_tokens: int) -> None:
        """Begin a stage.

        Args:
            length (`int`): Of the stage's slots, in tokens.
            max_tokens (`int`): Of the whole completion.
        """
        written = self.writer.completion.token_ids
        self.text = self.prompt + written if written else self.prompt  # the prompt itself, for the group to share
        self.goal = min(max_tokens, length - len(self.prompt))
        self.asked = len(written)  # some that the last stage asked for were beyond its slot's end


def turns(left: Sequence[int], lengths: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """(step at which it begins, tokens that it writes before it leaves its row to one that waits) of each request.

    McNaughton's rule (1959, "Scheduling with deadlines and loss functions"): the requests are laid one behind another
    on `rows` lines of equal length. What is beyond the end of a line is written at the beginning of the next one, so
    such a request writes that part first, and the rest when its turn comes again. Then all rows end together, in
    sum(left) / rows steps, if every text gets as long as it may.

    A text that comes again is computed again, as a prompt. Where that takes longer than what is won, nobody takes
    turns: each begins at step 0 and writes all it has left.

    Args:
        left (`Sequence[int]`): Tokens that each request may still write, at least 1.
        lengths (`Sequence[int]`): Of their texts, in tokens.
        rows (`int`): That there are.
    """
    line = max(max(left), ceil(sum(left) / rows))
    taken, at, again, ends = [], 0, 0, [0] * rows
    for tokens, length in zip(left, lengths, strict=True):
        ends[ends.index(min(ends))] += tokens  # of the rows, if each request is written at once
        over = at + tokens - line
        taken.append((at, tokens) if over <= 0 else (0, over))
        again += length + over if over > 0 else 0
        at = at + tokens if over < 0 else over
    return taken if (max(ends) - line) * STEP_TOKENS > again else [(0, tokens) for tokens in left]


class Chunk(NamedTuple):
    """The tokens of a few steps on their way to the host, and the request of each row when they were asked for."""

    tokens: Tensor  # int64 [steps, rows]
    logprobs: Tensor  # fp32 [steps, rows]
    requests: list[Request | None]
    ready: torch.cuda.Event | None  # on a GPU: the copy to the host is complete


class Prefilled(NamedTuple):
    """A text that has been computed while requests of its group still wait for a row."""

    text: list[int]
    row: int  # whose slot holds its keys and values
    logits: Tensor  # after its last token, fp32 [1, V]


class Scheduler:
    """One stage of `GraphEngine.generate`: `run` writes each request up to its goal.

    Args:
        runner (`ModelRunner`): Takes the steps; its cache has a slot for each row.
        requests (`list[Request]`): Those that have not ended.
        sampling (`Sampling`): Of the whole generation.
        spare (`Callable[[], float]`): Bytes that may be used now for a larger piece of a long text.
    """

    def __init__(
        self, runner: ModelRunner, requests: list[Request], sampling: Sampling, spare: Callable[[], float] = float
    ):
        self.runner, self.decoder, self.cache = runner, runner.decoder, runner.cache
        rows, self.length = self.cache.slots()
        self.max_tokens = sampling.max_tokens
        for request in requests:
            request.enter(self.length, self.max_tokens)
        # texts of similar length are prefilled together, which needs little padding; a group stays together
        self.waiting = deque(sorted(requests, key=lambda request: len(request.text), reverse=True))
        if all(request.writer.completion.token_ids for request in requests):  # no group has a prompt to share
            left, lengths = [r.left for r in self.waiting], [len(r.text) for r in self.waiting]
            taken = zip(turns(left, lengths, rows), self.waiting, strict=True)
            self.waiting = deque()
            for (_, first), request in sorted(taken, key=lambda one: one[0][0]):
                request.goal += first - request.left
                self.waiting.append(request)
        self.rows: list[Request | None] = [None] * rows
        self.pending: deque[Chunk] = deque()
        # While members of this group wait they are the first in line, so the row that holds their text cannot have
        # been given to another group.
        self.prefilled: Prefilled | None = None
        self.at_once = prefill_tokens(self.decoder.token_bytes)
        self.spare, self.larger = spare, False  # larger: whether a piece of more than `at_once` was tried
        # empty rows are computed too, and the positions of the last stage may be beyond this stage's slots
        runner.state.zero_()

    def run(self) -> None:
        """Until no request is waiting or in a row."""
        runner, begun = self.runner, False
        while self.waiting or any(self.rows):
            self.admit()
            batch = self._batch()
            todo = [request.goal - request.asked for request in filter(None, self.rows)]
            if (steps := min(CHUNK if runner.asynchronous else 1, max(todo, default=0))) > 0:
                if not begun:
                    runner.hand_back()
                    begun = True
                longest = steps - 1 + max(len(r.prompt) + r.asked for r in filter(None, self.rows))
                self._send(*runner.run(batch, steps, min(longest, self.length)), self.rows[:batch])
                for request in filter(None, self.rows):
                    request.asked += steps
            while len(self.pending) > (1 if runner.asynchronous and steps > 0 else 0):
                self._collect()

    # ---- rows ----

    def _batch(self) -> int:
        """How many rows the next step takes; if the batch can shrink, the last rows move into the holes first."""
        rows = self.rows
        used = sum(request is not None for request in rows)
        width = max((i + 1 for i, request in enumerate(rows) if request is not None), default=1)
        target = batch_for(max(used, 1), len(rows))
        if target >= batch_for(width, len(rows)):
            return batch_for(width, len(rows))
        holes = [i for i in range(target) if rows[i] is None]
        movers = [(i, request) for i, request in enumerate(rows[target:width], target) if request is not None]
        for hole, (mover, request) in zip(holes, movers, strict=False):
            rows[hole], rows[mover] = request, None
            self.cache.copy(mover, [hole], len(request.prompt) + request.asked)
        self._copy_state([mover for mover, _ in movers], holes[: len(movers)])
        return target

    def _copy_state(self, sources: list[int], rows: list[int]) -> None:
        if not rows:
            return
        source, row = torch.tensor([sources, rows], device=self.cache.device)
        self.runner.state[:, row] = self.runner.state[:, source]
        self.runner.state[LEFT, source] = 0
        if self.runner.seen is not None:
            self.runner.seen[row] = self.runner.seen[source]

    # ---- prompts ----

    def admit(self) -> None:
        """Waiting requests take the free rows, and get their next token."""
        free = deque(i for i, request in enumerate(self.rows) if request is None)
        while free and self.waiting:
            first = self.waiting[0].text
            begun = self.prefilled if self.prefilled is not None and self.prefilled.text is first else None
            most = 1 if begun is not None else max(1, self.at_once // len(first))  # texts; the first is longest
            texts: list[list[int]] = []
            groups: list[list[int]] = []  # the rows that each text goes to
            while free and self.waiting:
                text = self.waiting[0].text
                if not texts or text is not texts[-1]:
                    if len(texts) == most or len(text) > len(first):  # one that comes again may be longer
                        break
                    texts.append(text)
                    groups.append([])
                groups[-1].append(free.popleft())
                self.rows[groups[-1][-1]] = self.waiting.popleft()
            if begun is not None:
                sources, logits = [begun.row], begun.logits
            else:
                sources = [rows[0] for rows in groups]
                logits = self._prefill(texts, sources)
            for text, rows, source in zip(texts, groups, sources, strict=True):
                self.cache.copy(source, rows, len(text))
            more = self.waiting and self.waiting[0].text is texts[-1]
            self.prefilled = Prefilled(texts[-1], groups[-1][-1], logits[-1:].clone()) if more else None
            self._first_tokens(groups, logits)

    def _prefill(self, texts: list[list[int]], rows: list[int]) -> Tensor:
        """Compute each text into the slot of its row; returns the logits after each, fp32 [texts, V]."""
        device = self.cache.device
        longest = max(map(len, texts))
        tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
        ends = torch.tensor([len(text) - 1 for text in texts], device=device)
        last, each = torch.empty(0, device=device), torch.arange(len(texts), device=device)
        width = self._width(len(texts), longest)
        for start in range(0, longest, width):
            piece = tokens[:, start : start + width]
            positions = torch.arange(start, start + piece.shape[1], device=device)[None]
            hidden = self.decoder.hidden(piece, positions, self.cache.prompt(rows, start))
            picked = hidden[each, (ends - start).clamp(0, piece.shape[1] - 1)]
            last = picked if start == 0 else torch.where(ends[:, None] >= start, picked, last)
        return self.decoder.logits(last)

    def _width(self, texts: int, longest: int) -> int:
        """Tokens of each text that are computed at a time, so that their activations fit."""
        width = max(1, self.at_once // texts)
        if longest > width and texts == 1:
            more = min(longest, prefill_tokens(self.decoder.token_bytes, self.spare()))
            if more > width and self.cache.without_mask(self.decoder.layers, longest, more):
                self.larger, width = True, more
        return ceil(longest / ceil(longest / width))  # pieces of similar size

    def _first_tokens(self, groups: list[list[int]], logits: Tensor) -> None:
        """Draw the next token of the rows of each group from the logits [groups, V] after the group's text."""
        runner, device = self.runner, self.cache.device
        rows = [row for group in groups for row in group]
        requests = list(filter(None, (self.rows[row] for row in rows)))
        row = torch.tensor(rows, device=device)
        state = torch.tensor(
            [(0, len(r.text) - 1, r.seed, r.asked, r.goal - r.asked) for r in requests], device=device
        ).t()
        seen = None
        if runner.seen is not None:
            seen = torch.zeros_like(runner.seen[: len(rows)])
            for i, request in enumerate(requests):
                seen[i, torch.tensor(request.text, device=device)] = True
        of_group = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=device)
        token, logp = next_token(logits[of_group], state[2], state[3], runner.sampling, runner.stops, seen)
        advance(state, token, runner.stops)
        runner.state[:, row] = state
        if runner.seen is not None and seen is not None:
            runner.seen[row] = seen
        for request in requests:
            request.asked += 1
        self._send(to_host(token[None]), to_host(logp[None]), requests)

    # ---- what was written ----

    def _send(self, tokens: Tensor, logprobs: Tensor, requests: Sequence[Request | None]) -> None:
        ready = None
        if self.runner.asynchronous:
            ready = torch.cuda.Event()
            ready.record()
        self.pending.append(Chunk(tokens, logprobs, list(requests), ready))

    def _collect(self) -> None:
        """Read the oldest chunk; requests that ended in it, or have filled their slot, leave their rows."""
        chunk = self.pending.popleft()
        if chunk.ready is not None:
            chunk.ready.synchronize()
        columns = zip(chunk.requests, chunk.tokens.t().tolist(), chunk.logprobs.t().tolist(), strict=True)
        for request, tokens, logprobs in columns:
            if request is None or (left := request.left) <= 0:
                continue
            request.writer.add(tokens[:left], logprobs[:left])  # what was drawn beyond the slot's end is discarded
            if request.left <= 0:
                self.rows[self.rows.index(request)] = None
                # another object: chunks that are still on their way know the old one, which has nothing to come
                again = Request(request.prompt, request.seed, request.writer)
                again.enter(self.length, self.max_tokens)
                if again.left > 0:  # it took a turn
                    self.waiting.append(again)
