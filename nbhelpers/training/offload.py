"""Layer inputs waiting for the backward: on the GPU, or in pinned host memory, copied while the GPU computes.

    store = Checkpoints(device)
    store.put(3, x, host=True)        # forward: the copy runs on a stream of its own
    store.prefetch(3)                 # backward, one layer early: the copy back begins
    x = store.take(3)                 # the GPU waits for it, Python does not

At most IN_FLIGHT tensors are held while they are copied to the host. For an older one the compute stream waits for the
copy, after which the allocator may reuse its memory at once.
"""

from collections import deque

import torch
from torch import Tensor

CHUNK = 64 * 2**20  # bytes; torch rounds a pinned allocation up to a power of two, so tensors are laid across those
IN_FLIGHT = 2


class Checkpoints:
    """Tensors by key, on the device or on the host. On a CPU "host" is a copy in ordinary memory: the same results."""

    def __init__(self, device: torch.device):
        self.device = device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.chunks: list[Tensor] = []  # pinned; reused by the next micro-batch
        self.used = 0  # bytes of them
        self.on_device: dict[int, Tensor] = {}
        self.offloaded: dict[int, tuple[list[Tensor], torch.Size, torch.dtype]] = {}
        self.coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self.leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def put(self, key: int, x: Tensor, host: bool) -> None:
        """Keep x until `take(key)`.

        Args:
            key (`int`): Its name, e.g. the layer's number.
            x (`Tensor`): Any shape and dtype. With `host` the caller may drop it, and must not write into it.
            host (`bool`): Copy it to the host, and free it here.
        """
        if not host:
            self.on_device[key] = x
            return
        x = x.contiguous()
        pieces = self._reserve(x.numel() * x.element_size())
        self.offloaded[key] = (pieces, x.shape, x.dtype)
        if self.copies is None:
            _copy(x, pieces, out=True)
            return
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            _copy(x, pieces, out=True)
            self.leaving.append((self.copies.record_event(), x))
        while len(self.leaving) > IN_FLIGHT:
            self._let_go()

    def flush(self) -> None:
        """The end of the forward: let go of all tensors that are being copied."""
        while self.leaving:
            self._let_go()

    def prefetch(self, key: int) -> None:
        """Begin to copy a tensor back; does nothing for one that is on the device or being copied."""
        if key not in self.offloaded or key in self.coming or self.copies is None:
            return
        pieces, shape, dtype = self.offloaded[key]
        x = torch.empty(shape, dtype=dtype, device=self.device)
        self.copies.wait_stream(torch.cuda.current_stream(self.device))  # x's memory may still be in use there
        with torch.cuda.stream(self.copies):
            _copy(x, pieces, out=False)
            self.coming[key] = (x, self.copies.record_event())

    def take(self, key: int) -> Tensor:
        """The tensor on the device; the store forgets it. KeyError for a key that was not put."""
        if key in self.on_device:
            return self.on_device.pop(key)
        pieces, shape, dtype = self.offloaded[key]
        if self.copies is None:
            x = torch.empty(shape, dtype=dtype, device=self.device)
            _copy(x, pieces, out=False)
        else:
            self.prefetch(key)
            x, arrived = self.coming.pop(key)
            torch.cuda.current_stream(self.device).wait_event(arrived)
        del self.offloaded[key]
        return x

    def clear(self) -> None:
        """Forget everything, after an error as well; the pinned memory is kept for the next micro-batch."""
        if self.copies is not None and (self.leaving or self.coming):
            self.copies.synchronize()
        self.on_device.clear()
        self.offloaded.clear()
        self.coming.clear()
        self.leaving.clear()
        self.used = 0

    def host_bytes(self) -> int:
        """Bytes of host memory that are held, used or not."""
        return len(self.chunks) * CHUNK

    def _let_go(self) -> None:
        copied, x = self.leaving.popleft()
        torch.cuda.current_stream(self.device).wait_event(copied)
        del x  # only now: the next use of its memory is queued behind the wait

    def _reserve(self, nbytes: int) -> list[Tensor]:
        """uint8 views of pinned memory, `nbytes` in all."""
        pieces = []
        while nbytes:
            index, start = divmod(self.used, CHUNK)
            if index == len(self.chunks):
                self.chunks.append(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self.copies is not None))
            size = min(nbytes, CHUNK - start)
            pieces.append(self.chunks[index][start : start + size])
            self.used, nbytes = self.used + size, nbytes - size
        return pieces


def _copy(x: Tensor, pieces: list[Tensor], out: bool) -> None:
    """Between a contiguous tensor and the pieces of host memory that hold its bytes."""
    start, flat = 0, x.detach().view(-1).view(torch.uint8)
    for piece in pieces:
        span = flat[start : start + len(piece)]
        source, target = (span, piece) if out else (piece, span)
        target.copy_(source, non_blocking=True)
        start += len(piece)
