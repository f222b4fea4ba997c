"""Rows of the torture with two processes, as on two cards: one of them is killed, or both, and the run goes on."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import torture_run
from torture_bench import Bench, Row
from torture_run import PHASES

WHO = ("0", "1", "0 1")  # the ranks that are killed


class TwoProcesses(Bench):
    """As `Bench`, each run in two processes (gloo) by torch.distributed.run. What they give is both ranks'."""

    processes = 2

    def start(self, folder: Path, phase: str = "", call: int = 0, share: float = 0.0, number: int = 9, room: int = 1,
              ranks: str = "") -> subprocess.Popen:  # fmt: skip
        command = [
            *self.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python",
            *self.python, torture_run.__file__, "child", str(folder), phase, str(call), str(share), str(int(number)),
            str(room),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORTURE_RANKS": ranks}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    @staticmethod
    def result(ended: tuple[int, str]) -> dict | None:
        lines = [line.partition("RESULT ")[2] for line in ended[1].splitlines() if "RESULT " in line]
        both = [json.loads(line) for line in lines]
        same = len(both) == 2 and both[0]["weights"] == both[1]["weights"]
        return next(one for one in both if one["rank"] == 0) if same else None


def kills(bench: TwoProcesses, count: int) -> Row:
    """One rank or both are killed at the same moments as `torture.kills` takes; whom they leave behind is ended."""
    row = Row("two processes (gloo), rank 0, rank 1 or both killed (SIGKILL); each kill fired")
    late = 0
    while row.tried < count:
        phase, ranks = list(PHASES)[row.tried % len(PHASES)], WHO[row.tried % len(WHO)]
        call, share = bench.random.randint(1, PHASES[phase][1]), bench.random.random()
        folder = bench.fresh()
        code, text = bench.run(folder, phase, call, share, ranks=ranks)
        fired = text.count("is killed in")
        if code == 0 and late < count:  # it came after the end of the run: another is drawn
            late += 1
        else:
            fault = None if fired else f"it ended with {code}"
            row.count(f"{signal.Signals(9).name} of rank {ranks} in {phase} {call}, {share:.0%} into it",
                      fault or bench.goes_on(folder))  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
    return row
