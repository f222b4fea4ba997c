"""The project's own decoder: generates from the very tensors that are being trained, one CUDA graph per step.

A generation has one stage (scheduler.py: requests take rows, are written and leave) if the keys and values of the texts
at their full length fit the budget. If not:

    first stage      -> a row for each request, in slots as short as the budget makes them; many texts end in it
    next stages      -> those that filled their slot go on in about half as many rows, twice as long, in waves;
                        their keys and values are recomputed as those of a long prompt, never swapped out
    last stage       -> slots of the full length

On a CPU the same code runs eagerly, a step at a time.

The engine's words, the same in all its files:

    Sampling         how to draw, for all completions of one call (base.py)
    Request          one completion that is being written; a prompt's requests are its group (scheduler.py)
    row              a place in the batch: it holds one request at a time, or none
    slot             the row's place in the cache: keys and values of so many tokens, the same number for each row
    text             the prompt of a request and what had been written when its stage began: what is prefilled
    Chunk            the tokens of a few steps, on their way to the host (scheduler.py)
    Completion       what is handed back for a request (base.py)

A request's draws depend on its seed alone, and on a CPU so do its tokens. On a GPU the matrix products of another batch
size, or of a text that is recomputed, round differently, so a near-tie may be decided differently too, once in some
thousand tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from nbhelpers.architecture import GB
from nbhelpers.kernels import ahead
from nbhelpers.memory.kv import MAX_ROWS, SLOT, checked, rows_that_fit, slot_tokens
from nbhelpers.memory.room import Room
from nbhelpers.models import families

from .base import Completion, Engine, Sampling, Writer, check, inference
from .cuda_graphs import BATCHES, CHUNK, ModelRunner, batch_for
from .forward import Decoder
from .kv_cache import KVCache
from .scheduler import Request, Scheduler

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DRY_TOKENS = 272  # of a prompt in a dry pass: some kernels are compiled otherwise for 256 tokens or fewer
STAGE_TOKENS = 256  # a stage that brings the longest text on by less is left out: it recomputes all of them


class GraphEngine(Engine):
    """See the top of this file.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): Of a family in models/families.py, on one device.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Needed for stop strings alone.
        kv_bytes (`int`, *optional*): Bytes that keys and values may take in all; by default most of what is free when a
            generation begins (`Room.for_keys_and_values`). Texts that do not fit at their full length are written in
            stages: see the top of this file.
        max_rows (`int`): Rows that are written at the same time, at most; up to 256.
        budget_gb (`float`, *optional*): What torch may allocate in this process in all, GB (10^9 bytes).
        eager (`bool`): No CUDA graphs: the same steps, launched kernel by kernel. Slow; to compare with.
        kv_bits (`int`): Of a number of keys and values: 16, as wide as the model's own, or 8 (kernels.eight_bits), so
            that about twice as many texts are written at the same time. With 8 the model that writes is not quite the
            one that is trained; `Completion.logprobs` are those of the one that writes.

    Raises ValueError, with the reason, for a model that it cannot decode, and for other kv_bits.
    """

    name = "graph"

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        kv_bytes: int | None = None,
        max_rows: int = MAX_ROWS,
        budget_gb: float | None = None,
        eager: bool = False,
        kv_bits: int = 16,
    ):
        if (why := families.why_not(model, "generation")) is not None:
            raise ValueError(f'the graph engine cannot decode this model: {why}. Use engine="hf"')
        if not 1 <= max_rows <= BATCHES[-1]:
            raise ValueError(f"max_rows={max_rows} is not between 1 and {BATCHES[-1]}")
        self.model, self.tokenizer, self.max_rows, self.kv_bits = model, tokenizer, max_rows, checked(kv_bits)
        self.kv_bytes, self.budget_gb, self.eager = kv_bytes, budget_gb, eager
        self._runner: ModelRunner | None = None
        ahead.begin(model.device)

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """See `Engine.generate`. Raises MemoryError too, if not even one row fits the budget for keys and values."""
        # 1. A request for each completion.
        check(prompts, sampling, self.model.config.max_position_embeddings, self.tokenizer)
        n = sampling.num_generations
        seeds = sampling.seeds(len(prompts) * n)
        requests = [Request(prompts[j // n], seed, Writer(sampling, self.tokenizer)) for j, seed in enumerate(seeds)]
        if not prompts:
            return []
        with inference(self.model):
            # 2. The model as it is now: graphs captured from other tensors, or with another adapter, are dropped.
            runner = self._prepare(Decoder(self.model), sampling)
            cache = runner.cache
            # 3. The bytes for keys and values, and those beside them for the pieces of a long text.
            budget, room = self.kv_bytes, Room(cache.device, self.budget_gb)
            spare: Callable[[], float] = room.for_long_text
            if budget is None:
                budget = room.for_keys_and_values()
            # 4. Stage after stage, until every request has ended; then the cache is freed for training.
            try:
                while going := [request for request in requests if not request.writer.ended]:
                    rows, length = self._stage(going, sampling.max_tokens, budget, cache.token_bytes)
                    scheduler = None
                    try:
                        cache.allocate(rows, length, budget)
                        if not (runner.compiled or runner.decoder.eager):  # a hook is not to see noise
                            runner.compiled = True
                            ahead.compile_for(cache.device, partial(_dry_pass, runner, going, sampling))
                            cache.allocate(rows, length, budget)  # it has left noise there
                        scheduler = Scheduler(runner, going, sampling, spare)
                        scheduler.run()
                    except torch.OutOfMemoryError:  # free memory is in pieces; nothing that was written is lost
                        if scheduler is not None and scheduler.larger:
                            spare = float  # 0 bytes: pieces as small as without room
                        else:
                            budget = min(budget, rows * length * cache.token_bytes) * 7 // 8
            finally:
                cache.free()
        # 5. The completions, in the order of the prompts.
        return [request.writer.completion for request in requests]

    def _prepare(self, decoder: Decoder, sampling: Sampling) -> ModelRunner:
        """The runner of the last generation, or a new one if the model's device or dtype has changed since."""
        place = (decoder.device, decoder.dtype)
        if self._runner is None or (self._runner.cache.device, self._runner.cache.dtype) != place:
            self._runner = ModelRunner(decoder, KVCache(decoder, self.kv_bits), self.max_rows, eager=self.eager)
        self._runner.prepare(decoder, sampling)
        return self._runner

    def _stage(self, requests: list[Request], max_tokens: int, budget: int, token: int) -> tuple[int, int]:
        """(rows, tokens of a slot) of the next stage of these requests, within `budget` bytes at `token` per token."""
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


def _dry_pass(runner: ModelRunner, requests: list[Request], sampling: Sampling) -> None:
    """For kernels/ahead.py: the beginnings of the first prompts, their first tokens, and a step of all rows."""
    rows, length = runner.cache.slots()
    first = sorted(requests, key=lambda request: len(request.prompt), reverse=True)[:rows]
    texts = {id(request.prompt): request.prompt[:DRY_TOKENS] for request in first}
    scheduler = Scheduler(runner, [Request(text, 0, Writer(sampling)) for text in texts.values()], sampling)
    scheduler.decoder = runner.decoder.of_each_form()
    # the step first, as its kernels take longest; with as many positions as the first steps are asked for
    runner.dry_step(rows, min(len(first[0].prompt) + CHUNK, length))
    scheduler.admit()
