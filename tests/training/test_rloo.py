"""RLOO on GRPO's hooks: TRL's advantages, loss and gradients on the same rollout, and what it does not serve."""

import pytest
import tiny_model
import torch
import trl
from resume_cases import At, same, weights
from step_cases import ROWS, difference, make_batch, make_model

from nbhelpers import LeanGRPOConfig, LeanRLOOConfig, LeanRLOOTrainer
from nbhelpers.grpo import leave_one_out
from nbhelpers.models import lineage
from nbhelpers.training import rows as rows_module

SETTINGS = dict(
    max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=12, learning_rate=1e-2,
    gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, report_to="none",
    logging_steps=1, seed=3,
)  # fmt: skip


def letters(completions, **_):
    """By how many letters there are; None, unscorable, for some."""
    return [None if sum(map(ord, text)) % 5 == 0 else float(len(set(text)) % 4) for text in completions]


def make(cls, folder, engine=None, callbacks=None, config=trl.RLOOConfig, **changes):
    args = config(str(folder), **(SETTINGS | changes))
    more = {"engine": engine} if cls is LeanRLOOTrainer else {}  # None: TRL writes the completions of both
    return cls(
        make_model(), reward_funcs=[letters], args=args, train_dataset=ROWS, processing_class=tiny_model.tokenizer(),
        callbacks=callbacks, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.0},
        {"beta": 0.05},
        {"beta": 0.3, "normalize_advantages": True, "mask_truncated_completions": True},
        {"beta": 0.05, "reward_clip_range": (0.5, 2.0), "temperature": 0.7},
    ],
)
def test_a_rollout_has_trls_advantages_and_logs(tmp_path, changes):
    rollouts = []
    for cls in (trl.RLOOTrainer, LeanRLOOTrainer):
        one = make(cls, tmp_path, **changes)
        one.model.train()
        with torch.no_grad():
            for name, parameter in one.model.named_parameters():
                if "lora_B.default" in name:
                    parameter.mul_(1.5)  # away from the reference
        torch.manual_seed(5)
        batch = one._generate_and_score_completions([row for row in ROWS.select(range(4)) for _ in range(4)])
        rollouts.append((one, batch))
    (trls, wanted), (ours, got) = rollouts
    assert torch.equal(wanted["completion_ids"], got["completion_ids"])
    assert got["advantages"].abs().sum() > 0
    torch.testing.assert_close(got["advantages"], wanted["advantages"], rtol=1e-4, atol=1e-5)
    assert list(ours._logs["advantages"]) == pytest.approx(list(trls._logs["advantages"]), rel=1e-4, abs=1e-5)
    for name in ("kl", "reward", "reward_std"):
        if name in trls._metrics["train"]:
            assert ours._metrics["train"][name] == pytest.approx(trls._metrics["train"][name], rel=1e-4)
    if "old_per_token_logps" in got:
        logps = (got["old_per_token_logps"] * got["completion_mask"]).sum(1)
        torch.testing.assert_close(logps, wanted["old_logps"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_gradients_and_clipping_are_trls(tmp_path, accumulation):
    batch = make_batch()
    model_logps = {}
    results = []
    for cls in (trl.RLOOTrainer, LeanRLOOTrainer):
        one = make(cls, tmp_path, beta=0.05, epsilon=0.1, epsilon_high=0.15)
        one.model.train()
        one.current_gradient_accumulation_steps = accumulation
        if not model_logps:  # a policy near the one that wrote: products of ratios around 1, some of them clipped
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            with torch.no_grad():
                logps, _, _ = one._get_per_token_logps_and_entropies(one.model, ids, mask, 12)
            torch.manual_seed(1)
            model_logps["old"] = (logps + 0.06 * torch.randn(logps.shape)) * batch["completion_mask"]
        given = {**batch, "old_per_token_logps": model_logps["old"], "old_logps": model_logps["old"].sum(1)}
        one.model.zero_grad()
        loss = one.compute_loss(one.model, given)
        if cls is trl.RLOOTrainer:
            loss = loss / accumulation  # transformers does it
        one.accelerator.backward(loss)
        grads = {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}
        results.append((loss.item(), grads, one._metrics["train"]))
    (wanted_loss, wanted, trls), (got_loss, got, ours) = results
    assert got_loss == pytest.approx(wanted_loss, rel=1e-5) and difference(got, wanted) < 1e-5
    assert 0 < trls["clip_ratio/region_mean"][0] < 1
    for name in ("entropy", "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"):
        assert ours[name] == pytest.approx(trls[name], rel=1e-4)


@pytest.mark.parametrize("changes", [{"beta": 0.0}, {"beta": 0.1, "num_iterations": 2}])
def test_whole_runs_end_at_trls_weights(tmp_path, changes):
    ends = []
    for cls in (trl.RLOOTrainer, LeanRLOOTrainer):
        one = make(cls, tmp_path, optim="sgd", gradient_accumulation_steps=2, max_steps=3, **changes)
        start = weights(one)
        one.train()
        ends.append({name: end - start[name] for name, end in weights(one).items() if ".ref." not in name})
    assert difference(ends[1], ends[0]) < 1e-4


def test_it_learns_what_is_rewarded(tmp_path):
    """Capital letters, of which a random model writes some; all of its weights learn."""

    def capitals(completions, **_):
        return [sum(map(str.isupper, text)) / max(1, len(text)) for text in completions]

    changes = {
        "max_steps": 8, "per_device_train_batch_size": 32, "num_generations": 8, "max_completion_length": 4,
        "beta": 0.0, "learning_rate": 3e-2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    one = LeanRLOOTrainer(
        tiny_model.model(initializer_range=0.1), [capitals], LeanRLOOConfig(str(tmp_path), **SETTINGS | changes),
        train_dataset=ROWS, processing_class=tiny_model.tokenizer(), engine="hf",
    )  # fmt: skip
    one.train()
    rewards = [log["reward"] for log in one.state.log_history if "reward" in log]
    assert rewards[0] < 0.5 and rewards[7] > rewards[0] + 0.3


def test_leave_one_out_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 4.0, torch.nan, 2.0, torch.nan, torch.nan, 3.0])
    got = leave_one_out(rewards, 3)
    assert got.tolist() == [1.0, -0.5, -0.5, 2.0, 0.0, -2.0, 0.0, 0.0, 0.0]
    known = leave_one_out(torch.tensor([1.0, 0.0, 3.0, 2.0]), 2, normalize=True)
    assert known.mean().item() == pytest.approx(0.0, abs=1e-6) and known.std().item() == pytest.approx(1.0, rel=1e-3)


def test_silent_groups_weigh_nothing_unless_the_kl_tells_their_answers_apart(tmp_path):
    def same_for_all(completions, **_):
        return [0.1] * len(completions)

    for beta, silent in ((0.0, 1.0), (0.05, 0.0)):
        one = make(LeanRLOOTrainer, tmp_path, beta=beta, config=LeanRLOOConfig)
        one.reward_funcs[:] = [same_for_all]
        with torch.no_grad():
            for name, parameter in one.model.named_parameters():
                if "lora_B.default" in name:
                    parameter.add_(0.05)
        one.model.train()
        batch = one._generate_and_score_completions([row for row in ROWS.select(range(2)) for _ in range(4)])
        assert one._metrics["train"]["frac_reward_zero_std"] == [silent]
        assert bool(batch["advantages"].any()) == (beta > 0)


def test_a_stopped_run_goes_on_bit_for_bit_and_no_other_methods_does(tmp_path):
    changes = {"config": LeanRLOOConfig, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "engine": "hf"}
    whole = make(LeanRLOOTrainer, tmp_path / "whole", **changes)
    whole.train()
    stop = At(2, KeyboardInterrupt, "on_step_begin")
    make(LeanRLOOTrainer, tmp_path / "broken", callbacks=[stop], **changes).train()
    again = make(LeanRLOOTrainer, tmp_path / "broken", **changes)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 4 and same(weights(whole), weights(again))
    assert lineage.methods(again.model) == ["RLOO"]
    assert again._identity()["method"] == "RLOO"
    changes["beta"] = 0.0
    with pytest.raises(ValueError, match=r"beta: 0.05 there, 0.0 here"):
        make(LeanRLOOTrainer, tmp_path / "broken", **changes).train(resume_from_checkpoint="auto")


def test_what_rloo_has_not_is_refused_by_name(tmp_path):
    for name, value in (
        ("loss_type", "dr_grpo"), ("scale_rewards", "batch"), ("importance_sampling_level", "sequence"),
        ("delta", 2.0), ("entropy_coef", 0.1), ("cast_lm_head_to_fp32", True), ("top_entropy_quantile", 0.2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}=.* is not served with RLOO"):
            LeanRLOOConfig(str(tmp_path), **{name: value})
    for limits in ((1.0, 0.0), (1.0,), "0-1"):
        with pytest.raises(ValueError, match="reward_clip_range"):
            LeanRLOOConfig(str(tmp_path), reward_clip_range=limits)
    given = {"train_dataset": ROWS, "processing_class": tiny_model.tokenizer()}
    for name, value in (("tools", [print]), ("rollout_func", print), ("lean", False)):
        with pytest.raises(ValueError, match=f"{name}=.* is not served with RLOO"):
            LeanRLOOTrainer(make_model(), letters, LeanRLOOConfig(str(tmp_path)), **given, **{name: value})
    with pytest.raises(TypeError, match=r"pass a LeanRLOOConfig or trl\.RLOOConfig"):
        LeanRLOOTrainer(make_model(), letters, LeanGRPOConfig(str(tmp_path)), **given)
    with pytest.raises(ValueError, match=r"RLOO runs through the lean step alone, and torch_compile is asked for"):
        make(LeanRLOOTrainer, tmp_path, torch_compile=True)
    with pytest.raises(ValueError, match="no step at all"):
        rows_module.enough(ROWS.select(range(1)), LeanRLOOConfig(str(tmp_path), **SETTINGS))
