"""GRPO's loss of a batch through the lean step, and what is worth watching about it, under TRL's names.

The batch is TRL's: a dictionary with prompt_ids, prompt_mask [B, P]; completion_ids, completion_mask [B, T];
advantages [B]; and, where they are needed, num_items_in_batch, old_per_token_logps, ref_per_token_logps,
sampling_per_token_logps and importance_sampling_ratio [B, T].
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nbhelpers import grpo
from nbhelpers.architecture import GB

from .lean_step import LeanStep
from .packing import unpad


@dataclass(frozen=True)
class Settings:
    """The part of TRL's GRPOConfig that decides the loss; the names are TRL's."""

    loss_type: str = "dapo"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    importance_sampling_level: str = "token"
    use_bias_correction_kl: bool = True
    max_completion_length: int = 256
    correction: str | None = "sequence_mask"  # vllm_importance_sampling_mode; None: no correction for the engine
    correction_min: float | None = None
    correction_max: float | None = 3.0


@dataclass
class Outcome:
    """A batch's loss (a scalar without graph) and its tensors [B, T], for the metrics."""

    loss: Tensor
    logps: Tensor
    entropies: Tensor
    mask: Tensor
    scored: Tensor  # mask of the rows that went through the model
    old_logps: Tensor
    correction: Tensor | None  # [B, T] or [B, 1]
    seconds: float


def run(
    step: LeanStep,
    batch: dict,
    settings: Settings,
    accumulation: float = 1.0,
    num_items: Tensor | float | None = None,
    backward: Callable | None = None,
) -> Outcome:
    """The loss of a batch and, with `backward`, its gradients in the parameters' `.grad`.

    accumulation: what the mean-type losses are divided by; num_items: the tokens that DAPO divides by.
    backward: called with each micro-batch's scalar, e.g. accelerator.backward; None: no gradients.

    If memory runs out on the way, the batch is computed again in smaller parts (`LeanStep.retried`).

    Where beta is 0 a completion without advantage (all of its group got the same reward) has no gradient: it is not
    computed when there is a backward, and its log-probabilities stay those of the rollout.
    """
    return step.retried(
        lambda: _run(step, batch, settings, accumulation, num_items, backward), learns=backward is not None
    )


def _run(step, batch, settings, accumulation, num_items, backward) -> Outcome:
    start = time.perf_counter()
    mask, advantages = batch["completion_mask"], batch["advantages"]
    old, ref, sampled = (batch.get(f"{name}_per_token_logps") for name in ("old", "ref", "sampling"))
    given = batch.get("importance_sampling_ratio")
    divisor = 1.0 if settings.loss_type == "dapo" else accumulation
    weights = grpo.token_weights(mask, settings.loss_type, settings.max_completion_length, num_items) / divisor

    skip = backward is not None and not settings.beta
    keep = advantages != 0 if skip else torch.ones_like(advantages, dtype=torch.bool)
    rows = unpad(*(batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), keep)
    logps = torch.zeros(mask.shape, device=mask.device) if old is None else old.float().clone()
    entropies = torch.zeros_like(logps)
    correction = given
    if given is None and sampled is not None and settings.correction is not None:
        width = 1 if settings.correction.startswith("sequence") else mask.shape[1]
        correction = torch.ones(len(mask), width, device=mask.device)
    total = torch.zeros((), device=mask.device)

    def value(numbers: Tensor, part: Tensor) -> Tensor:
        """What the rows `numbers` [n] add to the loss; part: their log-probabilities [n, T'], T' <= T."""

        def of(tensor):
            return None if tensor is None else tensor[numbers, : part.shape[1]]

        here = of(mask)
        if given is None and correction is not None:
            before = part.detach() if old is None else of(old)
            limits = settings.correction_min, settings.correction_max
            weight = grpo.engine_correction(before, of(sampled), here, settings.correction, *limits)
            correction[numbers, : weight.shape[1]] = weight
        per_token = grpo.token_loss(
            part, advantages[numbers], here, old_logps=of(old), ref_logps=of(ref), correction=of(correction),
            beta=settings.beta, epsilon=settings.epsilon, epsilon_high=settings.epsilon_high, delta=settings.delta,
            importance_sampling_level=settings.importance_sampling_level,
            use_bias_correction_kl=settings.use_bias_correction_kl,
        )  # fmt: skip
        loss = (per_token * of(weights)).sum()
        total.add_(loss.detach())
        return loss

    def objective(new: Tensor, entropy: Tensor, packed) -> Tensor:
        place = packed.number, packed.column
        logps[place], entropies[place] = new.detach(), entropy
        numbers, local = packed.number.unique(return_inverse=True)
        part = torch.zeros(len(numbers), int(packed.column.max()) + 1, device=new.device)
        return value(numbers, part.index_put((local, packed.column), new))

    if backward is None:
        logps, entropies = step.score(rows, tuple(mask.shape))
        value(torch.arange(len(mask), device=mask.device), logps)
    else:
        step.differentiate(rows, objective, backward)
    seconds = time.perf_counter() - start
    scored = mask * keep.unsqueeze(1)
    return Outcome(total, logps, entropies, mask, scored, logps if old is None else old, correction, seconds)


def metrics(outcome: Outcome, batch: dict, settings: Settings, reduce: Callable, gather: Callable) -> dict[str, float]:
    """What TRL logs of a batch, by TRL's names, and: sampling/kl, frac_zero_signal_skipped, tokens_per_second, peak_gb.

    reduce: adds a tensor up over all processes, gather: lays a tensor of each end to end (accelerator's). Every process
    calls them equally often, whatever its rows are like. NaN stands for what cannot be told.
    """
    mask, level = outcome.mask, settings.importance_sampling_level
    advantages = batch["advantages"].unsqueeze(1)

    def mean(x: Tensor, over: Tensor = mask) -> float:
        """Over all tokens of all processes; over rows where there is one number a row."""
        if x.shape[1] == 1:
            over = torch.ones_like(x)
        total, count = reduce(torch.stack([(x * over).sum(), over.sum().float()])).tolist()
        return total / max(count, 1.0)

    coef = grpo.ratio(outcome.logps, outcome.old_logps, mask, level)
    found = {}
    if settings.beta:
        divergence = grpo.kl(outcome.logps, batch["ref_per_token_logps"])
        found["kl"] = mean(divergence * coef if settings.use_bias_correction_kl else divergence)
    found["entropy"] = mean(outcome.entropies, outcome.scored)
    coef = coef if settings.delta is None else coef.clamp(max=settings.delta)
    low = ((coef < 1 - settings.epsilon) & (advantages < 0)).float()
    high = ((coef > 1 + settings.epsilon_high) & (advantages > 0)).float()

    def by_row(x: Tensor) -> Tensor:
        return gather(x.squeeze(1) if x.shape[1] == 1 else (x * mask).sum(-1) / mask.sum(-1))

    found["clip_ratio/low_mean"], found["clip_ratio/high_mean"] = mean(low), mean(high)
    found["clip_ratio/region_mean"] = mean(torch.maximum(low, high))
    found["clip_ratio/low_min"] = by_row(low).nan_to_num(nan=torch.inf).min().item()
    found["clip_ratio/high_max"] = by_row(high).nan_to_num(nan=-torch.inf).max().item()

    sampled = batch.get("sampling_per_token_logps")
    if sampled is not None:
        known = outcome.scored * ~sampled.isnan()
        sampled = torch.where(known.bool(), sampled, outcome.logps)
        difference = (outcome.logps - sampled).abs()
        found["sampling/kl"] = mean(grpo.kl(sampled, outcome.logps), known)
        found["sampling/sampling_logp_difference/mean"] = mean(difference, known)
        found["sampling/sampling_logp_difference/max"] = gather(difference.max()).max().item()
    if outcome.correction is not None:
        every = gather(outcome.correction.min()), gather(outcome.correction.max())
        found["sampling/importance_sampling_ratio/min"] = every[0].min().item()
        found["sampling/importance_sampling_ratio/mean"] = mean(outcome.correction)
        found["sampling/importance_sampling_ratio/max"] = every[1].max().item()
    skipped = (outcome.scored.sum(1) == 0) & (mask.sum(1) > 0)
    found["frac_zero_signal_skipped"] = mean(skipped.float().unsqueeze(1))
    found["tokens_per_second"] = reduce(mask.sum().float()).item() / max(outcome.seconds, 1e-9)
    if mask.is_cuda:
        found["peak_gb"] = torch.cuda.max_memory_allocated(mask.device) / GB
    return found
