"""Fault injection: runs are killed, signalled, put on full disks, doubled and damaged, and must go on bit for bit.

    make torture                                                  # everything, into docs/reliability.md; an hour
    python tests/helpers/torture.py --kills 5 --flips 40          # less, to the terminal

Each row of the table says what was tried, in how many cases it held and in how many something was lost: a step that had
been saved, a number that differs from the undisturbed run's, an error that does not say what to do. Linux; the small
disks need root, the quota a C compiler. A small half of it is in tests/training/test_torture.py.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torture_long
import torture_two
import warm_python
from torture_bench import Bench, Row, last_line
from torture_disks import disks, quotas
from torture_run import PHASES

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


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
    for name, default in (("kills", 50), ("chains", 3), ("signals", 30), ("twins", 5), ("flips", 400), ("steps", 2000),
                          ("two", 20)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    asked, begun = parser.parse_args(), time.monotonic()
    rows: list[Row] = []

    def done(row: Row) -> None:
        """What was run stands in the page, whatever becomes of the rest."""
        rows.append(row)
        if asked.write:
            write(rows, " ".join(["python tests/helpers/torture.py", *sys.argv[1:]]), time.monotonic() - begun)

    with warm_python.server() as python, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bench = Bench(python, root, asked.seed)
        long = torture_long.begin(bench, asked.steps) if asked.steps else None
        done(kills(bench, asked.kills))
        done(chains(bench, asked.chains))
        if asked.two:
            done(torture_two.kills(torture_two.TwoProcesses(python, root, asked.seed), asked.two))
        done(signals(bench, asked.signals))
        done(twins(bench, asked.twins))
        done(flips(bench, asked.flips))
        done(bad_inputs(bench))
        if sys.platform == "linux":
            done(disks(bench))
            done(quotas(bench))
        done(torture_long.leaks(bench))
        if long is not None:
            done(torture_long.long_run(bench, long, asked.steps))
    print(table(rows))
    sys.exit(any(row.lost for row in rows))


if __name__ == "__main__":
    main()
