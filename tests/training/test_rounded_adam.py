"""AdamW on weights in 16 bits: right on average, as torch's own in fp32, and the same again from its saved state."""

import copy

import pytest
import torch

from nbhelpers.training.rounded_adam import BLOCK, PIECE, RoundedAdamW, rounded_by_chance


def test_rounding_is_right_on_average_and_never_further_than_the_next_number():
    generator = torch.Generator().manual_seed(0)
    for value in (0.02 + 1e-5, -0.02 - 1e-5, 3.1, 1e-30):
        x = torch.full((200_000,), value)
        got = rounded_by_chance(x, generator).float()
        assert len(got.unique()) == 2 and got.min() < x[0] < got.max()
        assert got.double().mean().item() == pytest.approx(x[0].item(), rel=1e-4)
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), -float("inf")])
    assert torch.equal(rounded_by_chance(exact).float(), exact)
    assert rounded_by_chance(torch.tensor([float("nan")])).isnan().all()


def runs(dtype, ours: bool, updates: int = 200, bits: int = 8, lr: float = 1e-3, n: int = 6000):
    """A weight that is drawn to a target by noisy gradients, with weight decay."""
    noise = torch.Generator().manual_seed(1)
    target, start = torch.randn(2, n, generator=noise).bfloat16().float().unbind()
    weight = torch.nn.Parameter(start.to(dtype).clone())
    settings = {"lr": lr, "weight_decay": 0.01}
    optimizer = RoundedAdamW([weight], bits=bits, **settings) if ours else torch.optim.AdamW([weight], **settings)
    for _ in range(updates):
        weight.grad = (weight.detach().float() - target + 0.1 * torch.randn(n, generator=noise)).to(dtype)
        optimizer.step()
    return weight.detach().float(), start


def test_with_fp32_moments_and_weights_it_is_torchs_adamw():
    ours, _ = runs(torch.float32, True, bits=32)
    torch.testing.assert_close(ours, runs(torch.float32, False)[0], rtol=1e-5, atol=1e-6)


def test_in_16_bits_it_goes_where_fp32_goes_and_rounding_to_the_nearest_does_not():
    wanted, start = runs(torch.float32, False, lr=1e-5)
    way = (wanted - start).sign()
    ours, nearest = (((runs(torch.bfloat16, own, lr=1e-5)[0] - start) * way).mean().item() for own in (True, False))
    whole = (wanted - start).abs().mean().item()
    assert ours == pytest.approx(whole, rel=0.1) and nearest < 0.2 * whole


def test_moments_take_two_bytes_a_number_and_small_tensors_are_exact():
    large, small = (torch.nn.Parameter(torch.randn(n).bfloat16()) for n in (PIECE + 300, 4000))
    optimizer = RoundedAdamW([large, small])
    for p in (large, small):
        p.grad = torch.randn(p.shape).bfloat16()
    optimizer.step()
    taken = sum(value.nbytes for value in optimizer.state[large].values())
    assert taken == 2 * (large.numel() + 4 * -(-large.numel() // BLOCK))
    assert {value.dtype for value in optimizer.state[small].values()} == {torch.float32}
    root = (large.grad.float().square() * 0.001).sqrt()
    assert optimizer.state[large]["root_v"].dtype == torch.uint8 and root.max() > 0


def test_its_saved_state_goes_on_bit_for_bit():
    torch.manual_seed(0)
    gradients = torch.randn(6, 5000).bfloat16()
    weight = torch.nn.Parameter(torch.randn(5000).bfloat16())
    optimizer, ends = RoundedAdamW([weight], lr=1e-4, seed=3), []
    for number, gradient in enumerate(gradients):
        if number == 3:
            saved, at = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
    ends.append(weight.detach().clone())
    again = torch.nn.Parameter(at)
    resumed = RoundedAdamW([again], lr=1e-4, seed=3)
    resumed.load_state_dict(saved)
    torch.manual_seed(99)  # what others draw does not matter
    for gradient in gradients[3:]:
        again.grad = gradient.clone()
        resumed.step()
    assert torch.equal(again.detach(), ends[0])


def test_the_factor_of_the_clipping_acts_in_fp32_and_once():
    one, two = (torch.nn.Parameter(torch.ones(5000)) for _ in range(2))
    ours, torchs = RoundedAdamW([one], bits=32), torch.optim.AdamW([two], lr=1e-3, weight_decay=0.0)
    gradient = torch.randn(5000)
    for factor in (1 / 3, 1.0):
        ours.param_groups[0]["gradient_factor"] = factor
        one.grad, two.grad = gradient.clone(), gradient * factor
        ours.step(), torchs.step()
        assert ours.param_groups[0]["gradient_factor"] == 1.0
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
