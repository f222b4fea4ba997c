"""Whole GRPO steps: the workload that ours and the peer's (trl.py) share, and ours."""

import random
import statistics
import tempfile
import time
from dataclasses import replace
from functools import wraps
from typing import Any

import torch

from benchmarks import common
from benchmarks.harness import Job, build, hold, peak_driver, wait
from nbhelpers.engines import Completion, Sampling
from nbhelpers.engines.base import Engine

from .cases import RowWriter

KEPT = {  # of the last step's log
    "completions/mean_length": "completion",
    "sampling/sampling_logp_difference/mean": "logp_difference",
    "sampling/importance_sampling_ratio/mean": "importance_sampling_ratio",
    "skipped_steps": "skipped_steps",
}


def watch(owner: Any, method: str) -> list[float]:
    """From now on each call of this one instance's method adds the seconds that it took to the list returned."""
    seconds: list[float] = []
    call = getattr(owner, method)

    @wraps(call)
    def timed_call(*args: Any, **options: Any) -> Any:
        wait()
        start = time.perf_counter()
        result = call(*args, **options)
        wait()
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, method, timed_call)
    return seconds


def logged(log: dict[str, float], names: dict[str, str]) -> dict[str, float]:
    """What of a step's log goes into a row, and under which name."""
    return {name: round(float(log[key]), 4) for key, name in names.items() if key in log}


def workload(quick: bool, context: int, rows: int = 8) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    """The workload of the GRPO steps, ours and the peer's alike: completions of one prompt of 256 tokens.

    Args:
        quick (`bool`): 24 + 8 tokens instead.
        context (`int`): Tokens of a prompt and its completion together.
        rows (`int`): Completions of a step.

    Returns arguments for a GRPOConfig, arguments for a GRPOTrainer, and the seconds of each step so far.
    """
    from datasets import Dataset
    from transformers import TrainerCallback

    from nbhelpers.models import smoke

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait()
            times[-1] += time.perf_counter()

    prompt, completion = (24, 8) if quick else (256, context - 256)
    settings = {
        "per_device_train_batch_size": rows, "num_generations": rows, "max_completion_length": completion,
        "learning_rate": 1e-5, "optim": "adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    parts = {
        "reward_funcs": lambda completions, **_: [float(i % 3) for i in range(len(completions))],
        "train_dataset": Dataset.from_dict({"prompt": [chr(97 + i % 26) * prompt for i in range(32)]}),
        "processing_class": smoke.make_tokenizer(), "callbacks": [Clock()],
    }  # fmt: skip
    return settings, parts, times


def lengths(kind: str, turn: int, part: int, gpus: int, most: int, rows: int = 8) -> list[int]:
    """How long the completions of a turn are, decided before they are written.

    Args:
        kind (`str`): "equal": all have `most` tokens; "ragged": from a quarter of that on, evenly, in another order for
            each `gpus` turns.
        turn (`int`): Step of the run, from 0.
        part (`int`): Which `rows` of the `gpus` x `rows` completions: the process. A process that works alone has them
            part after part, so that from turn 1 on it has written the same texts as those who share them.
        gpus (`int`): Processes that share the texts.
        most (`int`): Tokens of the longest.
    """
    if kind == "equal":
        return [most] * rows
    every = [most - i * (most - most // 4) // (gpus * rows - 1) for i in range(gpus * rows)]
    random.Random((turn - 1) // gpus).shuffle(every)
    return every[part * rows : (part + 1) * rows]


def write_lengths(engine: Engine, kind: str, part: int | None, gpus: int) -> None:
    """From now on this engine's completions are as long as `lengths` says, whatever the model would end with.

    `part` None: a process that works alone. All rows of a turn are written as far as its longest text goes, and then
    cut: few rows take as long as one.
    """
    generate, turns = engine.generate, 0

    def cut(prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        nonlocal turns
        mine = lengths(kind, turns, (turns - 1) % gpus if part is None else part, gpus, sampling.max_tokens,
                       len(prompts) * sampling.num_generations)  # fmt: skip
        turns += 1
        written = generate(prompts, replace(sampling, max_tokens=max(mine), min_tokens=max(mine)))
        return [
            replace(completion, token_ids=completion.token_ids[:length], logprobs=completion.logprobs[:length])
            for completion, length in zip(written, mine, strict=True)
        ]

    setattr(engine, "generate", cut)  # noqa: B010


def efficiencies(rows: list[common.Row]) -> list[common.Row]:
    """For each step of several cards that share the texts of several steps of one: the share of its time in theirs."""
    known = {row["what"]: row for row in rows}
    shares = []
    for what, row in known.items():
        one = known.get(f"{row['alone']}/step_time") if "alone" in row else None
        if one is not None:
            setting = what.removesuffix("/step_time")
            share = round(one["mean_s"] / row["mean_s"], 4)
            seconds = {"one_s": one["mean_s"], "several_s": row["mean_s"], "steps": row["steps"] - 1}
            shares.append(common.row(f"{setting}/efficiency", "ours", share, "share", **seconds))
    return shares


def steps(job: Job, row: RowWriter) -> None:
    """`steps` whole steps of LeanGRPOTrainer, G=8, a prompt of 256 tokens, in a process that may take `cap` GB in all;
    or as many such processes as there are `gpus`, each with a prompt of its own.

    generating_s and training_s (forward and backward) are the last step's. With `lengths` completions are as long as
    that says, and `shared_by` counts the processes that this one, or all of them together, are compared with.
    """
    from accelerate import PartialState

    from nbhelpers.training.trainer import LeanGRPOConfig, LeanGRPOTrainer

    cap, gpus, bits = job["cap"], job.get("gpus", 1), job.get("kv_bits", 16)
    if torch.cuda.is_available():
        if gpus > 1:
            PartialState().wait_for_everyone()  # NCCL's memory is not torch's
        budget = hold(cap)
    model = build(job)
    settings, parts, times = workload(job["quick"], job["context"])
    with tempfile.TemporaryDirectory() as folder, peak_driver() as peak:
        args = LeanGRPOConfig(folder, max_steps=job["steps"], kv_bits=bits, **settings)
        extra = {"budget_gb": budget} if torch.cuda.is_available() else {}
        trainer = LeanGRPOTrainer(model, args=args, engine="graph", **parts, **extra)
        if kept := job.get("lengths"):
            part = trainer.accelerator.process_index if gpus > 1 else None
            write_lengths(trainer.engine, kept, part, job.get("shared_by", 1))
        generated, trained = watch(trainer.engine, "generate"), watch(trainer, "compute_loss")
        trainer.train()
    kind = f"{job['context'] // 1024}K{'-t4' if job.get('t4') else ''}"
    rest = f"{f'-kv{bits}' if bits != 16 else ''}{'-ragged' if job.get('lengths') == 'ragged' else ''}"
    cards = f"-{gpus}-gpus" if gpus > 1 else f"-1-of-{job['shared_by']}-gpus" if "shared_by" in job else ""
    setting = f"{kind}{cards}{rest}"
    written: dict[str, Any] = {
        "generating_s": round(generated[-1], 3),
        "training_s": round(trained[-1], 3),
        "steps": len(times),
    }
    written["dtype"] = "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"
    written |= logged(trainer.state.log_history[-2], KEPT)  # -1: the whole run's
    if len(times) > 1:
        written["mean_s"] = round(statistics.mean(times[1:]), 4)
    if gpus > 1 and "shared_by" in job:
        written["alone"] = f"{job['model']}/{kind}-1-of-{gpus}-gpus{rest}"
    if gpus > 1:  # each learned from all of them: the adapters must be the same in the end
        sums = torch.stack([p.double().sum() for p in model.parameters() if p.requires_grad])
        ends = trainer.accelerator.gather(sums).view(gpus, -1)
        written["same_adapter"] = bool((ends == ends[0]).all())
    if torch.cuda.is_available():
        written["allocator_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    row(
        f"{setting}/step_time",
        statistics.median(times[1:] or times),
        "s",
        "ours",
        first_step_s=round(times[0], 2),
        **written,
    )
    row(f"{setting}/step_peak_driver", peak[0], "GB", "ours", cap=cap)
