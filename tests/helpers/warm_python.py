"""Python processes that have imported what is slow to import, forked from one that did it once.

    with warm_python.server() as command:         # a list: what stands for `python`
        subprocess.run([*command, "script.py"])   # or [*command, "-m", "module", "argument"], or "-c"

A notebook's kernel imports torch, transformers and TRL for six seconds of CPU time before it does anything. The server
imports them and waits; the command is a small process that hands over its arguments, environment, folder and output,
and then stands for the fork: signals go through it, and it ends when and as the fork does.
Imports start no thread, which a fork would lose. They may look for a GPU, which a fork could then not use: on a machine
with one the tests take fresh processes (tests/conftest.py).
"""

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from contextlib import contextmanager, suppress
from importlib import import_module

# what the model notebooks, and the processes that they start, import
MODULES = ("ipykernel.kernelapp", "matplotlib.pyplot", "datasets", "trl", "nbhelpers.training.trainer",
           "nbhelpers.loader", "nbhelpers.evaluate", "nbhelpers.export", "nbhelpers.panel",
           "nbhelpers.engines.graph")  # fmt: skip


@contextmanager
def server():
    """Start the process that forks, one thread each. Yields the command to put before arguments."""
    with tempfile.TemporaryDirectory() as folder:  # not pytest's: a socket's path may have no more than 100 characters
        address = f"{folder}/warm"
        process = subprocess.Popen(
            [sys.executable, __file__, "serve", address], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        try:
            yield [sys.executable, "-I", "-S", __file__, "ask", address]  # no site-packages: it starts at once
        finally:
            process.communicate()  # the end of its input ends it
            assert process.returncode == 0


def serve(address: str) -> tuple[dict, socket.socket]:
    """Import, then fork for whoever asks until the input ends. Returns in the forks alone, with what was asked."""
    for kind, normal in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(kind, normal)  # nohup and a shell's & have them ignored, here and in all forks
    for module in MODULES:
        import_module(module)
    gc.freeze()  # what is there now stays, in every fork: no collection needs to look at it
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    ended, end = socket.socketpair()  # readable when a fork has ended
    end.setblocking(False)
    signal.set_wakeup_fd(end.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    print("ready", flush=True)
    forks: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as events:
        for source in (sys.stdin, listener, ended):
            events.register(source, selectors.EVENT_READ)
        while sys.stdin not in (ready := [key.fileobj for key, _ in events.select()]):
            if ended in ready:
                ended.recv(4096)
                for pid in list(forks):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        with forks.pop(pid) as connection, suppress(BrokenPipeError):
                            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            if listener in ready:
                connection, _ = listener.accept()
                message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 2)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for opened in (listener, ended, end, *forks.values()):
                        opened.close()
                    for number, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
                        os.dup2(stream, number)
                    return json.loads(message), connection
                forks[pid] = connection
                connection.sendall(f"{pid}\n".encode())
                for stream in streams:
                    os.close(stream)
    os._exit(0)  # nothing to tidy up, and torch takes seconds for it


def run(asked: dict, connection: socket.socket) -> None:
    """What a fork does: be the program that was asked for, and end with the process that asked."""
    os.setsid()
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    threading.Thread(target=lambda: connection.recv(1) or os._exit(1), daemon=True).start()
    program, *rest = asked["arguments"]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = ["" if program in ("-m", "-c") else os.path.dirname(os.path.abspath(program)), *filter(None, paths)]
    if program == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif program == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv[:] = [program, *rest]
        runpy.run_path(program, run_name="__main__")
    # It came to its end. What Python does at its end, but for taking apart all that was imported: half a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def ask(address: str, arguments: list[str]) -> None:
    """What the command does: pass on what it was called with, then signals, and end as the fork ended."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    asked = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(asked).encode()], [1, 2])
    answers = connection.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int(answers.read())
    if status < 0:  # a signal ended it
        with suppress(OSError):  # of SIGKILL there is nothing to set
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    role, where, *given = sys.argv[1:]
    if role == "ask":
        ask(where, given)
    run(*serve(where))
