"""Tensors of a checkpoint on the card, in a known order: a thread reads the next bytes while these are quantised.

Reading, copying and packing one after another leave disk and card waiting for each other. The bytes of all tensors, one
behind the other, go through two pinned buffers of PIECE bytes, whatever the size of a tensor: a packed base has six a
layer, most of them of some hundred bytes. READERS fill a buffer together: a core alone copies out of the page cache
more slowly than the card takes it.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from queue import Queue
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from .shards import Entry, Shards, read_into

PIECE = 64 * 2**20  # bytes of a buffer
BUFFERS = 2
READERS = 4  # threads: page cache to pinned memory goes at 3 to 10 GB/s a core
LEAST = 2**20  # bytes for which another reader is worth it


class Part(NamedTuple):
    """Bytes `start` to `start + nbytes` of a tensor."""

    name: str
    entry: Entry
    start: int
    nbytes: int


class ReadAhead:
    """`take` each tensor once, in the order of `names`, within a `with`, whose end stops the thread.

    Args:
        shards (`Shards`): The checkpoint.
        names (`list[str]`): Of tensors in it, in the order in which they are taken.
        device (`torch.device`): Where they go.
    """

    def __init__(self, shards: Shards, names: list[str], device: torch.device):
        self.names, self._entries, self._device, self._left = set(names), shards.entries, device, deque(names)
        self._free: Queue[Tensor | None] = Queue()  # None: nobody takes any more
        self._ready: Queue[tuple[Tensor, int] | Exception] = Queue()  # a buffer and how much of it, or what went wrong
        self._buffer: Tensor | None = None  # what is taken from: the first `_count` bytes, of which `_used` were
        self._count = self._used = 0
        self._thread = threading.Thread(target=self._read, args=(names,), daemon=True, name="read ahead")

    def __enter__(self) -> "ReadAhead":
        for _ in range(BUFFERS if self.names else 0):
            self._free.put(_buffer(pinned=self._device.type == "cuda"))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free.put(None)
        self._thread.join()

    def take(self, name: str, device: torch.device | None = None) -> Tensor:
        """The tensor in the checkpoint's dtype, on `device`, or where all go. On a card copies may still be on their
        way: what is launched behind them finds them done.

        Raises ValueError for a file that ends too early, here or in a tensor soon after, OSError for one that cannot be
        read, KeyError for a tensor that is not the next one.
        """
        if not self._left or self._left.popleft() != name:
            raise KeyError(f"{name} is taken out of order")
        entry, done = self._entries[name], 0
        result = torch.empty(entry.nbytes, dtype=torch.uint8, device=device or self._device)
        while done < entry.nbytes:
            if self._used == self._count:
                self._next()
            assert self._buffer is not None  # for the type checker
            count = min(entry.nbytes - done, self._count - self._used)
            result[done : done + count].copy_(self._buffer[self._used : self._used + count], non_blocking=True)
            done, self._used = done + count, self._used + count
        return result.view(entry.dtype).view(entry.shape)

    def _next(self) -> None:
        """Hand the buffer back, once all copies from it are done, and take the next one."""
        if self._buffer is not None:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            self._free.put(self._buffer)
            self._buffer, self._count, self._used = None, 0, 0
        piece = self._ready.get()
        if isinstance(piece, Exception):
            raise piece
        self._buffer, self._count = piece

    def _read(self, names: list[str]) -> None:
        parts = (Part(name, self._entries[name], 0, self._entries[name].nbytes) for name in names)
        with ThreadPoolExecutor(READERS) as pool:
            try:
                for piece in _cut(parts, PIECE):
                    if (buffer := self._free.get()) is None:
                        return
                    count = sum(part.nbytes for part in piece)
                    runs = list(_cut(piece, max(LEAST, -(-count // READERS))))
                    targets = buffer[:count].split([sum(part.nbytes for part in run) for run in runs])
                    for _ in pool.map(_fill, runs, targets):
                        pass  # an error of a run is raised here
                    self._ready.put((buffer, count))
            except Exception as error:  # raised where a tensor is taken
                self._ready.put(error)


def _cut(parts: Iterable[Part], size: int) -> Iterator[list[Part]]:
    """The same bytes in runs of `size` bytes, the last one shorter."""
    run, room = list[Part](), size
    for name, entry, start, count in parts:
        while count:
            taken = min(count, room)
            run.append(Part(name, entry, start, taken))
            start, count, room = start + taken, count - taken, room - taken
            if not room:
                yield run
                run, room = [], size
    if run:
        yield run


def _buffer(pinned: bool) -> Tensor:
    """PIECE bytes, pinned if the machine lets so many be: copies are slower without."""
    if pinned:
        with suppress(RuntimeError):
            return torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
    return torch.empty(PIECE, dtype=torch.uint8)


def _fill(run: list[Part], target: Tensor) -> None:
    """Read a run into `target`, uint8 of its length."""
    at = 0
    for file, parts in groupby(run, lambda part: part.entry.file):
        with open(file, "rb", buffering=0) as f:
            for name, entry, start, count in parts:
                f.seek(entry.start + start)
                read_into(target[at : at + count], f, entry, name)
                at += count
