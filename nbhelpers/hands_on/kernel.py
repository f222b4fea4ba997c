"""Presses of buttons while a cell runs: who computes for an hour looks for them now and then, as here.

A kernel handles one message after another, so what a person does to a widget waits until the cell has ended. JupyterLab
from 4.4 on, with ipykernel 7, sends it on a way of its own (a subshell); elsewhere it is fetched here: messages to
widgets out of turn, all others in theirs. Two attributes of others are touched that no documentation names:
`ZMQStream._recv_callback` (pyzmq) and, in ipykernel 7, the stream by which its main thread gets its messages.
"""

import asyncio
import inspect
import threading
from typing import Any

from nbhelpers.progress import in_notebook

TO_WIDGETS = ("comm_msg", "comm_close")
_waiting: set[asyncio.Future] = set()  # asyncio itself forgets a task that nobody holds


def listen() -> None:
    """Handle what widgets were told since the cell began, here and now. Nothing outside a notebook, and nothing where a
    kernel is made in another way: its presses are handled after the cell, and who waits for them has the stop button.
    """
    if not in_notebook() or threading.current_thread() is not threading.main_thread():
        return
    from IPython import get_ipython

    kernel = get_ipython().kernel
    try:
        stream = _stream(kernel)
        usual = stream._recv_callback
    except AttributeError:
        return

    def sort(message: list) -> Any:
        identities, parts = kernel.session.feed_identities(message, copy=False)
        kind = kernel.session.deserialize(parts, content=False, copy=False)["header"]["msg_type"]
        if kind in TO_WIDGETS:
            _handle(kernel, stream, identities, kernel.session.deserialize(parts, copy=False))
        elif inspect.isawaitable(later := usual(message)):  # in its turn, after this cell
            task = asyncio.ensure_future(later)
            _waiting.add(task)
            task.add_done_callback(_waiting.discard)

    stream.on_recv(sort, copy=False)
    try:
        stream.flush(1)  # zmq.POLLIN: what has arrived
    finally:
        stream.on_recv(usual, copy=False)


def _stream(kernel: Any) -> Any:
    """By which the main thread gets its messages."""
    thread = getattr(kernel, "shell_channel_thread", None)  # ipykernel 7's
    return kernel.shell_stream if thread is None else thread.manager.get_shell_channel_to_subshell_pair(None).to_stream


def _handle(kernel: Any, stream: Any, identities: list[bytes], message: dict) -> None:
    kernel.shell_handlers[message["header"]["msg_type"]](stream, identities, message)
    # A front end sends no more of a text that is being typed before it knows that this is done. The kernel is busy all
    # the same: the cell runs.
    topic = f"kernel.{kernel.ident}.status".encode()
    for state, parent in (("idle", message), ("busy", kernel.get_parent())):
        kernel.session.send(kernel.iopub_socket, "status", {"execution_state": state}, parent=parent, ident=topic)
