"""A reward that runs what a model wrote: every answer in a process of its own, without a network, with limits.

    def passes(completions, tests, **_):                 # exec()s the answer, so it must never run here
        ...

    trainer = LeanGRPOTrainer(model, [rewards.sandboxed(passes, seconds=5)], ...)

The process is a fork, so that a function from a notebook's cell works as it is, and nothing is pickled. What it may not
do is decided by the Linux kernel: namespaces, where this machine allows them, and resource limits everywhere.
"""

import contextlib
import ctypes
import json
import math
import os
import selectors
import signal
import sys
import tempfile
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any

from nbhelpers import host

from .guard import is_async, named
from .reward import Reward

ANSWER = 65536  # bytes that a process may send back
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000  # linux/sched.h
RDONLY, RECURSIVE, MOUNT_SETATTR = 1, 0x8000, 442  # linux/mount.h, fcntl.h; the number is the same on all machines
WALLS = {
    "network": "it can reach the network",
    "processes": "it can see and end your other processes",
    "files": "it can change every file that you can",
}


def sandboxed(
    reward: Reward,
    *,
    seconds: float = 10.0,
    memory_gb: float = 1.0,
    file_mb: float = 16.0,
    failed: float | None = 0.0,
    workers: int | None = None,
) -> Reward:
    """The same reward function, called for each completion by itself, in a process that can do little harm.

    Each such process gets: no network; no other process to see or to end; all files read-only but an empty folder of
    its own, which is its working folder and is deleted; no environment variables but PATH, HOME and TMPDIR; limits of
    time, memory, size of a file, number of open files, and no core dumps. It and all that it started are killed when
    the time is up. A completion whose process is late, is killed or dies scores `failed`; the others are not affected.

    What it does not promise:

    - The walls around network, processes and files are Linux namespaces. Where a machine does not allow them (some
      containers), a warning says which are missing, once, and the limits are all there is.
    - It shares the kernel and the user id with you: a hole in the kernel is a hole here. It is no virtual machine.
    - It can read the files that you can read, and a copy of this process's memory, tokens in it among them. Without a
      network it can send them nowhere, but its score is a number that it may choose.
    - The score comes out of the process in which the code ran. Code that looks for it can write a score of its own:
      keep the expected output out of what the code sees, and look at the best-paid answers (`panel.Live` shows them).
    - What a reward writes into a list or logs with `log_metric` stays in that process. It must not use the GPU.

    Args:
        reward (`Reward`): A reward function with TRL's signature, not async. It is given lists of one entry.
        seconds (`float`): Time for one completion.
        memory_gb (`float`): Address space that it may take beyond what this process has, GB (10^9 bytes).
        file_mb (`float`): Size of a file that it may write, MB.
        failed (`float`, *optional*): The score of a completion whose process gave none; None for "not scored".
        workers (`int`, *optional*): Processes at a time; as many as there are cores if not given.

    Returns:
        `Reward`: It has the name of `reward`.

    Raises:
        host.CannotRun: Where there is no fork (Windows).
        ValueError: For a limit that is not above 0, or an async function.
        RuntimeError: From the function, if the reward raised for every completion: then it is the reward that is wrong.

    Example:
    >>> def runs(completions, **_):
    ...     room = {}
    ...     exec(completions[0], room)
    ...     return [float(room["answer"] == 42)]
    >>> reward = sandboxed(runs, seconds=2)  # doctest: +SKIP
    >>> reward(completions=["answer = 6 * 7", "while True: pass"])  # doctest: +SKIP
    [1.0, 0.0]
    """
    name, inner = named(reward)
    if not hasattr(os, "fork"):
        raise host.CannotRun("rewards.sandboxed needs Linux or macOS: Windows cannot fork a process")
    if is_async(inner):
        raise ValueError(f"reward function {name!r} is async: make it a plain function, each call has its own process")
    for limit, value in (("seconds", seconds), ("memory_gb", memory_gb), ("file_mb", file_mb)):
        if not 0 < value < math.inf:
            raise ValueError(f"sandboxed({limit}={value}): a number above 0")
    limits = _Limits(seconds, int(memory_gb * 1e9), int(file_mb * 1e6))
    at_a_time = workers or os.cpu_count() or 1
    said: set[str] = set()

    def score(completions: list, **columns: Any) -> list[float | None]:
        n = len(completions)
        scores: dict[int, float | None] = {}
        errors: dict[int, str] = {}
        waiting, running = deque(range(n)), dict[int, _Child]()
        selector = selectors.DefaultSelector()
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    row = waiting.popleft()
                    one = {k: [v[row]] if isinstance(v, list) and len(v) == n else v for k, v in columns.items()}
                    running[row] = child = _Child(reward, {"completions": [completions[row]], **one}, limits)
                    selector.register(child.pipe, selectors.EVENT_READ, row)
                soonest = min(child.deadline for child in running.values())
                ready = {key.data for key, _ in selector.select(max(0.0, soonest - time.monotonic()))}
                for row, child in list(running.items()):
                    if (row in ready and child.read()) or time.monotonic() >= child.deadline:
                        selector.unregister(child.pipe)
                        answer = running.pop(row).end()
                        scores[row] = answer.get("score", failed)
                        errors |= {row: answer["error"]} if "error" in answer else {}
                        said_now = [WALLS[wall] for wall in answer.get("missing", ()) if wall not in said]
                        said.update(answer.get("missing", ()))
                        if said_now:
                            warnings.warn(f"rewards.sandboxed: this machine does not allow every wall around what "
                                          f"{name!r} runs: {', and '.join(said_now)}. Only the limits of time, memory "
                                          "and files hold", RuntimeWarning, stacklevel=2)  # fmt: skip
        finally:  # the stop button too leaves nothing running
            for child in running.values():
                child.end()
            selector.close()
        if n and len(errors) == n:
            raise RuntimeError(f"it raised for all {n} completions, in the first {errors[0]}")
        return [scores[row] for row in range(n)]

    score.__name__ = score.__qualname__ = name
    score.__doc__ = inner.__doc__
    return score


class _Limits:
    def __init__(self, seconds: float, memory: int, file: int):
        self.seconds, self.memory, self.file = seconds, memory, file


class _Child:
    """One process with one completion. `read` until it is through or late, then `end`."""

    def __init__(self, reward: Reward, arguments: dict[str, Any], limits: _Limits):
        self.deadline = time.monotonic() + limits.seconds
        self.said = b""
        self.folder = tempfile.TemporaryDirectory(prefix="sandbox-")
        self.pipe, there = os.pipe()
        with warnings.catch_warnings():  # torch has threads; what the child does needs none of their locks
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                _inside(reward, arguments, limits, there, self.folder.name)
            finally:
                os._exit(1)
        os.close(there)

    def read(self) -> bool:
        """Take in what it has said; whether that is all."""
        piece = os.read(self.pipe, ANSWER)
        self.said += piece
        return not piece or len(self.said) > ANSWER

    def end(self) -> dict[str, Any]:
        """Kill it and all that it started, and return its answer; {} if it gave none."""
        children = Path(
            f"/proc/{self.pid}/task/{self.pid}/children"
        )  # the first of its namespace, whatever its group is
        first = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        # its group may not be there yet
        for kill, pid in ((os.killpg, self.pid), (os.kill, self.pid), *((os.kill, pid) for pid in first)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pipe)
        self.folder.cleanup()
        lines = self.said.splitlines()
        try:
            answer: dict[str, Any] = {}
            for line in lines:
                answer |= json.loads(line)
            number = answer.get("score")
            known = number is None or (isinstance(number, (int, float)) and math.isfinite(number))
            return answer if known else {}
        except (ValueError, TypeError):
            return {}


def _inside(reward: Reward, arguments: dict[str, Any], limits: _Limits, pipe: int, folder: str) -> None:
    """What the child does. It never returns to the notebook."""
    import resource

    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGVTALRM):
        signal.signal(number, signal.SIG_DFL)
    missing = _walls(folder) if sys.platform == "linux" else list(WALLS)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):  # what it prints is nobody's
        os.dup2(nowhere, descriptor)
    os.dup2(pipe, 3)
    os.closerange(4, 65536)  # files, sockets and devices of the notebook
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  a notebook's own go through its sockets
    os.chdir(folder)
    path = os.environ.get("PATH", os.defpath)
    os.environ.clear()
    os.environ.update(PATH=path, HOME=folder, TMPDIR=folder)
    os.write(3, json.dumps({"missing": missing}).encode() + b"\n")

    def cap(what: int, most: int) -> None:
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))

    if sys.platform == "linux":  # macOS ignores it
        cap(resource.RLIMIT_AS, int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            + limits.memory)  # fmt: skip
    cap(resource.RLIMIT_CPU, math.ceil(limits.seconds) + 1)
    cap(resource.RLIMIT_FSIZE, limits.file)
    cap(resource.RLIMIT_NOFILE, 64)
    cap(resource.RLIMIT_CORE, 0)
    if "processes" not in missing:  # the first process of a PID namespace: its end is everybody's
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
    try:
        scores: Any = reward(**arguments)
        (number,) = scores
        answer: dict[str, Any] = {"score": None if number is None else float(number)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
    os.write(3, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _walls(folder: str) -> list[str]:
    """Put up what the kernel allows around this process; the names of the walls that it does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    ids = os.getuid(), os.getgid()
    own = libc.unshare(NEWUSER) == 0
    if own:  # root in here, the same user outside
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
            try:
                Path(f"/proc/self/{file}").write_text(text)
            except OSError:
                own = False
    missing = [
        wall for wall, flags in (("network", NEWNET | NEWIPC), ("processes", NEWPID)) if libc.unshare(flags) != 0
    ]
    files = libc.unshare(NEWNS) == 0
    if files:
        private, nothing = 1 << 18 | 1 << 14, None  # MS_PRIVATE | MS_REC: what is mounted here is not seen outside
        libc.mount(b"none", b"/", nothing, private, nothing)
        here = folder.encode()
        files = libc.mount(b"tmpfs", here, b"tmpfs", 0, b"size=64m") == 0
        attributes = (ctypes.c_uint64 * 4)(RDONLY, 0, 0, 0)
        files = files and libc.syscall(MOUNT_SETATTR, -100, b"/", RECURSIVE, attributes, 32) == 0
        attributes = (ctypes.c_uint64 * 4)(0, RDONLY, 0, 0)
        files = files and libc.syscall(MOUNT_SETATTR, -100, here, 0, attributes, 32) == 0
    return missing if files else [*missing, "files"]
