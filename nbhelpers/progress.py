"""What a person sees while something takes long: one line with a clock, and one sentence where Ctrl-C ends it."""

import contextvars
import html
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from nbhelpers.html import COLORS, bar, framed

SILENT = 2.0  # seconds: what is done by then needs no line


def in_notebook() -> bool:
    """Whether outputs go to a notebook (Jupyter, Colab, Kaggle, a headless runner) and not to a terminal."""
    shell = _shell()
    return shell is not None and "IPKernelApp" in shell.config


def this_cell() -> str | None:
    """What tells one running of a cell from another; None outside a notebook."""
    return _shell().get_parent().get("header", {}).get("msg_id") if in_notebook() else None


def duration(seconds: float) -> str:
    """ "0:07", "12:30" or "2:05:00"."""
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{int(seconds) % 60:02}" if hours else f"{minutes}:{int(seconds) % 60:02}"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or the stop button ended a call. The message, all that is shown, says which and what is left of it."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@contextmanager
def interruptible(doing: str, left: str) -> Iterator[None]:
    """Around what takes long, or a decorator of it: a KeyboardInterrupt becomes an Interrupted, which is still one.

    Args:
        doing (`str`): What was done, as in "the model was loaded".
        left (`str`): What is left of it, and what to do.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if type(stop) is not KeyboardInterrupt:  # said already; or another signal, which the trainer has to know
            raise
        if _shell() is None and not isinstance(sys.excepthook, _Sentence):
            sys.excepthook = _Sentence(sys.excepthook)  # what a notebook does with _render_traceback_
        raise Interrupted(f"Stopped by you while {doing}: {left}.") from None


class _Sentence:
    """An excepthook that shows an Interrupted without its traceback, and everything else as before."""

    def __init__(self, before: Callable[..., Any]):
        self.before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, Interrupted):
            print(f"\n{error}", file=sys.stderr)
        else:
            self.before(kind, error, trace)


class Ticker:
    """Calls `tick` again and again from a thread of its own, until `stop`. In a notebook the end of the cell stops it
    too: what ticks may be a training that ended in an error.

    Args:
        tick (`Callable[[], object]`): What to call.
        seconds (`float`): Between two calls, and before the first.
    """

    def __init__(self, tick: Callable[[], object], seconds: float = 1.0):
        self._tick, self._seconds, self._stopped = tick, seconds, threading.Event()
        self._shell = _shell()
        if self._shell is not None:
            self._shell.events.register("post_run_cell", self._end_of_cell)
        context = contextvars.copy_context()  # by it a kernel knows which cell an output belongs to
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No further call; one that has begun is waited for."""
        self._stopped.set()
        self._thread.join()
        if self._shell is not None:
            self._shell.events.unregister("post_run_cell", self._end_of_cell)
            self._shell = None

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            self._tick()

    def _end_of_cell(self, result: object) -> None:
        self.stop()


class Clock:
    """One updating line: what goes on, how much of it is done, since when, and how long still. Nothing for what takes
    no longer than SILENT seconds, and nothing in a file that a terminal's output goes to.

    Args:
        what (`str`): A noun in the plural, "answers", or what is done: "calibrating".
        total (`int`): Of the steps that there will be.
        shown (`bool`): False for no line at all.

    Example:
    ```python
    with Clock("answers", 100) as clock:
        for question in questions:
            ask(question)
            clock.step()
    ```
    """

    def __init__(self, what: str, total: int, *, shown: bool = True):
        self.what, self.total, self.done = what, total, 0
        # several processes of one run need one line
        self._shown = shown and os.environ.get("RANK", "0") == "0" and (in_notebook() or sys.stderr.isatty())
        self._handle: Any = None  # IPython's, of the output that is updated
        self._ended = False
        self._begun = False  # whether the line is there

    def __enter__(self) -> "Clock":
        self._started = time.monotonic()
        self._ticker = Ticker(self._tick) if self._shown else None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._ticker is not None:
            self._ticker.stop()
        if self._begun:
            self._ended = kind is None
            self._show()
            if not in_notebook():
                print(file=sys.stderr)

    def step(self) -> None:
        """One more is done."""
        self.done = min(self.total, self.done + 1)

    def line(self) -> str:
        """As it is now: "answers: 41 of 100 · 0:35 · about 0:50 left", and in the end "answers: 100 in 1:25"."""
        seconds = time.monotonic() - self._started
        if self._ended:
            return f"{self.what}: {self.total} in {duration(seconds)}"
        parts = [f"{self.what}: {self.done} of {self.total}", duration(seconds)]
        if 10 * self.done >= self.total and self.done < self.total:  # from a tenth on it can be told
            parts.append(f"about {duration(seconds / self.done * (self.total - self.done))} left")
        return " · ".join(parts)

    def _tick(self) -> None:
        if self._begun or time.monotonic() - self._started >= SILENT:
            self._show()

    def _show(self) -> None:
        self._begun = True
        line = self.line()
        if not in_notebook():
            print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
            return
        from IPython.display import display

        gauge = "" if self._ended else bar({COLORS[0]: self.done / self.total})
        bundle = {"text/html": framed(html.escape(line) + gauge), "text/plain": line}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def _shell() -> Any:
    """IPython's, if this process runs in it."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
