"""GRPO's loss of a batch through the lean step, and its metrics under TRL's names.

The batch is TRL's: a dictionary with prompt_ids, prompt_mask [B, P]; completion_ids, completion_mask [B, T];
advantages [B]; and, where they are needed, num_items_in_batch, tool_mask (0 on the results of tools, which take no
loss), old_per_token_logps, ref_per_token_logps, sampling_per_token_logps and importance_sampling_ratio [B, T].
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

from . import losses
from .lean_step import LeanStep
from .losses import Settings
from .packing import Packed, Rows, unpad

HighEntropy = Callable[[Tensor, Tensor], Tensor]  # (entropies, mask) [B, T] -> bool [B, T], as TRL's trainer gives it
ValueLoss = Callable[[Packed, Tensor], Tensor]  # (micro-batch, weights [S] of its tokens) -> scalar, PPO's


@dataclass
class Outcome:
    """A batch's loss and its tensors, for the metrics. All are detached."""

    loss: Tensor  # scalar, fp32
    policy_loss: Tensor  # of it, without the entropy bonus and before it is divided for gradient accumulation
    logps: Tensor  # [B, T] fp32, of the policy; the rollout's own in rows that were not computed
    entropies: Tensor  # [B, T] fp32, nats
    mask: Tensor  # [B, T], 1 on the tokens that take a loss
    acts: Tensor  # [B, T], `mask` without the tokens that top_entropy_quantile leaves out
    scored: Tensor  # [B, T], `mask` in the rows that went through the model, 0 elsewhere
    old_logps: Tensor  # [B, T] fp32
    correction: Tensor | None  # fp32 [B, T], or [B, 1] with one weight per completion
    seconds: float
    value_loss: Tensor | None = None  # of the loss, before it is divided for gradient accumulation


def run(
    step: LeanStep,
    batch: dict[str, Any],
    settings: Settings,
    accumulation: float = 1.0,
    num_items: Tensor | float | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    high_entropy: HighEntropy | None = None,
    value_loss: ValueLoss | None = None,
) -> Outcome:
    """The loss of a batch (losses.py has its equations) and, with `backward`, its gradients in the parameters' `.grad`.

    Stage 1: what each token counts in the whole batch, and which completions have a gradient at all. Without a KL term
        and an entropy bonus one without advantage (all of its group got the same reward) has none: with `backward` it
        is not computed.
    Stage 2: the completions without their padding.
    Stage 3: forward and backward, one micro-batch after the other; each adds its tokens' weighted loss.

    If memory runs out, all stages are run again with smaller micro-batches (`LeanStep.retried`). With `high_entropy` a
    pass of its own comes before them: which tokens count is known only once all entropies are. (Outside of what is run
    again, since all processes must call it equally often.)

    Args:
        step (`LeanStep`): Of the policy.
        batch (`dict`): As TRL hands it over, see the module.
        settings (`Settings`): What decides the loss.
        accumulation (`float`): What the mean-type losses are divided by.
        num_items (`Tensor` or `float`, *optional*): The completion tokens that DAPO divides by; the batch's own if not
            given.
        backward (`Callable`, *optional*): Called with each micro-batch's scalar, e.g. accelerator.backward. None: no
            gradients.
        high_entropy (`Callable`, *optional*): Which tokens count, those with the highest entropies; None: all do.
        value_loss (`Callable`, *optional*): What a micro-batch adds to the loss beside the policy; with `backward`.

    Raises CannotFit if not even one completion fits.
    """
    mask = acts = loss_mask(batch)
    if high_entropy is not None:
        rows, shape = unpadded(batch, mask), (mask.shape[0], mask.shape[1])
        acts = mask * high_entropy(step.retried(lambda: step.score(rows, shape)[1], learns=False), mask)
    return step.retried(
        lambda: _run(step, batch, settings, mask, acts, accumulation, num_items, backward, value_loss),
        learns=backward is not None,
    )


def _run(
    step: LeanStep,
    batch: dict[str, Any],
    settings: Settings,
    mask: Tensor,
    acts: Tensor,
    accumulation: float,
    num_items: Tensor | float | None,
    backward: Callable[[Tensor], Any] | None,
    value_loss: ValueLoss | None,
) -> Outcome:
    start = time.perf_counter()
    # Stage 1: weights of the tokens, and rows with a gradient
    advantages = batch["advantages"]
    divisor = 1.0 if settings.loss_type in losses.BY_ITEMS else accumulation
    weights = losses.token_weights(mask, settings, num_items) / divisor
    every = backward is None or value_loss is not None or bool(settings.beta or settings.entropy_bonus)
    keep = torch.ones(len(mask), dtype=torch.bool, device=mask.device) if every else advantages != 0

    # Stage 2: no padding
    rows = unpadded(batch, mask, keep)

    # Stage 3: forward and backward
    loss = _BatchLoss(batch, settings, mask, weights, acts, accumulation, value_loss)
    if backward is None:
        loss.logps, loss.entropies = step.score(rows, (mask.shape[0], mask.shape[1]))
        loss.of_rows(torch.arange(len(mask), device=mask.device), loss.logps, loss.entropies)
    else:
        step.differentiate(rows, loss.of_packed, backward, entropy_grad=settings.entropy_coef != 0)
    seconds = time.perf_counter() - start
    old_logps = loss.logps if loss.old is None else loss.old
    scored = mask * keep.unsqueeze(1)
    return Outcome(
        loss.total - loss.bonus + loss.of_values, loss.total * divisor, loss.logps, loss.entropies, mask, acts, scored,
        old_logps, loss.correction, seconds, None if value_loss is None else loss.of_values * divisor,
    )  # fmt: skip


def unpadded(batch: dict[str, Any], mask: Tensor, keep: Tensor | None = None) -> Rows:
    """The rows of TRL's batch on the host; `mask` [B, T] has 1 on what is scored, `keep` bool [B] on rows to take."""
    prompts, completions = (
        (batch["prompt_ids"], batch["prompt_mask"]),
        (batch["completion_ids"], batch["completion_mask"]),
    )
    return unpad(*prompts, *completions, keep, mask)


def loss_mask(batch: dict[str, Any]) -> Tensor:
    """[B, T], 1 on the tokens that take a loss: those of the completions, without what tools and environments wrote."""
    mask: Tensor = batch["completion_mask"]
    return mask if batch.get("tool_mask") is None else mask * batch["tool_mask"]


class _BatchLoss:
    """The loss of a batch, micro-batch by micro-batch, and what its forward passes bring: tensors of the whole batch.

    Args:
        batch (`dict`): As TRL hands it over, see the module.
        settings (`Settings`): What decides the loss.
        mask (`Tensor`): [B, T], 1 on the tokens that take a loss.
        weights (`Tensor`): fp32 [B, T], what each token's loss is multiplied by (losses.token_weights).
        acts (`Tensor`): [B, T], 1 on the tokens whose policy term and entropy bonus count.
        accumulation (`float`): What the mean entropy is divided by.
        value_loss (`Callable`, *optional*): As in `run`.
    """

    def __init__(
        self, batch: dict[str, Any], settings: Settings, mask: Tensor, weights: Tensor, acts: Tensor,
        accumulation: float, value_loss: ValueLoss | None = None,
    ):  # fmt: skip
        self.value_loss = value_loss
        self.settings, self.mask, self.weights = settings, mask, weights
        self.counts = None if acts is mask else acts
        self.bonus_weights = settings.entropy_coef * acts / acts.sum().clamp(min=1) / accumulation
        self.advantages: Tensor = batch["advantages"]
        self.old: Tensor | None = batch.get("old_per_token_logps")
        self.ref: Tensor | None = batch.get("ref_per_token_logps")
        self.sampled: Tensor | None = batch.get("sampling_per_token_logps")
        device = self.mask.device
        self.total, self.bonus, self.of_values = torch.zeros(3, device=device).unbind()
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
        self.logps[place], self.entropies[place] = logps.detach(), entropies.detach()
        padded = torch.zeros(len(packed.rows), packed.width, device=logps.device)
        place = packed.local, packed.column
        loss = self.of_rows(packed.rows, padded.index_put(place, logps), padded.index_put(place, entropies))
        if self.value_loss is None:
            return loss
        of_values = self.value_loss(packed, self.weights[packed.number, packed.column])
        self.of_values.add_(of_values.detach())
        return loss + of_values

    def of_rows(self, rows: Tensor, logps: Tensor, entropies: Tensor) -> Tensor:
        """What the rows int64 [n] of the batch add to the loss, from their padded logps and entropies [n, T'].

        T' <= T. What takes no loss is 0 everywhere, so that no difference there can overflow.
        """
        settings, length = self.settings, logps.shape[1]
        mask = self.mask[rows, :length]
        old, ref, sampled = (
            None if one is None else one[rows, :length].masked_fill(mask == 0, 0.0)
            for one in (self.old, self.ref, self.sampled)
        )
        of_rollout = logps.detach() if old is None else old
        if self.mode is not None and sampled is not None and self.correction is not None:
            limits = settings.correction_min, settings.correction_max
            weight = grpo.engine_correction(of_rollout, sampled, mask, self.mode, *limits)
            self.correction[rows, : weight.shape[1]] = weight
        advantages = self.advantages[rows]
        advantages = advantages[:, :length] if advantages.dim() == 2 else advantages
        counts = None if self.counts is None else self.counts[rows, :length]
        if settings.off_policy_mask_threshold is not None:
            drawn = of_rollout if sampled is None else sampled
            near = losses.near_policy(logps, drawn, advantages, mask, settings.off_policy_mask_threshold)
            counts = near if counts is None else near * counts
        correction = None if self.correction is None else self.correction[rows, :length]
        per_token = losses.token_loss(logps, advantages, mask, settings, old, ref, correction, counts)
        loss = (per_token * self.weights[rows, :length]).sum()
        self.total.add_(loss.detach())
        if not settings.entropy_coef:
            return loss
        bonus = (entropies * self.bonus_weights[rows, :length]).sum()
        self.bonus.add_(bonus.detach())
        return loss - bonus


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
    advantages = batch["advantages"]
    advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)

    def mean(x: Tensor, over: Tensor | None = None) -> float:
        """Over all tokens of all processes, or those that `over` marks; over rows where there is one number per row."""
        if over is None:
            over = torch.ones_like(x) if x.shape[1] == 1 else mask
        x = torch.where(over.bool(), x, 0.0)  # no product: what takes no loss may be infinite
        total, count = reduce(torch.stack([x.sum(), over.sum().float()])).tolist()
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

    def by_row(x: Tensor) -> Tensor:
        return x.squeeze(1) if x.shape[1] == 1 else (x * mask).sum(-1) / mask.sum(-1)

    if settings.loss_type in losses.CLIPPED:
        coef = coef if settings.delta is None else coef.clamp(max=settings.delta)
        low = ((coef < 1 - settings.epsilon) & (advantages < 0)).float()
        high = ((coef > 1 + settings.epsilon_high) & (advantages > 0)).float()
        logs["clip_ratio/low_mean"], logs["clip_ratio/high_mean"] = mean(low), mean(high)
        logs["clip_ratio/region_mean"] = mean(torch.maximum(low, high))
        logs["clip_ratio/low_min"], logs["clip_ratio/high_max"] = lowest(by_row(low)), -lowest(-by_row(high))
    elif settings.loss_type == "cispo":
        logs["cispo_clip_ratio"] = mean(((coef > settings.epsilon_high) & (advantages > 0)).float())
    elif settings.loss_type == "vespo":
        phi = losses.sequence_weight(
            outcome.logps - outcome.old_logps, batch["advantages"], mask, settings, outcome.correction
        )
        logs["vespo/phi_seq_mean"] = mean(phi)
    if outcome.value_loss is not None:
        logs["value_loss"] = gather(outcome.value_loss).mean().item()
    if settings.entropy_bonus:
        logs["policy_loss"] = gather(outcome.policy_loss).nanmean().item()

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
