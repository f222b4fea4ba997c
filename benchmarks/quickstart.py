"""The quickstart on a CPU: three seeds as it stands, and one with the model in NF4 with LoRA, as large models learn.

    python benchmarks/quickstart.py

Runs notebooks/00_quickstart.ipynb in a fresh process each time, on 512 held-out pairs at temperature 1, and writes
benchmarks/results/quickstart.json. `seconds` is GRPO alone, `run_seconds` the whole notebook.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

ROOT = Path(__file__).parents[1]
RUNS = {
    **{f"seed-{seed}": [f"SEED={seed}"] for seed in (0, 1, 2)},
    "nf4-lora-16": ["QUANTIZATION=nf4", "LORA_RANK=16", "LEARNING_RATE=0.003"],
}


def rows_of(name: str, parameters: list[str]) -> list[dict]:
    """Run the notebook once and read its report.json."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "notebooks/run.py", "notebooks/00_quickstart.ipynb", out]
        started = time.time()
        subprocess.run(command + [f"--set={p}" for p in parameters], cwd=ROOT, check=True)
        seconds = time.time() - started
        report = json.loads(Path(out, "report.json").read_text())
    rows = [
        common.row(f"workshop/{name}/run_seconds", "ours", round(seconds, 1), "s"),
        common.row(f"workshop/{name}/seconds", "ours", round(report["seconds"], 1), "s"),
        common.row(f"workshop/{name}/steps", "ours", report["steps"], "steps"),
    ]
    for what in ("accuracy_before", "accuracy_after", "format_before", "format_after"):
        share = report[what]
        interval = {key: round(share[key], 4) for key in ("low", "high")}
        rows.append(
            common.row(f"workshop/{name}/{what}", "ours", round(share["value"], 4), "share", n=share["n"], **interval)
        )
    for what in ("probe_before", "probe_after"):
        rows.append(common.row(f"workshop/{name}/{what}", "ours", float(report[what] or "nan"), "answer"))
    return rows


def main() -> None:
    rows = []
    for name, parameters in RUNS.items():
        rows += rows_of(name, parameters)
        common.write("quickstart", rows)
    print(common.table(rows))


if __name__ == "__main__":
    main()
