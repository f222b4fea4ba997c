"""PPO: loss and gradient against an implementation of its own in fp64, written here from the papers' equations."""

import copy

import pytest
import torch
from method_cases import ANSWERS, PROMPTS, SCORES, gradients, rollout, scored, tiny
from safetensors import safe_open
from step_cases import difference, make_model

from nbhelpers import LeanGRPOConfig, LeanPPOConfig, LeanPPOTrainer, export, loader

SETTINGS = dict(kl_coef=0.3, gamma=0.9, lam=0.8, cliprange=0.1, cliprange_value=0.05, vf_coef=0.7)


def head_of(one):
    return one.model.value_head


def made(folder, **changes):
    """A trainer whose value head is no zero, and its rollout."""
    one = tiny("ppo", folder, **{**SETTINGS, **changes})
    torch.nn.init.normal_(head_of(one).weight, std=0.2, generator=torch.Generator().manual_seed(5))
    torch.nn.init.constant_(head_of(one).bias, 0.1)
    return one, rollout(one)


class InDouble:
    """PPO on ANSWERS, answer by answer, without padding: a policy in fp64 that knows the old one's numbers."""

    def __init__(self, one):
        self.model = make_model("qwen2").double()  # the same numbers, without the kernels that the trainer puts on
        self.model.add_module("value_head", copy.deepcopy(head_of(one)).double())
        self.prompts = [[ord(c) - ord("a") + 13 for c in PROMPTS[i // 2]] for i in range(len(ANSWERS))]

    def of_answer(self, i):
        """(log-probabilities, values) of the answer's tokens, with gradients."""
        ids = torch.tensor([self.prompts[i] + ANSWERS[i]])
        out = self.model(ids, output_hidden_states=True)
        n, start = len(ANSWERS[i]), len(self.prompts[i]) - 1
        logps = out.logits[0, start : start + n].log_softmax(-1)[torch.arange(n), torch.tensor(ANSWERS[i])]
        head = self.model.value_head
        return logps, (out.hidden_states[-1][0, start : start + n] @ head.weight[0]) + head.bias

    def remember(self, scores, kl_coef, gamma, lam, whitened=False):
        """The rollout's own numbers: (old logps, old values, advantages, returns), one list each."""
        with torch.no_grad():
            old = [self.of_answer(i) for i in range(len(ANSWERS))]
            with self.model.disable_adapter():
                base = [self.of_answer(i)[0] for i in range(len(ANSWERS))]
        paid = [-kl_coef * (logps - ref) for (logps, _), ref in zip(old, base, strict=True)]
        for one, score in zip(paid, scores, strict=True):
            one[-1] += score
        if whitened:
            flat = torch.cat(paid)
            paid = [(one - flat.mean()) / flat.std() + flat.mean() for one in paid]
        advantages = []
        for one, (_, values) in zip(paid, old, strict=True):
            d = one + gamma * torch.cat((values[1:], values.new_zeros(1))) - values
            n = len(one)
            advantages.append(torch.stack([
                sum((gamma * lam) ** (u - t) * d[u] for u in range(t, n)) for t in range(n)
            ]))  # fmt: skip
        self.returns = [a + v for a, (_, v) in zip(advantages, old, strict=True)]
        flat = torch.cat(advantages)
        self.advantages = [(a - flat.mean()) / flat.std() for a in advantages]
        self.old = old

    def loss(self, cliprange, cliprange_value, vf_coef):
        """The mean over all tokens."""
        policy, value = [], []
        for i in range(len(ANSWERS)):
            logps, values = self.of_answer(i)
            old_logps, old_values = self.old[i]
            ratio, a = (logps - old_logps).exp(), self.advantages[i]
            policy.append(torch.max(-a * ratio, -a * ratio.clamp(1 - cliprange, 1 + cliprange)))
            near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
            value.append(torch.max((values - self.returns[i]) ** 2, (near - self.returns[i]) ** 2) / 2)
        return torch.cat(policy).mean() + vf_coef * torch.cat(value).mean()


def moved(model, seed=3):
    """Another policy and another value function, as after an update."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += (0.3 if "value_head" in name else 0.05) * torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("whitened", [False, True])
def test_loss_and_gradient_are_those_of_fp64(tmp_path, whitened):
    """After an update too, where ratios and values are clipped."""
    one, batch = made(tmp_path, whiten_rewards=whitened)
    double = InDouble(one)
    assert one._tokenizer.encode("abc") == [13, 14, 15]  # what InDouble's prompts say
    double.remember(SCORES, 0.3, 0.9, 0.8, whitened)
    for row, i in enumerate(range(6)):
        n = len(ANSWERS[i])
        for name, wanted in (
            ("advantages", double.advantages), ("returns", double.returns), ("old_values", [v for _, v in double.old]),
        ):  # fmt: skip
            assert torch.allclose(batch[name][row, :n].double(), wanted[i], atol=2e-5), name
            assert batch[name][row, n:].abs().sum() == 0
    for update in (0, 1):
        if update:
            moved(one.model), moved(double.model)
        wanted_loss = double.loss(0.1, 0.05, 0.7)
        double.model.zero_grad()
        wanted_loss.backward()
        wanted = {n: p.grad.float() for n, p in double.model.named_parameters() if p.grad is not None}
        loss, got = gradients(one, batch)
        assert loss == pytest.approx(wanted_loss.item(), rel=1e-4, abs=1e-6)
        assert difference(got, wanted) < 1e-4 and "value_head.weight" in got
    clipped = one._metrics["train"]["clip_ratio/region_mean"][-1]
    assert 0.05 < clipped < 0.95  # both sides of the clip are there


def test_an_answer_that_nobody_scored_takes_no_loss(tmp_path):
    def partly(completion_ids, **_):
        return [None if list(ids) == ANSWERS[3] else score for ids, score in zip(completion_ids, SCORES, strict=True)]

    one, batch = made(tmp_path, reward=partly)
    assert batch["advantages"][3].abs().sum() == 0 and batch["tool_mask"][3].sum() == 0
    loss, got = gradients(one, batch)
    others = {n: v[[0, 1, 2, 4, 5]] if v.dim() else v for n, v in batch.items()}
    alone, wanted = gradients(one, others)
    assert loss == pytest.approx(alone, rel=1e-5) and difference(got, wanted) < 1e-5


def test_a_cut_batch_learns_the_same(tmp_path):
    one, batch = made(tmp_path)
    wanted_loss, wanted = gradients(one, batch)
    step = one._step_of(one.model)
    assert step.cost.valued  # and it costs what the planner says
    step.plan = lambda rows: [step.cost.split([(r.prompt, r.prompt_length, r.completion_length)], 1e12)[0]._replace(
        rows=(i,)) for i, r in enumerate(rows)]  # fmt: skip
    loss, got = gradients(one, batch)
    assert len(step.micro_batches) == 6 and loss == pytest.approx(wanted_loss, rel=1e-5)
    assert difference(got, wanted) < 1e-5


def test_epochs_and_mini_batches(tmp_path):
    """Two epochs of three mini-batches are six updates of one rollout, and the old numbers stay."""
    one = tiny("ppo", tmp_path, max_steps=7, per_device_train_batch_size=2, num_ppo_epochs=2, num_mini_batches=3)
    made_at = []
    generate = one._generate_and_score_completions
    one._generate_and_score_completions = lambda rows: made_at.append(one.state.global_step) or generate(rows)
    one.train()
    assert made_at == [0, 6]
    logs = [log["value_loss"] for log in one.state.log_history if "value_loss" in log][:6]
    assert logs[3] < logs[0] and logs[4] < logs[1] and logs[5] < logs[2]  # the same answers, an epoch later
    assert head_of(one).weight.abs().sum() > 0


def test_the_value_head_is_no_part_of_what_is_taken_away(tmp_path):
    """Neither the adapter nor a merged model has it; the trainer after this one makes its own."""
    model, tokenizer = loader.load("workshop", lora_rank=4, quantization="none", progress=False)
    args = LeanPPOConfig(str(tmp_path / "run"), per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True)
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    one = LeanPPOTrainer(model, [scored], args, rows, processing_class=tokenizer)
    torch.nn.init.ones_(head_of(one).weight)
    one._save_final()
    export.save(model, tokenizer, tmp_path / "adapter")
    export.merged(model, tokenizer, tmp_path / "merged")
    for folder in ("run", "adapter"):
        loaded, _ = loader.load(tmp_path / folder, progress=False)
        assert not any("value_head" in name for name, _ in loaded.named_parameters())
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert not any("value_head" in name for name in file.keys())  # noqa: SIM118
    again = LeanPPOTrainer(model, [scored], args, rows, processing_class=tokenizer)
    assert head_of(again).weight.abs().sum() == 0


@pytest.mark.parametrize("settings, message", [
    ({"beta": 0.1}, "beta=0.1 is not served with PPO"),
    ({"loss_type": "grpo"}, "loss_type='grpo'"),
    ({"num_iterations": 2}, "num_iterations=2"),
    ({"dynamic_sampling": 1}, "dynamic_sampling=1"),
    ({"epsilon": 0.3}, "epsilon=0.3"),
    ({"num_ppo_epochs": 0}, "num_ppo_epochs=0: it must be a whole number"),
    ({"lam": 1.5}, "lam=1.5"),
])  # fmt: skip
def test_what_is_not_served_is_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        LeanPPOConfig(str(tmp_path), use_cpu=True, **settings)


def test_a_trainer_that_cannot_be_says_why(tmp_path):
    with pytest.raises(ValueError, match="without its adapter"):
        tiny("ppo", tmp_path, make_model("qwen2", lora=False))
    with pytest.raises(TypeError, match="PPO takes a LeanPPOConfig"):
        LeanPPOTrainer(make_model("qwen2"), [scored], LeanGRPOConfig(str(tmp_path), use_cpu=True))
