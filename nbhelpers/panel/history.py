"""What a run leaves behind: a dict for each logged step, from TRL's logs, the rollout and the machine.

Plain numbers, so that a recorded run is a small JSON file.
"""

import math
import os
import platform
from collections.abc import Sequence
from statistics import fmean, stdev, variance
from typing import TypeGuard

from nbhelpers import gpu, host
from nbhelpers.architecture import GB
from nbhelpers.rewards import Sample

# column of the history -> TRL's log key
METRICS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "length": "completions/mean_length",
    "shortest": "completions/min_length",
    "longest": "completions/max_length",
    "clipped": "completions/clipped_ratio",
    "clip_ratio": "clip_ratio/region_mean",
    "zero_signal": "frac_reward_zero_std",
    "kl": "kl",
    "kl_answer": "objective/kl",
    "margin": "rewards/margins",
    "agree": "rewards/accuracies",
    "right": "right",
    "alike": "alike",
    "replaced": "signal/replaced",
    "value_loss": "value_loss",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "tokens": "num_tokens",
}
OF_UPDATE = ("clip_ratio", "loss", "value_loss", "grad_norm", "tokens")  # the others are a rollout's


def is_step(log: dict) -> bool:
    """Whether it is a step's: with a reward, or of a method that learns from texts with a loss alone."""
    return "reward" in log or "loss" in log


def row_of(log: dict) -> dict:
    """One entry of `Live.history` from one log of TRL's; what is not in it is None or empty, for the panel to fill in.

    What is no finite number (a KL of infinity, say) counts as not logged: no axis can show it, and JSON has none.
    """
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in log.items()
    }
    row = {"step": log["step"], **{name: values.get(key) for name, key in METRICS.items()}}
    for column, end in (("rewards", "/mean"), ("stds", "/std")):
        row[column] = {
            key.removeprefix("rewards/").removesuffix(end): value
            for key, value in values.items()
            if key.startswith("rewards/") and key.endswith(end)
        }
    costs = [value for key, value in values.items() if key.startswith("reward_seconds/") and value is not None]
    if costs:
        row["reward_seconds"] = sum(costs)
    unknown = {name: None for name in ("format", "speed", "memory", "seconds")}
    return {**row, "within": {}, "between": {}, **unknown, "gaming": []}


def after(row: dict, before: dict | None) -> dict:
    """`row`, and where no answers were written for its update the numbers of those that it learned from again, which
    the row `before` has."""
    if before is None or row["reward"] is not None or row["length"] is not None:
        return row
    again = {name: before[name] for name in METRICS if name not in OF_UPDATE and row[name] is None}
    shown = {name: before[name] for name in ("rewards", "stds", "format", "within", "between", "speed")}
    return {**row, **again, **shown}


def rows_of(logs: Sequence[dict]) -> list[dict]:
    """The history of the steps among TRL's logs."""
    rows: list[dict] = []
    for log in filter(is_step, logs):
        rows.append(after(row_of(log), rows[-1] if rows else None))
    return rows


# ---- from start to end ----


def ends(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The mean of the first tenth of the known values, and that of the last; (None, None) if none is known."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    tenth = max(1, len(known) // 10)
    return fmean(known[:tenth]), fmean(known[-tenth:])


def of_what(history: list[dict]) -> str:
    """In words, what `ends` takes the means of."""
    tenth = max(1, len(history) // 10)
    return "the first and the last step" if tenth == 1 else f"means of the first {tenth} steps and of the last {tenth}"


# ---- groups ----


def total(sample: Sample, weights: Sequence[float] | None = None) -> float:
    """The reward that TRL computes with: the weighted sum over the functions that applied.

    Args:
        sample (`Sample`): Its rewards in the order of the run's functions.
        weights (`Sequence[float]`, *optional*): One for each function, TRL's `reward_weights`; 1.0 each if not given.
    """
    weights = [1.0] * len(sample.rewards) if weights is None else weights
    pairs = zip(weights, sample.rewards.values(), strict=True)
    return sum(weight * value for weight, value in pairs if _known(value))


def _known(value: float | None) -> TypeGuard[float]:
    """Whether a function applied (TRL turns None into NaN) and gave a number that can be counted with."""
    return value is not None and math.isfinite(value)


def groups_of(samples: list[Sample], num_generations: int) -> list[list[Sample]]:
    """The answers to each prompt, which stand side by side; all together if they are not whole groups."""
    if len(samples) % num_generations:
        return [samples]
    return [samples[i : i + num_generations] for i in range(0, len(samples), num_generations)]


def spreads(
    groups: list[list[Sample]], weights: Sequence[float] | None = None
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Standard deviation of each reward function, and of the "total", within the groups and between them.

    Within: the root of the mean variance; what GRPO learns from. Between: of the groups' means; how unequally hard the
    questions are. Both with Bessel's correction; None where there is too little to tell.

    Args:
        groups (`list[list[Sample]]`): The answers to each prompt.
        weights (`Sequence[float]`, *optional*): See `total`.

    Returns:
        `tuple[dict[str, float | None], dict[str, float | None]]`: Within and between, by name of the function.
    """

    def value_of(sample: Sample, name: str) -> float | None:
        return total(sample, weights) if name == "total" else sample.rewards.get(name)

    within: dict[str, float | None] = {}
    between: dict[str, float | None] = {}
    for name in ("total", *(groups[0][0].rewards if groups and groups[0] else ())):
        values = [[value for sample in group if _known(value := value_of(sample, name))] for group in groups]
        several = [variance(group) for group in values if len(group) > 1]
        means = [fmean(group) for group in values if group]
        within[name] = math.sqrt(fmean(several)) if several else None
        between[name] = stdev(means) if len(means) > 1 else None
    return within, between


def best_and_worst(groups: list[list[Sample]], weights: Sequence[float] | None = None) -> list[Sample]:
    """The best and the worst answer of the group in which they differ most; one answer if they differ in none."""
    ranked = [sorted(group, key=lambda sample: total(sample, weights)) for group in groups if group]
    if not ranked:
        return []
    widest = max(ranked, key=lambda group: total(group[-1], weights) - total(group[0], weights))
    worst, best = widest[0], widest[-1]
    return [best] if total(best, weights) == total(worst, weights) else [best, worst]


# ---- the machine ----


def memory_now() -> dict[str, float]:
    """GB (10^9 bytes) now. With a GPU: `peak` that torch allocated, what it has `reserved`, what is `used` of the card
    by everyone, as the driver counts, and the card's `total`; without: this process's `used` and the host's `total`."""
    import torch

    device = gpu.device()
    if device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        return {
            "peak": torch.cuda.max_memory_allocated(device) / GB,
            "reserved": torch.cuda.memory_reserved(device) / GB,
            "used": (total_bytes - gpu.free_bytes(device.index)) / GB,
            "total": total_bytes / GB,
        }
    import psutil  # accelerate needs it too

    return {"used": psutil.Process().memory_info().rss / GB, "total": psutil.virtual_memory().total / GB}


def hardware() -> str:
    """The machine in a few words: "Tesla T4, 15.8 GB", or "2 CPU cores (AMD EPYC)"."""
    card = gpu.card()
    if card is not None:
        return f"{card.name}, {card.total / GB:.1f} GB"
    return f"{os.cpu_count()} CPU cores ({host.cpu() or platform.machine()})"
