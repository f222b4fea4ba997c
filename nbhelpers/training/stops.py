"""A run that is told to stop: by Ctrl-C, by the notebook's stop button, by a machine that is switched off.

SIGTERM and SIGHUP (a job's time is up, the terminal is closed) arrive as KeyboardInterrupt too, and none of them cuts
what is written to the disk in two. Python hands signals to the main thread alone: in any other nothing changes.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C's asks the run to end; its argument is the signal's name."""


def sender(stop: KeyboardInterrupt) -> str:
    """Who asked the run to end: the signal's name, or "you" for Ctrl-C and the stop button."""
    return stop.args[0] if isinstance(stop, Stopped) else "you"


@contextmanager
def signals_stop() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise Stopped; at its end whoever handled them does so again.

    One that is ignored stays ignored, as `nohup` wants it.
    """
    with _handled([getattr(signal, name) for name in NAMES if hasattr(signal, name)], _raise):
        yield


@contextmanager
def held_back(deliver: bool = True) -> Iterator[None]:
    """Within the block signals wait; the first is delivered at its end, or none if not `deliver`: the run ends anyway.

    Who sends three means it: the third gets in. Within another such block this one does nothing.
    """
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) >= 3:
            _raise(number, frame)
        print("What was learned is being written: the run stops as soon as that is complete.", flush=True)

    numbers = [getattr(signal, name) for name in ("SIGINT", *NAMES) if hasattr(signal, name)]
    if any(signal.getsignal(number) in _waits for number in numbers):
        yield
        return
    _waits.append(wait)
    try:
        with _handled(numbers, wait):
            yield
    finally:
        _waits.remove(wait)
    if waiting and deliver:
        _raise(waiting[0], None)


_waits: list[Callable[[int, FrameType | None], None]] = []  # the handlers of held_back that are in place


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(signal.Signals(number).name)


@contextmanager
def _handled(numbers: list[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    # None: not set from Python, and could not be put back
    ours = [number for number, old in before.items() if old not in (signal.SIG_IGN, None)]
    try:
        for number in ours:
            signal.signal(number, handler)
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
