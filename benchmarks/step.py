"""The training half of a GRPO step against TRL's own, on identical tokens, weights and adapters.

    python benchmarks/step.py --first              about 90 s: is it right on this GPU, one small case
    python benchmarks/step.py --only qwen2.5-1.5b llama-3.1-8b --minutes 9 --out runs/a    two calls, and then one file
    python benchmarks/step.py --only phi-4 --minutes 9 --out runs/b
    python benchmarks/step.py --join runs/a/step.json runs/b/step.json
    python benchmarks/step.py --quick              tiny shapes on a CPU: does the script run at all?

Random weights at the presets' real shapes, made and quantised to NF4 on the card; LoRA of rank 16 on all linear layers,
fp32; 8-bit Adam's states are there; 8 completions of one prompt of 256 tokens, all of full length, loss "grpo", one
update a rollout. "ours" is objective.run under a `budget_gb` a little below the goal of that cell; "trl" is
GRPOTrainer.compute_loss and backward with gradient checkpointing, 1, 2 or 8 rows at once (`trl-1`, ...; "trl" is the
fastest of them, and the smallest peak of them). At 20K one of TRL's eight rows is run and its time multiplied by 8.

train_peak: torch's allocations, GB of 10^9 bytes; train_peak_driver: what the driver says is taken, context included;
train_time: seconds of one forward and backward of the batch, median. "planner" is memory.plan's prediction. t4: fp16,
memory-efficient attention only, loss scaled by 1024; its time is not a T4's. Every job is a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# not this folder: transformers would take kernels.py for the package `kernels`
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, step_child  # noqa: E402

JOBS = ("check", "errors", "ours", "groups", "trl", "t4")
ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TOKENIZERS_PARALLELISM": "false"}


def jobs(args) -> list[tuple[str, str]]:
    """(preset, kind) of what to run, in order."""
    names = args.only or list(step_child.GOALS)
    if args.first or args.quick:
        return [(names[0], kind) for kind in args.jobs or (("check", "errors", "ours") if args.first else JOBS)]
    kinds = args.jobs or JOBS[1:]
    only = {"errors": "qwen2.5-1.5b", "groups": "llama-3.1-8b"}  # made for one preset each
    return [(name, kind) for kind in kinds for name in names if only.get(kind, name) == name or args.jobs]


def run(job: dict, seconds: float) -> list[dict]:
    """One job in a process of its own. Rows that were written before a failure count."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]
    environment = os.environ | ENVIRONMENT | ({"NBHELPERS_SMOKE": "1"} if job["quick"] else {})
    try:
        code = subprocess.run(command, env=environment, timeout=seconds).returncode
        print(f"  exit code {code}" if code else "  done", flush=True)
    except subprocess.TimeoutExpired:
        print("  stopped: --minutes is used up", flush=True)
    file = Path(job["file"])
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--only", nargs="*", help="presets")
    parser.add_argument("--jobs", nargs="*", help=f"of: {' '.join(JOBS)}")
    parser.add_argument("--lengths", nargs="*", help=f"of: {' '.join(step_child.LENGTHS)}")
    parser.add_argument("--margin", type=float, default=0.1, help="GB below a cell's goal that the step is given")
    parser.add_argument("--minutes", type=float, default=60, help="no job is started after that")
    parser.add_argument("--out", type=Path, help="where step.json is written, instead of benchmarks/results")
    parser.add_argument("--join", nargs="+", type=Path, help="measure nothing, put the rows of these files together")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        step_child.main(json.loads(args.child))
        return
    if args.join:
        common.join("step", args.join, args.out or common.RESULTS)
        return
    start, rows = time.monotonic(), []
    lengths = args.lengths or (["1K"] if args.first else [])
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, kind) in enumerate(jobs(args)):
            passed = time.monotonic() - start
            print(f"{name} {kind} ({passed:.0f} s)", flush=True)
            if (left := args.minutes * 60 - passed) < 20:
                print("  not started: --minutes is used up", flush=True)
                continue
            file = str(Path(folder, f"{number}.jsonl"))
            rows += run({"preset": name, "kind": kind, "file": file, "quick": args.quick, "margin": args.margin,
                         "lengths": lengths}, left)  # fmt: skip
            if rows and not (args.quick or args.first):
                print(f"  {common.write('step', rows, args.out or common.RESULTS)}", flush=True)
                if out := os.environ.get("OUT"):
                    common.write("step", rows, Path(out))
    print(f"{time.monotonic() - start:.0f} s")
    if rows:
        print(common.table(rows))


if __name__ == "__main__":
    main()
