"""GRPO's loss of a batch through the lean step, and its metrics under TRL's names.

The batch is TRL's: a dictionary with prompt_ids, prompt_mask [B, P]; completion_ids, completion_mask [B, T];
advantages [B]; and, where they are needed, num_items_in_batch, old_per_token_logps, ref_per_token_logps,
sampling_per_token_logps and importance_sampling_ratio [B, T].
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbhelpers import grpo
from nbhelpers.architecture import GB

from .lean_step import LeanStep
from .packing import Packed, unpad


@dataclass(frozen=True)
class Settings:
    """What decides the loss in TRL's GRPOConfig, under TRL's names."""

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
    """A batch's loss and its tensors, for the metrics. All are detached."""

    loss: Tensor  # scalar, fp32
    logps: Tensor  # [B, T] fp32, of the policy; the rollout's own in rows that were not computed
    entropies: Tensor  # [B, T] fp32, nats
    mask: Tensor  # [B, T], 1 on the completions' tokens
    scored: Tensor  # [B, T], `mask` in the rows that went through the model, 0 elsewhere
    old_logps: Tensor  # [B, T] fp32
    correction: Tensor | None  # fp32 [B, T], or [B, 1] with one weight per completion
    seconds: float


def run(
    step: LeanStep,
    batch: dict[str, Any],
    settings: Settings,
    accumulation: float = 1.0,
    num_items: Tensor | float | None = None,
    backward: Callable[[Tensor], Any] | None = None,
) -> Outcome:
    """The loss of a batch (grpo.py has its equations) and, with `backward`, its gradients in the parameters' `.grad`.

    Stage 1: what each token counts in the whole batch, and which completions have a gradient at all. Where beta is 0
        one without advantage (all of its group got the same reward) has none: with `backward` it is not computed.
    Stage 2: the completions without their padding.
    Stage 3: forward and backward, one micro-batch after the other; each adds its tokens' weighted loss.

    If memory runs out, all stages are run again with smaller micro-batches (`LeanStep.retried`).

    Args:
        step (`LeanStep`): Of the policy.
        batch (`dict`): As TRL hands it over, see the module.
        settings (`Settings`): What decides the loss.
        accumulation (`float`): What the mean-type losses are divided by.
        num_items (`Tensor` or `float`, *optional*): The completion tokens that DAPO divides by; the batch's own if not
            given.
        backward (`Callable`, *optional*): Called with each micro-batch's scalar, e.g. accelerator.backward. None: no
            gradients.

    Raises CannotFit if not even one completion fits.
    """
    return step.retried(
        lambda: _run(step, batch, settings, accumulation, num_items, backward), learns=backward is not None
    )


def _run(
    step: LeanStep,
    batch: dict[str, Any],
    settings: Settings,
    accumulation: float,
    num_items: Tensor | float | None,
    backward: Callable[[Tensor], Any] | None,
) -> Outcome:
    start = time.perf_counter()
    # Stage 1: weights of the tokens, and rows with a gradient
    mask, advantages = batch["completion_mask"], batch["advantages"]
    divisor = 1.0 if settings.loss_type == "dapo" else accumulation
    weights = grpo.token_weights(mask, settings.loss_type, settings.max_completion_length, num_items) / divisor
    skip = backward is not None and not settings.beta
    keep = advantages != 0 if skip else torch.ones_like(advantages, dtype=torch.bool)

    # Stage 2: no padding
    rows = unpad(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], mask, keep)

    # Stage 3: forward and backward
    loss = _BatchLoss(batch, settings, weights)
    if backward is None:
        loss.logps, loss.entropies = step.score(rows, (mask.shape[0], mask.shape[1]))
        loss.of_rows(torch.arange(len(mask), device=mask.device), loss.logps)
    else:
        step.differentiate(rows, loss.of_packed, backward)
    seconds = time.perf_counter() - start
    old_logps = loss.logps if loss.old is None else loss.old
    scored = mask * keep.unsqueeze(1)
    return Outcome(loss.total, loss.logps, loss.entropies, mask, scored, old_logps, loss.correction, seconds)


class _BatchLoss:
    """The loss of a batch, micro-batch by micro-batch, and what its forward passes bring: tensors of the whole batch.

    Args:
        batch (`dict`): As TRL hands it over, see the module.
        settings (`Settings`): What decides the loss.
        weights (`Tensor`): fp32 [B, T], what each token's loss is multiplied by (grpo.token_weights).
    """

    def __init__(self, batch: dict[str, Any], settings: Settings, weights: Tensor):
        self.settings, self.weights = settings, weights
        self.mask: Tensor = batch["completion_mask"]
        self.advantages: Tensor = batch["advantages"]
        self.old: Tensor | None = batch.get("old_per_token_logps")
        self.ref: Tensor | None = batch.get("ref_per_token_logps")
        self.sampled: Tensor | None = batch.get("sampling_per_token_logps")
        device = self.mask.device
        self.total = torch.zeros((), device=device)
        self.logps = torch.zeros(self.mask.shape, device=device) if self.old is None else self.old.float().clone()
        self.entropies = torch.zeros_like(self.logps)
        self.correction: Tensor | None = batch.get("importance_sampling_ratio")
        # TRL gives the correction for the engine where it made an "old" pass; else `of_rows` computes it, in this mode
        self.mode = settings.correction if self.correction is None and self.sampled is not None else None
        if self.mode is not None:
            width = 1 if self.mode.startswith("sequence") else self.mask.shape[1]
            self.correction = torch.ones(len(self.mask), width, device=device)

    def of_packed(self, logps: Tensor, entropies: Tensor, packed: Packed) -> Tensor:
        """What a micro-batch adds to the loss, a scalar with gradient, from its tokens' logps and entropies [S]."""
        place = packed.number, packed.column
        self.logps[place], self.entropies[place] = logps.detach(), entropies
        rows, local = packed.number.unique(return_inverse=True)
        padded = torch.zeros(len(rows), int(packed.column.max()) + 1, device=logps.device)
        return self.of_rows(rows, padded.index_put((local, packed.column), logps))

    def of_rows(self, rows: Tensor, logps: Tensor) -> Tensor:
        """What the rows int64 [n] of the batch add to the loss, from their padded logps [n, T'], T' <= T."""
        settings, length = self.settings, logps.shape[1]
        mask, old, sampled = self.mask[rows, :length], _cut(self.old, rows, length), _cut(self.sampled, rows, length)
        if self.mode is not None and sampled is not None and self.correction is not None:
            of_rollout = logps.detach() if old is None else old
            limits = settings.correction_min, settings.correction_max
            weight = grpo.engine_correction(of_rollout, sampled, mask, self.mode, *limits)
            self.correction[rows, : weight.shape[1]] = weight
        per_token = grpo.token_loss(
            logps, self.advantages[rows], mask, old_logps=old, ref_logps=_cut(self.ref, rows, length),
            correction=_cut(self.correction, rows, length), beta=settings.beta, epsilon=settings.epsilon,
            epsilon_high=settings.epsilon_high, delta=settings.delta,
            importance_sampling_level=settings.importance_sampling_level,
            use_bias_correction_kl=settings.use_bias_correction_kl,
        )  # fmt: skip
        loss = (per_token * self.weights[rows, :length]).sum()
        self.total.add_(loss.detach())
        return loss


def _cut(tensor: Tensor | None, rows: Tensor, length: int) -> Tensor | None:
    return None if tensor is None else tensor[rows, :length]


def metrics(
    outcome: Outcome,
    batch: dict[str, Any],
    settings: Settings,
    reduce: Callable[[Tensor], Tensor],
    gather: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """What TRL logs of a batch, by TRL's names, and: sampling/kl, frac_zero_signal_skipped, tokens_per_second, peak_gb,
    and signal/entropy, which is over the rows that were computed.

    Args:
        outcome (`Outcome`): From `run` on this batch.
        batch (`dict`): As TRL hands it over, see the module.
        settings (`Settings`): As in `run`.
        reduce (`Callable`): Adds a tensor up over all processes, as accelerator.reduce.
        gather (`Callable`): Concatenates a tensor of all processes, as accelerator.gather.

    Returns means over all tokens, or all rows, of all processes; NaN where there is nothing to tell, and for `entropy`
    where rows were not computed, so that it is TRL's number or none. Every process calls `reduce` and `gather` equally
    often, whatever its rows are like.
    """
    mask, level = outcome.mask, settings.importance_sampling_level
    advantages = batch["advantages"].unsqueeze(1)

    def mean(x: Tensor, over: Tensor | None = None) -> float:
        """Over all tokens of all processes, or those that `over` marks; over rows where there is one number per row."""
        if over is None:
            over = torch.ones_like(x) if x.shape[1] == 1 else mask
        total, count = reduce(torch.stack([(x * over).sum(), over.sum().float()])).tolist()
        return total / count if count else math.nan

    def lowest(x: Tensor) -> float:
        """Of all processes' numbers, NaN left out."""
        value = gather(x.nan_to_num(nan=math.inf).min()).min().item()
        return value if math.isfinite(value) else math.nan

    coef = grpo.ratio(outcome.logps, outcome.old_logps, mask, level)
    logs: dict[str, float] = {}
    if settings.beta:
        divergence = grpo.kl(outcome.logps, batch["ref_per_token_logps"])
        logs["kl"] = mean(divergence * coef if settings.use_bias_correction_kl else divergence)
    logs["signal/entropy"] = mean(outcome.entropies, outcome.scored)
    all_scored = reduce((mask - outcome.scored).sum()).item() == 0
    logs["entropy"] = logs["signal/entropy"] if all_scored else math.nan
    coef = coef if settings.delta is None else coef.clamp(max=settings.delta)
    low = ((coef < 1 - settings.epsilon) & (advantages < 0)).float()
    high = ((coef > 1 + settings.epsilon_high) & (advantages > 0)).float()

    def by_row(x: Tensor) -> Tensor:
        return x.squeeze(1) if x.shape[1] == 1 else (x * mask).sum(-1) / mask.sum(-1)

    logs["clip_ratio/low_mean"], logs["clip_ratio/high_mean"] = mean(low), mean(high)
    logs["clip_ratio/region_mean"] = mean(torch.maximum(low, high))
    logs["clip_ratio/low_min"], logs["clip_ratio/high_max"] = lowest(by_row(low)), -lowest(-by_row(high))

    sampled = batch.get("sampling_per_token_logps")
    if sampled is not None:
        known = outcome.scored * ~sampled.isnan()
        sampled = torch.where(known.bool(), sampled, outcome.logps)
        difference = (outcome.logps - sampled).abs()
        logs["sampling/kl"] = mean(grpo.kl(sampled, outcome.logps), known)
        logs["sampling/sampling_logp_difference/mean"] = mean(difference, known)
        logs["sampling/sampling_logp_difference/max"] = -lowest((-difference).masked_fill(known == 0, math.nan))
    if outcome.correction is not None:
        weighted = outcome.scored if batch.get("importance_sampling_ratio") is None else mask  # TRL's has every row
        if outcome.correction.shape[1] == 1:
            weighted = weighted.amax(1, keepdim=True)
        weights = outcome.correction.masked_fill(weighted == 0, math.nan)
        logs["sampling/importance_sampling_ratio/min"] = lowest(weights)
        logs["sampling/importance_sampling_ratio/mean"] = mean(outcome.correction, weighted)
        logs["sampling/importance_sampling_ratio/max"] = -lowest(-weights)
    skipped = (outcome.scored.sum(1) == 0) & (mask.sum(1) > 0)
    logs["frac_zero_signal_skipped"] = mean(skipped.float().unsqueeze(1))
    logs["tokens_per_second"] = reduce(mask.sum().float()).item() / max(outcome.seconds, 1e-9)
    if mask.is_cuda:
        logs["peak_gb"] = torch.cuda.max_memory_allocated(mask.device) / GB
    return logs
