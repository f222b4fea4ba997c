"""Does a model learn? The quickstart from its first cell to its last, as a script, on this machine.

    python -m benchmarks.quickstart        on a CPU: three seeds, and once in NF4 with LoRA, as large models learn
                                           on a GPU: as it stands and in NF4 with LoRA, then that as a T4 would (fp16)
    python -m benchmarks.quickstart --base ../before    GRPO alone by this tree and by another, seed after seed, taking
                                           turns: seconds, and seconds of all cores, as other programs cost the first.
                                           Writes benchmarks/results/quickstart_before.json
    python -m benchmarks.quickstart --whole     every weight in bf16 with 8-bit Adam, three seeds: does it learn as in
                                           fp32? Writes benchmarks/results/whole.json

Runs the cells of notebooks/00_quickstart.ipynb in a fresh process each time, on 512 held-out pairs at temperature 1,
and writes benchmarks/results/quickstart.json, on a GPU quickstart_gpu.json. `seconds` is GRPO alone, `run_seconds` the
whole notebook. `generated` are the tokens of all answers that GRPO asked for, those to replaced questions too.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import common

NOTEBOOK = common.ROOT / "notebooks" / "00_quickstart.ipynb"
LORA = 'QUANTIZATION, LORA_RANK, LEARNING_RATE = "nf4", 16, 0.003'
ON_CPU = {**{f"seed-{seed}": f"SEED = {seed}" for seed in (0, 1, 2)}, "nf4-lora-16": LORA}
ON_GPU = {"gpu": "", "gpu-nf4-lora-16": LORA, "gpu-nf4-lora-16-t4": LORA}
# bf16 is emulated on a CPU: the same numbers, slowly
WHOLE = """SEED = {seed}
import functools
import nbhelpers
from nbhelpers import loader
loader.load = functools.partial(loader.load, dtype=torch.bfloat16)
nbhelpers.LeanGRPOConfig = functools.partial(nbhelpers.LeanGRPOConfig, optim="adamw_8bit")
"""
T4 = "from benchmarks.harness import play_t4\n\nplay_t4()\n\n"
COUNT = "from benchmarks.quickstart import count_generated\n\ngenerated = count_generated()\n\n"
CLOCK = """import json
import time
from nbhelpers import LeanGRPOTrainer

train = LeanGRPOTrainer.train

def timed(self, *args, **options):
    wall, cpu = time.perf_counter(), time.process_time()
    result = train(self, *args, **options)
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    with open(FILE, "w") as file:
        json.dump(seconds, file)
    return result

LeanGRPOTrainer.train = timed
"""
KEEP = "\n\nreport['generated'] = sum(generated)\nPath(OUT, 'report.json').write_text(json.dumps(report))\n"


def count_generated() -> list[int]:
    """A list that gets the tokens of each rollout from now on, whether its answers are trained on or replaced."""
    from nbhelpers import LeanGRPOTrainer

    counts: list[int] = []
    generate = LeanGRPOTrainer._generate

    def counted(self: LeanGRPOTrainer, prompts: list[Any]) -> tuple[Any, ...]:
        rollout = generate(self, prompts)
        counts.append(sum(len(ids) for ids in rollout[1]))  # prompts' ids, completions' ids, ...
        return rollout

    LeanGRPOTrainer._generate = counted  # type: ignore[method-assign]
    return counts


def script(parameters: str, folder: str, notebook: Path = NOTEBOOK) -> str:
    """The notebook's code with other parameters and results in `folder`; without its install cell and section 9, which
    trains a second time."""
    parts = []
    for tags, source in common.code_cells(notebook):
        if "versions" in tags:
            continue
        parts.append(source)
        if "parameters" in tags:
            parts.append(f"import torch\n\n{parameters}\nOUT = {folder!r}\ntorch.manual_seed(SEED)  # a LoRA is drawn")
    return "\n\n".join(parts)


def rows_of(name: str, parameters: str) -> list[common.Row]:
    """Run the notebook once and read its report.json."""
    with tempfile.TemporaryDirectory() as out:
        code = COUNT + script(parameters, out) + KEEP
        if name.endswith("-t4"):
            code = T4 + code
        started = time.time()
        subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, check=True)
        seconds = time.time() - started
        report = json.loads(Path(out, "report.json").read_text())
    rows = [
        common.row(f"workshop/{name}/run_seconds", "ours", round(seconds, 1), "s"),
        common.row(f"workshop/{name}/seconds", "ours", round(report["seconds"], 1), "s"),
        common.row(f"workshop/{name}/steps", "ours", report["steps"], "steps"),
        common.row(f"workshop/{name}/generated", "ours", report["generated"], "tokens"),
    ]
    for what in ("accuracy_before", "accuracy_after", "format_before", "format_after"):
        rows.append(common.share(f"workshop/{name}/{what}", report[what]))
    for what in ("probe_before", "probe_after"):
        rows.append(common.row(f"workshop/{name}/{what}", "ours", float(report[what] or "nan"), "answer"))
    return rows


def whole(seeds: tuple[int, ...] = (0, 1, 2)) -> list[common.Row]:
    """Each seed in bf16, and the mean of what they get right beside that of the same seeds in fp32."""
    rows: list[common.Row] = []
    for seed in seeds:
        rows += rows_of(f"whole-seed-{seed}", WHOLE.format(seed=seed))
    known = json.loads((common.RESULTS / "quickstart.json").read_text())["rows"] + rows
    values = {row["what"]: row["value"] for row in known}
    ours, fp32 = (
        sum(values[f"workshop/{name}{seed}/accuracy_after"] for seed in seeds) / len(seeds)
        for name in ("whole-seed-", "seed-")
    )
    return [*rows, common.row("workshop/whole/accuracy_after", "ours", round(ours, 4), "share", fp32=round(fp32, 4))]


def grpo_of(tree: Path, seed: int) -> dict[str, float]:
    """GRPO of a tree's quickstart: `seconds`, `cpu_seconds` of all cores, `steps` and the `accuracy` afterwards."""
    with tempfile.TemporaryDirectory() as out:
        file = Path(out, "seconds.json")
        code = script(f"SEED = {seed}", out, tree / NOTEBOOK.relative_to(common.ROOT))
        environment = os.environ | {"PYTHONPATH": str(tree)}
        clock = CLOCK.replace("FILE", repr(str(file)))
        subprocess.run([sys.executable, "-c", f"{clock}\n\n{code}"], cwd=tree, env=environment, check=True)
        report = json.loads(Path(out, "report.json").read_text())
        steps, accuracy = report["steps"], round(report["accuracy_after"]["value"], 4)
        return {**json.loads(file.read_text()), "steps": steps, "accuracy": accuracy}


def against(base: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> list[common.Row]:
    """GRPO's seconds of `base` and of this tree: the median of the seeds, and this tree's over `base`'s."""
    trees = {"before": base.resolve(), "ours": common.ROOT}
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in trees}
    for seed in seeds:
        for who, tree in trees.items():
            runs[who].append(grpo_of(tree, seed))
            print(f"seed {seed}, {who}: {runs[who][-1]}", flush=True)
    rows = []
    for what in ("seconds", "cpu_seconds"):
        values = {who: statistics.median(run[what] for run in each) for who, each in runs.items()}
        for who, each in runs.items():
            more = {key: [run[key] for run in each] for key in ("steps", "accuracy")}
            more |= {"each": [round(run[what], 1) for run in each], "ratio": round(values[who] / values["before"], 4)}
            rows.append(common.row(f"quickstart/grpo_{what}", who, round(values[who], 2), "s", **more))
    return rows


def main() -> None:
    if "--base" in sys.argv:
        common.write("quickstart_before", rows := against(Path(sys.argv[sys.argv.index("--base") + 1])))
        print(common.table(rows))
        return
    if "--whole" in sys.argv:
        common.write("whole", rows := whole())
        print(common.table(rows))
        return
    rows = []
    gpu = torch.cuda.is_available()
    for name, parameters in (ON_GPU if gpu else ON_CPU).items():
        rows += rows_of(name, parameters)
        common.write("quickstart_gpu" if gpu else "quickstart", rows)
    print(common.table(rows))


if __name__ == "__main__":
    main()
