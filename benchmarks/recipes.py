"""Does the recipe of DeepSeek-R1 work on the workshop model? Lesson 6 from its first cell to its last, as a script.

    python -m benchmarks.recipes --seed 0      workshop/r1_recipe/seed-0/accuracy_after, ...
    python -m benchmarks.recipes --real WEIGHTS --out runs/r1              the stages on a real 1.5B, on a GPU
    python -m benchmarks.recipes --real WEIGHTS --stages --out runs/long   answers of 256, 512 and 1K tokens, in stages
    python -m benchmarks.recipes --join runs/r1/recipes_gpu.json runs/long/recipes_gpu.json

One run a call; its rows replace those of the same seed in benchmarks/results/recipes.json. A row without a seed is the
worst of its seeds. `accuracy_zero` is R1-Zero: RL alone, with as many updates as both RL stages have together. `tokens`
of a row is the mean length of those answers. `seconds` is the whole lesson.

--real writes recipes_gpu.json, after every stage: what was measured outlives a run that is cut off. In a row of
accuracy_base, _cold_start, _rl, _sft, _after and _zero are `low` and `high` (Wilson, 95 %), `in_form` with its own,
`tokens`, and `steps` and `seconds` of that stage's training. --minutes is for all of the call: RL that would take
longer makes fewer updates, which `steps` says; R1-Zero comes last and gets as many as both RL stages have made. With
--stages `steps_256` and so on are the updates in each stage, and `ended` is what ended it. `points` of a `curve` are
step and what `points_are` says. --gb is the card that is played, as in `benchmarks.real`; 0: as it is. With
NBHELPERS_SMOKE=1 WEIGHTS is any word, and the model a small random one.
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
        tokens = round(report[stage]["tokens"], 1)
        rows.append(common.share(f"{label}/accuracy_{what}", report[stage]["accuracy"], seed=seed, tokens=tokens))
    rows.append(common.row(f"{label}/seconds", "ours", round(seconds, 1), "s"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the results file, instead of benchmarks/results")
    parser.add_argument("--join", nargs="+", type=Path, help="run nothing, put the rows of these files together")
    parser.add_argument("--real", type=Path, metavar="WEIGHTS", help="a GGUF file, or a folder with safetensors")
    parser.add_argument("--stages", action="store_true", help="with --real: length in stages instead of R1's recipe")
    parser.add_argument("--minutes", type=float, default=8.0, help="of a --real call")
    parser.add_argument("--gb", type=float, default=7.0, help="of the card that is played, by the driver; 0: as it is")
    parser.add_argument("--steps", type=int, help="updates of each RL stage, 30; with --stages of the run, 50")
    parser.add_argument("--text-steps", type=int, default=24, help="updates of each SFT, of 16 texts")
    parser.add_argument("--questions-per-step", type=int, default=8, metavar="N")
    parser.add_argument("--sampled", type=int, default=96, help="questions of the rejection sampling, 8 answers each")
    parser.add_argument("--n", type=int, default=200, help="held-out questions")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024], help="tokens, of --stages")
    args = parser.parse_args()
    if args.join:
        common.join(args.join[0].stem, args.join, args.out or common.RESULTS)
        return
    if args.real:
        from benchmarks.real import recipe

        args.steps = args.steps or (50 if args.stages else 30)
        print(common.table(recipe.stages(args) if args.stages else recipe.r1(args)))
        return
    rows = common.merged(RESULT, rows_of(args.seed), worst)
    common.publish(RESULT, rows, args.out)
    print(common.table(rows))


if __name__ == "__main__":
    main()
