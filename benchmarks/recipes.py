"""Does the recipe of DeepSeek-R1 work on the workshop model? Lesson 6 from its first cell to its last, as a script.

    python -m benchmarks.recipes --seed 0      workshop/r1_recipe/seed-0/accuracy_after, ...

One run a call; its rows replace those of the same seed in benchmarks/results/recipes.json. A row without a seed is the
worst of its seeds. `accuracy_zero` is R1-Zero: RL alone, with as many updates as both RL stages have together. `tokens`
of a row is the mean length of those answers. `seconds` is the whole lesson.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.real.__main__ import worst

RESULT = "recipes"
NOTEBOOK = common.ROOT / "notebooks" / "06_r1_recipe.ipynb"


def script(parameters: str) -> str:
    """The notebook's code with other parameters; without its install cell."""
    parts = ["import matplotlib", 'matplotlib.use("Agg")']
    for tags, source in common.code_cells(NOTEBOOK):
        parts += [source, parameters] if "parameters" in tags else [source]
    return "\n\n".join(parts)


def rows_of(seed: int, parameters: str = "", python: Sequence[str] = (sys.executable,)) -> list[common.Row]:
    """The lesson once, in a process of its own, which `python` starts."""
    with tempfile.TemporaryDirectory() as out:
        code, began = script(f"SEED = {seed}\nOUT = {out!r}\n{parameters}"), time.time()
        places = os.pathsep.join([str(common.ROOT), os.environ.get("PYTHONPATH", "")])
        subprocess.run([*python, "-c", code], cwd=out, check=True, env=os.environ | {"PYTHONPATH": places})
        seconds = time.time() - began
        report = json.loads(Path(out, "report.json").read_text())
    label, rows = f"workshop/r1_recipe/seed-{seed}", []
    for what, stage in (("before", "base"), ("zero", "R1-Zero"), ("rl", "2 RL"), ("sft", "4 SFT"), ("after", "5 RL")):
        share, tokens = report[stage]["accuracy"], round(report[stage]["tokens"], 1)
        interval = {key: round(share[key], 4) for key in ("low", "high")}
        about = {"n": share["n"], "seed": seed, "tokens": tokens, **interval}
        rows.append(common.row(f"{label}/accuracy_{what}", "ours", round(share["value"], 4), "share", **about))
    rows.append(common.row(f"{label}/seconds", "ours", round(seconds, 1), "s"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the results file, instead of benchmarks/results")
    args = parser.parse_args()
    rows = common.merged(RESULT, rows_of(args.seed), worst)
    common.publish(RESULT, rows, args.out)
    print(common.table(rows))


if __name__ == "__main__":
    main()
