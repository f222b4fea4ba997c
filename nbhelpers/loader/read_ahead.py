"""Tensors of a checkpoint on the card, in a known order: a thread reads the next bytes while these are quantised.

Reading, copying and packing one after another leave disk and card waiting for each other. Two pinned buffers of PIECE
bytes go round between the thread and the copies, whatever the size of a tensor. READERS fill one together: a core alone
copies out of the page cache more slowly than the card takes it.
"""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import accumulate
from queue import Queue
from types import TracebackType

import torch
from torch import Tensor

from .shards import Entry, Shards, read_into

PIECE = 64 * 2**20  # bytes of a buffer
BUFFERS = READERS = 2
LEAST = 2**20  # bytes for which a second reader is worth it


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

    def take(self, name: str) -> Tensor:
        """The tensor on the device, in the checkpoint's dtype.

        Raises ValueError for a file that ends too early, OSError for one that cannot be read, KeyError for a tensor
        that is not the next one.
        """
        if not self._left or self._left.popleft() != name:
            raise KeyError(f"{name} is taken out of order")
        entry = self._entries[name]
        result, done = torch.empty(entry.nbytes, dtype=torch.uint8, device=self._device), 0
        while done < entry.nbytes:
            piece = self._ready.get()
            if isinstance(piece, Exception):
                raise piece
            buffer, count = piece
            result[done : done + count].copy_(buffer[:count])  # waits until it is there: the buffer is free again
            done += count
            self._free.put(buffer)
        return result.view(entry.dtype).view(entry.shape)

    def _read(self, names: list[str]) -> None:
        with ThreadPoolExecutor(READERS) as pool:
            try:
                for name in names:
                    entry = self._entries[name]
                    for start in range(0, entry.nbytes, PIECE):
                        if (buffer := self._free.get()) is None:
                            return
                        count = min(PIECE, entry.nbytes - start)
                        parts = buffer[:count].split(max(LEAST, -(-count // READERS)))
                        where = accumulate((len(part) for part in parts[:-1]), initial=entry.start + start)
                        for _ in pool.map(partial(_fill, name, entry), parts, where):
                            pass  # an error of a part is raised here
                        self._ready.put((buffer, count))
            except Exception as error:  # raised where the tensor is taken
                self._ready.put(error)


def _buffer(pinned: bool) -> Tensor:
    """PIECE bytes, pinned if the machine lets so many be: copies are slower without."""
    if pinned:
        with suppress(RuntimeError):
            return torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
    return torch.empty(PIECE, dtype=torch.uint8)


def _fill(name: str, entry: Entry, part: Tensor, start: int) -> None:
    """Read a part of a tensor, uint8, from byte `start` of its file."""
    with open(entry.file, "rb", buffering=0) as f:
        f.seek(start)
        read_into(part, f, entry, name)
