"""Completions that get longer in stages: what ends a stage, and that a resumed run changes where it would have."""

import pytest
from resume_cases import At, curve, make, same, weights
from transformers import AutoTokenizer

from nbhelpers import engines, memory
from nbhelpers.presets import WORKSHOP
from nbhelpers.training import identity
from nbhelpers.training.config import LeanGRPOConfig
from nbhelpers.training.methods.ppo import LeanPPOConfig
from nbhelpers.training.methods.rloo import LeanRLOOConfig
from nbhelpers.training.stages import ROLLOUTS, Stage

BY_STEPS = [Stage(4, steps=2), Stage(9, steps=3), Stage(14)]
COMMON = {"max_steps": 7, "save_steps": 100, "max_completion_length": 4, "stages": BY_STEPS}
REUSED = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


def lengths(run) -> list:
    logs = [log for log in run.state.log_history if "train_runtime" not in log]  # the summary repeats the last step
    return [log.get("max_completion_length") for log in logs if "loss" in log]


# ---- what ends a stage ----


@pytest.mark.parametrize("stage, steps, cut_off, rewards, over", [
    (Stage(8), 10**6, [1.0] * 99, [0.0] * 99, False),
    (Stage(8, steps=3), 2, [], [], False), (Stage(8, steps=3), 3, [], [], True), (Stage(8, steps=3), 4, [], [], True),
    (Stage(8, cut_off=0.5), 9, [1.0] * (ROLLOUTS - 1), [], False),
    (Stage(8, cut_off=0.5), 9, [0.5] * ROLLOUTS, [], True),
    (Stage(8, cut_off=0.5), 9, [1.0] * 50 + [0.4] * ROLLOUTS, [], False),  # the newest count
    (Stage(8, plateau=2), 9, [], [1, 1, 1], False),
    (Stage(8, plateau=2), 9, [], [0, 0, 1, 1], False),
    (Stage(8, plateau=2), 9, [], [0, 0, 1, 1, 1, 1], True), (Stage(8, plateau=2), 9, [], [0, 2, 1, 0], True),
    (Stage(8, steps=100, cut_off=0.9, plateau=1), 9, [0.0] * 20, [1, 0], True),
])  # fmt: skip
def test_what_ends_a_stage(stage, steps, cut_off, rewards, over):
    assert (stage.over(steps, cut_off, rewards) is not None) == over


def test_the_length_of_the_first_stage_is_the_config_s(tmp_path):
    assert LeanGRPOConfig(str(tmp_path), stages=BY_STEPS).max_completion_length == 4
    assert LeanRLOOConfig(str(tmp_path), stages=BY_STEPS).max_completion_length == 4
    assert LeanPPOConfig(str(tmp_path), stages=BY_STEPS).max_completion_length == 4
    assert LeanGRPOConfig(str(tmp_path)).to_dict()["stages"] is None
    LeanGRPOConfig(str(tmp_path), stages=BY_STEPS).to_json_string()
    with pytest.raises(ValueError, match="max_completion_length=9, and the first of the stages has 4"):
        LeanGRPOConfig(str(tmp_path), stages=BY_STEPS, max_completion_length=9)


# ---- runs ----


@pytest.mark.parametrize("engine", ["hf", "graph"])
def test_completions_get_longer_and_a_line_says_so(tokenizer, tmp_path, capsys, engine):
    run = make(tokenizer, tmp_path, engine=engine, **COMMON, loss_type="dr_grpo")
    assert run._longest_row()[2] == 14, "the longest of all is rehearsed"
    seen, generate = [], run.engine.generate

    def spied(prompts, sampling):
        written = generate(prompts, sampling)
        seen.append((sampling.max_tokens, run.settings().max_completion_length))
        assert max(len(completion.token_ids) for completion in written) <= sampling.max_tokens
        return written

    run.engine.generate = spied
    for _ in range(2):  # the same trainer once more begins with the first stage
        run.train()
        assert seen == [(4, 4)] * 2 + [(9, 9)] * 3 + [(14, 14)] * 2 and lengths(run) == [length for length, _ in seen]
        said = capsys.readouterr().out
        assert "Step 3: stage 2 of 3 begins, with up to 9 tokens a completion: after 2 steps." in said
        assert "Step 6: stage 3 of 3" in said
        seen.clear()


def test_the_share_of_cut_off_completions_and_a_plateau_end_a_stage(tokenizer, tmp_path, capsys):
    stages = [Stage(2, cut_off=1.0), Stage(3, plateau=1), Stage(4)]
    sums = iter([0.0] * 12 + [1.0] * 8 + [0.0] * 99)  # the reward falls in the second rollout of the second stage

    def told(completions, **_):
        value = next(sums)
        return [value + 0.1 * i for i in range(len(completions))]

    settings = {**COMMON, "stages": stages, "max_completion_length": 2, "max_steps": ROLLOUTS + 4, "beta": 0.0}
    run = make(tokenizer, tmp_path, reward=told, **settings)
    run.train()
    said = capsys.readouterr().out
    assert (
        f"Step {ROLLOUTS + 1}: stage 2 of 3 begins, with up to 3 tokens" in said and "100% of the completions" in said
    )
    assert lengths(run)[:ROLLOUTS] == [2] * ROLLOUTS and lengths(run)[ROLLOUTS] == 3
    assert "stage 3 of 3" in said and "has not risen for 1 rollouts" in said and lengths(run)[-1] == 4


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    ends = {}
    for name, more in (("plain", {}), ("reused", REUSED)):
        run = make(tokenizer, tmp_path_factory.mktemp(name), **COMMON, **more)
        run.train()
        ends[name] = weights(run), curve(run), lengths(run)
    return ends


@pytest.mark.parametrize("name, more, step", [
    *(("plain", {}, step) for step in (1, 2, 3, 5)), *(("reused", REUSED, step) for step in (2, 3, 5)),
])  # fmt: skip
def test_a_run_that_is_stopped_goes_on_in_its_stage_bit_for_bit(tokenizer, tmp_path, whole, name, more, step):
    """Stopped right before and right behind a change, and in the middle of a rollout that is used twice."""
    make(tokenizer, tmp_path, At(step, KeyboardInterrupt, "on_step_begin"), **COMMON, **more).train()
    again = make(tokenizer, tmp_path, **COMMON, **more)
    assert again.train(resume_from_checkpoint="auto").global_step == 7
    end, log, longest = whole[name]
    assert same(weights(again), end) and curve(again) == log and lengths(again) == longest


def test_other_stages_are_another_run(tokenizer, tmp_path):
    make(tokenizer, tmp_path, At(2, KeyboardInterrupt, "on_step_begin"), **COMMON).train()
    other = {**COMMON, "stages": [Stage(4, steps=3), *BY_STEPS[1:]]}
    with pytest.raises(identity.AnotherRun, match="stages: "):
        make(tokenizer, tmp_path, **other).train(resume_from_checkpoint="auto")


def test_an_engine_that_has_written_short_answers_writes_long_ones_like_a_fresh_one(tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(WORKSHOP)
    prompts = [tokenizer("Which is bigger? 9.11 or 9.9?").input_ids]
    used = engines.choose("graph", model, tokenizer)
    for tokens in (6, 60, 300, 12):
        sampling = engines.Sampling(tokens, num_generations=3, seed=tokens, min_tokens=tokens)
        fresh = engines.choose("graph", model, tokenizer).generate(prompts, sampling)
        assert [c.token_ids for c in used.generate(prompts, sampling)] == [c.token_ids for c in fresh]
        assert all(len(c.token_ids) == tokens for c in fresh)


# ---- the plan ----


def test_the_plan_has_a_line_for_each_stage():
    plans = memory.plan_stages("r1-distill-qwen-7b", [256, 1024, 200_000], card_gb=15)
    assert [plan.setting.max_completion_length for plan in plans.plans] == [256, 1024, 200_000]
    assert [plan.fits for plan in plans.plans] == [True, True, False] and not plans.fits
    assert [sum(plan.generation.values()) for plan in plans.plans[:2]] == [
        sum(memory.plan("r1-distill-qwen-7b", 15, max_completion_length=n).generation.values()) for n in (256, 1024)
    ]
    *_, long, why = str(plans).splitlines()
    assert long.startswith("200,000") and long.endswith("does NOT fit") and "It does NOT fit." in why
    assert memory.plan_stages("qwen2.5-1.5b", [256], card_gb=15).fits
    with pytest.raises(ValueError, match="lengths is empty"):
        memory.plan_stages("qwen2.5-1.5b", [])
