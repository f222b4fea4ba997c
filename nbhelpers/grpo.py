"""GRPO in plain torch, as pure functions: group advantages, the probability ratio, clipping, KL and the loss.

The text of the lessons and the oracle of the tests. B is the number of completions, T their longest length, G the
number of completions of one prompt (`num_generations`); the completions of a prompt stand next to each other.

Sources: GRPO, arXiv:2402.03300; Dr. GRPO, arXiv:2503.20783; DAPO, arXiv:2503.14476; GSPO, arXiv:2507.18071; the k3
estimator of the KL divergence, http://joschu.net/blog/kl-approx.html. Names and constants are TRL's.
"""

from typing import Any

import torch

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def group_advantages(rewards: torch.Tensor, num_generations: int, scale: bool = True) -> torch.Tensor:
    """How much better each completion is than the others of its own prompt.

    advantage = reward - mean of the group, and with `scale` (GRPO) divided by the group's standard deviation (with
    Bessel's correction) + 1e-4; without (Dr. GRPO) not.

    Args:
        rewards (`Tensor`): float [B], B a multiple of `num_generations`.
        num_generations (`int`): G, completions of each prompt.
        scale (`bool`): Whether to divide by the standard deviation.

    Returns:
        `Tensor`: float [B]. A group whose rewards are all equal gets zeros: it teaches nothing.

    Raises ValueError for rewards that are not whole groups of at least 2.
    """
    if num_generations < 2 or rewards.numel() % num_generations:
        raise ValueError(
            f"{rewards.numel()} rewards are not whole groups of num_generations={num_generations} (at least 2): "
            "pass the rewards of all completions of each prompt, side by side"
        )
    groups = rewards.view(-1, num_generations)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.view(-1)


def leave_one_out(rewards: torch.Tensor, num_generations: int, normalize: bool = False) -> torch.Tensor:
    """RLOO's advantages (arXiv:2402.14740): a reward less the mean of the rewards of the group's other completions.

    `rewards` are float [B], groups of `num_generations` side by side, NaN where none applied. Returns float [B], 0
    where there is none or no other in the group; `normalize` makes their mean 0 and divides by their deviation + 1e-4.
    """
    groups = rewards.view(-1, num_generations)
    others = (~groups.isnan()).sum(1, keepdim=True) - 1
    advantages = (groups - (groups.nansum(1, keepdim=True) - groups) / others).view(-1)
    known = advantages[advantages.isfinite()]
    if normalize and len(known) > 1:
        advantages = (advantages - known.mean()) / (known.std() + 1e-4)
    return advantages.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def total_rewards(rewards: torch.Tensor) -> torch.Tensor:
    """float [B, functions] -> [B]: the sum of the functions that applied; NaN in a row where none did."""
    return rewards.nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)


def silent_groups(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Which groups teach nothing, because all of their rewards are equal.

    Args:
        rewards (`Tensor`): float [B], NaN where no reward function applied; groups stand side by side.
        num_generations (`int`): Rows of a group.

    Returns bool [B / num_generations].
    """
    groups = rewards.view(-1, num_generations)
    highest = groups.nan_to_num(nan=-torch.inf).amax(1)
    lowest = groups.nan_to_num(nan=torch.inf).amin(1)
    return highest <= lowest


def ratio(
    logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor, importance_sampling_level: str = "token"
) -> torch.Tensor:
    """Probability of what was sampled, under the model now over the model that sampled it.

    exp(logps - old_logps), token by token (in arXiv:2402.03300, equation 3), its geometric mean over a completion's
    tokens (GSPO, arXiv:2507.18071), or its product over them (RLOO, arXiv:2402.14740).

    Args:
        logps (`Tensor`), old_logps (`Tensor`): float [B, T], log-probability of each token of each completion.
        mask (`Tensor`): [B, T], 1 where a token belongs to the completion.
        importance_sampling_level (`str`): "token", "sequence" for GSPO, or "completion" for RLOO.

    Returns:
        `Tensor`: float [B, T], or [B, 1] for a whole completion.

    Raises ValueError for another level.
    """
    log_ratio = logps - old_logps
    if importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1)).unsqueeze(-1)
    elif importance_sampling_level == "completion":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True)
    elif importance_sampling_level != "token":
        raise ValueError("importance_sampling_level must be 'token', 'sequence' or 'completion', not "
                         f"{importance_sampling_level!r}")  # fmt: skip
    return log_ratio.exp()


def kl(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """k3, an unbiased and never negative estimate of KL(model || reference), token by token.

    exp(ref_logps - logps) - (ref_logps - logps) - 1 (arXiv:2402.03300, equation 4).

    Args:
        logps (`Tensor`), ref_logps (`Tensor`): float [B, T], log-probabilities under the model and the reference.

    Returns:
        `Tensor`: float [B, T].
    """
    difference = ref_logps - logps
    return difference.exp() - difference - 1


def engine_correction(
    logps: torch.Tensor,
    sampling_logps: torch.Tensor,
    mask: torch.Tensor,
    mode: str = "token_truncate",
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> torch.Tensor:
    """What a token's loss is multiplied by because another engine drew it than the one that trains.

    weight = exp(logps - sampling_logps), of a token or ("sequence_...") of a whole completion. "..._truncate" clamps it
    to [clip_min, clip_max], "..._mask" makes it 0 outside. It has no gradient. A token without a sampling_logp (NaN)
    counts as drawn by the trainer. Names and modes are TRL's (`vllm_importance_sampling_mode`). Source:
    https://fengyao.notion.site/off-policy-rl (truncated importance sampling).

    Args:
        logps (`Tensor`): float [B, T], log-probabilities as of the rollout, under the trainer.
        sampling_logps (`Tensor`): float [B, T], those under the engine that drew; like logps, without any filter.
        mask (`Tensor`): [B, T], 1 where a token belongs to the completion.
        mode (`str`): "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask".
        clip_min (`float`, *optional*), clip_max (`float`, *optional*): Limits of the weight; None for no limit.

    Returns:
        `Tensor`: float [B, T], or [B, 1] for a sequence.

    Raises ValueError for another mode.
    """
    level, _, action = mode.partition("_")
    if level not in ("token", "sequence") or action not in ("truncate", "mask"):
        raise ValueError(
            f"the correction's mode is token_truncate, token_mask, sequence_truncate or sequence_mask, not {mode!r}"
        )
    difference = torch.nan_to_num((logps.detach() - sampling_logps) * mask, nan=0.0)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    weight = difference.exp()
    if action == "truncate":
        return weight.clamp(min=clip_min, max=clip_max)
    low, high = float("-inf") if clip_min is None else clip_min, float("inf") if clip_max is None else clip_max
    return weight.masked_fill((weight < low) | (weight > high), 0.0)


def token_loss(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    use_bias_correction_kl: bool = False,
) -> torch.Tensor:
    """The loss of each token, before any average.

    -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) * correction + beta * KL

    That is GRPO's objective (arXiv:2402.03300, equation 3) with DAPO's second epsilon (arXiv:2503.14476).

    Args:
        logps (`Tensor`): float [B, T] with gradient.
        advantages (`Tensor`): float [B], or [B, T] with one for each token.
        mask (`Tensor`): [B, T], 1 on the completion's tokens.
        old_logps (`Tensor`, *optional*): float [B, T], logps when the completions were sampled. None: equal to logps,
            i.e. one update per rollout.
        ref_logps (`Tensor`, *optional*): float [B, T] under the reference model, needed when beta > 0.
        correction (`Tensor`, *optional*): float [B, T] or [B, 1] from `engine_correction`.
        beta (`float`): Weight of the KL divergence to the reference model.
        epsilon (`float`), epsilon_high (`float`, *optional*): How far the ratio counts below and above 1; one number
            for both if `epsilon_high` is not given.
        delta (`float`, *optional*): A second upper limit of the ratio, for negative advantages too (two-sided clipping,
            arXiv:2505.07291).
        importance_sampling_level (`str`): See `ratio`.
        use_bias_correction_kl (`bool`): Multiply the KL by the ratio (DeepSeek-V3.2, arXiv:2512.02556).

    Returns:
        `Tensor`: float [B, T]; 0 where the mask is 0.

    Raises ValueError for beta > 0 without ref_logps, and as `ratio` does.
    """
    old_logps = logps.detach() if old_logps is None else old_logps
    r = ratio(logps, old_logps, mask, importance_sampling_level)
    high = epsilon if epsilon_high is None else epsilon_high
    a = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    limited = r if delta is None else r.clamp(max=delta)
    per_token = -torch.min(limited * a, r.clamp(1 - epsilon, 1 + high) * a)
    if correction is not None:
        per_token = per_token * correction
    if beta:
        if ref_logps is None:
            raise ValueError("beta > 0 needs ref_logps, the log-probabilities under the reference model")
        divergence = kl(logps, ref_logps)
        per_token = per_token + beta * (divergence * r if use_bias_correction_kl else divergence)
    return per_token * mask  # [B, 1] at the sequence level becomes [B, T] here


def token_weights(
    mask: torch.Tensor,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    num_items: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """What each token's loss is multiplied by, so that the sum over all tokens is the loss of the batch.

    "grpo" averages over a completion's tokens, then over completions; "bnpo" and "dapo" over all tokens of the batch
    (they differ only once a batch is split: DAPO counts the tokens of all of it, `num_items`); "dr_grpo" divides by
    B * `max_completion_length`, so that a long wrong answer is not cheaper than a short one.

    Args:
        mask (`Tensor`): [B, T], 1 on the completions' tokens, of the WHOLE batch: so a micro-batch is weighed right.
        loss_type (`str`): One of LOSS_TYPES.
        max_completion_length (`int`, *optional*): In tokens; "dr_grpo" needs it.
        num_items (`Tensor` or `float`, *optional*): Completion tokens of the whole batch, for "dapo"; the mask's own if
            not given.

    Returns:
        `Tensor`: float [B, T], 0 where the mask is.

    Raises ValueError for another loss type, and for "dr_grpo" without its length.
    """
    mask = mask.float()
    if loss_type == "grpo":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)
    if loss_type in ("bnpo", "dapo"):
        total = mask.sum() if num_items is None or loss_type == "bnpo" else num_items
        return mask / torch.as_tensor(total).clamp(min=1)
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' divides by max_completion_length: pass it")
        return mask / (len(mask) * max_completion_length)
    raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, not {loss_type!r}")


def loss(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """The GRPO loss of one batch; its gradient in `logps` is the learning signal.

    Args:
        logps (`Tensor`), advantages (`Tensor`), mask (`Tensor`), options: As in `token_loss`.
        loss_type (`str`), max_completion_length (`int`, *optional*): As in `token_weights`.

    Returns:
        `Tensor`: A scalar. With beta = 0 and old_logps None it is 0 up to the advantages' mean: watch the reward, not
        this.
    """
    weights = token_weights(mask, loss_type, max_completion_length)
    return (token_loss(logps, advantages, mask, **options) * weights).sum()
