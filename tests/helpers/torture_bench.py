"""What the rows of the torture share: a line of the table, and runs in processes of their own."""

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torture_run
from torture_run import RUN


@dataclass
class Row:
    """A line of the table."""

    name: str
    tried: int = 0
    held: int = 0
    lost: list[str] = field(default_factory=list)

    def count(self, what: str, fault: str | None) -> None:
        self.tried += 1
        self.held += fault is None
        self.lost += [] if fault is None else [f"{what}: {fault}"]
        print(f"{self.name}: {what}: {fault or 'held'}", flush=True)


def last_line(text: str) -> str:
    """The last line that was printed, cut."""
    return (text.strip().splitlines() or [""])[-1][:200]


class Bench:
    """Runs children, and knows what an undisturbed one gives."""

    processes = 1

    def __init__(self, python: list[str], root: Path, seed: int):
        self.python, self.root, self.random = python, root, random.Random(seed)
        self.count = 0
        self.undisturbed = self.fresh()
        ended = self.run(self.undisturbed)
        self.whole = self.result(ended)
        assert self.whole is not None and self.whole["step"] == RUN["max_steps"], f"undisturbed: {ended[1][-2000:]}"

    def fresh(self) -> Path:
        self.count += 1
        return self.root / f"run-{self.processes}-{self.count}"

    def start(
        self, folder: Path, phase: str = "", call: int = 0, share: float = 0.0, number: int = 9, room: int = 1,
        before: Sequence[str] = (), environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen:  # fmt: skip
        """A child. `before`: words of a command that starts it, for which it is a new python and not a fork;
        `environment`: instead of this process's."""
        given = [torture_run.__file__, "child", str(folder), phase, str(call), str(share), str(int(number)), str(room)]
        command = [*before, sys.executable, *given] if before else [*self.python, *given]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, errors="replace"
        )

    def run(self, folder: Path, *args, **kwargs) -> tuple[int, str]:
        process = self.start(folder, *args, **kwargs)
        out, err = process.communicate(timeout=600)
        return process.returncode, out + err

    @staticmethod
    def result(ended: tuple[int, str]) -> dict | None:
        lines = [line for line in ended[1].splitlines() if line.startswith("RESULT ")]
        return json.loads(lines[-1].removeprefix("RESULT ")) if lines else None

    def goes_on(self, folder: Path) -> str | None:
        """What differs from the undisturbed run when a run in `folder` is started again; None: nothing."""
        ended = self.run(folder)
        result = self.result(ended)
        if result is None:
            return f"it did not go on: {last_line(ended[1])}"
        differ = [key for key in result if result[key] != self.whole[key]]
        return f"other {', '.join(differ)}" if differ else None
