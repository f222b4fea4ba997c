"""Fault injection: runs are killed, signalled, put on full disks, doubled and damaged, and must go on bit for bit.

    make torture                                                  # everything, into docs/reliability.md; an hour
    python tests/helpers/torture.py --kills 5 --flips 40          # less, to the terminal

Each row of the table says what was tried, in how many cases it held and in how many something was lost: a step that had
been saved, a number that differs from the undisturbed run's, an error that does not say what to do. Linux; the disks
need root. A small half of it is in tests/training/test_torture.py.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torture_run
import warm_python
from torture_run import PHASES, RUN

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


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

    def __init__(self, python: list[str], root: Path, seed: int):
        self.python, self.root, self.random = python, root, random.Random(seed)
        self.count = 0
        self.whole = self.result(self.run(self.fresh()))
        self.undisturbed = self.root / "run-1"
        assert self.whole is not None and self.whole["step"] == RUN["max_steps"], "the undisturbed run failed"

    def fresh(self) -> Path:
        self.count += 1
        return self.root / f"run-{self.count}"

    def start(self, folder: Path, phase: str = "", call: int = 0, share: float = 0.0, number: int = 9, room: int = 1,
              before: str = "") -> subprocess.Popen:  # fmt: skip
        command = [
            *self.python,
            torture_run.__file__,
            "child",
            str(folder),
            phase,
            str(call),
            str(share),
            str(int(number)),
            str(room),
        ]
        if before:
            command = ["bash", "-c", f'{before}; exec "$@"', "bash", sys.executable, *command[len(self.python) :]]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

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


# ------------------------------------------------------------------------------------------------- the rows


def _ended_by(
    bench: Bench, row: Row, count: int, numbers: Sequence[int], first: int, most: float,
    judge: Callable[[int, str], tuple[bool, str | None]],
) -> Row:  # fmt: skip
    """Runs that a signal ends, from the `first` call of a phase on and at most a share of `most` into it. Only those
    count in which it fired: one that came after the end of the run is drawn again.

    `judge`: of the exit code and what was printed, whether it fired, and what was wrong with the end; None: nothing.
    """
    late = 0
    while row.tried < count:
        phase, number = list(PHASES)[row.tried % len(PHASES)], numbers[row.tried % len(numbers)]
        call, share = bench.random.randint(first, PHASES[phase][1]), most * bench.random.random()
        folder = bench.fresh()
        ended = bench.run(folder, phase, call, share, number)
        fired, fault = judge(*ended)
        if not fired and bench.result(ended) and late < count:
            late += 1
        else:
            what = f"{signal.Signals(number).name} in {phase} {call}, {share:.0%} into it"
            row.count(what, fault or bench.goes_on(folder))
        shutil.rmtree(folder, ignore_errors=True)
    return row


def kills(bench: Bench, count: int) -> Row:
    def judge(code: int, text: str) -> tuple[bool, str | None]:
        fired = code == -signal.SIGKILL
        return fired, None if fired else f"it ended with {code}"

    row = Row("killed (SIGKILL) in rollout, loss, update, save, evaluation; each kill fired")
    return _ended_by(bench, row, count, (signal.SIGKILL,), 1, 1.0, judge)


def chains(bench: Bench, count: int) -> Row:
    row = Row("one run killed again and again, 4 times; each kill fired")
    for _ in range(count):
        folder, codes = bench.fresh(), []
        for _ in range(4):
            phase = bench.random.choice(("rollout", "loss", "update"))  # of these each start has several
            codes.append(bench.run(folder, phase, bench.random.randint(1, 3), bench.random.random())[0])
        fault = None if codes == [-signal.SIGKILL] * 4 else f"they ended with {codes}"
        row.count("4 kills", fault or bench.goes_on(folder))
    return row


def signals(bench: Bench, count: int) -> Row:
    def judge(code: int, text: str) -> tuple[bool, str | None]:
        if code != 0 or "Stopped by" not in text:
            return False, f"it ended with {code}: {last_line(text)}"
        told = "after step" in text or "before the " in text
        return True, None if told else "it does not say what is kept"

    row = Row("SIGINT, SIGTERM, SIGHUP: what was learned is saved, and it goes on")
    return _ended_by(bench, row, count, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), 2, 0.5, judge)


def twins(bench: Bench, count: int) -> Row:
    row = Row("two runs on one folder at once: one is told who holds it")
    for _ in range(count):
        folder = bench.fresh()
        both = [bench.start(folder), bench.start(folder)]
        ended = [(process.communicate(timeout=600), process.returncode) for process in both]
        texts = [out + err for (out, err), _ in ended]
        results = [bench.result((0, text)) for text in texts]
        whole = sum(result is not None and result["weights"] == bench.whole["weights"] for result in results)
        told = sum("is in use by" in text for text in texts)
        row.count("twins", None if whole + told == 2 and whole else f"{whole} whole, {told} told")
    return row


def disks(bench: Bench) -> Row:
    row = Row("disk full, file too large, read-only, folder gone: named with path and GB, and it goes on")
    disk = bench.root / "disk"

    def named(what: str, ended: tuple[int, str], folder: Path) -> None:
        last = ended[1].strip().splitlines()[-1]
        fault = None if "FolderError" in last and str(disk) in last else f"not named: {last[:200]}"
        moved = bench.fresh()  # a larger disk
        if folder.is_dir():
            shutil.copytree(folder, moved)
        row.count(what, fault or bench.goes_on(moved))

    for megabytes, room in ((12, 1), (25, 1), (12, 0), (25, 0), (28, 0)):
        disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", disk], check=True)
        try:
            named(f"tmpfs of {megabytes} MB{'' if room else ', found out in a save'}",
                  bench.run(disk / "run", room=room), disk / "run")  # fmt: skip
        finally:
            subprocess.run(["umount", disk], check=True)
    for room in (1, 0):
        named("files of at most 5 MB", bench.run(disk / f"limited{room}", room=room, before="ulimit -f 5000"),
              disk / f"limited{room}")  # fmt: skip
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], check=True)
    try:
        named("read-only", bench.run(disk / "run"), disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)
    row.count("folder deleted while it runs", _same(bench, bench.run(bench.fresh(), "vanish")))
    return row


def _same(bench: Bench, ended: tuple[int, str]) -> str | None:
    result = bench.result(ended)
    return None if result == bench.whole else f"it ended with {last_line(ended[1])}"


def flips(bench: Bench, count: int) -> Row:
    from nbhelpers.training import checkpoint

    row = Row("one bit flipped in a file of the newest checkpoint: the one before is taken, or it was harmless")
    folder = bench.undisturbed
    newest = checkpoint.newest(folder)
    assert newest is not None
    manifest = checkpoint.read(newest)
    files = sorted(path for path in newest.iterdir() if path.is_file())
    for i in range(count):
        file = files[i % len(files)]
        whole = file.read_bytes()
        bit = bench.random.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            found = checkpoint.newest(folder)
            fine = found is not None and (found != newest or checkpoint.read(found) == manifest)
            fault = None if fine else f"{found} is taken"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        file.write_bytes(whole)
        row.count(f"{file.name}, bit {bit}", fault)
    return row


def bad_inputs(bench: Bench) -> Row:
    """Those of tests/helpers/bad_inputs.py."""
    from bad_inputs import CASES

    row = Row("bad settings, rows, files and models: a sentence that names what is wrong, or a row left out by name")
    for name, fault_of in CASES:
        folder = bench.fresh()
        row.count(name, fault_of(folder))
        shutil.rmtree(folder, ignore_errors=True)
    return row


def long_run(bench: Bench, steps: int) -> Row:
    """Memory, descriptors, threads and shared memory after a tenth of a run of many short steps, and at its end."""
    row = Row(f"{steps:,} short steps: memory, descriptors, threads, /dev/shm flat")
    if not steps:
        return row
    command = [*bench.python, torture_run.__file__, "long", str(bench.fresh()), str(steps)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    lines = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        row.count("run", f"it ended: {last_line(out.stdout + out.stderr)}")
        return row
    early, late = json.loads(lines[-1].removeprefix("RESULT "))
    grown = (late["rss"] - early["rss"]) / 1e6
    row.name += f" (RSS {early['rss'] / 1e6:.0f} to {late['rss'] / 1e6:.0f} MB)"
    for name in ("fds", "threads", "shm"):
        row.count(name, None if late[name] <= early[name] else f"{early[name]} to {late[name]}")
    row.count("RSS", None if grown < 0.03 * steps else f"{grown:.1f} MB more")  # TRL's own log grows by 10 kB a step
    return row


# ------------------------------------------------------------------------------------------------- the table


def table(rows: list[Row]) -> str:
    lines = ["| what was done | tried | held | lost |", "| --- | ---: | ---: | ---: |"]
    return "\n".join([*lines, *(f"| {r.name} | {r.tried} | {r.held} | {len(r.lost)} |" for r in rows if r.tried)])


def write(rows: list[Row], command: str, seconds: float) -> None:
    """Put the table into docs/reliability.md, between its two marks."""
    from nbhelpers import host
    from nbhelpers.panel import history

    versions = ", ".join(f"{name} {number}" for name, number in host.versions().items())
    lost = "".join(f"\n- {fault}" for row in rows for fault in row.lost)
    text = (f"Run on {date.today().isoformat()} on {history.hardware()}, {versions}, in {seconds / 60:.0f} minutes, by "
            f"`{command}`.\n\n{table(rows)}\n" + (f"\nWhat was lost:\n{lost}\n" if lost else ""))  # fmt: skip
    before, mark, rest = PAGE.read_text().partition("<!-- torture -->\n")
    _, end, after = rest.partition("<!-- /torture -->")
    PAGE.write_text(before + mark + text + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 50), ("chains", 3), ("signals", 30), ("twins", 5), ("flips", 400), ("steps", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    asked, begun = parser.parse_args(), time.monotonic()
    with warm_python.server() as python, tempfile.TemporaryDirectory() as root:
        bench = Bench(python, Path(root), asked.seed)
        rows = [kills(bench, asked.kills), chains(bench, asked.chains), signals(bench, asked.signals),
                twins(bench, asked.twins), flips(bench, asked.flips), bad_inputs(bench)]  # fmt: skip
        if os.geteuid() == 0 and sys.platform == "linux":
            rows.append(disks(bench))
        rows.append(long_run(bench, asked.steps))
    print(table(rows))
    if asked.write:
        write(rows, " ".join(["python tests/helpers/torture.py", *sys.argv[1:]]), time.monotonic() - begun)
    sys.exit(any(row.lost for row in rows))


if __name__ == "__main__":
    main()
