"""Layer inputs waiting for the backward: on the card, or in pinned host memory behind the work that goes on.

    store = Checkpoints(device)
    store.put(3, x, host=True)        # forward: the copy runs on a stream of its own
    store.prefetch(3)                 # backward, one layer early: the copy back begins
    x = store.take(3)                 # and here it is waited for, by the card, not by Python

A tensor that is being copied out is held until the copy is done, by at most IN_FLIGHT tensors; the work stream then
waits for the copy, so the allocator may give the memory away at once and no memory is held for longer than that.
"""

from collections import deque

import torch
from torch import Tensor

CHUNK = 64 * 2**20  # torch rounds a pinned allocation up to a power of two: take those, and lay tensors across them
IN_FLIGHT = 2


class Checkpoints:
    """Tensors by key. Without a CUDA device "host" is a copy in ordinary memory: same results, nothing saved."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.chunks: list[Tensor] = []  # pinned; kept and used again by the next micro-batch
        self.used = 0  # bytes of them
        self.on_device: dict[int, Tensor] = {}
        self.offloaded: dict[int, tuple[list[Tensor], torch.Size, torch.dtype]] = {}
        self.coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self.leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def put(self, key: int, x: Tensor, host: bool) -> None:
        """Keep x until `take(key)`. With host=True the caller may drop x; it must not write into it."""
        if not host:
            self.on_device[key] = x
            return
        x = x.contiguous()
        pieces = self._reserve(x.numel() * x.element_size())
        self.offloaded[key] = (pieces, x.shape, x.dtype)
        if self.side is None:
            _copy(x, pieces, out=True)
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            _copy(x, pieces, out=True)
            self.leaving.append((self.side.record_event(), x))
        while len(self.leaving) > IN_FLIGHT:
            self._let_go()

    def flush(self) -> None:
        """The end of the forward: nothing is held for a copy any more."""
        while self.leaving:
            self._let_go()

    def prefetch(self, key: int) -> None:
        """Begin to bring a tensor back; nothing happens for one that is on the card or on its way."""
        if key not in self.offloaded or key in self.coming or self.side is None:
            return
        pieces, shape, dtype = self.offloaded[key]
        x = torch.empty(shape, dtype=dtype, device=self.device)
        self.side.wait_stream(torch.cuda.current_stream(self.device))  # x's memory may still be in use there
        with torch.cuda.stream(self.side):
            _copy(x, pieces, out=False)
            self.coming[key] = (x, self.side.record_event())

    def take(self, key: int) -> Tensor:
        """The tensor on the device; the store forgets it. KeyError for a key that was not put."""
        if key in self.on_device:
            return self.on_device.pop(key)
        pieces, shape, dtype = self.offloaded[key]
        if self.side is None:
            x = torch.empty(shape, dtype=dtype, device=self.device)
            _copy(x, pieces, out=False)
        else:
            self.prefetch(key)
            x, arrived = self.coming.pop(key)
            torch.cuda.current_stream(self.device).wait_event(arrived)
        del self.offloaded[key]
        return x

    def clear(self) -> None:
        """Forget everything, after an error as well; the pinned memory stays for the next time."""
        if self.side is not None and (self.leaving or self.coming):
            self.side.synchronize()
        self.on_device.clear()
        self.offloaded.clear()
        self.coming.clear()
        self.leaving.clear()
        self.used = 0

    def host_bytes(self) -> int:
        return len(self.chunks) * CHUNK

    def _let_go(self) -> None:
        copied, x = self.leaving.popleft()
        torch.cuda.current_stream(self.device).wait_event(copied)
        del x  # only now: what is written there next is queued behind the wait

    def _reserve(self, nbytes: int) -> list[Tensor]:
        """uint8 views of pinned memory, `nbytes` in all."""
        pieces = []
        while nbytes:
            which, start = divmod(self.used, CHUNK)
            if which == len(self.chunks):
                self.chunks.append(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self.side is not None))
            size = min(nbytes, CHUNK - start)
            pieces.append(self.chunks[which][start : start + size])
            self.used, nbytes = self.used + size, nbytes - size
        return pieces


def _copy(x: Tensor, pieces: list[Tensor], out: bool) -> None:
    """Between a contiguous tensor and the pieces of host memory that hold its bytes."""
    start, flat = 0, x.detach().view(-1).view(torch.uint8)
    for piece in pieces:
        part = flat[start : start + len(piece)]
        source, target = (part, piece) if out else (piece, part)
        target.copy_(source, non_blocking=True)
        start += len(piece)
