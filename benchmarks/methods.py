"""Does each method learn? The notebooks' own cells with another trainer in GRPO's place, on this machine.

    python -m benchmarks.methods --method rloo --seed 0      the quickstart: workshop/rloo/seed-0/accuracy_after, ...
    python -m benchmarks.methods --real WEIGHTS --questions FOLDER --method rloo     60 steps of the real 1.5B, on a GPU
    python -m benchmarks.methods --join a/methods_gpu.json b/methods_gpu.json        calls with --out, in one file

A method is one line of METHODS: the names of its config and its trainer in nbhelpers, and what it sets otherwise than
the notebook does. The cells call them as they call LeanGRPOConfig and LeanGRPOTrainer; settings that a method does not
have (`num_generations` of SFT, say) and the arguments in `without` are left out. A method that learns from texts gets a
column `completion`.

One run a call; its rows replace those of the same method and seed in benchmarks/results/methods.json, those of --real
in methods_gpu.json. A row without a seed is the worst of its seeds. `seconds` is `train()` alone. `peak` is the
process's, weights and libraries included: what torch allocated on a GPU, resident memory on a CPU.

--real is `python -m benchmarks.real` with --mode, --n and --after-only as there, and 8 questions a step: 64 answers, in
groups of 8, or of 2 with online DPO and PPO; SFT takes 16 of its own answers that are right and in form, sampled before
the training (8 each to 400 questions). In the row `curve` are its `points`: step,
reward, loss, share of right answers. With NBHELPERS_SMOKE=1 WEIGHTS is any word, and the model a small random one.
"""

import argparse
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset

from benchmarks import common, quickstart
from benchmarks.method_tables import MODEL
from benchmarks.real import __main__ as real
from benchmarks.real import measure
from benchmarks.real.recipe import good_ones
from nbhelpers import evaluate, tasks

QUICKSTART, REAL = "methods", "methods_gpu"  # the files: each says of one machine what it measured


@dataclasses.dataclass(frozen=True)
class Method:
    """Names in nbhelpers, and what is set otherwise than in the quickstart, and than in the real notebook."""

    config: str
    trainer: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    real_changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    texts: bool = False  # learns from answers
    without: tuple[str, ...] = ()  # arguments of the notebooks' trainer that it does not have
    parameters: str = ""  # of the quickstart's first cell, set otherwise


TEXTS = 2880  # that a method which learns from texts gets in the quickstart: 90 steps of 32
ASKED = 400  # questions whose answers a method which learns from texts gets in the real run
OF_TEXTS = {"learning_rate": 1e-4, "per_device_train_batch_size": 16}
OF_REWARDS = ("reward_funcs", "engine", "tags", "stop_when")
# a reference and a value head need an adapter on the workshop model
LORA = 'QUANTIZATION, LORA_RANK, LEARNING_RATE = "none", 16, 3e-3\nSTEPS = '
PAIRS = {"num_generations": 2, "beta": 0.1}
PPO = {"num_generations": 2, "num_ppo_epochs": 2, "lam": 1.0, "kl_coef": 0.0, "dynamic_sampling": 0}
METHODS = {
    "grpo": Method("LeanGRPOConfig", "LeanGRPOTrainer"),
    "rloo": Method("LeanRLOOConfig", "LeanRLOOTrainer"),
    "sft": Method("LeanSFTConfig", "LeanSFTTrainer", {"learning_rate": 1e-3}, OF_TEXTS, texts=True, without=OF_REWARDS),
    "online_dpo": Method("LeanOnlineDPOConfig", "LeanOnlineDPOTrainer", PAIRS, PAIRS, parameters=LORA + "45"),
    "ppo": Method("LeanPPOConfig", "LeanPPOTrainer", PPO | {"learning_rate": 3e-3}, PPO, parameters=LORA + "120"),
}


def take(name: str, questions: str | None = None) -> None:
    """From now on `from nbhelpers import LeanGRPOConfig, LeanGRPOTrainer` gives the method's.

    `questions`: the real run's folder; None in the quickstart.
    """
    import nbhelpers

    method = METHODS[name]
    config, trainer = getattr(nbhelpers, method.config), getattr(nbhelpers, method.trainer)
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    changes = method.real_changes if questions else method.changes
    longest = 512  # tokens of an answer

    def configured(**arguments: Any) -> Any:
        nonlocal longest
        longest = arguments.get("max_completion_length", longest)
        return config(**{key: value for key, value in arguments.items() if key in fields} | changes)

    def made(model: Any, **arguments: Any) -> Any:
        if not questions:
            arguments.pop("stop_when", None)  # all of its steps: what is compared takes as many questions
        if method.texts:
            arguments["train_dataset"] = (
                own_answers(model, longest, **arguments) if questions else with_texts(arguments["train_dataset"])
            )
        return trainer(model, **{key: value for key, value in arguments.items() if key not in method.without})

    vars(nbhelpers).update(LeanGRPOConfig=configured, LeanGRPOTrainer=made)


def with_texts(rows: Any) -> Any:
    """The first TEXTS rows with a column `completion`: the comparison, place by place."""

    def completion(row: dict[str, Any]) -> dict[str, Any]:
        text = tasks.by_place(*re.findall(r"[0-9.]+[0-9]", row["prompt"][-1]["content"]))
        return {"completion": tasks.worked(f"{text} So {row['answer']} is bigger.", row["answer"])}

    return rows.select(range(min(TEXTS, len(rows)))).map(completion)


def own_answers(
    model: Any, longest: int, args: Any, train_dataset: Any, processing_class: Any, tags: Any, **_: Any
) -> Any:
    """Rejection sampling: the model's own answers to the first ASKED questions that are right and in form, one each."""
    asked = train_dataset.select(range(min(ASKED, len(train_dataset))))
    sampled = evaluate.pass_at_k(
        model, processing_class, asked, num_generations=8, tags=tags, max_new_tokens=longest, batch_size=128,
        seed=args.seed,
    )  # fmt: skip
    kept = good_ones(asked, sampled.rows) or asked.map(lambda row: {"completion": tasks.worked("", row["answer"])})
    print(f"SFT: {len(kept)} of {len(asked)} questions have a text", flush=True)
    return Dataset.from_list(list(kept))


TAKE = "from benchmarks import methods\n\nmethods.take({!r})\n\n"
KEEP = "\n\nfrom benchmarks import methods\n\nmethods.keep(OUT, live)\n"


def keep(out: str, live: Any) -> None:
    """Add the peak and the curve to the quickstart's report."""
    import torch

    report = json.loads(Path(out, "report.json").read_text())
    gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report |= {"peak": peak / 1e9, "curve": measure.curve(live.history)}
    Path(out, "report.json").write_text(json.dumps(report))


def of_quickstart(name: str, seed: int) -> list[common.Row]:
    """The quickstart once, in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        code = TAKE.format(name) + quickstart.script(f"SEED = {seed}\n{METHODS[name].parameters}", out) + KEEP
        subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, check=True, env=_environment())
        report = json.loads(Path(out, "report.json").read_text())
    label, rows = f"workshop/{name}/seed-{seed}", []
    about = {"seed": seed, "seconds": round(report["seconds"], 1), "peak": round(report["peak"], 3)}
    for what in ("accuracy_before", "accuracy_after", "format_after"):
        rows.append(common.share(f"{label}/{what}", report[what], **about))
    rows.append(common.row(f"{label}/seconds", "ours", about["seconds"], "s", steps=report["steps"]))
    rows.append(common.row(f"{label}/peak", "ours", about["peak"], "GB"))
    return rows


def of_real(args: argparse.Namespace) -> list[common.Row]:
    """The model notebook once, on real weights."""
    preset = json.dumps({"questions_per_step": args.questions_per_step})
    job = vars(args) | {"weights": args.real, "model": MODEL, "label": args.method, "preset": preset,
                        "train_on": "questions", "prompts": False, "executed": None, "before_only": False}  # fmt: skip
    return real.run(argparse.Namespace(**job))


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(common.ROOT), os.environ.get("PYTHONPATH", "")])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--join", nargs="+", type=Path, help="run nothing, put the rows of these files together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the results file, instead of benchmarks/results")
    parser.add_argument("--real", type=Path, metavar="WEIGHTS", help="a GGUF file, or a folder with safetensors")
    parser.add_argument("--questions", type=Path, help="a folder with train.jsonl and the test files")
    parser.add_argument("--mode", choices=real.MODES, default="7GB")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--questions-per-step", type=int, default=8, metavar="N")
    parser.add_argument("--after-only", action="store_true", help="no scores before: they are another method's")
    parser.add_argument("--n", type=int, default=400, help="test questions of each kind")
    args = parser.parse_args()
    if args.join:
        common.join(args.join[0].stem, args.join, args.out or common.RESULTS, real.worst)
        return
    if args.method is None:
        parser.error("which --method?")
    name = QUICKSTART if args.real is None else REAL
    rows = of_quickstart(args.method, args.seed) if args.real is None else of_real(args)
    if not rows:
        sys.exit("the run left no report")
    rows = common.merged(name, rows, real.worst)
    common.publish(name, rows, args.out)
    print(common.table(rows))


if __name__ == "__main__":
    main()
