"""Online DPO and PPO in plain torch, as pure functions: the loss of a pair; rewards, advantages and values of tokens.

What grpo.py is to GRPO. P is the number of pairs, B of completions, T their longest length. PPO's clipped policy loss
is GRPO's (`grpo.token_loss`, with one advantage for each token).

Sources: DPO, arXiv:2305.18290; IPO, arXiv:2310.12036; from online pairs, arXiv:2402.04792; PPO, arXiv:1707.06347;
generalized advantage estimation, arXiv:1506.02438; PPO on language models, arXiv:1909.08593 and arXiv:2403.17031. Names
and constants are TRL's.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def dpo_loss(margins: Tensor, beta: float, loss_type: str = "sigmoid") -> Tensor:
    """The loss of each pair, float [P]: -log sigmoid(beta m), or (m - 1 / (2 beta))^2 with "ipo".

    `margins` are m = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected), float [P], of whole completions
    (arXiv:2305.18290, equation 7). `beta`, above 0, is the price of leaving the reference, IPO's tau.
    """
    if loss_type == "ipo":
        return (margins - 1 / (2 * beta)) ** 2
    return -torch.nn.functional.logsigmoid(beta * margins)


def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor | None, mask: Tensor, kl_coef: float) -> Tensor:
    """What each token is paid: -kl_coef (logp - ref_logp), and the completion's score at its last token; float [B, T].

    `scores` are float [B]; `logps` and `ref_logps` [B, T], under the model that wrote and the reference (None where
    kl_coef is 0); `mask` [B, T] is 1 on the completion's tokens, which come first; `kl_coef` is the price of a nat
    (arXiv:1909.08593, equation 2). What is returned is 0 where the mask is 0.
    """
    rewards = torch.zeros_like(logps) if ref_logps is None else -kl_coef * (logps - ref_logps)
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0).long()
    return torch.where(mask.bool(), rewards.scatter_add(1, last, scores.unsqueeze(1).to(rewards.dtype)), 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: A_t = d_t + gamma lam A_(t+1), d_t = r_t + gamma V_(t+1) - V_t.

    Nothing follows the last token: V and A are 0 behind it (arXiv:1506.02438, equation 16). `rewards` are those of each
    token, `values` those of the text before it, float [B, T]; `mask` [B, T] is 1 on the completion's tokens, which come
    first. Returns (advantages, returns), float [B, T], 0 where the mask is 0; a return is advantage plus value.
    """
    rewards, values = (torch.where(mask.bool(), x, 0.0) for x in (rewards, values))
    advantages, after = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_value = after
    for t in range(rewards.shape[1] - 1, -1, -1):
        after = (rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * after) * mask[:, t]
        advantages[:, t], next_value = after, values[:, t]
    return advantages, advantages + values


def whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Callable[[Tensor], Tensor] = Tensor.clone
) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over all that the mask marks, the variance with Bessel's correction.

    `x` is float [B, T], as the result, which is 0 where `mask` [B, T] is. shift_mean=False adds the mean again, as for
    rewards, whose sign means something. `reduce` adds a tensor up over all processes, as accelerator.reduce.
    """
    total, count = reduce(torch.stack(((x * mask).sum(), mask.sum().to(x.dtype))))
    mean = total / count.clamp(min=1)
    variance = reduce(((x - mean) ** 2 * mask).sum()) / (count - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * mask


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float = 0.2) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), as in arXiv:2403.17031, section 2.

    `values`, with gradient, `old_values` and `returns`, those of the rollout, are float of one shape, as the result;
    `cliprange_value` is c.
    """
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)
