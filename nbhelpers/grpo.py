"""GRPO in plain torch, as pure functions: group advantages, the probability ratio, clipping, KL and the loss.

The text of the lessons and the oracle of the tests. B is the number of completions, T their longest length, G the
number of completions of one prompt (`num_generations`); the completions of a prompt stand next to each other.

Sources: GRPO, arXiv:2402.03300; Dr. GRPO, arXiv:2503.20783; DAPO, arXiv:2503.14476; GSPO, arXiv:2507.18071; the k3
estimator of the KL divergence, http://joschu.net/blog/kl-approx.html. Names and constants are TRL's.
"""

import torch

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def group_advantages(rewards: torch.Tensor, num_generations: int, scale: bool = True) -> torch.Tensor:
    """How much better each completion is than the others of its own prompt.

    advantage = reward - mean of the group, and with `scale` (GRPO) divided by the group's standard deviation (with
    Bessel's correction) + 1e-4; without (Dr. GRPO) not.

    Args:
        rewards: float [B], B a multiple of `num_generations`.
    Returns:
        float [B]. A group whose rewards are all equal gets zeros: it teaches nothing.
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


def ratio(
    logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor, importance_sampling_level: str = "token"
) -> torch.Tensor:
    """Probability of what was sampled, under the model now over the model that sampled it.

    Args:
        logps, old_logps: float [B, T], log-probability of each token of each completion.
        mask: [B, T], 1 where a token belongs to the completion.
        importance_sampling_level: "token", or "sequence" for GSPO (the geometric mean over a completion's tokens).
    Returns:
        float [B, T], or [B, 1] at the sequence level.
    """
    log_ratio = logps - old_logps
    if importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1)).unsqueeze(-1)
    elif importance_sampling_level != "token":
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', not {importance_sampling_level!r}")
    return log_ratio.exp()


def kl(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """k3, an unbiased and never negative estimate of KL(model || reference), token by token: float [B, T]."""
    difference = ref_logps - logps
    return difference.exp() - difference - 1


def loss(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
) -> torch.Tensor:
    """The GRPO loss of one batch; its gradient in `logps` is the learning signal.

    per token: -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * KL, then averaged:
    "grpo" over a completion's tokens, then over completions; "bnpo" and "dapo" over all tokens of the batch (they
    differ only once a batch is split: DAPO counts the tokens of all of it); "dr_grpo" divides by
    B * `max_completion_length`, so that a long wrong answer is not cheaper than a short one.

    Args:
        logps: float [B, T] with gradient. old_logps: the same when the completions were sampled (None: equal, i.e.
            one update per rollout). ref_logps: under the reference model, needed when beta > 0.
        advantages: float [B]. mask: [B, T], 1 on the completion's tokens.
    Returns:
        a scalar. With beta = 0 and old_logps None it is 0 up to the advantages' mean: watch the reward, not this.
    """
    old_logps = logps.detach() if old_logps is None else old_logps
    r = ratio(logps, old_logps, mask, importance_sampling_level)
    high = epsilon if epsilon_high is None else epsilon_high
    a = advantages.unsqueeze(1)
    per_token = -torch.min(r * a, r.clamp(1 - epsilon, 1 + high) * a)
    if beta:
        if ref_logps is None:
            raise ValueError("beta > 0 needs ref_logps, the log-probabilities under the reference model")
        per_token = per_token + beta * kl(logps, ref_logps)
    per_token = per_token * mask  # [B, 1] at the sequence level becomes [B, T] here
    if loss_type == "grpo":
        return (per_token.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    if loss_type in ("bnpo", "dapo"):
        return per_token.sum() / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' divides by max_completion_length: pass it")
        return per_token.sum() / (len(per_token) * max_completion_length)
    raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, not {loss_type!r}")
