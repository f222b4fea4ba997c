"""How much faster than before? The table of speeds as ratios to another tree of this repository, on the same card.

    git worktree add ../before f990437
    python -m benchmarks.ratios --base ../before               # a GPU of 80 GB, about 7 minutes, 25 GB of disk
    python -m benchmarks.ratios --base ../before --only qwen-train llama-decode --out runs/x
    python -m benchmarks.ratios --base ../before --smoke       # a CPU: tiny shapes, proves the script, no results file

Each case runs in a process of its own, once with each tree, the two one after the other and taking turns to be first;
cases.py measures both with the same code. Rows are "ours" and "before"; `ratio` is ours over before's, of seconds as of
tokens/s. All processes import first, side by side, and are then let go one by one. Before that every case runs once
with one layer, all at the same time: Triton compiles then, for both. Rows are written after each case; one that fails
or takes too long leaves what it had. A case's `note` says where a row is computed from less than the table names.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, harness
from benchmarks.harness import Job

SCRIPT = Path(__file__).with_name("cases.py")
QWEN, LLAMA = "qwen2.5-1.5b", "llama-3.1-8b"
BUDGETS = (("3GB", 3), ("4GB", 4), ("6GB", 6), ("8GB", 8), ("15GB", 15), ("roomy", None))

# by what a second of the card's time is worth: (case, seconds for each tree, job)
CASES: dict[str, tuple[int, Job]] = {
    "llama-decode": (75, {"kind": "decode", "model": LLAMA, "batches": [8, 128], "launches": 8, "dynamic": 8,
                          "prefill": True}),
    "qwen-train": (60, {"kind": "train", "model": QWEN, "cells": [(f"4K-{n}", 8, 4096, gb) for n, gb in BUDGETS]}),
    "llama-train": (60, {"kind": "train", "model": LLAMA,
                         "cells": [("1K-roomy", 8, 1024, None), ("20K-9.3GB", 1, 20480, 9.3)]}),
    "qwen-decode": (50, {"kind": "decode", "model": QWEN, "batches": [8, 32, 128]}),
    "qwen-step": (60, {"kind": "grpo", "model": QWEN, "cap": 4.0}),
    "llama-load": (60, {"kind": "load", "model": LLAMA}),
    "phi-decode": (75, {"kind": "decode", "model": "phi-4", "batches": [8, 128]}),
}  # fmt: skip
WARM = 100  # seconds for all cases with one layer, side by side
DISK = {LLAMA: 25e9, QWEN: 6e9}  # bytes of a checkpoint in 16 bits and of its packed copy


class Child:
    """A process that imports at once and measures when it is told to."""

    def __init__(self, job: Job):
        self.job = job
        # without other copies of this project: an older tree's `benchmarks`, no package yet, would give way to theirs
        more = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
                if path and not Path(path, "nbhelpers").exists()]  # fmt: skip
        paths = os.pathsep.join([job["tree"], *more])  # absolute: it starts elsewhere
        environment = os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-P", str(SCRIPT), json.dumps(job)]
        self.process = subprocess.Popen(command, cwd=job["tree"], env=environment, stdin=subprocess.PIPE)

    def imported(self, seconds: float = 90) -> None:
        """Wait until it has imported, so that no two do so while one measures, or has failed."""
        ready, until = Path(self.job["out"] + self.job["ready"]), time.perf_counter() + seconds
        while not ready.exists() and self.process.poll() is None and time.perf_counter() < until:
            time.sleep(0.05)

    def go(self) -> None:
        """Let it measure."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has failed by now: `end` says so
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()

    def end(self, seconds: float) -> None:
        """Wait for it, so long at most."""
        start = time.perf_counter()
        try:
            code: int | str = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds:.0f} s"
        self.stop()
        kind = "warm-up" if self.job["warm"] else self.job["who"]
        print(f"-- {self.job['case']} {kind}: {time.perf_counter() - start:.0f} s, exit {code}", flush=True)

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()


def jobs(args: argparse.Namespace, work: Path) -> list[Job]:
    """Every case for both trees, in the order in which they run."""
    every: list[Job] = []
    for number, name in enumerate(args.only or CASES):
        seconds, case = CASES[name]
        common_part = {**case, "case": name, "seconds": seconds, "smoke": args.smoke, "warm": False,
                       "out": str(work / "rows.jsonl")}  # fmt: skip
        if args.smoke:
            tiny = {"batches": [2, 4], "launches": 2, "dynamic": 2}
            common_part |= {key: value for key, value in tiny.items() if key in case}
        pair: list[Job] = [{**common_part, "who": "before", "tree": str(args.base.resolve())},
                           {**common_part, "who": "ours", "tree": str(common.ROOT)}]  # fmt: skip
        if case["kind"] == "load":
            room = shutil.disk_usage(work).free
            model = LLAMA if args.smoke or room > DISK[LLAMA] else QWEN
            print(f"{room / 1e9:.0f} GB of disk: {model} is loaded", flush=True)
            for job in pair:
                job |= {"model": model, "folder": str(work / "checkpoint" / model)}
            every.append({**pair[1], "kind": "checkpoint", "case": f"{name}: checkpoint", "seconds": 100})
        every += pair if number % 2 == 0 else pair[::-1]
    return [{**job, "ready": f"-{number}"} for number, job in enumerate(every)]


def with_ratios(rows: list[common.Row]) -> list[common.Row]:
    """The rows, each with its value over before's."""
    before = {row["what"]: row["value"] for row in rows if row["who"] == "before"}
    of = {what: value for what, value in before.items() if value > 0}
    return [row | ({"ratio": round(row["value"] / of[row["what"]], 4)} if row["what"] in of else {}) for row in rows]


def run(args: argparse.Namespace, work: Path) -> list[common.Row]:
    """All cases; returns the rows."""
    start, file = time.perf_counter(), work / "rows.jsonl"
    planned, rows = jobs(args, work), list[common.Row]()
    if not args.smoke:  # compiles; a CPU has nothing to compile
        compiling = [job for job in planned if job["kind"] in ("decode", "train", "grpo")]
        warm = [Child({**job, "warm": True, "ready": f"{job['ready']}-warm"}) for job in compiling]
        for child in warm:
            child.go()
        for child in warm:
            child.end(WARM - (time.perf_counter() - start))
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    waiting = [] if args.smoke else [Child(job) for job in planned]
    try:
        for child in waiting:
            child.imported()
        print(f"imported after {time.perf_counter() - start:.0f} s", flush=True)
        for index, job in enumerate(planned):
            left = 60 * args.minutes - (time.perf_counter() - start)
            if left < 5:
                print(f"{args.minutes} minutes are over: {job['case']} {job['who']} is left out", flush=True)
                continue
            child = Child(job) if args.smoke else waiting[index]
            waiting += [child] if args.smoke else []
            child.imported()
            child.go()
            child.end(min(600 if args.smoke else job["seconds"], left))
            rows = with_ratios(harness.read_rows(file))
            if rows and (args.out or not args.smoke):
                common.publish("ratios", rows, args.out)
    finally:
        for child in waiting:
            child.stop()
    return rows


def table(rows: list[common.Row]) -> str:
    """A line for each row of ours: what, before, ours, ratio."""
    values: dict[tuple[str, str], Any] = {(row["what"], row["who"]): row for row in rows}
    lines = []
    for what in dict.fromkeys(row["what"] for row in rows):
        before, ours = (values.get((what, who), {}) for who in ("before", "ours"))
        unit = (ours or before)["unit"]
        numbers = [f"{each.get('value', float('nan')):12.4f}" for each in (before, ours)]
        lines.append(f"{what:44s} {numbers[0]} {numbers[1]} {unit:9s} {ours.get('ratio', float('nan')):.3f} x")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the tree that this one is compared with")
    parser.add_argument("--only", nargs="+", choices=CASES, help="these cases, in this order")
    parser.add_argument("--minutes", type=float, default=7.0, help="no case begins after that, and none goes on")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made, on a local disk; a temporary one")
    parser.add_argument("--out", type=Path, help="folder of the results file, instead of benchmarks/results")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if not (args.base / "nbhelpers" / "__init__.py").exists():
        parser.error(f"--base {args.base} holds no nbhelpers: git worktree add {args.base} f990437")
    if not args.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU: --smoke runs the script on a CPU, with tiny shapes")
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        print(table(run(args, Path(work))))


if __name__ == "__main__":
    main()
