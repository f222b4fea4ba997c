"""Does a real model learn from the notebook as it stands? Its own cells, on weights that people use.

    python -m benchmarks.real --weights qwen.gguf --questions FOLDER --mode 7GB      bf16, under 7 GB by the driver
    python -m benchmarks.real --weights qwen.gguf --questions FOLDER --mode t4       fp16, as a T4 would, under 15 GB
    python -m benchmarks.real --weights qwen.gguf --questions FOLDER --prompts       which system prompt is followed?
    python -m benchmarks.real --join runs/a/real.json runs/b/real.json

The code is that of notebooks/models/qwen2.5-1.5b.ipynb, cell by cell, with three things exchanged: the weights (a
GGUF file or a folder), the questions (FOLDER/train.jsonl, test_numbers.jsonl, test_templates.jsonl with the columns
question and answer, the answer behind "####"), and the number of steps. Weights and questions are for measuring:
neither is shipped with this project.

`right` is in whatever form, `in_form` between the tags, right or wrong; shares with their 95 % interval (Wilson).
`numbers` and `templates` are the two test files, `own_templates` held-out stories of `tasks.word_problems`, `decimals`
which of two is bigger. `pass_8_before` is what the model could do with eight tries before the training, on `numbers`.
`plain`: what was asked of it that has nothing to do with the task, right before and after.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common, harness

from . import cells

MODES = {"7GB": 7.0, "t4": 15.0}  # GB of the process, by the driver


def rows_of(report: dict[str, Any], label: str) -> list[common.Row]:
    """The report of one run as rows of a results file."""
    rows = []
    for name, share in report["shares"].items():
        interval = {key: round(share[key], 4) for key in ("low", "high")}
        rows.append(common.row(f"{label}/{name}", "ours", round(share["value"], 4), "share", n=share["n"], **interval))
    for name, unit in (("seconds", "s"), ("steps", "steps"), ("peak_driver", "GB"), ("stopped_at", "steps")):
        if report.get(name) is not None:
            rows.append(common.row(f"{label}/{name}", "ours", round(report[name], 3), unit, **report["settings"]))
    for i, probe in enumerate(report["probes"]):
        rows.append(common.row(f"{label}/probe_{i}", "ours", float(probe["right_after"]), "1 = right", **probe))
    return rows


def run(args: argparse.Namespace) -> list[common.Row]:
    """One run of the notebook in a process of its own."""
    label = f"{args.model}/{args.label or args.mode}" + (f"/seed-{args.seed}" if args.seed else "")
    with tempfile.TemporaryDirectory() as folder:
        job = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        job |= {"folder": folder, "cap": MODES[args.mode]}
        if args.prompts:
            job["cap"] = None
        started = time.time()
        code = cells.prompts(job) if args.prompts else cells.notebook(job)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(common.ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, env=environment)
        print(f"exit {done.returncode} after {time.time() - started:.0f} s", flush=True)
        report = Path(folder, "report.json")
        if not report.exists():
            return []
        found = json.loads(report.read_text())
    if args.prompts:
        return [common.row(f"{args.model}/{name}", "ours", round(value, 4), "share", **more)
                for name, value, more in found]  # fmt: skip
    if args.out and "live" in found:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, f"{label.replace('/', '-')}-run.json").write_text(found["live"])
    return rows_of(found, label)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--weights", type=Path, help="a GGUF file, or a folder with safetensors")
    parser.add_argument("--questions", type=Path, help="a folder with the three files")
    parser.add_argument("--model", default="qwen2.5-coder-1.5b", help="what the rows call the model")
    parser.add_argument("--mode", choices=MODES, default="7GB")
    parser.add_argument("--label", help="what the rows call the run, if not its mode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--train-on", choices=("questions", "word_problems"), default="questions")
    parser.add_argument("--preset", default="{}", help="JSON of what to change in the preset; a system_prompt by name")
    parser.add_argument("--prompts", action="store_true", help="measure the system prompts instead")
    parser.add_argument("--n", type=int, default=400, help="test questions of each kind")
    args = parser.parse_args()
    if args.join:
        common.join("real", args.join, args.out or common.RESULTS)
        return
    rows = run(args)
    if not rows:
        sys.exit("the run left no report")
    common.publish("real", rows, args.out)
    print(common.table(rows))


if __name__ == "__main__":
    main()
