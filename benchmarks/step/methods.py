"""Whole steps of Online DPO and PPO: answers, reference, values, loss, gradient and update.

Random weights and a tokenizer of bytes: an answer hardly ever ends, so all are as long as they may be.
"""

import tempfile
import time
from typing import Any

import torch

import nbhelpers
from benchmarks import harness
from benchmarks.harness import GB
from nbhelpers import memory
from nbhelpers.models import smoke

from .cases import Job

STEPS = 4
NAMES = {
    "online_dpo": ("LeanOnlineDPOConfig", "LeanOnlineDPOTrainer", {}),
    "ppo": ("LeanPPOConfig", "LeanPPOTrainer", {"num_ppo_epochs": 1}),
}
CAP = 5.0  # GB of the process


def odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that tells two answers apart."""
    return [float(sum(ids) % 97) for ids in completion_ids]


def step(job: Job) -> None:
    """Peak and seconds of an update of `job.kind` with the pairs of 4 prompts, and what the planner says."""
    config, trainer, own = NAMES[job.kind]
    budget = harness.hold(CAP) if job.cuda else None
    tokenizer, model = smoke.make_tokenizer(), job.model()
    length, rows = (1024 - 256, 8) if job.cuda else (32, 8)
    prompt = "x" * (256 if job.cuda else 16)
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(nbhelpers, config)(
            folder, max_steps=STEPS, per_device_train_batch_size=rows, max_completion_length=length, temperature=1.0,
            save_strategy="no", disable_tqdm=True, optim="adamw_8bit" if job.cuda else "adamw_torch", **own,
        )  # fmt: skip
        data = [{"prompt": prompt[:-2] + f"{i:02}"} for i in range(16)]
        one = getattr(nbhelpers, trainer)(model, [odd], args, data, processing_class=tokenizer, budget_gb=budget)
        if job.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with harness.peak_driver() as driver:
            one.train()
        seconds = (time.perf_counter() - start) / STEPS
        torch_peak = torch.cuda.max_memory_allocated() / GB if job.cuda else 0.0
    about = {"rows": rows, "tokens": len(prompt) + length, "cap": CAP}
    job.row(f"{job.kind}/step_peak_driver", "ours", driver[0], "GB", **about)
    job.row(f"{job.kind}/step_peak", "ours", torch_peak, "GB", **about)
    job.row(f"{job.kind}/step_time", "ours", seconds, "s", **about)
    plan = memory.plan(
        job.preset, card_gb=140, max_prompt_length=256, max_completion_length=1024 - 256, lora_rank=job.rank, rows=rows,
        quantization="nf4", budget_gb=budget, method=job.kind,
    )  # fmt: skip
    job.row(f"{job.kind}/step_peak", "planner", max(plan.training_peak, plan.generation_peak), "GB", **about)
