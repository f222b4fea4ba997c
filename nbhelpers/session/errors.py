"""In a notebook an error of this package is a sentence, the cause and what to change; `%tb` shows where it was raised.

Errors of other libraries, bugs of this one among them, keep their traceback.
"""

import os
import sys
import traceback
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_shells: list[Any] = []  # those that have the hook


def instead_of_tracebacks() -> None:
    """Show the errors of this package as sentences, from the next cell's on; nothing outside IPython.

    What was hooked in before, Colab's help for an ImportError for instance, still gets what is not ours.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or any(shell is one for one in _shells):
        return
    earlier = shell.custom_exceptions, shell.CustomTB

    def show(
        shell: Any, kind: type[Exception], error: Exception, trace: TracebackType, tb_offset: int | None = None
    ) -> None:
        if is_ours(trace):
            # by what an error brings along to render itself, each kind of notebook shows it in its own way
            vars(error)["_render_traceback_"] = lambda: [sentence(error), "(%tb shows where it was raised)"]
            shell.showtraceback((kind, error, trace))
            whole = partial(shell.InteractiveTB.structured_traceback, kind, error, trace)
            vars(error)["_render_traceback_"] = whole  # for %tb
        elif isinstance(error, earlier[0]):
            earlier[1](kind, error, trace, tb_offset=tb_offset)
        else:
            shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((Exception,), show)
    _shells.append(shell)


def is_ours(trace: TracebackType) -> bool:
    """Whether the error was raised by a `raise` of this package: on purpose, with a message for the reader."""
    last = traceback.extract_tb(trace)[-1]
    return last.filename.startswith(_PACKAGE) and (last.line or "").startswith("raise")


def sentence(error: Exception) -> str:
    """The message, and where a cell of the reader caused it, the line there."""
    text = str(error) or type(error).__name__
    cause = traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
    in_cells = [frame for frame in cause if frame.line and not Path(frame.filename).exists()]  # a cell is no file
    return f"{text}\nLine {in_cells[-1].lineno} of that cell: {in_cells[-1].line}" if in_cells else text
