"""Online DPO: loss and gradient are TRL's, whoever judges; ties teach nothing; what is not served is named."""

import copy
import warnings

import pytest
import tiny_model
import torch
from datasets import Dataset
from method_cases import ANSWERS, PROMPTS, QUIET, SCORES, Fixed, gradients, rollout, scored, tiny
from step_cases import difference, make_model

from nbhelpers import LeanOnlineDPOConfig, LeanOnlineDPOTrainer


def trls(model, folder, **settings):
    """(loss, gradients) of TRL's OnlineDPOTrainer on the same answers: first all first ones, then all second ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        args = OnlineDPOConfig(
            str(folder), per_device_train_batch_size=3, max_new_tokens=6, use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, disable_tqdm=True, **settings,
        )  # fmt: skip
        one = OnlineDPOTrainer(
            model, reward_funcs=[scored_padded], args=args, train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tiny_model.tokenizer(),
        )  # fmt: skip
    one.ref_model = None  # the base without its adapter, as TRL has it where it makes the adapter itself
    tokenizer, order = tiny_model.tokenizer(), [0, 2, 4, 1, 3, 5]
    prompts = tokenizer([PROMPTS[i // 2] for i in order], padding=True, padding_side="left", return_tensors="pt")
    ids = torch.tensor([ANSWERS[i] + [0] * (6 - len(ANSWERS[i])) for i in order])
    mask = torch.tensor([[1] * len(ANSWERS[i]) + [0] * (6 - len(ANSWERS[i])) for i in order])
    one._generate = lambda *_: (prompts["input_ids"], prompts["attention_mask"], ids, mask, None)
    loss = one.training_step(one.model, {"prompt": PROMPTS})
    return loss.item(), {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}


def scored_padded(completion_ids, **_):
    return [SCORES[ANSWERS.index([id for id in ids if id != 0])] for ids in completion_ids]


@pytest.mark.parametrize("settings", [
    {"loss_type": "sigmoid", "beta": 0.1}, {"loss_type": "ipo", "beta": 0.3}, {"missing_eos_penalty": 1.5},
])  # fmt: skip
def test_loss_and_gradient_are_trls(tmp_path, settings):
    """The penalty turns the third pair around: its better answer was cut off."""
    model = make_model("qwen2")
    wanted_loss, wanted = trls(copy.deepcopy(model), tmp_path / "trl", **settings)
    one = tiny("dpo", tmp_path / "ours", model, **settings)
    loss, got = gradients(one, rollout(one))
    assert loss == pytest.approx(wanted_loss, rel=1e-5) and difference(got, wanted) < 1e-5


def test_a_budget_that_cuts_pairs_changes_nothing(tmp_path):
    """Each answer in a micro-batch of its own."""
    model = make_model("qwen2")
    one = tiny("dpo", tmp_path, model)
    batch = rollout(one)
    wanted_loss, wanted = gradients(one, batch)
    step = one._step_of(one.model)
    step.plan = lambda rows: [step.cost.split([(r.prompt, r.prompt_length, r.completion_length)], 1e12)[0]._replace(
        rows=(i,)) for i, r in enumerate(rows)]  # fmt: skip
    loss, got = gradients(one, batch)
    assert len(step.micro_batches) == 6 and loss == wanted_loss and difference(got, wanted) < 1e-6


def test_the_reference_is_the_base_without_its_adapter(tmp_path):
    """One model, one adapter: no copy of either; the margins are against the base."""
    model = make_model("qwen2")
    one = tiny("dpo", tmp_path, model)
    batch = rollout(one)
    assert list(one.model.peft_config) == ["default"] and one.ref_model is None
    logps = one._scored(batch)[0]
    with one.model.disable_adapter():
        ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
        mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
        base = one.model(ids, attention_mask=mask).logits.log_softmax(-1)[:, -7:-1]
    base = base.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2) * batch["completion_mask"]
    assert torch.allclose(one._reference(batch), base, atol=1e-5)
    assert not torch.allclose(logps, base, atol=1e-2)


def test_a_judge_says_which_is_better_and_a_tie_teaches_nothing(tmp_path):
    asked = []

    def judge(prompts, pairs):
        asked.extend(zip(prompts, pairs, strict=True))
        return [1, -1, 0]

    one = tiny("dpo", tmp_path, judge=judge)
    batch = rollout(one)
    assert [prompt for prompt, _ in asked] == PROMPTS and all(len(pair) == 2 for _, pair in asked)
    assert batch["advantages"].sign().tolist() == [-1, 1, 0, 0, 1, -1]
    assert batch["pair_losses"][2:4].tolist() == [0, 0] and (batch["pair_losses"][[0, 1, 4, 5]] > 0).all()
    assert one._metrics["train"]["frac_reward_zero_std"] == [pytest.approx(1 / 3)]
    assert one._metrics["train"]["rewards/accuracies"][0] in (0.0, 0.5, 1.0) and "judge" in one.reward_func_names
    loss, _ = gradients(one, batch)
    assert loss == pytest.approx(batch["pair_losses"].mean().item())


def test_a_judge_that_fails_costs_a_batch_and_not_the_run(tmp_path):
    one = tiny("dpo", tmp_path, judge=lambda prompts, pairs: [2] * len(pairs))
    with pytest.warns(RuntimeWarning, match="one of 0, 1 and -1 for each"):
        batch = rollout(one)
    assert batch["advantages"].abs().sum() == 0


def test_a_whole_run_learns_from_fixed_pairs(tmp_path):
    one = tiny("dpo", tmp_path, max_steps=6, beta=1.0)
    one.train()
    logs = [log for log in one.state.log_history if "rewards/margins" in log]
    assert len(logs) >= 6 and logs[5]["rewards/margins"] > logs[0]["rewards/margins"] + 1
    assert logs[5]["loss"] < logs[0]["loss"] and logs[5]["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("more", [
    {"completion": " two numbers"}, {"chosen": "a", "rejected": "b", "info": {"subreddit": "r/numbers"}},
])  # fmt: skip
def test_the_rows_of_tldr_are_taken_as_they_are(tmp_path, more):
    """Plain prompts, and beside them what people wrote; TRL hands all of it to a reward but a column `completion`."""
    seen = {}

    def reward(completion_ids, **columns):
        seen.update(columns)
        return scored(completion_ids)

    settings = {"max_steps": 1, "per_device_train_batch_size": 6, "max_completion_length": 6, **QUIET}
    rows = Dataset.from_list([{"prompt": prompt, **more} for prompt in PROMPTS])
    one = LeanOnlineDPOTrainer(
        make_model("qwen2"), [reward], LeanOnlineDPOConfig(str(tmp_path), **settings), rows,
        processing_class=tiny_model.tokenizer(), engine=Fixed(),
    )  # fmt: skip
    one.train()
    assert one.state.log_history[0]["grad_norm"] > 0
    assert {name: values[0] for name, values in seen.items() if name in more} == (more if "chosen" in more else {})


def test_trls_own_config_counts_prompts(tmp_path):
    from trl.experimental.online_dpo import OnlineDPOConfig

    theirs = OnlineDPOConfig(str(tmp_path), per_device_train_batch_size=3, beta=0.3, loss_type="ipo",
                             missing_eos_penalty=0.5, max_new_tokens=9, use_cpu=True, bf16=False)  # fmt: skip
    ours = LeanOnlineDPOConfig.of(theirs)
    assert (ours.per_device_train_batch_size, ours.beta, ours.loss_type) == (6, 0.3, "ipo")
    assert (ours.missing_eos_penalty, ours.max_completion_length, ours.temperature) == (0.5, 9, 0.9)
    with pytest.raises(ValueError, match="max_length=100 is not served with online DPO"):
        LeanOnlineDPOConfig.of(OnlineDPOConfig(str(tmp_path), max_length=100, use_cpu=True, bf16=False))
    with pytest.raises(TypeError, match="args is a str"):
        LeanOnlineDPOTrainer(make_model("qwen2"), [scored], "args")


@pytest.mark.parametrize("settings, message", [
    ({"num_generations": 4}, "num_generations=4 is not served with online DPO"),
    ({"num_iterations": 2}, "num_iterations=2"),
    ({"steps_per_generation": 2}, "one update of each rollout"),
    ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, "an even number"),
    ({"mask_truncated_completions": True}, "mask_truncated_completions"),
    ({"entropy_coef": 0.1}, "entropy_coef"),
    ({"beta": 0.0}, "beta=0.0: it must be a number above 0"),
    ({"beta": [0.1, 0.2]}, "beta="),
    ({"loss_type": "hinge"}, "one of sigmoid, ipo"),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty"),
])  # fmt: skip
def test_what_is_not_served_is_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        LeanOnlineDPOConfig(str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize("changes, message", [
    ({"judge": None}, "Pass either reward_funcs or judge"),
    ({"judge": 3}, "judge is a plain function"),
    ({"tools": [len]}, "tools=.* is not served with online DPO"),
    ({"neftune_noise_alpha": 1.0}, "lean step alone"),
    ({"model": make_model("qwen2", lora=False)}, "without its adapter"),
])  # fmt: skip
def test_a_trainer_that_cannot_be_says_why(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny("dpo", tmp_path, **changes)
    with pytest.raises(ValueError, match="Pass either"):
        LeanOnlineDPOTrainer(make_model("qwen2"), [scored], judge=lambda prompts, pairs: [])
