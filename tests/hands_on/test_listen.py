"""A real kernel hears of a button while a cell runs, and runs the cells that were sent meanwhile afterwards."""

import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from nbhelpers import hands_on

ROOT = Path(__file__).parents[2]
CELL = """
import sys; sys.path.insert(0, {root!r})
import ipywidgets, signal, time
from nbhelpers import hands_on
button, text, heard = ipywidgets.Button(), ipywidgets.Text(), []
button.on_click(lambda _: heard.append("click"))
text.observe(lambda change: heard.append(change["new"]), "value")
before = signal.getsignal(signal.SIGINT)
print("IDS", button.model_id, text.model_id, hands_on.attended(), flush=True)
end = time.monotonic() + 20
while len(heard) < 4 and time.monotonic() < end:
    time.sleep(0.02)
    if {listens}: hands_on.listen()
print("HEARD", heard, signal.getsignal(signal.SIGINT) is before)
"""


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(client, listens: bool, presses) -> tuple[list[str], list[tuple[str, str]]]:
    """What is printed, and (state, kind of request) of each status, until all is done."""
    printed, states, waiting = [], [], set()
    waiting.add(client.execute(CELL.format(root=str(ROOT), listens=listens)))
    end = time.monotonic() + 60
    while waiting and time.monotonic() < end:
        message = client.get_iopub_msg(timeout=60)
        kind, content, parent = message["header"]["msg_type"], message["content"], message["parent_header"]
        assert kind != "error", content
        if kind == "stream" and content["name"] == "stdout":
            printed += content["text"].splitlines()
            if "IDS" in content["text"]:
                waiting |= presses(client, *content["text"].split()[1:3])
        elif kind == "status":
            states.append((content["execution_state"], parent["msg_type"]))
            if content["execution_state"] == "idle":
                waiting.discard(parent["msg_id"])
    assert not waiting
    return printed, states


def tell(client, widget: str, data: dict) -> None:
    client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": widget, "data": data}))


def presses(client, button: str, text: str) -> set[str]:
    """Two presses and two texts, with cells that a person starts in between."""
    cells = {client.execute("print('cell', len(heard))")}
    for word in ("9.9", "9.11"):
        tell(client, button, {"method": "custom", "content": {"event": "click"}})
        tell(client, text, {"method": "update", "state": {"value": word}, "buffer_paths": []})
        cells.add(client.execute(f"print('cell', {word!r})"))
    return cells


def test_a_press_is_heard_while_the_cell_runs(kernel):
    printed, states = run(kernel, True, presses)
    assert printed[0].split()[3] == "True"  # a front end that can be asked is attended
    assert printed[1] == "HEARD ['click', '9.9', 'click', '9.11'] True"
    assert printed[2:] == ["cell 4", "cell 9.9", "cell 9.11"]  # each later, in its turn, and none lost
    assert states.count(("idle", "comm_msg")) == 4  # or a front end holds back what is typed next
    first, last = states.index(("idle", "comm_msg")), states.index(("idle", "execute_request"))
    assert first < last and states[last - 1] == ("busy", "execute_request")  # busy, as long as the cell runs
    again, _ = run(kernel, True, presses)  # it all works a second time
    assert again[1:] == printed[1:]


def test_outside_a_notebook_nothing_is_heard_and_nobody_sits_there():
    hands_on.listen()
    assert not hands_on.attended()
