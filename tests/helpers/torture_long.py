"""Rows of the torture about what a long run keeps: memory, descriptors, threads, shared memory; and whose it is."""

import json
import subprocess

import torture_run
from torture_bench import Bench, Row, last_line

SAYS = "keeps memory"  # what a run prints of a reward function that does


def begin(bench: Bench, steps: int) -> subprocess.Popen:
    """Start the long run, beside the rest of the torture. What it prints goes into `bench.root`/long.txt."""
    command = [*bench.python, torture_run.__file__, "long", str(bench.fresh()), str(steps)]
    with open(bench.root / "long.txt", "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def long_run(bench: Bench, process: subprocess.Popen, steps: int) -> Row:
    """Memory, descriptors, threads and shared memory after a tenth of a run of many short steps, and at its end."""
    row = Row(f"{steps:,} short steps: memory, descriptors, threads, /dev/shm flat; no reward is accused")
    process.wait(timeout=14400)
    out = (bench.root / "long.txt").read_text()
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    if not lines:
        row.count("run", f"it ended: {last_line(out)}")
        return row
    early, late = json.loads(lines[-1].removeprefix("RESULT "))
    grown = (late["rss"] - early["rss"]) / 1e6
    row.name += f" (RSS {early['rss'] / 1e6:.0f} to {late['rss'] / 1e6:.0f} MB)"
    for name in ("fds", "threads", "shm"):
        row.count(name, None if late[name] <= early[name] else f"{early[name]} to {late[name]}")
    row.count("RSS", None if grown < 0.03 * steps else f"{grown:.1f} MB more")  # TRL's own log grows by 10 kB a step
    row.count("no reward is accused", f"it says {SAYS!r}" if SAYS in out else None)
    return row


def leaks(bench: Bench) -> Row:
    """Rewards that keep memory in different places, beside one that keeps none."""
    row = Row("a reward that keeps memory: it is named, and no other")
    for kind in torture_run.LEAKS:
        command = [*bench.python, torture_run.__file__, "leak", str(bench.fresh()), kind]
        out = subprocess.run(command, capture_output=True, text=True, timeout=600)
        said = [line for line in out.stdout.splitlines() if SAYS in line]
        named = len(said) == 1 and f"'keeps_{kind}'" in said[0] and out.returncode == 0
        row.count(kind, None if named else f"{said or last_line(out.stdout + out.stderr)}")
    return row
