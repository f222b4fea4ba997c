"""GRPO's relatives, what is left out of a loss, and the entropy bonus, against TRL's own loss on one rollout."""

import math

import pytest
import torch
import trl
from step_cases import chunks, compare, configure, difference, gradients, make_batch, make_model, make_trainer

from nbhelpers import grpo
from nbhelpers.training import losses, trainer
from nbhelpers.training.losses import Settings


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(stock TRL, ours), each with its own copy of one model."""
    folder = tmp_path_factory.mktemp("pair")
    return [make_trainer(cls, make_model("qwen2"), folder) for cls in (trl.GRPOTrainer, trainer.LeanGRPOTrainer)]


def same_numbers(found):
    stock, ours = found
    assert stock.keys() <= ours.keys()
    for name, wanted in stock.items():
        assert ours[name] == pytest.approx(wanted, rel=1e-4, abs=1e-6, nan_ok=True), name


# -------------------------------------------------------------------------------------------------- against TRL


@pytest.mark.parametrize("settings", [
    {"loss_type": "cispo", "high": 1.05},
    {"loss_type": "cispo", "high": 5.0, "level": "sequence"},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
    {"loss_type": "sapo", "level": "sequence", "beta": 0.04},
    {"loss_type": "luspo", "level": "sequence"},
    {"loss_type": "luspo", "level": "sequence", "beta": 0.04, "accumulation": 2},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 2.0, "vespo_lambda_neg": 0.3},
    {"loss_type": "vespo", "beta": 0.04, "bias": False},
], ids=str)  # fmt: skip
def test_relatives_in_other_settings(pair, settings):
    same_numbers(compare(pair, make_batch(), **settings))


@pytest.mark.parametrize("loss_type", losses.LOSS_TYPES)
def test_the_results_of_tools_take_no_loss(pair, loss_type):
    batch = make_batch(tools=True)
    same_numbers(compare(pair, batch, loss_type=loss_type, beta=0.04, accumulation=2))
    with_them = {name: value for name, value in batch.items() if name != "tool_mask"}
    configure(pair[1], loss_type=loss_type, beta=0.04)
    wanted = gradients(pair[1], batch)[1]
    pair[1].model.zero_grad()
    assert difference(gradients(pair[1], with_them)[1], wanted) > 1e-3, "the mask changes nothing"


def test_a_tools_result_that_nobody_would_have_written_breaks_nothing(pair):
    """Its log-probability was -200 in the rollout: what takes no loss must not overflow either."""
    batch = make_batch(tools=True)
    of_tools = (batch["tool_mask"] == 0) & (batch["completion_mask"] == 1)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        batch[name] = batch[name].masked_fill(of_tools, -200.0 if name.startswith("old") else -0.1)
    configure(pair[1], beta=0.04)
    loss, got = gradients(pair[1], batch)
    assert math.isfinite(loss) and all(gradient.isfinite().all() for gradient in got.values())
    assert math.isfinite(pair[1]._metrics["train"]["kl"][0])


def test_a_completion_that_is_all_tools_is_left_out(pair):
    batch = make_batch(tools=True)
    batch["tool_mask"][3] = 0
    compare(pair, batch, loss_type="grpo")


def test_whole_runs_with_an_environment_end_at_the_same_weights(tmp_path):
    """Its texts stand between the model's own; two updates for each rollout, so with an old pass, and a reference."""

    def rollout(prompts, one):
        draw = torch.Generator().manual_seed(one.state.global_step)
        ids = [torch.randint(3, 40, (int(n),), generator=draw).tolist()
               for n in torch.randint(4, 12, (len(prompts),), generator=draw)]  # fmt: skip
        mask = [[int(i % 4 != 2) for i in range(len(row))] for row in ids]
        return {"prompt_ids": one.processing_class(prompts)["input_ids"], "completion_ids": ids, "logprobs": None,
                "env_mask": mask}  # fmt: skip

    ends = []
    for cls in (trl.GRPOTrainer, trainer.LeanGRPOTrainer):
        model = make_model("qwen2")
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        one = make_trainer(cls, model, tmp_path, optim="sgd", num_iterations=2, beta=0.04, max_steps=3)
        one.rollout_func = rollout
        one.train()
        ends.append({n: p.detach() - start[n] for n, p in one.model.named_parameters() if p.requires_grad})
    assert one.lean and difference(ends[1], ends[0]) < 1e-4


@pytest.mark.parametrize("settings", [
    {"quantile": 0.2}, {"quantile": 0.5, "loss_type": "grpo", "beta": 0.04}, {"quantile": 0.3, "coef": 0.1},
    {"threshold": 0.05}, {"threshold": 0.1, "quantile": 0.5, "loss_type": "vespo"},
    {"threshold": 0.05, "loss_type": "luspo", "level": "sequence"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tools", [False, True])
def test_tokens_and_completions_that_do_not_count(pair, settings, tools):
    batch = make_batch(tools=tools, size=6)
    same_numbers(compare(pair, batch, **settings))
    configure(pair[1], **{name: value for name, value in settings.items() if name not in ("quantile", "threshold")})
    plain = gradients(pair[1], batch)[1]
    configure(pair[1], **settings)
    assert difference(gradients(pair[1], batch)[1], plain) > 1e-2, "all of them count"


@pytest.mark.parametrize("loss_type", losses.LOSS_TYPES)
def test_the_entropy_bonus(pair, loss_type):
    """It acts in rows without advantage too, and is a mean over tokens whatever the policy's own mean is."""
    batch = make_batch(zeros=True, tools=True)
    same_numbers(compare(pair, batch, loss_type=loss_type, coef=0.3, accumulation=2))
    configure(pair[1], loss_type=loss_type)
    plain = gradients(pair[1], batch)[1]
    configure(pair[1], loss_type=loss_type, coef=0.3)
    assert difference(gradients(pair[1], batch)[1], plain) > 1e-3


@pytest.mark.parametrize("target", [0.5, 20.0], ids=["above", "below"])
def test_the_adaptive_entropy_bonus_moves_as_trls(pair, target):
    """Three updates of two micro-batches: the factor moves once an update, and acts while the entropy is low enough."""
    settings = dict(coef=0.1, adaptive=True, accumulation=2, entropy_target=target, entropy_coef_delta=0.04)
    settings |= dict(entropy_coef_min=0.05, entropy_coef_max=0.17)
    seen = []
    for one in pair:
        configure(one, **settings)
        one.entropy_coef, track = 0.1, []
        for seed in range(3):
            one.model.zero_grad()
            for number, part in enumerate(chunks(make_batch(seed=seed), 2)):
                one.accelerator.gradient_state._set_sync_gradients(number == 1)
                one.accelerator.backward(one.compute_loss(one.model, part))
            track.append((one.entropy_coef, one._last_world_entropy))
        seen.append(
            (
                track,
                {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None},
                one._metrics["train"]["entropy_coef"],
                one._metrics["train"]["policy_loss"],
            )
        )
    (wanted, grads, coefs, policy), (got, ours, our_coefs, our_policy) = seen
    assert [pytest.approx(each, rel=1e-5) for each in wanted] == got and len(set(coefs)) > 1
    assert coefs == pytest.approx(our_coefs) and policy == pytest.approx(our_policy, rel=1e-4, abs=1e-6)
    assert difference(ours, grads) < 1e-5


# ---------------------------------------------------------------------------------------------------- by hand


def test_the_engines_correction_is_vespos_own_weight():
    logps, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.1, -1.8]])
    mask, one = torch.ones(1, 2), torch.ones(1)
    settings = Settings("vespo")
    correction = torch.tensor([[1.5, 0.8]])
    w = math.exp(-0.1) * 1.5 * 0.8
    phi = w**2 * math.exp(3 * (1 - w))
    assert losses.sequence_weight(logps - old, one, mask, settings, correction).item() == pytest.approx(phi)
    got = losses.token_loss(logps, one, mask, settings, old, correction=correction)
    torch.testing.assert_close(got, -phi * logps)
    assert losses.sequence_weight(0 * logps, one, mask, settings).item() == pytest.approx(1.0)


def test_a_completion_is_left_out_once_it_is_improbable_and_bad():
    now, drawn, mask = torch.tensor([[-3.0, -1.0]] * 3), torch.tensor([[-1.0, float("nan")]] * 3), torch.ones(3, 2)
    advantages = torch.tensor([-1.0, 1.0, 0.0])
    assert losses.near_policy(now, drawn, advantages, mask, 0.9).tolist() == [[0.0], [1.0], [1.0]]
    assert losses.near_policy(now, drawn, advantages, mask, 1.0).tolist() == [[1.0], [1.0], [1.0]]


def test_means_of_the_relatives():
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    assert losses.token_weights(mask, Settings("luspo")).tolist() == [[0.5, 0.5, 0.5], [0.5, 0, 0]]
    for kind, like in (("sapo", "grpo"), ("cispo", "dapo"), ("vespo", "dapo")):
        assert torch.equal(losses.token_weights(mask, Settings(kind), 9), grpo.token_weights(mask, like, None, 9))
