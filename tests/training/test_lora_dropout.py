"""LoRA's dropout in the lean step: what a layer draws when it is computed again is what it drew the first time."""

import peft
import pytest
import resume_cases
import torch
import trl
from resume_cases import curve, same, weights
from step_cases import compare, difference, make_batch, make_model, make_trainer, rollout, through
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbhelpers.models import families
from nbhelpers.presets import WORKSHOP
from nbhelpers.training import lean_step, packing, trainer
from nbhelpers.training.layerwise import Layers

ALL_SAVED, RECOMPUTED, OFFLOADED = Layers(3, 0, 1000), Layers(0, 3, 1000), Layers(1, 0, 1000)
IN_TILES = Layers(1, 1, 7)


def adapted(config, seed=0):
    torch.manual_seed(seed)
    model = peft.get_peft_model(make_model("qwen2", lora=False), config)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():  # B, at the start
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def lora(p, **options):
    return adapted(peft.LoraConfig(r=4, lora_dropout=p, target_modules="all-linear", **options))


def walked(model, layers, seed=5):
    """(loss, gradients) of one micro-batch whose layers are in these states, the generator in a known one."""
    rows, _ = rollout(groups=2, size=3)
    packed = packing.pack(rows, rows.rows, "cpu")
    torch.manual_seed(7)
    share, values = torch.randn(len(packed.target)), []

    def objective(logps, entropies):
        values.append((logps * share).sum())
        return values[-1]

    model.zero_grad()
    torch.manual_seed(seed)
    lean_step.LeanStep(model).decoder.differentiate(packed, 1.0, layers, objective, torch.Tensor.backward)
    return values[0].item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [
    peft.LoraConfig(r=4, lora_dropout=0.4, target_modules="all-linear"),
    peft.LoraConfig(r=4, lora_dropout=0.4, target_modules=["q_proj", "down_proj"], use_dora=True),
    peft.LoKrConfig(r=4, rank_dropout=0.4, target_modules=["v_proj", "up_proj"]),
    peft.LoHaConfig(r=4, module_dropout=0.4, target_modules=["v_proj", "up_proj"]),
    peft.VeraConfig(r=4, vera_dropout=0.4, target_modules=["q_proj", "v_proj"]),
], ids=["lora", "dora", "lokr", "loha", "vera"])  # fmt: skip
def test_recomputed_layers_draw_again_what_they_drew(config):
    model = adapted(config)
    loss, wanted = walked(model, ALL_SAVED)
    after = torch.rand(3)
    assert walked(model, ALL_SAVED, seed=6)[0] != loss, "nothing is drawn"
    for layers in (RECOMPUTED, OFFLOADED):
        again, got = walked(model, layers)
        assert torch.equal(torch.rand(3), after), "what is drawn afterwards has changed"
        assert again == pytest.approx(loss, rel=1e-6) and difference_of_all(got, wanted) < 1e-5


def difference_of_all(got, wanted):
    """As `difference`, where a module that was dropped has a gradient of zero."""
    assert got.keys() == wanted.keys()
    total = sum(gradient.norm() ** 2 for gradient in wanted.values()) ** 0.5
    return (sum((got[n] - wanted[n]).norm() ** 2 for n in wanted) ** 0.5 / total).item()


@pytest.mark.parametrize("layers", [ALL_SAVED, RECOMPUTED, IN_TILES], ids=["saved", "recomputed", "tiles"])
def test_the_gradient_is_that_of_the_masks_which_were_drawn(layers):
    """Against the loss itself, moved a little along a direction with the generator in the same state."""
    model = lora(0.4).double()
    _, gradient = walked(model, layers)
    torch.manual_seed(1)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    direction = {n: torch.randn_like(p) for n, p in named.items()}
    ends = []
    for step in (1e-5, -1e-5):
        for n, p in named.items():
            p.data.add_(direction[n], alpha=step)
        ends.append(walked(model, layers)[0])
        for n, p in named.items():
            p.data.sub_(direction[n], alpha=step)
    slope = sum((gradient[n] * direction[n]).sum().item() for n in named)
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-4)


class Known(nn.Dropout):
    """Drops the same features of every token: a mask that padded and packed rows have in common."""

    def forward(self, x):
        if not self.training:
            return x
        keep = (torch.arange(x.shape[-1]) * 37 + self.salt) % 10 >= 10 * self.p
        return x * keep / (1 - self.p)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.04, "loss_type": "grpo"}, {"coef": 0.1}], ids=str)
def test_under_the_same_masks_the_gradients_are_trls(tmp_path, settings):
    pair = []
    for cls in (trl.GRPOTrainer, trainer.LeanGRPOTrainer):
        model = lora(0.3)
        for salt, layer in enumerate(one for one in model.modules() if isinstance(one, peft.tuners.lora.LoraLayer)):
            layer.lora_dropout["default"] = Known(0.3).train()
            layer.lora_dropout["default"].salt = salt
        pair.append(make_trainer(cls, model, tmp_path))
    assert pair[1].lean
    compare(pair, make_batch(), **settings)
    wanted = {n: p.grad.clone() for n, p in pair[1].model.named_parameters() if p.grad is not None}
    for layer in (one for one in pair[1].model.modules() if isinstance(one, Known)):
        layer.p = 0.0
    pair[1].model.zero_grad()
    pair[1].compute_loss(pair[1].model, make_batch())
    got = {n: p.grad for n, p in pair[1].model.named_parameters() if p.grad is not None}
    assert difference(got, wanted) > 1e-2, "the masks change nothing"


@pytest.mark.parametrize("model", [make_model("qwen2"), lora(0.3).eval()], ids=["no dropout", "no training"])
def test_without_dropout_nothing_is_drawn(model):
    rows, share = rollout()
    state = torch.get_rng_state()
    through(model, rows, share, budget_gb=2e-4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_that_draws_and_adapts_and_is_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    """With dropout, and the adaptive entropy bonus, whose state TRL keeps in the checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(WORKSHOP)
    settings = {"max_steps": 4, "save_steps": 100, "entropy_coef": 0.05, "use_adaptive_entropy": True}
    settings |= {"entropy_target": 0.11, "entropy_coef_delta": 0.01, "gradient_accumulation_steps": 2}

    def run(folder, *callbacks):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"))
        one = resume_cases.make(tokenizer, folder, *callbacks, model=model, **settings)
        assert one.lean
        return one

    whole = run(tmp_path / "whole")
    whole.train()
    run(tmp_path / "cut", resume_cases.At(2, KeyboardInterrupt)).train()
    again = run(tmp_path / "cut")
    assert again.train(resume_from_checkpoint="auto").global_step == 4
    assert same(weights(again), weights(whole)) and curve(again)[-2:] == curve(whole)[-2:]
    factors = [log["entropy_coef"] for log in whole.state.log_history if "entropy_coef" in log]
    assert len(set(factors)) > 1 and again.entropy_coef == factors[-1]


def test_its_memory_is_reckoned_with():
    rows, _ = rollout()
    with_it, without = (lean_step.LeanStep(lora(p), budget_gb=2e-4) for p in (0.3, 0.0))
    assert with_it.cost.dropped == 6 * 32 + 48 and without.cost.dropped == 0  # six projections read 32 features
    assert max(one.peak for one in with_it.plan(rows.rows)) <= with_it.available()
    assert with_it.cost.least([(0, 9, 12)]) > without.cost.least([(0, 9, 12)])


def test_dropout_that_the_walk_does_not_pass_is_refused():
    assert "dropout (model.layers.0.resid_attn_dropout)" in families.why_not(
        make_model("phi3", lora=False, resid_pdrop=0.1), "training"
    )
    assert "attention_dropout" in families.why_not(make_model("qwen2", attention_dropout=0.1), "training")
    assert families.why_not(lora(0.1), "training") is None
