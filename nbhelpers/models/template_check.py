"""Try a chat template before it is trusted: it came with the model, and may be broken, or never end.

transformers renders it in jinja's sandbox, which keeps it away from Python and files, and limits neither time nor loops
within loops.
"""

import ctypes
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0  # for a short conversation, which takes milliseconds; a loaded machine is slow


class _Late(BaseException):
    """Raised in the thread of a template that does not end."""


def check(tokenizer: "PreTrainedTokenizerBase", seconds: float = SECONDS) -> None:
    """Render a short conversation. Raises ValueError for a template that fails or takes longer than `seconds`."""
    user = {"role": "user", "content": "Which is bigger?"}
    error: BaseException | None = None
    for conversation in ([{"role": "system", "content": "Think first."}, user], [user]):  # some know no system
        error = _error(lambda: tokenizer.apply_chat_template(conversation, add_generation_prompt=True), seconds)  # noqa: B023
        if error is None:
            return
        if isinstance(error, _Late):
            break
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, _Late):
        what = f"it has not rendered a conversation of one question in {seconds:g} s"
    raise ValueError(
        f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} cannot be used ({what}): put another into "
        "its chat_template.jinja (or chat_template in tokenizer_config.json), or take the model from its makers"
    )


def _error(work: Callable[[], object], seconds: float) -> BaseException | None:
    """What `work` raised; `_Late` if it took longer. It runs in a thread, in which that is raised to end it: jinja's
    loops are Python's, and unlike a signal this works in every thread and on every system."""
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Late))
        thread.join(seconds)
    return found[0] if found else _Late()  # a thread in one call that Python cannot interrupt is left behind
