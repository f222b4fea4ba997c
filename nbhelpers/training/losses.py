"""The losses of TRL's `loss_type`: GRPO's own (grpo.py), and its relatives CISPO, SAPO, LUSPO and VESPO.

A loss is a policy term for each token, what each token counts in the mean, and what is left out of it:

    loss = sum over tokens of  weight (policy term * counts * correction + beta KL)

With r the ratio, A the advantage and sg(...) without a gradient the policy terms are

    CLIPPED    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)     GRPO, arXiv:2402.03300; luspo, arXiv:2602.05261
    cispo      -sg(min(r, epsilon_high)) A logp                        MiniMax-M1, arXiv:2506.13585
    sapo       -sigmoid(t (r - 1)) 4 / t A                             arXiv:2511.20347
    vespo      -sg(w^k exp(l (1 - w))) A logp, w the sequence's ratio  arXiv:2602.10693

B is the number of completions, T their longest length. Names, constants and means are TRL's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nbhelpers import grpo

CLIPPED = (*grpo.LOSS_TYPES, "luspo")  # with GRPO's clipped policy term
BY_ITEMS = ("dapo", "cispo", "vespo")  # divided by the completion tokens of the whole batch
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")


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
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)  # sapo_temperature_pos, sapo_temperature_neg
    vespo_pos: tuple[float, float] = (2.0, 3.0)  # vespo_k_pos, vespo_lambda_pos
    vespo_neg: tuple[float, float] = (3.0, 2.0)  # vespo_k_neg, vespo_lambda_neg
    off_policy_mask_threshold: float | None = None
    entropy_bonus: bool = False  # whether there is one, be its factor 0 in this batch
    entropy_coef: float = 0.0  # the factor in this batch: the adaptive bonus changes it
    correction: str | None = "sequence_mask"  # vllm_importance_sampling_mode; None: no correction for the engine
    correction_min: float | None = None
    correction_max: float | None = 3.0


def token_weights(mask: Tensor, settings: Settings, num_items: Tensor | float | None = None) -> Tensor:
    """What each token's loss is multiplied by, so that the sum over all tokens is the loss of the batch.

    As `grpo.token_weights`. "sapo" averages as "grpo" does, "cispo" and "vespo" as "dapo"; "luspo" sums over a
    completion's tokens and averages over completions.

    Args:
        mask (`Tensor`): [B, T], 1 on the tokens that take a loss, of the WHOLE batch.
        settings (`Settings`): What decides the loss.
        num_items (`Tensor` or `float`, *optional*): Such tokens of the whole batch, for BY_ITEMS; the mask's own if not
            given.

    Returns float [B, T].
    """
    if settings.loss_type == "luspo":
        return mask.float() / len(mask)
    mean = {"sapo": "grpo", "cispo": "dapo", "vespo": "dapo"}.get(settings.loss_type, settings.loss_type)
    return grpo.token_weights(mask, mean, settings.max_completion_length, num_items)


def token_loss(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    settings: Settings,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    correction: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The loss of each token, before any mean; the module has the equations.

    Args:
        logps (`Tensor`), advantages (`Tensor`), mask (`Tensor`), old_logps (`Tensor`, *optional*), ref_logps (`Tensor`,
            *optional*), correction (`Tensor`, *optional*): As in `grpo.token_loss`.
        settings (`Settings`): What decides the loss.
        counts (`Tensor`, *optional*): [B, T] or [B, 1], 0 where the policy term is left out, else 1.

    Returns float [B, T]; 0 where the mask is 0.
    """
    kind, beta, level = settings.loss_type, settings.beta, settings.importance_sampling_level
    if kind in CLIPPED:
        return grpo.token_loss(
            logps, advantages, mask, old_logps=old_logps, ref_logps=ref_logps, correction=_times(correction, counts),
            beta=beta, epsilon=settings.epsilon, epsilon_high=settings.epsilon_high, delta=settings.delta,
            importance_sampling_level=level, use_bias_correction_kl=settings.use_bias_correction_kl,
        )  # fmt: skip
    old_logps = logps.detach() if old_logps is None else old_logps
    r, a = grpo.ratio(logps, old_logps, mask, level), advantages.unsqueeze(1)
    factor = _times(correction, counts)
    if kind == "cispo":
        per_token = -r.clamp(max=settings.epsilon_high).detach() * a * logps
    elif kind == "sapo":
        high, low = a.new_tensor(settings.sapo_temperatures)
        t = torch.where(a > 0, high, low)
        per_token = -torch.sigmoid(t * (r - 1)) * 4 / t * a
    else:
        phi = sequence_weight(logps - old_logps, advantages, mask, settings, correction)
        per_token, factor = -phi * a * logps, counts  # the correction is in phi
    if factor is not None:
        per_token = per_token * factor
    if beta:
        assert ref_logps is not None  # TRL computes them where beta is not 0
        divergence = grpo.kl(logps, ref_logps)
        per_token = per_token + beta * (divergence * r if settings.use_bias_correction_kl else divergence)
    return per_token * mask


def _times(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one * other


def sequence_weight(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, settings: Settings, correction: Tensor | None = None
) -> Tensor:
    """VESPO's weight of a completion, w^k exp(l (1 - w)) (arXiv:2602.10693): 1 at w = 1. It has no gradient.

    w is the product of the ratios of all of the completion's tokens, and of their corrections.

    Args:
        log_ratio (`Tensor`): float [B, T], logps - old_logps.
        advantages (`Tensor`): float [B]; its sign decides k and l.
        mask (`Tensor`): [B, T], 1 on the tokens that take a loss.
        settings (`Settings`): Has k and l.
        correction (`Tensor`, *optional*): float [B, T] or [B, 1] from `grpo.engine_correction`.

    Returns float [B, 1].
    """
    lowest = math.log(1e-8)
    log_w = (log_ratio.detach().clamp(-20.0, 20.0) * mask).sum(-1, keepdim=True)
    if correction is not None:
        log_w = log_w + correction.log().clamp(lowest, 20.0).sum(-1, keepdim=True)
    log_w = log_w.clamp(lowest, 20.0)
    pos, neg = log_w.new_tensor([settings.vespo_pos, settings.vespo_neg])
    k, rate = torch.where((advantages >= 0).unsqueeze(1), pos, neg).split(1, dim=1)
    rate = rate.clamp(min=1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0)


def near_policy(logps: Tensor, drawn_logps: Tensor, advantages: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Which completions count, if those that the model has left behind do not (DeepSeek-V3.2, arXiv:2512.02556, 9).

    A completion with a negative advantage is left out once the mean of drawn_logps - logps exceeds the threshold.

    Args:
        logps (`Tensor`): float [B, T], under the model now.
        drawn_logps (`Tensor`): float [B, T], when the completions were drawn; a NaN tells nothing.
        advantages (`Tensor`): float [B].
        mask (`Tensor`): [B, T], 1 on the tokens that take a loss.
        threshold (`float`): In nats per token, TRL's `off_policy_mask_threshold`.

    Returns float [B, 1], 1 where a completion counts, else 0.
    """
    drift = ((drawn_logps - logps.detach()).nan_to_num(nan=0.0) * mask).sum(1, keepdim=True)
    drift = drift / mask.sum(1, keepdim=True).clamp(min=1)
    return ((advantages.unsqueeze(1) >= 0) | (drift <= threshold)).float()
