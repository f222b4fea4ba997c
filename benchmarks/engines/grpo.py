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
from nbhelpers.architecture import GB
from nbhelpers.engines import Completion, Sampling
from nbhelpers.engines.base import Engine
from nbhelpers.memory.micro_batches import MicroBatch

from .cases import RowWriter

KEPT = {  # of the last step's log
    "completions/mean_length": "completion",
    "sampling/sampling_logp_difference/mean": "logp_difference",
    "sampling/importance_sampling_ratio/mean": "importance_sampling_ratio",
    "skipped_steps": "skipped_steps",
}
PARTS = ("generating_s", "training_s", "waiting_s", "reduce_s", "rest_s")  # of a step, see `parts`
QUICK_WORK_GB = 6e-4  # on a CPU, over the processes: a batch has to be cut, and one process alone would cut otherwise


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


def write_lengths(engine: Engine, kinds: list[str], steps: int, part: int | None, gpus: int) -> None:
    """From now on this engine's completions are as long as `lengths` says, whatever the model would end with: `steps`
    turns of each of `kinds`.

    `part` None: a process that works alone. All rows of a turn are written as far as its longest text goes, and then
    cut: few rows take as long as one.
    """
    generate, turns = engine.generate, 0

    def cut(prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        nonlocal turns
        kind, turn = kinds[turns // steps], turns % steps
        mine = lengths(kind, turn, (turn - 1) % gpus if part is None else part, gpus, sampling.max_tokens,
                       len(prompts) * sampling.num_generations)  # fmt: skip
        turns += 1
        written = generate(prompts, replace(sampling, max_tokens=max(mine), min_tokens=max(mine)))
        return [
            replace(completion, token_ids=completion.token_ids[:length], logprobs=completion.logprobs[:length])
            for completion, length in zip(written, mine, strict=True)
        ]

    setattr(engine, "generate", cut)  # noqa: B010


def watch_cuts(trainer: Any) -> list[str]:
    """From now on each batch that is trained adds to the list returned how it was cut, in words."""
    cuts: list[str] = []
    compute_loss = trainer.compute_loss

    def told(*args: Any, **options: Any) -> Any:
        loss = compute_loss(*args, **options)
        cuts.append("; ".join(map(in_words, trainer._step_of(trainer.model).micro_batches)))
        return loss

    trainer.compute_loss = told
    return cuts


def in_words(one: MicroBatch) -> str:
    """What is decided about a micro-batch; counts of layers, and of the MLP's tokens at once."""
    return (f"{len(one.rows)} rows of {one.tokens.packed} tokens, {one.saved} layers saved, {one.on_device} inputs on "
            f"device, tiles of {one.tile}")  # fmt: skip


def cut_alike(trainer: Any, work_gb: float | None) -> list[float]:
    """From the first batch on batches of the same lengths are cut the same in every process of this run, and of another
    one with this `work_gb`.

    A cut follows from what the card has left (NCCL takes some of it) and from how long launches took in the rehearsal.
    Launches take the planner's time here; `work_gb` is what a micro-batch may take, in GB. None: the least that a
    process has left at its first batch.

    Returns a list that holds the GB once the first batch is trained.
    """
    step, compute_loss, accelerator = trainer._step_of(trainer.model), trainer.compute_loss, trainer.accelerator
    step.set_launches = lambda seconds: None
    agreed: list[float] = []

    def pinned(*args: Any, **options: Any) -> Any:
        if not agreed:
            left = torch.tensor([step.available() / GB], device=accelerator.device)
            agreed.append(work_gb or float(accelerator.gather(left).min()))
            step.room.share = 1.0  # of what was left: a rehearsal that ran out of memory has made it less
            step.room.for_step = lambda coming=0: agreed[0] * GB * step.room.share
        return compute_loss(*args, **options)

    trainer.compute_loss = pinned
    return agreed


def work_gb(rows: list[common.Row], model: str) -> float | None:
    """What the steps of several cards with this model were cut for, GB; None where there are none."""
    found = [row["work_gb"] for row in rows if "alone" in row and row["what"].startswith(f"{model}/")]
    return found[-1] if found else None


def parts(seconds: list[dict[str, list[float]]], first: int, end: int, whole: float) -> dict[str, float]:
    """What the steps first..end-1 took, by part; the parts add up to `whole`, their mean.

    Args:
        seconds (`list[dict[str, list[float]]]`): For each process what each step took it: "generating"; "training", the
            gradients' sum over the processes included; "reduce", that sum alone, with the wait for it.
        first, end (`int`): Which steps.
        whole (`float`): Seconds of a step.

    Returns generating_s and training_s, means over the processes; waiting_s, for the slowest in either; reduce_s, of
    the process that came to it last; and rest_s: rewards, the optimizer, what processes tell each other, Python.
    """
    found = dict.fromkeys(PARTS[:-1], 0.0)
    for i in range(first, end):
        generating = [one["generating"][i] for one in seconds]
        training = [one["training"][i] - one["reduce"][i] for one in seconds]
        found["generating_s"] += statistics.mean(generating)
        found["training_s"] += statistics.mean(training)
        for each in (generating, training):
            found["waiting_s"] += max(each) - statistics.mean(each)
        found["reduce_s"] += min(one["reduce"][i] for one in seconds)
    found = {name: total / (end - first) for name, total in found.items()}
    found[PARTS[-1]] = whole - sum(found.values())
    return {name: round(value, 4) for name, value in found.items()}


def efficiencies(rows: list[common.Row]) -> list[common.Row]:
    """For each step of several cards that share the texts of several steps of one: the share of its time in theirs.

    same_cuts: whether the same batches were timed, cut alike; if not, the share says nothing. lost_s: by how much each
    part of the step is longer than that of one card.
    """
    known = {row["what"]: row for row in rows}
    shares = []
    for what, row in known.items():
        one = known.get(f"{row['alone']}/step_time") if "alone" in row else None
        if one is not None:
            setting = what.removesuffix("/step_time")
            share = round(one["mean_s"] / row["mean_s"], 4)
            fields = {"one_s": one["mean_s"], "several_s": row["mean_s"], "steps": row["steps"] - 1}
            fields["same_cuts"] = row["cuts"] == one["cuts"]
            fields["lost_s"] = {part: round(row[part] - one[part], 4) for part in PARTS}
            shares.append(common.row(f"{setting}/efficiency", "ours", share, "share", **fields))
    return shares


def steps(job: Job, row: RowWriter) -> None:
    """`steps` whole steps of LeanGRPOTrainer, G=8, a prompt of 256 tokens, in a process that may take `cap` GB in all;
    or as many such processes as there are `gpus`, each with a prompt of its own.

    With `lengths` there are so many steps of each kind, one kind after the other, whose completions are as long as
    `lengths` says; the driver's peak is that of them all. `shared_by` counts the processes that this one, or all of
    them together, are compared with: then batches are cut alike, for `work_gb` if that is given.

    Each row has the parts of its timed steps, and their cuts, each once.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from nbhelpers.training.trainer import LeanGRPOConfig, LeanGRPOTrainer

    cap, gpus, bits, count = job["cap"], job.get("gpus", 1), job.get("kv_bits", 16), job["steps"]
    kinds = job.get("lengths") or [""]
    budget = QUICK_WORK_GB / gpus
    if torch.cuda.is_available():
        if gpus > 1:
            PartialState().wait_for_everyone()  # NCCL's memory is not torch's
        budget = hold(cap)
    model = build(job)
    settings, more, times = workload(job["quick"], job["context"])
    with tempfile.TemporaryDirectory() as folder, peak_driver() as peak:
        args = LeanGRPOConfig(folder, max_steps=count * len(kinds), kv_bits=bits, **settings)
        trainer = LeanGRPOTrainer(model, args=args, engine="graph", budget_gb=budget, **more)
        if kinds[0]:
            part = trainer.accelerator.process_index if gpus > 1 else None
            write_lengths(trainer.engine, kinds, count, part, job.get("shared_by", 1))
        seconds = {
            "generating": watch(trainer.engine, "generate"), "training": watch(trainer, "compute_loss"),
            "reduce": watch(trainer, "_average_gradients"),
        }  # fmt: skip
        cuts = watch_cuts(trainer)
        agreed = cut_alike(trainer, job.get("work_gb")) if "shared_by" in job else []
        trainer.train()
    everyones: list[dict[str, Any]] = gather_object([{**seconds, "cuts": cuts}])
    same: dict[str, Any] = {"dtype": "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32", "steps": count}
    if agreed:
        same["work_gb"] = agreed[0]
    if gpus > 1:  # each learned from all of them: the adapters must be the same in the end
        sums = torch.stack([p.double().sum() for p in model.parameters() if p.requires_grad])
        ends = trainer.accelerator.gather(sums).view(gpus, -1)
        same["same_adapter"] = bool((ends == ends[0]).all())
    if torch.cuda.is_available():
        same["allocator_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    context = f"{job['context'] // 1024}K{'-t4' if job.get('t4') else ''}"
    cards = f"-{gpus}-gpus" if gpus > 1 else f"-1-of-{job['shared_by']}-gpus" if "shared_by" in job else ""
    for i, kind in enumerate(kinds):
        begin, end = i * count, (i + 1) * count
        first = min(begin + 1, end - 1)  # that is timed
        rest = f"{f'-kv{bits}' if bits != 16 else ''}{'-ragged' if kind == 'ragged' else ''}"
        setting, mean = f"{context}{cards}{rest}", statistics.mean(times[first:end])
        written = {
            "first_step_s": round(times[begin], 2), "mean_s": round(mean, 4), **parts(everyones, first, end, mean),
            "cuts": sorted({cut for one in everyones for cut in one["cuts"][first:end]}),
        }  # fmt: skip
        written |= same | logged(trainer.state.log_history[end - 1], KEPT)
        if gpus > 1 and "shared_by" in job:
            written["alone"] = f"{job['model']}/{context}-1-of-{gpus}-gpus{rest}"
        row(f"{setting}/step_time", statistics.median(times[first:end]), "s", "ours", **written)
        row(f"{setting}/step_peak_driver", peak[0], "GB", "ours", cap=cap)
