"""Whether a reward function keeps memory: hours later the machine has none left, and nobody knows whose it was."""

from collections.abc import Iterator
from contextlib import contextmanager

LEAK = 250e6  # bytes that are kept until it is said
FIRST_CALLS = 3  # they load models, fill caches and let the allocator grow


class MemoryWatch:
    """What the process's resident memory grew by within the calls of one function.

    Memory that a call leaves behind and that somebody frees later is no leak, so it counts for no more than the whole
    process has grown since the first calls.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.within = 0  # bytes, over all calls but the first
        self.start = 0  # bytes of the process after the first calls
        self.said = False

    @contextmanager
    def watched(self, name: str) -> Iterator[None]:
        """Around one call; prints a line, once, when the function called `name` keeps more than LEAK bytes."""
        before = resident()
        try:
            yield
        finally:
            after = resident()
            self.calls += 1
            if self.calls <= FIRST_CALLS:
                self.start = after
            else:
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
