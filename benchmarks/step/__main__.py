"""The training half of a GRPO step against TRL's own, on identical tokens, weights and adapters.

    python -m benchmarks.step --first              about 90 s: is it right on this GPU, one small case
    python -m benchmarks.step --only qwen2.5-1.5b llama-3.1-8b --minutes 9 --out runs/a    two calls, and then one file
    python -m benchmarks.step --only phi-4 --minutes 9 --out runs/b
    python -m benchmarks.step --join runs/a/step.json runs/b/step.json
    python -m benchmarks.step --only llama-3.2-1b --jobs online_dpo ppo --out runs/methods    whole steps of those
    python -m benchmarks.step --quick              tiny shapes on a CPU: does the script run at all?

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
import tempfile
import time
from pathlib import Path

from benchmarks import common, harness

from . import cases, check, methods, trl

KINDS = {
    "check": check.check,
    "errors": check.errors,
    "ours": cases.ours,
    "groups": cases.groups,
    "trl": trl.measure,
    "t4": cases.t4,
    "online_dpo": methods.step,
    "ppo": methods.step,
}
ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TOKENIZERS_PARALLELISM": "false"}


def jobs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(preset, kind) of what to run, in order."""
    names = args.only or list(cases.GOALS)
    if args.first or args.quick:
        return [(names[0], kind) for kind in args.jobs or (("check", "errors", "ours") if args.first else KINDS)]
    kinds = args.jobs or [kind for kind in KINDS if kind != "check"]
    # made for one preset each
    only = {"errors": "qwen2.5-1.5b", "groups": "llama-3.1-8b", "online_dpo": "llama-3.2-1b", "ppo": "llama-3.2-1b"}
    return [(name, kind) for kind in kinds for name in names if only.get(kind, name) == name or args.jobs]


def run(job: harness.Job, seconds: float) -> list[common.Row]:
    """One job in a process of its own. Rows that were written before a failure count."""
    environment = os.environ | ENVIRONMENT | ({"NBHELPERS_SMOKE": "1"} if job["quick"] else {})
    code = harness.run_child("benchmarks.step", job, seconds, environment)
    print(f"  exit {code}" if code else "  done", flush=True)
    return harness.read_rows(Path(job["file"]))


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--only", nargs="*", help="presets")
    parser.add_argument("--jobs", nargs="*", help=f"of: {' '.join(KINDS)}")
    parser.add_argument("--lengths", nargs="*", help=f"of: {' '.join(cases.LENGTHS)}")
    parser.add_argument("--margin", type=float, default=0.1, help="GB below a cell's goal that the step is given")
    parser.add_argument("--minutes", type=float, default=60, help="no job is started after that")
    args = parser.parse_args()
    if args.child:
        job = cases.Job(**json.loads(args.child))
        KINDS[job.kind](job)
        return
    if args.join:
        common.join("step", args.join, args.out or common.RESULTS)
        return
    start = time.monotonic()
    rows: list[common.Row] = []
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
                print(f"  {common.publish('step', rows, args.out)}", flush=True)
    print(f"{time.monotonic() - start:.0f} s")
    if rows:
        print(common.table(rows))


if __name__ == "__main__":
    main()
