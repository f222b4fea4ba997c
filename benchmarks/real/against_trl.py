"""The same training by us and by TRL with vLLM in the same process, one after the other on one card.

A base in 16 bits for both, since TRL's 4-bit path with vLLM is broken (trl #4973). Equal in both: the LoRA, questions,
their order, rewards, learning rate, STEPS steps of QUESTIONS questions, token-level importance weights. Dynamic
sampling and early stops are off. Each runs in a process of its own; what counts is the time inside `train()`: ours
with its rehearsal, TRL's without its start of vLLM, which is in the row as `loading_s`.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from benchmarks import common, harness
from nbhelpers import loader, presets

from . import cells, measure

STEPS, QUESTIONS = 60, 8
LEARNING_RATE = 5e-5
COMPLETION = 512
VLLM_SHARE = 0.3  # of the card, for vLLM's copy of the weights and its keys and values


def settings(folder: str, seed: int) -> dict[str, Any]:
    """GRPOConfig's arguments, for both."""
    return {
        "output_dir": folder, "max_steps": STEPS, "num_generations": 8, "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": QUESTIONS * 8 // 32, "max_completion_length": COMPLETION, "temperature": 1.0,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10,
        "max_grad_norm": 0.2, "beta": 0.0, "optim": "adamw_8bit", "save_strategy": "no", "seed": seed, "bf16": True,
        "logging_steps": 1, "report_to": "none", "vllm_importance_sampling_mode": "token_truncate",
        "reward_weights": [1.0, 1.0, 0.0],
    }  # fmt: skip


class Curve(TrainerCallback):
    """Seconds since its making, those of them in which completions were written, and what was logged, at every step."""

    def __init__(self, trainer: Any) -> None:
        self.began, self.writing = time.monotonic(), 0.0
        self.points: list[dict[str, float]] = []
        self._generate = trainer._generate  # TRL's, of both trainers
        trainer._generate = self._timed

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        try:
            return self._generate(*args, **kwargs)
        finally:
            torch.cuda.synchronize()
            self.writing += time.monotonic() - start

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            point = {"seconds": round(time.monotonic() - self.began, 2), "writing": round(self.writing, 2),
                     "reward": round(logs["reward"], 4),
                     "right": round(logs["rewards/right_in_any_form/mean"], 4),
                     "in_form": round(logs["rewards/in_form/mean"] / 0.3, 4),
                     "length": round(logs["completions/mean_length"], 1)}  # fmt: skip
            self.points.append(point)
            print(len(self.points), point, flush=True)


def right_in_any_form(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """What the curve shows; its weight in the reward is 0."""
    from nbhelpers import rewards

    return [float(rewards.right(rewards.text_of(c), gold)) for c, gold in zip(completions, answer, strict=True)]


def child(job: harness.Job) -> None:
    """One of the two trainings."""
    from nbhelpers import tasks

    began = time.monotonic()
    preset = presets.get("qwen2.5-1.5b")
    names: dict[str, Any] = {"preset": preset}
    exec("from nbhelpers import rewards\n" + cells.rewards(), names)  # our own notebook's cell
    questions = measure.problems(job, preset.system_prompt)
    task = tasks.mix(questions, tasks.decimals(system_prompt=preset.system_prompt), shares=(0.8, 0.2), seed=job["seed"])
    parts = {
        "reward_funcs": [names["correct"], names["in_form"], right_in_any_form], "train_dataset": task.train,
    }  # fmt: skip
    targets = list(preset.lora_targets)
    torch.manual_seed(job["seed"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(folder, job["seed"])
        if job["who"] == "ours":
            from nbhelpers import LeanGRPOConfig, LeanGRPOTrainer

            model, tokenizer = loader.load(
                job["base"], quantization="none", lora_rank=32, lora_alpha=32, lora_targets=targets
            )
            trainer = LeanGRPOTrainer(
                model, args=LeanGRPOConfig(**arguments), processing_class=tokenizer, engine="auto", **parts
            )
        else:
            from peft import LoraConfig
            from trl import GRPOConfig, GRPOTrainer

            vllm = {
                "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": VLLM_SHARE,
                "vllm_max_model_length": 1024 + COMPLETION, "model_init_kwargs": {"dtype": "bfloat16"},
            }  # fmt: skip
            adapter = LoraConfig(r=32, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
            trainer = GRPOTrainer(job["base"], args=GRPOConfig(**arguments, **vllm), peft_config=adapter, **parts)
        loading = time.monotonic() - began
        curve = Curve(trainer)
        trainer.add_callback(curve)
        with harness.peak_driver() as peak:
            trainer.train()
        seconds = time.monotonic() - curve.began
    more = {"loading_s": round(loading, 1), "peak_driver": round(peak[0], 2), "seed": job["seed"],
            "questions_per_step": QUESTIONS, "learning_rate": LEARNING_RATE, "curve": curve.points}  # fmt: skip
    row = common.row(f"{job['model']}/seconds_{STEPS}_steps", job["who"], round(seconds, 1), "s", **more)
    harness.append_row(row, job["out"])


def run(args: argparse.Namespace) -> list[common.Row]:
    """Both trainings, ours first, from one folder with the weights in bf16; with both, learning.png beside the rows."""
    with tempfile.TemporaryDirectory() as folder:
        base, out = args.weights, Path(folder, "rows.jsonl")
        if not base.is_dir():
            model, tokenizer = loader.load(base, quantization="none", lora_rank=0, dtype=torch.bfloat16, kernels=False)
            base = Path(folder, "base")
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
            del model
            torch.cuda.empty_cache()
        for who in args.against_trl or ("ours", "trl"):
            job = {"who": who, "model": args.model, "base": str(base), "questions": str(args.questions), "n": args.n,
                   "seed": args.seed, "train_on": args.train_on, "out": str(out)}  # fmt: skip
            print(who, harness.run_child("benchmarks.real", job, None, os.environ), flush=True)
            common.publish("real", harness.read_rows(out), args.out)
        rows = harness.read_rows(out)
        if len(rows) == 2:
            plot(rows, (args.out or common.RESULTS) / "learning.png")
        return rows


def plot(rows: list[common.Row], file: Path) -> None:
    """The two curves, mean of 9 steps over the steps themselves, against steps and against minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row in rows:
        curve, title = row["curve"], {"ours": "this project", "trl": "TRL with vLLM"}[row["who"]]
        shares = [100 * point["right"] for point in curve]
        smooth = [fmean(shares[max(0, i - 4) : i + 5]) for i in range(len(shares))]
        for axes, xs in ((left, range(1, len(curve) + 1)), (right, [point["seconds"] / 60 for point in curve])):
            (line,) = axes.plot(xs, smooth, label=title)
            axes.scatter(xs, shares, s=6, alpha=0.35, color=line.get_color())
    left.set(xlabel=f"steps of {8 * QUESTIONS} answers", ylabel="right answers, %", ylim=(0, 100))
    right.set(xlabel="minutes of training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(loc="lower right")
    figure.savefig(file, metadata={"Software": None})
