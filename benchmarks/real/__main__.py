"""Does a real model learn from the notebook as it stands? Its own cells, on weights that people use.

    python -m benchmarks.real --weights qwen.gguf --questions FOLDER --mode 7GB      bf16, under 7 GB by the driver
    python -m benchmarks.real --weights qwen.gguf --questions FOLDER --mode t4       fp16, as a T4 would, under 15 GB
    python -m benchmarks.real --weights qwen.gguf --questions FOLDER --prompts       which system prompt is followed?
    python -m benchmarks.real --weights qwen.gguf --questions FOLDER --against-trl   the same steps, and by TRL + vLLM
    python -m benchmarks.real --weights qwen.gguf --questions FOLDER --executed FILE --about "Qwen2.5, a GGUF"
                                                                   by Jupyter; FILE gets the notebook with its outputs
    python -m benchmarks.real --join runs/a/real.json runs/b/real.json

The code is that of notebooks/models/qwen2.5-1.5b.ipynb, cell by cell, with three things exchanged: the weights (a
GGUF file or a folder), the questions (FOLDER/train.jsonl, test_numbers.jsonl, test_templates.jsonl with the columns
question and answer, the answer behind "####"), and the number of steps. Weights and questions are for measuring:
neither is shipped with this project.

`right` is in whatever form, `in_form` between the tags, right or wrong; shares with their 95 % interval (Wilson).
`numbers` and `templates` are the two test files, `own_templates` held-out stories of `tasks.word_problems`, `decimals`
which of two is bigger. `pass_8_before` is what the model could do with eight tries before the training, on `numbers`.
`plain`: what was asked of it that has nothing to do with the task, right before and after. `in_form_after` is over both
test files. A row without a seed is the worst of its seeds.
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

from . import against_trl, cells

MODES = {"7GB": 7.0, "t4": 15.0}  # GB of the process, by the driver


def rows_of(report: dict[str, Any], label: str) -> list[common.Row]:
    """The report of one run as rows of a results file."""
    rows = [common.share(f"{label}/{name}", share) for name, share in report["shares"].items()]
    if "curve" not in report:  # --before-only
        return rows
    for name, unit in (("seconds", "s"), ("steps", "steps"), ("peak_driver", "GB"), ("stopped_at", "steps")):
        if report.get(name) is not None:
            rows.append(common.row(f"{label}/{name}", "ours", round(report[name], 3), unit, **report["settings"]))
    rows.append(common.row(f"{label}/curve", "ours", report["steps"], "steps", points=report["curve"]))
    for i, probe in enumerate(report["probes"]):
        rows.append(common.row(f"{label}/probe_{i}", "ours", float(probe["right_after"]), "1 = right", **probe))
    return rows


def worst(rows: list[common.Row]) -> list[common.Row]:
    """`rows`, and for each "model/mode/seed-0/name" a row "model/mode/name": the worst of the seeds."""
    seeds: dict[str, list[common.Row]] = {}
    rest = [row for row in rows if "of_seeds" not in row]
    for row in rest:
        head, found, tail = row["what"].partition("/seed-")
        if found:
            seeds.setdefault(f"{head}/{tail.partition('/')[2]}", []).append(row)
    summary = []
    for what, several in seeds.items():
        high_is_bad = what.endswith(("_before", "/seconds", "/peak", "/peak_driver", "/steps"))
        chosen = (max if high_is_bad else min)(several, key=lambda row: row["value"])
        summary.append(chosen | {"what": what, "of_seeds": len(several)})
    return summary + rest


def run(args: argparse.Namespace) -> list[common.Row]:
    """One run of the notebook in a process of its own."""
    label = f"{args.model}/{args.label or args.mode}/seed-{args.seed}"
    with tempfile.TemporaryDirectory() as folder:
        job = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        job |= {"folder": folder, "cap": MODES[args.mode]}
        if args.prompts:
            job["cap"] = None
        started = time.time()
        places = os.pathsep.join([str(common.ROOT), os.environ.get("PYTHONPATH", "")])
        if args.executed:
            from . import executed  # Jupyter, which a machine that only measures may lack

            os.environ["PYTHONPATH"] = places
            executed.run(job, args.executed)
        else:
            code = cells.prompts(job) if args.prompts else cells.notebook(job)
            environment = os.environ | {"PYTHONPATH": places}
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
    return worst(rows_of(found, label))


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
    parser.add_argument("--after-only", action="store_true", help="no scores before: they are another seed's")
    parser.add_argument("--before-only", action="store_true", help="the scores of the untrained model, and no training")
    parser.add_argument("--executed", type=Path, help="run by Jupyter, and the notebook with its outputs written there")
    parser.add_argument("--about", default="", help="what the notebook's first output says of the weights")
    parser.add_argument("--against-trl", nargs="*", choices=("ours", "trl"), help="curves and seconds; both, or one")
    parser.add_argument("--n", type=int, default=400, help="test questions of each kind")
    args = parser.parse_args()
    if args.join:
        common.join("real", args.join, args.out or common.RESULTS, worst)
        return
    if args.child:
        against_trl.child(json.loads(args.child))
        return
    rows = against_trl.run(args) if args.against_trl is not None else run(args)
    if not rows:
        sys.exit("the run left no report")
    common.publish("real", rows, args.out)
    print(common.table(rows))


if __name__ == "__main__":
    main()
