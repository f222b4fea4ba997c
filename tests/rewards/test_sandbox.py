"""What a model wrote runs where it can do little harm, and costs its own row at most."""

import asyncio
import os
import sys
import warnings
from pathlib import Path

import pytest

from nbhelpers.rewards import sandboxed
from nbhelpers.rewards.guard import guard
from nbhelpers.training.identity import code_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux namespaces and limits")


def runs(completions, **_):
    """1.0 when the code sets `answer` to 42."""
    room: dict = {}
    exec(completions[0], room)
    return [float(room["answer"] == 42)]


@pytest.fixture(scope="module")
def walls():
    """Which walls this machine allows."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert sandboxed(runs)(completions=["answer = 42"]) == [1.0]
    text = " ".join(str(warning.message) for warning in said)
    return {"network": "the network" not in text, "processes": "end your other" not in text,
            "files": "change every file" not in text}  # fmt: skip


def test_hostile_answers_cost_their_own_rows(walls):
    hostile = {
        "endless": "while True: pass",
        "asleep": "import time; time.sleep(60)",
        "exit": "raise SystemExit",
        "gone": "import os; os._exit(0)",
        "crash": "import ctypes; ctypes.string_at(0)",
        "memory": "answer = bytearray(4 * 10**9) and 42",
        "file": "open('big', 'wb').write(bytes(3 * 10**6)); answer = 42",
        "wrong": "answer = 41",
        "no python": "answer = = 42",
        "shouts": "print('x' * 10**6); answer = 42",
    }
    scored = sandboxed(runs, seconds=2, memory_gb=0.5, file_mb=2, workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        scores = scored(prompts=["?"] * 11, completions=["answer = 6 * 7", *hostile.values()])
    assert dict(zip(["good", *hostile], scores, strict=True)) == {
        "good": 1.0,
        **dict.fromkeys(hostile, 0.0),
        "shouts": 1.0,
    }


def test_it_cannot_reach_out(walls, tmp_path):
    token = tmp_path / "token"
    os.environ["A_TOKEN"] = "secret"
    attempts = {
        "network": "import socket; s = socket.socket(); s.settimeout(1); s.connect(('127.0.0.1', {port})); answer = 42",
        "processes": f"import os; os.kill({os.getpid()}, 0); answer = 42",
        "files": f"open({str(token)!r}, 'w').write('x'); answer = 42",
        "environment": "import os; os.environ['A_TOKEN']; answer = 42",
        "its own folder": "open('fine', 'w').write('x'); answer = 42",
    }
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        codes = [code.replace("{port}", str(server.getsockname()[1])) for code in attempts.values()]
        scores = dict(zip(attempts, sandboxed(runs, seconds=20)(completions=codes), strict=True))
    del os.environ["A_TOKEN"]
    assert scores["its own folder"] == 1.0 and scores["environment"] == 0.0
    for wall, there in walls.items():
        assert scores[wall] == (0.0 if there else 1.0), wall
    assert token.exists() is not walls["files"]


def test_nothing_stays_behind_and_columns_reach_their_rows(walls):
    def same(completions, answer, trainer_state, **_):
        return [float(completions[0] == answer[0]) + trainer_state]

    scored = sandboxed(same)
    assert scored.__name__ == "same"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert scored(completions=["a", "b", "c"], answer=["a", "x", "c"], trainer_state=1) == [2.0, 1.0, 2.0]
        assert scored(completions=[], answer=[], trainer_state=1) == []
        sandboxed(runs, seconds=1)(completions=["import os\nif os.fork() or os.fork(): pass\nwhile True: pass"])
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == Path("/proc/self/comm").read_text()
                and "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]]  # fmt: skip
    assert not list(Path("/tmp").glob("sandbox-*/fine"))


def test_a_reward_that_is_wrong_itself_is_named(walls):
    def typo(completions, **_):
        return [undefined]  # noqa: F821

    scored = guard(sandboxed(typo))
    with pytest.warns(RuntimeWarning, match="'typo' failed with RuntimeError: it raised for all 2 .*NameError"):
        assert scored(completions=["a", "b"]) == [None, None]


def test_what_it_cannot_do_is_refused():
    async def later(completions, **_):
        await asyncio.sleep(0)
        return [0.0]

    class Later:
        async def __call__(self, completions, **_):
            return await later(completions)

    with pytest.raises(ValueError, match="'later' is async"):
        sandboxed(later)
    with pytest.raises(ValueError, match="'Later' is async"):
        sandboxed(Later())
    for limit in ("seconds", "memory_gb", "file_mb"):
        with pytest.raises(ValueError, match=limit):
            sandboxed(runs, **{limit: 0})
    assert code_of(sandboxed(runs)) != code_of(sandboxed(test_what_it_cannot_do_is_refused))
