"""Runs of Online DPO and PPO that are killed go on bit for bit, the value head too; the planner knows them."""

import math
import signal
import subprocess
from pathlib import Path

import method_cases
import pytest
from method_cases import workshop
from resume_cases import At, curve, same, weights

from nbhelpers import memory, panel
from nbhelpers.memory.micro_batches import StepCost, Tokens
from nbhelpers.training import checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and curves of runs that nobody stopped."""
    ends = {}
    for kind in method_cases.KINDS:
        run = workshop(kind, tmp_path_factory.mktemp(kind))
        run.train()
        ends[kind] = weights(run), curve(run)
    return ends


@pytest.mark.parametrize("kind", method_cases.KINDS)
def test_a_killed_run_goes_on_bit_for_bit(kind, tmp_path, whole, warm):
    """From step 3: for PPO in the middle of a rollout that is used four times."""
    command, here = [*warm, "-m", "method_cases", kind, str(tmp_path)], Path(method_cases.__file__).parent
    out = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=200)
    assert out.returncode == -signal.SIGKILL, out.stdout[-2000:] + out.stderr[-2000:]
    assert checkpoint.newest(tmp_path).name == "checkpoint-3"
    again = workshop(kind, tmp_path)
    assert again.train(resume_from_checkpoint="auto").global_step == 7
    assert same(weights(again), whole[kind][0]) and curve(again) == whole[kind][1]
    assert ("value_head.weight" in weights(again)) == (kind == "ppo")


@pytest.mark.parametrize("kind", method_cases.KINDS)
def test_an_interrupted_run_goes_on_with_the_panel(kind, tmp_path, whole):
    run = workshop(kind, tmp_path, At(5, KeyboardInterrupt, "on_step_begin"), panel.Live())
    assert run.train().metrics == {"interrupted": True}
    again = workshop(kind, tmp_path, panel.Live())
    again.train(resume_from_checkpoint="auto")
    assert same(weights(again), whole[kind][0])
    if kind == "dpo":  # PPO's last rollout is of before
        assert again.state.samples and again.state.samples[0].rewards.keys() == {"nines"}
    finished = workshop(kind, tmp_path)  # has the finished run's weights, and its values
    finished.train(resume_from_checkpoint="auto")
    assert same(weights(finished), whole[kind][0])


@pytest.mark.parametrize("kind", method_cases.KINDS)
def test_an_evaluation_has_the_methods_loss(kind, tmp_path):
    one = method_cases.tiny(
        kind, tmp_path, eval_dataset=[{"prompt": prompt} for prompt in method_cases.PROMPTS],
        per_device_eval_batch_size=6, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    one.train()
    log = next(log for log in one.state.log_history if "eval_loss" in log)
    assert log["eval_reward"] == pytest.approx(5 / 6) and math.isfinite(log["eval_loss"])
    assert f"eval_{'rewards/margins' if kind == 'dpo' else 'objective/kl'}" in log


def test_the_planner_knows_the_methods():
    """Online DPO makes two answers; PPO's value head reads the scored tokens in 32 bits."""
    grpo, dpo, ppo = (memory.plan("qwen2.5-1.5b", 15, method=name) for name in ("grpo", "online_dpo", "ppo"))
    assert dpo.setting.num_generations == dpo.setting.rows == 2 and dpo.training_peak < grpo.training_peak
    tokens, shapes = Tokens(1000, 500, 1000), grpo.preset.architecture
    more = StepCost(shapes, valued=True).head(tokens) - StepCost(shapes).head(tokens)
    assert more == 2 * 4 * 500 * shapes.hidden_size and ppo.fits
    with pytest.raises(ValueError, match="method is one of grpo, "):
        memory.plan("qwen2.5-1.5b", 15, method="dpo")


def test_a_1b_learns_from_pairs_in_5_gb():
    plan = memory.plan("llama-3.2-1b", 15, method="online_dpo")
    assert plan.fits and max(plan.training_peak, plan.generation_peak) + memory.CONTEXT_GB < 5
