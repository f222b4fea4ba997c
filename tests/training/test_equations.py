"""Online DPO's and PPO's equations, by hand and in fp64, written here a second time and in another way."""

import math

import pytest
import torch

from nbhelpers.training.methods import equations

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_loss_of_a_pair_by_hand():
    """beta 0.5 and a margin of 2: -log sigmoid(1) = log(1 + 1/e); IPO: (2 - 1)^2."""
    margin = torch.tensor([2.0])
    assert equations.dpo_loss(margin, 0.5).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert equations.dpo_loss(margin, 0.5, "ipo").item() == pytest.approx(1.0)


def test_what_tokens_are_paid_by_hand():
    """Two tokens and a score of 3; the first is 0.5 nats more likely than under the reference, the second 0.25 less."""
    logps, ref = torch.tensor([[-1.0, -1.25, 9.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
    paid = equations.token_rewards(torch.tensor([3.0]), logps, ref, torch.tensor([[1, 1, 0]]), 0.1)
    assert paid.tolist()[0] == pytest.approx([-0.05, 3.025, 0.0])
    alone = equations.token_rewards(torch.tensor([3.0]), logps, None, torch.tensor([[1, 1, 0]]), 0.0)
    assert alone.tolist() == [[0.0, 3.0, 0.0]]


def test_advantages_by_hand():
    """gamma 0.5, lam 0.5; rewards 0 and 1, values 0.4 and 0.6: d = (0 + 0.3 - 0.4, 1 - 0.6), A = (-0.1 + 0.1, 0.4)."""
    rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.4, 0.6, 5.0]])
    advantages, returns = equations.gae(rewards, values, torch.tensor([[1, 1, 0]]), 0.5, 0.5)
    assert advantages.tolist()[0] == pytest.approx([0.0, 0.4, 0.0], abs=1e-7)
    assert returns.tolist()[0] == pytest.approx([0.4, 1.0, 0.0])


def test_advantages_are_the_sum_of_the_papers_equation():
    """A_t = sum over l of (gamma lam)^l d_(t+l), row by row, without what stands behind the end."""
    rewards, values, gamma, lam = numbers(3, 4), numbers(3, 4, seed=1), 0.9, 0.8
    advantages, returns = equations.gae(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(MASK.sum(1).tolist()):
        v = [*values[row, :length].tolist(), 0.0]
        d = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        wanted = [sum((gamma * lam) ** (u - t) * d[u] for u in range(t, length)) for t in range(length)]
        assert advantages[row].tolist() == pytest.approx(wanted + [0.0] * (4 - length))
        assert returns[row, :length].tolist() == pytest.approx([a + b for a, b in zip(wanted, v, strict=False)])
    _, to_go = equations.gae(rewards, values, MASK, 1.0, 1.0)
    assert torch.allclose(to_go, (rewards * MASK).flip(1).cumsum(1).flip(1) * MASK)  # lam 1: the rewards to come


def test_whitened_numbers_have_mean_0_and_deviation_1():
    x = numbers(3, 4, seed=2) * 3 + 5
    white, marked = equations.whiten(x, MASK), MASK.bool()
    assert white[marked].mean().item() == pytest.approx(0, abs=1e-9)
    assert white[marked].std().item() == pytest.approx(1, abs=1e-6) and white[~marked].abs().sum() == 0
    kept = equations.whiten(x, MASK, shift_mean=False)
    assert torch.allclose(kept[marked], white[marked] + x[marked].mean())
    assert equations.whiten(torch.full((1, 1), 3.0), torch.ones(1, 1)).tolist() == [[0.0]]


def test_the_value_loss_by_hand():
    """Old value 0, return 1, clipped to 0.2: a value of 0.5 counts as 0.2, without a gradient; one of -1 as itself."""
    values = torch.tensor([0.5, -1.0, 0.1], requires_grad=True)
    loss = equations.value_loss(values, torch.zeros(3), torch.ones(3), 0.2)
    assert loss.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 2**2, 0.5 * 0.9**2])
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, -2.0, -0.9])
