"""The algorithm against arithmetic done by hand, and against TRL's own formulas where they are short."""

import math

import pytest
import torch
from trl import GRPOConfig

from nbhelpers import LeanGRPOConfig, grpo

ONES = torch.ones(2, 3)


def test_the_classic_group():
    """Rewards 1.0, 0.9, 0.0, 1.0: mean 0.725; squared deviations .0756, .0306, .5256, .0756; std sqrt(.7075 / 3)."""
    got = grpo.group_advantages(torch.tensor([1.0, 0.9, 0.0, 1.0]), 4)
    std = math.sqrt((0.275**2 + 0.175**2 + 0.725**2 + 0.275**2) / 3)
    assert std == pytest.approx(0.48563, abs=1e-5)
    assert got.tolist() == pytest.approx([0.5662, 0.3603, -1.4926, 0.5662], abs=1e-4)
    plain = grpo.group_advantages(torch.tensor([1.0, 0.9, 0.0, 1.0]), 4, scale=False)
    assert plain.tolist() == pytest.approx([0.275, 0.175, -0.725, 0.275])


def test_groups_do_not_mix_and_equal_rewards_teach_nothing():
    got = grpo.group_advantages(torch.tensor([0.0, 1.0, 5.0, 5.0]), 2)
    assert got[2:].tolist() == [0.0, 0.0]
    assert got[0] == -got[1] and got[1] == pytest.approx(1 / math.sqrt(2), abs=1e-3)


@pytest.mark.parametrize("count, group", [(5, 2), (4, 1), (3, 4)])
def test_broken_groups_are_refused(count, group):
    with pytest.raises(ValueError, match=f"{count} rewards are not whole groups of num_generations={group}"):
        grpo.group_advantages(torch.ones(count), group)


def test_one_update_per_rollout_is_the_policy_gradient():
    """With ratio 1 the gradient in a token's log-probability is -A over the number that the loss averages by."""
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    advantages = torch.tensor([0.5, -2.0])
    by_type = {
        "grpo": [[-0.5 / 6] * 3, [2.0 / 2, 0, 0]],
        "bnpo": [[-0.5 / 4] * 3, [2.0 / 4, 0, 0]],
        "dapo": [[-0.5 / 4] * 3, [2.0 / 4, 0, 0]],
        "dr_grpo": [[-0.5 / 20] * 3, [2.0 / 20, 0, 0]],
    }
    assert set(by_type) == set(grpo.LOSS_TYPES)
    for loss_type, wanted in by_type.items():
        value = grpo.loss(logps, advantages, mask, loss_type=loss_type, max_completion_length=10)
        (got,) = torch.autograd.grad(value, logps)
        torch.testing.assert_close(got, torch.tensor(wanted))


def test_clipping_stops_the_gradient_on_one_side_only():
    old = torch.zeros(1, 1)
    for log_ratio, advantage, flows in [(0.3, 1.0, False), (0.3, -1.0, True), (-0.3, 1.0, True), (-0.3, -1.0, False)]:
        logps = torch.full((1, 1), log_ratio, requires_grad=True)
        value = grpo.loss(logps, torch.tensor([advantage]), torch.ones(1, 1), old_logps=old)
        (gradient,) = torch.autograd.grad(value, logps)
        assert bool(gradient.abs() > 0) == flows, (log_ratio, advantage)
        clipped = min(max(math.exp(log_ratio), 0.8), 1.2)
        wanted = -min(math.exp(log_ratio) * advantage, clipped * advantage)
        assert value.item() == pytest.approx(wanted)


def test_kl_is_k3():
    logps, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])
    assert grpo.kl(logps, ref).tolist() == pytest.approx([math.exp(-1), math.e - 2])
    value = grpo.loss(logps[None], torch.zeros(1), torch.ones(1, 2), ref_logps=ref[None], beta=0.04)
    assert value.item() == pytest.approx(0.04 * (math.exp(-1) + math.e - 2) / 2)
    with pytest.raises(ValueError, match="ref_logps"):
        grpo.loss(logps[None], torch.zeros(1), torch.ones(1, 2), beta=0.04)


def test_sequence_ratio_is_the_geometric_mean_over_the_completion():
    logps, old = torch.tensor([[0.2, 0.4, 9.0]]), torch.zeros(1, 3)
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    assert grpo.ratio(logps, old, mask, "sequence").tolist() == [[pytest.approx(math.exp(0.3))]]
    assert grpo.ratio(logps, old, mask)[0, :2].tolist() == pytest.approx([math.exp(0.2), math.exp(0.4)])
    value = grpo.loss(logps, torch.tensor([1.0]), mask, old_logps=old, importance_sampling_level="sequence")
    assert value.item() == pytest.approx(-1.2)  # clipped at 1 + epsilon


def test_the_engine_correction_by_hand():
    """Trainer and engine disagree by log 2 on one token, by -log 8 on another, and the engine did not score a third."""
    logps = torch.tensor([[math.log(2.0), 0.0, -1.0, 7.0]])
    sampling = torch.tensor([[0.0, math.log(8.0), float("nan"), 0.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])

    def weights(mode, low=None, high=3.0):
        return grpo.engine_correction(logps, sampling, mask, mode, low, high).tolist()

    assert weights("token_truncate")[0] == pytest.approx([2.0, 1 / 8, 1.0, 1.0])
    assert weights("token_truncate", 0.5, 1.5)[0] == pytest.approx([1.5, 0.5, 1.0, 1.0])
    assert weights("token_mask", 0.5, 1.5)[0] == [0.0, 0.0, 1.0, 1.0]
    assert weights("sequence_truncate", None, 3.0) == [[pytest.approx(2 / 8)]]
    assert weights("sequence_mask", 0.5, 3.0) == [[0.0]]
    with pytest.raises(ValueError, match="sequence_mask, not 'group_mask'"):
        weights("group_mask")
    corrected = grpo.loss(logps, torch.tensor([1.0]), mask, correction=torch.tensor([[2.0, 0.125, 1.0, 1.0]]))
    assert corrected.item() == pytest.approx(-(2 + 0.125 + 1) / 3)


def test_rounding_is_a_weight_of_one_by_token_and_a_lottery_by_completion():
    """Why LeanGRPOConfig's default is not TRL's: 0.02 nats off a token, as bf16 rounds, over 64 texts of 20,000."""
    torch.manual_seed(0)
    logps, mask = -torch.rand(64, 20_000), torch.ones(64, 20_000)
    sampling = logps + 0.02 * torch.randn(64, 20_000) + 0.02**2 / 2  # so that the expected ratio is 1
    by_token = grpo.engine_correction(logps, sampling, mask, LeanGRPOConfig.vllm_importance_sampling_mode)
    assert by_token.mean(-1).sub(1).abs().max() < 1e-3
    by_text = grpo.engine_correction(logps, sampling, mask, GRPOConfig.vllm_importance_sampling_mode)
    assert by_text.median() < 0.05


def test_delta_bounds_the_ratio_of_a_negative_advantage():
    logps, old = torch.tensor([[math.log(10.0)]]), torch.zeros(1, 1)
    one = torch.ones(1, 1)
    assert grpo.loss(logps, -one[0], one, old_logps=old).item() == pytest.approx(10.0)
    assert grpo.loss(logps, -one[0], one, old_logps=old, delta=4.0).item() == pytest.approx(4.0)


def test_parts_of_a_batch_add_up_to_it():
    """Weights are those of the whole batch, so any split of the rows gives the same loss."""
    torch.manual_seed(0)
    logps, old, ref = torch.randn(3, 4, 5).unbind()
    mask = (torch.arange(5) < torch.tensor([5, 2, 0, 3])[:, None]).float()
    a = torch.tensor([1.0, -1.0, 0.5, 2.0])
    options = {"beta": 0.04, "use_bias_correction_kl": True}
    for loss_type in grpo.LOSS_TYPES:
        whole = grpo.loss(
            logps, a, mask, old_logps=old, ref_logps=ref, loss_type=loss_type, max_completion_length=9, **options
        )
        weights = grpo.token_weights(mask, loss_type, 9)
        parts = [
            (grpo.token_loss(logps[r], a[r], mask[r], old_logps=old[r], ref_logps=ref[r], **options) * weights[r]).sum()
            for r in ([0, 3], [1], [2])
        ]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    assert grpo.token_weights(mask, "dapo", num_items=20.0).sum().item() == pytest.approx(10 / 20)


def test_padding_is_never_seen():
    logps = torch.randn(2, 3)
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    poisoned = logps.masked_fill(mask == 0, 50.0)
    for loss_type in grpo.LOSS_TYPES:
        args = dict(old_logps=torch.zeros(2, 3), loss_type=loss_type, max_completion_length=3)
        advantages = torch.tensor([1.0, -1.0])
        torch.testing.assert_close(
            grpo.loss(poisoned, advantages, mask, **args), grpo.loss(logps * mask, advantages, mask, **args)
        )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="loss_type must be one of grpo, bnpo"):
        grpo.loss(ONES, torch.ones(2), ONES, loss_type="ppo")
    with pytest.raises(ValueError, match="max_completion_length"):
        grpo.loss(ONES, torch.ones(2), ONES, loss_type="dr_grpo")
    with pytest.raises(ValueError, match="'token', 'sequence' or 'completion'"):
        grpo.ratio(ONES, ONES, ONES, "group")
