"""Whether a reward function keeps memory: hours later the machine has none left, and nobody knows whose it was."""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LEAK = 250e6  # bytes that are kept until it is said
LOOK = 0.1  # of LEAK: once the process has grown by so much, it is looked at whose calls it is
FIRST_CALLS = 3  # they load models, fill caches and let the allocator grow


class MemoryWatch:
    """What the process's resident memory grew by within the calls of one function, from when the process has grown.

    The allocator keeps what is freed, and what one function keeps may lie where another's was: the growth would then be
    the other's. So what is free is given back to the system first. That takes milliseconds, in a growing process alone.

    Memory that a call leaves behind and that somebody frees later is no leak, so it counts for no more than the whole
    process has grown since the first calls.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.within = 0  # bytes, over the calls that were looked at
        self.start = 0  # bytes of the process after the first calls
        self.said = False

    @contextmanager
    def watched(self, name: str) -> Iterator[None]:
        """Around one call; prints a line, once, when the function called `name` keeps more than LEAK bytes."""
        before = resident()
        looked_at = self.calls >= FIRST_CALLS and before - self.start > LOOK * LEAK
        if looked_at:
            give_back()
            before = resident()
        try:
            yield
        finally:
            if looked_at:
                give_back()
            after = resident()
            self.calls += 1
            if self.calls <= FIRST_CALLS:
                self.start = after
            elif looked_at:
                self.within += after - before
            kept = min(self.within, after - self.start)
            if kept > LEAK and not self.said:
                self.said = True
                print(
                    f"reward function {name!r} keeps memory: {kept / 1e6:.0f} MB more after {self.calls} calls. Look "
                    "for a list, a dict or a cache outside of it that grows with each call.",
                    flush=True,
                )


def resident() -> int:
    """Bytes of this process in memory."""
    import psutil  # accelerate needs it too

    return psutil.Process().memory_info().rss


def give_back() -> None:
    """Let the allocator return what is free to the system; only glibc's can be asked for it."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
