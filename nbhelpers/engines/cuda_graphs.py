"""One decoding step for B rows, from the tokens written last to the next ones: on a GPU a CUDA graph, captured once.

All that a step reads and writes is at fixed addresses: the rows' state, the buffer of the last tokens and the model's
own tensors (the cache's address is looked up in a table). A graph is captured the first time that a batch size is
needed, in tenths of a second; an optimizer step writes new numbers to the same addresses and costs nothing. A graph
keeps the number of parts that attention is cut into. Long texts take more of them where rows are few: they get a graph
of their own when they come to that length. What else a graph depends on (tensors, adapter, filters of the sampling) is
compared before each generation; if it has changed, all graphs are dropped.
"""

from dataclasses import replace
from functools import cache

import torch

from nbhelpers import kernels
from nbhelpers.kernels import ahead, decode_step
from nbhelpers.kernels.decode_step import LEFT, POSITION, SEED, WRITTEN, Rows
from nbhelpers.memory.room import BESIDE_BYTES, idle_bytes

from .base import Sampling
from .forward import Decoder
from .kv_cache import KVCache
from .sampler import next_token

CHUNK = 8  # steps between two reads by the host; the next ones run while it reads
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # batch sizes that get a graph
GRAPHS = 32  # kept at most; the oldest is dropped first


def batch_for(rows: int, most: int) -> int:
    """The smallest batch size that holds `rows` rows, or `most` if that is smaller."""
    return min(next(size for size in BATCHES if size >= rows), most)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures of all engines: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class ModelRunner:
    """The state of up to `rows` rows, and the step that moves the first B of them on by a token.

    Args:
        decoder (`Decoder`): The model when the runner is made; `prepare` takes it as it is later.
        cache (`KVCache`): Of the same model.
        rows (`int`): The largest batch.
        eager (`bool`): On a GPU, no CUDA graphs.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, rows: int, *, eager: bool = False):
        self.decoder, self.cache = decoder, cache
        device = decoder.device
        self.state = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(CHUNK, rows, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(CHUNK, rows, dtype=torch.float32, device=device)
        self.tick = torch.zeros(1, dtype=torch.int64, device=device)  # steps that have begun since `run`
        self.seen: torch.Tensor | None = None  # bool [rows, V], with a repetition penalty
        self.sampling, self.stops = Sampling(), torch.zeros(0, dtype=torch.int64, device=device)
        self.asynchronous = device.type == "cuda"
        self.captures = self.asynchronous and not eager
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # by batch size and attention's parts
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None
        self._addresses = decoder.addresses()
        self.compiled = not ahead.possible(device)  # or the engine's dry pass has been

    def prepare(self, decoder: Decoder, sampling: Sampling) -> None:
        """Before a generation.

        Args:
            decoder (`Decoder`): The model as it is now.
            sampling (`Sampling`): Of this generation.
        """
        if (addresses := decoder.addresses()) != self._addresses:
            self._drop_graphs()
            self._addresses = addresses
        else:
            decoder.adapters = self.decoder.adapters  # the table of the same addresses
        self.decoder, self.cache.rotary = decoder, decoder.rotary
        # what is not part of a step is left out, so that another seed or length finds the same graph
        sampling = replace(sampling, max_tokens=max(1, sampling.min_tokens), num_generations=1, stop_strings=(), seed=0)
        if sampling != self.sampling:
            self.sampling = sampling
            self.stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=self.state.device)
            self._drop_graphs()  # they read the old `stops`
        if sampling.repetition_penalty == 1.0:
            self.seen = None
        elif self.seen is None:
            shape = (self.state.shape[1], decoder.vocabulary)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.state.device)

    def _drop_graphs(self) -> None:
        """And their pool with them: torch captures nothing into a pool that no graph holds any more."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None

    def run(self, batch: int, steps: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a few steps.

        Args:
            batch (`int`): The first so many rows are computed; with graphs, one of BATCHES or the number of all rows.
            steps (`int`): At most CHUNK.
            longest (`int`): No row reaches this position in them.

        Returns the tokens int64 [steps, batch] and their log-probabilities fp32 [steps, batch], on the host. On a GPU
        their copies are only enqueued when this returns: record an event and wait for it before reading them.
        """
        self.tick.zero_()
        captures = self.captures and not self.decoder.eager
        heads = (self.decoder.heads, self.cache.heads)
        graph = (batch, decode_step.attention_splits(self.state, batch, *heads, longest))
        if captures and graph not in self._graphs:
            try:
                self._graphs[graph] = self._capture(batch, longest)
            except BaseException:  # torch.OutOfMemoryError: the caller tries again with less
                self._drop_graphs()
                raise
            if len(self._graphs) > GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            self.tick.zero_()  # the step before a capture needs a row of the buffers as well
        for _ in range(steps):
            if captures:
                self._graphs[graph].replay()
            else:
                self._step(batch, longest)
        return to_host(self.tokens[:steps, :batch]), to_host(self.logprobs[:steps, :batch])

    def hand_back(self) -> None:
        """Before steps are taken: what prompts took of the card and steps do not need goes back to the driver. With a
        training step's memory, which it would have to allocate again, torch keeps it."""
        device = self.state.device
        if device.type == "cuda" and idle_bytes(device) <= BESIDE_BYTES:
            kernels.free_scratch(device)
            torch.cuda.empty_cache()

    def _step(self, batch: int, longest: int) -> None:
        state, decoder, sampling = self.state[:, :batch], self.decoder, self.sampling
        rows = Rows(state, self.stops, self.tick, self.tokens[:, :batch], self.logprobs[:, :batch])
        x, tables = self.cache.embed(rows, decoder.embedding)
        if decoder.watched_rotary:
            tables = decoder.rotary(x, state[POSITION, :, None])
        logits = decoder.logits(decoder.walk(x, tables, self.cache.step(state[POSITION], longest))[:, 0])
        if sampling.plain and sampling.temperature > 0.0:
            decode_step.append_drawn(rows, logits, sampling.temperature)
            return
        seen = None if self.seen is None else self.seen[:batch]
        decode_step.append(rows, *next_token(logits, state[SEED], state[WRITTEN], sampling, self.stops, seen))

    def dry_step(self, batch: int, longest: int) -> None:
        """A `run`'s launches for kernels/ahead.py, of one layer of each form. No row may have tokens to come."""
        self.tick.zero_()
        whole, self.decoder = self.decoder, self.decoder.of_each_form()
        try:
            self._step(batch, longest)
        finally:
            self.decoder = whole

    def _capture(self, batch: int, longest: int) -> torch.cuda.CUDAGraph:
        """Record a step without running it. One runs for real first, in which compilers and libraries allocate."""
        state, seen = self.state.clone(), None if self.seen is None else self.seen.clone()
        self.state[LEFT] = 0  # so that no row moves on
        ahead.compile_for(self.state.device, lambda: self.dry_step(batch, longest))
        self.tick.zero_()
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(self.state.device)
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._step(batch, longest)
            self.state.copy_(state)
            if self.seen is not None and seen is not None:
                self.seen.copy_(seen)
            torch.cuda.synchronize()
            self.hand_back()  # what the step took on this stream: the graph takes as much again in its own pool
            # not torch.cuda.graph(...): that collects garbage and empties the allocator's cache, which takes a second
            # or more; thread_local: a data loader's thread may go on pinning memory during the capture
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                if self.decoder.logits_are_largest:
                    # as many bytes, free at once: what layers make finds its place in them. Where that came first, the
                    # logits needed a block beside it
                    torch.empty(batch, self.decoder.vocabulary, dtype=torch.float32, device=state.device)
                self._step(batch, longest)
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return graph


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned host memory, made asynchronously; on a CPU a plain copy."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
