"""What peft changes outside linear layers is refused by both walks, and TRL's loss trains it all the same."""

import copy

import peft
import pytest
import torch
from engine_models import make
from peft import LoraConfig, get_peft_model
from step_cases import ROWS, length_reward

from nbhelpers.models import families, patch, tuners
from nbhelpers.training import trainer

LM = {"task_type": "CAUSAL_LM"}
LAYERS = {**LM, "r": 4, "target_modules": ["q_proj", "up_proj"]}
ELSEWHERE = {
    "PROMPT_TUNING": peft.PromptTuningConfig(**LM, num_virtual_tokens=4),
    "PREFIX_TUNING": peft.PrefixTuningConfig(**LM, num_virtual_tokens=4),
    "P_TUNING": peft.PromptEncoderConfig(**LM, num_virtual_tokens=4, encoder_hidden_size=16),
    "ADAPTION_PROMPT": peft.AdaptionPromptConfig(**LM, adapter_len=4, adapter_layers=1),
    "LN_TUNING": peft.LNTuningConfig(**LM, target_modules=["input_layernorm", "norm"]),
    "alora_invocation_tokens": LoraConfig(**LAYERS, alora_invocation_tokens=[4, 5]),
}
IDS = torch.tensor([[5, 9, 31, 7, 4, 5, 12]])


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_changes_more_than_linear_layers_is_refused_by_name(name):
    model = get_peft_model(make("llama", lora=False), copy.deepcopy(ELSEWHERE[name]))
    for walk in ("training", "generation"):
        assert name in families.why_not(model, walk)


@pytest.mark.parametrize("config", [
    LoraConfig(**LAYERS, use_dora=True, use_rslora=True),
    LoraConfig(**LAYERS, modules_to_save=["norm", "mlp"], exclude_modules=["up_proj"]),
    peft.IA3Config(**LM, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    peft.VeraConfig(**LM, r=4, target_modules=["q_proj"]),
])  # fmt: skip
def test_what_changes_linear_layers_alone_is_walked(config):
    model = get_peft_model(make("llama", lora=False), config)
    assert families.why_not(model, "training") is None and families.why_not(model, "generation") is None


def test_dropout_inside_an_adapters_layer_is_walked():
    """A layer that is computed again draws what it drew first (layerwise.py)."""
    config = peft.LoHaConfig(**LM, r=4, target_modules=["q_proj"], module_dropout=0.5)
    model = get_peft_model(make("llama", lora=False), config)
    assert families.why_not(model, "training") is None and families.why_not(model, "generation") is None


def test_a_module_that_is_not_the_familys_own_is_named():
    model = make("qwen3", lora=False)
    model.model.layers[1].self_attn.k_norm = torch.nn.LayerNorm(16)
    assert families.why_not(model, "training") == ("its layers.1.self_attn.k_norm is a LayerNorm, not the family's own")
    model = get_peft_model(make("llama", lora=False), LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert "its embedding is peft's Embedding" in families.why_not(model, "generation")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_norms_that_peft_wraps_run_under_the_kernels(name):
    norms = ["input_layernorm", "post_attention_layernorm", "norm", *(["q_norm", "k_norm"] if name == "qwen3" else [])]
    model = get_peft_model(make(name, lora=False), peft.LNTuningConfig(**LM, target_modules=norms)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 if parameter.requires_grad else 0.0
    wanted = model(input_ids=IDS).logits
    patch.with_kernels(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_mlp_that_peft_trains_whole_is_generated_with():
    from nbhelpers.engines.base import Sampling
    from nbhelpers.engines.graph import GraphEngine

    config = LoraConfig(**LM, r=4, target_modules=["q_proj"], modules_to_save=["mlp"])
    model = get_peft_model(make("llama", lora=False), config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0
    text = IDS[0].tolist()
    written = GraphEngine(model).generate([text], Sampling(max_tokens=6, temperature=0.0))[0].token_ids
    for i, token in enumerate(written):
        assert token == model(input_ids=torch.tensor([text + written[:i]])).logits[0, -1].argmax()


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "LN_TUNING"])
def test_the_trainer_falls_back_and_trains_them(name, tmp_path, capsys):
    import tiny_model

    config = {**ELSEWHERE, "LN_TUNING": peft.LNTuningConfig(**LM, target_modules=["norm"])}[name]
    model = get_peft_model(tiny_model.model(), copy.deepcopy(config))  # peft writes into it
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    args = trainer.LeanGRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
        learning_rate=0.1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    one = trainer.LeanGRPOTrainer(
        model, length_reward, args, train_dataset=ROWS, processing_class=tiny_model.tokenizer()
    )
    one.train()
    said = capsys.readouterr().out
    assert not one.lean and one.engine.name == "hf" and said.count(name) == 2
    assert all(not torch.equal(before[key], model.get_parameter(key)) for key in before)


def test_a_lora_gets_its_numbers_from_peft_alone(monkeypatch):
    """torch would draw each of its matrices first, for nothing; outside the block layers are drawn as ever."""
    nn = torch.nn
    drawn, uniform = [], nn.init.kaiming_uniform_
    monkeypatch.setattr(
        nn.init, "kaiming_uniform_", lambda t, **options: drawn.append(t.shape) or uniform(t, **options)
    )
    with tuners.drawn_once():
        nn.Linear(3, 2)
    assert not drawn
    with pytest.raises(KeyboardInterrupt), tuners.drawn_once():
        raise KeyboardInterrupt
    assert nn.Linear(3, 2).weight.isfinite().all() and drawn == [torch.Size((2, 3))]
