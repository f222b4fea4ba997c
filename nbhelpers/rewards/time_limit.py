"""A limit for the time that a function may take, whatever it does: computes for ever, or waits for ever.

A thread cannot end another one's work, and while a regular expression backtracks no other thread runs at all. So a
timer of the system counts the processor's time, and a thread the time that goes by while nothing is computed. Both send
one signal, whose handler raises: SIGVTALRM, because SIGALRM is what rewards and math-verify use themselves. A call into
C that never looks at signals is not interrupted. Windows and threads other than the main one have no such signal: there
it is only said that the function hangs.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NOTICE = 30.0  # seconds after which a line says who is at work


class Late(BaseException):
    """The time is up. No Exception: a reward that catches those for each row would only go on with the next row."""


@contextmanager
def limited(seconds: float, who: str) -> Iterator[None]:
    """Raise Late inside the block once it has taken `seconds`, and again every second while it goes on all the same.

    Args:
        seconds (`float`): The limit.
        who (`str`): For the line that is printed after 30 s, or half of the limit.
    """
    end = time.monotonic() + seconds
    over = threading.Event()
    cuts = hasattr(signal, "SIGVTALRM") and threading.current_thread() is threading.main_thread()
    main = threading.get_ident()

    def watch() -> None:
        notice = min(NOTICE, seconds / 2)
        if over.wait(notice):
            return
        then = f"it is cut off after {seconds:g} s" if cuts else "it cannot be cut off here: interrupt the run"
        print(f"{who} has been at work on one batch for {notice:g} s; {then}.", flush=True)
        while cuts and not over.wait(max(end - time.monotonic(), 1.0)):
            signal.pthread_kill(main, signal.SIGVTALRM)

    def late(number: int, frame: FrameType | None) -> None:
        if not over.is_set() and time.monotonic() >= end:
            raise Late

    watcher = threading.Thread(target=watch, daemon=True, name="time limit")
    before = signal.signal(signal.SIGVTALRM, late) if cuts else None
    try:
        if cuts:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
        watcher.start()
        yield
    finally:
        over.set()
        if cuts:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            watcher.join()  # it must not send a signal for which nobody is there
            signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
