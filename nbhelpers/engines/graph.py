"""The project's own decoder: generates from the very tensors that are being trained, one CUDA graph per step.

    waiting requests -> a free row: the prompt is computed once for its group and copied to the group's rows
    rows             -> CHUNK steps at a time; the host reads what the chunk before wrote while the next one runs
    finished rows    -> leave; a waiting request takes the row, or the last rows move into the holes: a smaller batch

That is one stage, and the only one if keys and values of the texts at their full length fit the budget. If not:

    first stage      -> a row for each request, in slots as short as the budget makes them; many texts end in there
    next stages      -> those that reached the slot's end go on in about half as many rows, twice as long, in waves;
                        their keys and values are computed again as a long prompt's, never swapped out
    last stage       -> slots of the full length

On a CPU the same code runs eagerly, a step at a time.

A request's draws depend on its seed alone, and on a CPU so do its tokens. On a GPU the matrix products of another batch
size, or of a text that is computed again, round otherwise, so a near-tie may fall out otherwise too, once in some
thousand tokens.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from nbhelpers.architecture import GB
from nbhelpers.memory.kv import MAX_ROWS, SLOT, prefill_tokens, rows_that_fit, slot_tokens
from nbhelpers.memory.room import Room
from nbhelpers.models import families

from .base import Completion, Engine, Sampling, Writer, check, inference
from .cuda_graphs import BATCHES, CHUNK, LEFT, Steps, batch_for, to_host
from .forward import Decoder
from .kv_cache import KVCache
from .sampler import sample

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGE_TOKENS = 256  # a stage that would bring the longest text less far on is not worth computing all of them again


@dataclass(eq=False)
class Request:
    """One completion to be written."""

    prompt: list[int]  # the same list object in its whole group
    seed: int
    writer: Writer
    text: list[int] = field(default_factory=list)  # what it enters a stage with: prompt and what was written by then
    goal: int = 0  # tokens that it has written when it leaves the stage, unless it ends before
    asked: int = 0  # tokens that the device has been asked for so far, in all stages

    @property
    def left(self) -> int:
        """Tokens that are still to come in this stage."""
        return 0 if self.writer.ended else self.goal - len(self.writer.completion.token_ids)

    def enter(self, length: int, max_tokens: int) -> None:
        """Before a stage with slots of `length` tokens."""
        written = self.writer.completion.token_ids
        self.text = self.prompt + written if written else self.prompt  # the prompt itself, for the group to share
        self.goal = min(max_tokens, length - len(self.prompt))
        self.asked = len(written)  # some that the last stage asked for were beyond its slot's end


@dataclass
class Chunk:
    """Tokens [steps, rows] that are on the way to the host, and the request of each row when they were asked for."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    requests: list[Request | None]
    ready: torch.cuda.Event | None


class GraphEngine(Engine):
    """See the top of this file.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): Qwen2, Llama, Mistral or Phi3, on one device.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Needed for stop strings alone.
        kv_bytes (`int`, *optional*): Bytes that keys and values may take in all; by default most of what is free when a
            generation begins (`Room.for_keys_and_values`). Texts that do not fit at their full length are written in
            stages: see the top of this file.
        max_rows (`int`): Rows that are written at the same time, at most; up to 256.
        budget_gb (`float`, *optional*): What torch may allocate in this process in all, GB (10^9 bytes).

    Raises ValueError, with the reason, for a model that it cannot decode.
    """

    name = "graph"

    def __init__(
        self, model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase | None" = None, *,
        kv_bytes: int | None = None, max_rows: int = MAX_ROWS, budget_gb: float | None = None,
    ):  # fmt: skip
        if (why := families.why_not(model, "generation")) is not None:
            raise ValueError(f'the graph engine cannot decode this model: {why}. Use engine="hf"')
        if not 1 <= max_rows <= BATCHES[-1]:
            raise ValueError(f"max_rows={max_rows} is not between 1 and {BATCHES[-1]}")
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.kv_bytes, self.budget_gb = kv_bytes, budget_gb
        self._steps: Steps | None = None

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """See `Engine.generate`. Raises MemoryError too, if not even one row fits the budget for keys and values."""
        check(prompts, sampling, self.model.config.max_position_embeddings, self.tokenizer)
        n = sampling.num_generations
        seeds = sampling.seeds(len(prompts) * n)
        requests = [Request(prompts[j // n], seed, Writer(sampling, self.tokenizer)) for j, seed in enumerate(seeds)]
        if not prompts:
            return []
        with inference(self.model):
            decoder = Decoder(self.model)
            place = (decoder.device, decoder.dtype)
            if self._steps is None or (self._steps.cache.device, self._steps.cache.dtype) != place:
                self._steps = Steps(decoder, KVCache(decoder), self.max_rows)
            self._steps.prepare(decoder, sampling)
            cache = self._steps.cache
            budget = self.kv_bytes
            if budget is None:
                budget = Room(cache.device, self.budget_gb).for_keys_and_values()
            try:
                while going := [request for request in requests if not request.writer.ended]:
                    rows, length = self._stage(going, sampling.max_tokens, budget, cache.token_bytes)
                    try:
                        cache.allocate(rows, length, budget)
                        _Generation(self._steps, going, sampling).run()
                    except torch.OutOfMemoryError:  # free memory is in pieces; nothing that was written is lost
                        budget = min(budget, rows * length * cache.token_bytes) * 7 // 8
            finally:
                cache.free()
        return [request.writer.completion for request in requests]

    def _stage(self, requests: list[Request], max_tokens: int, budget: int, token: int) -> tuple[int, int]:
        """(rows, tokens of a slot) of the next stage of these requests, within `budget` bytes, `token` bytes each."""
        full = slot_tokens(max(len(request.prompt) for request in requests) + max_tokens)
        affordable = rows_that_fit(budget, full, token, self.max_rows)
        if affordable < 1:  # at the first stage, if ever: no later one has a longer text
            raise MemoryError(
                f"one text of {full} tokens needs {full * token / GB:.2f} GB for keys and values, and "
                f"the budget is {budget / GB:.2f} GB: lower max_completion_length, or give kv_bytes more"
            )
        longest = max(len(request.prompt) + len(request.writer.completion.token_ids) for request in requests)
        rows = batch_for(min(len(requests), self.max_rows), self.max_rows)
        while min(rows, len(requests)) > affordable:  # else they can be written to their end
            if (length := budget // (rows * token) // SLOT * SLOT) >= longest + STAGE_TOKENS:
                return rows, length
            rows = max(size for size in BATCHES if size <= max(1, rows // 2))
        return batch_for(min(len(requests), affordable), affordable), full


class _Generation:
    """One stage of `generate`: which request is in which row, until each has ended or is at the slot's end."""

    def __init__(self, steps: Steps, requests: list[Request], sampling: Sampling):
        self.steps, self.decoder, self.cache, self.sampling = steps, steps.decoder, steps.cache, sampling
        rows, self.length = self.cache.slots()
        for request in requests:
            request.enter(self.length, sampling.max_tokens)
        # texts of like length go together, so that little is padded; a group stays together
        self.waiting = deque(sorted(requests, key=lambda request: len(request.text), reverse=True))
        self.rows: list[Request | None] = [None] * rows
        self.pending: deque[Chunk] = deque()
        # Of the group that has begun to enter: its text, where that lies, and the logits after it. While members wait
        # they are the first in line, so the row that the last of them took cannot have been given to another group.
        self.group: tuple[list[int], int, torch.Tensor] | None = None  # text, row, fp32 [V]
        self.at_once = prefill_tokens(self.decoder.token_bytes)
        # empty rows are computed along, and the positions of the last stage may be beyond this stage's slots
        steps.state.zero_()

    def run(self) -> None:
        steps = self.steps
        while self.waiting or any(self.rows):
            self._admit()
            batch = self._batch()
            todo = [request.goal - request.asked for request in filter(None, self.rows)]
            if (most := min(CHUNK if steps.asynchronous else 1, max(todo, default=0))) > 0:
                longest = most - 1 + max(len(r.prompt) + r.asked for r in filter(None, self.rows))
                self._send(*steps.run(batch, most, min(longest, self.length)), self.rows[:batch])
                for request in filter(None, self.rows):
                    request.asked += most
            while len(self.pending) > (1 if steps.asynchronous and most > 0 else 0):
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
        device = self.cache.device
        source, row = torch.tensor([sources, rows], device=device)
        self.steps.state[:, row] = self.steps.state[:, source]
        self.steps.state[LEFT, source] = 0
        if self.steps.seen is not None:
            self.steps.seen[row] = self.steps.seen[source]

    # ---- prompts ----

    def _admit(self) -> None:
        """Waiting requests take the free rows, and get their next token."""
        free = deque(i for i, request in enumerate(self.rows) if request is None)
        while free and self.waiting:
            first = self.waiting[0].text
            begun = self.group if self.group is not None and self.group[0] is first else None
            most = 1 if begun is not None else max(1, self.at_once // len(first))  # texts; the first is longest
            texts: list[list[int]] = []
            places: list[list[int]] = []  # the rows that each text goes to
            while free and self.waiting:
                if not texts or self.waiting[0].text is not texts[-1]:
                    if len(texts) == most:
                        break
                    texts.append(self.waiting[0].text)
                    places.append([])
                places[-1].append(free.popleft())
                self.rows[places[-1][-1]] = self.waiting.popleft()
            if begun is not None:
                sources, logits = [begun[1]], begun[2]
            else:
                sources = [rows[0] for rows in places]
                logits = self._prompts(texts, sources)
            for text, rows, source in zip(texts, places, sources, strict=True):
                self.cache.copy(source, rows, len(text))
            more = self.waiting and self.waiting[0].text is texts[-1]
            self.group = (texts[-1], places[-1][-1], logits[-1:].clone()) if more else None
            self._begin(places, logits)

    def _prompts(self, texts: list[list[int]], rows: list[int]) -> torch.Tensor:
        """Compute texts into the cache, row by row; returns the logits after each, fp32 [P, V]."""
        device = self.cache.device
        longest = max(map(len, texts))
        tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
        ends = torch.tensor([len(text) - 1 for text in texts], device=device)
        index = torch.tensor(rows, device=device)
        last, each = torch.empty(0, device=device), torch.arange(len(texts), device=device)
        for start in range(0, longest, chunk := max(1, self.at_once // len(texts))):
            part = tokens[:, start : start + chunk]
            positions = torch.arange(start, start + part.shape[1], device=device)[None]
            hidden = self.decoder.hidden(part, positions, self.cache.prompt(index, start))
            picked = hidden[each, (ends - start).clamp(0, part.shape[1] - 1)]
            last = picked if start == 0 else torch.where(ends[:, None] >= start, picked, last)
        return self.decoder.logits(last)

    def _begin(self, places: list[list[int]], logits: torch.Tensor) -> None:
        """The next token of the rows in `places`, drawn from the logits [P, V] after the text of each place."""
        steps, device = self.steps, self.cache.device
        rows = [row for place in places for row in place]
        requests = list(filter(None, (self.rows[row] for row in rows)))
        row = torch.tensor(rows, device=device)
        state = torch.tensor(
            [(0, len(r.text) - 1, r.seed, r.asked, r.goal - r.asked) for r in requests], device=device
        ).t()
        seen = None
        if steps.seen is not None:
            seen = torch.zeros_like(steps.seen[: len(rows)])
            for i, request in enumerate(requests):
                seen[i, torch.tensor(request.text, device=device)] = True
        of_place = torch.tensor([i for i, place in enumerate(places) for _ in place], device=device)
        token, logp = sample(logits[of_place], state[2], state[3], steps.sampling, steps.stops, seen)
        steps.advance(state, token)
        steps.state[:, row] = state
        if steps.seen is not None and seen is not None:
            steps.seen[row] = seen
        for request in requests:
            request.asked += 1
        self._send(to_host(token[None]), to_host(logp[None]), requests)

    # ---- what was written ----

    def _send(self, tokens: torch.Tensor, logprobs: torch.Tensor, requests: Sequence[Request | None]) -> None:
        ready = None
        if self.steps.asynchronous:
            ready = torch.cuda.Event()
            ready.record()
        self.pending.append(Chunk(tokens, logprobs, list(requests), ready))

    def _collect(self) -> None:
        """Read the oldest chunk; requests that ended in it, or came to the slot's end, leave their rows."""
        chunk = self.pending.popleft()
        if chunk.ready is not None:
            chunk.ready.synchronize()
        columns = zip(chunk.requests, chunk.tokens.t().tolist(), chunk.logprobs.t().tolist(), strict=True)
        for request, tokens, logprobs in columns:
            if request is None or (left := request.left) <= 0:
                continue
            request.writer.add(tokens[:left], logprobs[:left])  # beyond its slot's end a row's tokens are discarded
            if request.left <= 0:
                self.rows[self.rows.index(request)] = None
