"""One decoding step for B rows, from the tokens written last to the next ones: on a GPU a CUDA graph, captured once.

All that a step reads and writes lies at fixed addresses: the rows' state, the ring of the last tokens and the model's
own tensors (the cache is looked up in a table). A graph is captured the first time that a batch size is needed, in
tenths of a second; an optimizer step writes new numbers to the same addresses and costs nothing. What a graph takes for
granted (tensors, adapter, filters of the sampling) is compared before each generation; if it changed, the graphs go.
"""

from dataclasses import replace
from functools import cache

import torch

from .base import Sampling
from .forward import Decoder
from .kv_cache import KVCache
from .sampler import sample

TOKEN, POSITION, SEED, WRITTEN, LEFT = range(5)  # of a row: the last token, where it stands, its seed, tokens so far,
# and tokens that may still come: 0 when the row has ended, or is empty
CHUNK = 8  # steps between two looks of the host; the next ones are under way while it looks
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # batch sizes that get a graph
GRAPHS = 24  # kept at most; the oldest goes first


def batch_for(rows: int, most: int) -> int:
    """The smallest batch size that takes `rows`, or `most` if that is smaller."""
    return min(next(size for size in BATCHES if size >= rows), most)


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures of all engines: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Steps:
    """The state of up to `rows` rows, and the step that moves the first B of them on by a token."""

    def __init__(self, decoder: Decoder, cache: KVCache, rows: int):
        self.decoder, self.cache = decoder, cache
        device = decoder.device
        self.state = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(CHUNK, rows, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(CHUNK, rows, dtype=torch.float32, device=device)
        self.tick = torch.zeros(1, dtype=torch.int64, device=device)  # the ring's next row
        self.seen: torch.Tensor | None = None  # bool [rows, V], with a repetition penalty
        self.sampling, self.stops = Sampling(), torch.zeros(0, dtype=torch.int64, device=device)
        self.asynchronous = self.captures = device.type == "cuda"  # captures = False: the same steps without graphs
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None
        self._aside = _aside(device) if self.captures else None
        self._addresses = decoder.addresses()

    def prepare(self, decoder: Decoder, sampling: Sampling) -> None:
        """Before a generation: `decoder` is the model as it is now."""
        if decoder.addresses() != self._addresses:
            self._forget()
            self._addresses = decoder.addresses()
        self.decoder = decoder
        # what does not change the step is left out, so that another seed or length finds the same graph
        sampling = replace(sampling, max_tokens=max(1, sampling.min_tokens), num_generations=1, stop_strings=(), seed=0)
        if sampling != self.sampling:
            self.sampling = sampling
            self.stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=self.state.device)
            self._forget()  # they read the old `stops`
        if sampling.repetition_penalty == 1.0:
            self.seen = None
        elif self.seen is None:
            shape = (self.state.shape[1], decoder.vocabulary)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.state.device)

    def _forget(self) -> None:
        """Let go of all graphs, and of their pool: torch takes no capture into a pool that no graph holds any more."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None

    def run(self, batch: int, steps: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`steps` (up to CHUNK) steps of the first `batch` rows, none of which reaches position `longest` in them.

        Returns the tokens int64 [steps, batch] and their log-probabilities: on a GPU they are on the way to the host
        when this returns, and there once an event recorded now has passed.
        """
        self.tick.zero_()
        if self.captures and batch not in self._graphs:
            self._graphs[batch] = self._capture(batch)
            if len(self._graphs) > GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            self.tick.zero_()  # a capture makes a step of its own, which needs a place in the ring as well
        for _ in range(steps):
            if self.captures:
                self._graphs[batch].replay()
            else:
                self._step(batch, longest)
        return to_host(self.tokens[:steps, :batch]), to_host(self.logprobs[:steps, :batch])

    def _step(self, batch: int, longest: int) -> None:
        token, position, seed, written, _ = self.state[:, :batch]
        attend = self.cache.step(position, longest)
        hidden = self.decoder.hidden(token[:, None], position[:, None], attend)[:, 0]
        seen = None if self.seen is None else self.seen[:batch]
        new, logp = sample(self.decoder.logits(hidden), seed, written, self.sampling, self.stops, seen)
        self.tokens[:, :batch].index_copy_(0, self.tick, new[None])
        self.logprobs[:, :batch].index_copy_(0, self.tick, logp[None])
        self.tick += 1
        self.advance(self.state[:, :batch], new)

    def advance(self, state: torch.Tensor, new: torch.Tensor) -> None:
        """The rows' state [5, n] after their new tokens [n]; a row that has ended stays as it is, and so does the cache
        behind it: its last token is fed to the same position again."""
        token, position, _, written, left = state
        going = left > 0
        token.copy_(torch.where(going, new, token))
        position += going
        written += going
        stopped = (new[:, None] == self.stops).any(-1)
        left.copy_(torch.where(stopped, 0, (left - 1).clamp_(min=0)))

    def _capture(self, batch: int) -> torch.cuda.CUDAGraph:
        """Record the step without running it; once for real before, as compilers and libraries allocate then."""
        before, seen = self.state.clone(), None if self.seen is None else self.seen.clone()
        self.state[LEFT] = 0  # no row moves in the rehearsal
        graph, here, aside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), self._aside
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self._step(batch, 0)
            self.state.copy_(before)
            if seen is not None:
                self.seen.copy_(seen)
            torch.cuda.synchronize()
            # not torch.cuda.graph(...): that collects garbage and empties the allocator's cache, for a second or more
            # thread_local: a data loader's thread may go on pinning memory meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._step(batch, 0)
            finally:
                graph.capture_end()
        here.wait_stream(aside)
        return graph


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory that is on the way while the GPU works on; on a CPU a plain copy."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
