"""What is known of each family holds for transformers' own models, and both walks are told the same reasons."""

import pytest
import torch
from engine_models import ARCHITECTURES, make
from torch import nn

from nbhelpers.models import families


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_shapes_are_transformers_own(name):
    """Every matrix that the numbers count is in the model, with that shape and bias, and no other is."""
    model = make(name, lora=False, tie_word_embeddings=True)
    architecture = families.architecture(model.config.to_dict())
    family = families.of(model)
    assert family is families.FAMILIES[name] and architecture.family is family
    module = families.skeleton(model).layers[0]
    found = {path.rpartition(".")[2]: m for path, m in module.named_modules() if isinstance(m, nn.Linear)}
    counted = {linear.name: linear for linear in architecture.linears()}
    assert found.keys() == counted.keys() == set(family.linears)
    for key, linear in counted.items():
        assert found[key].weight.shape == (linear.out_features, linear.in_features)
        if key in family.qkv:
            assert (found[key].bias is not None) == linear.bias
    layer = families.layer(family, module)
    assert [*layer.qkv, layer.out, *layer.gate_up, layer.down] == [found[key] for key in family.linears]


@pytest.mark.parametrize(
    "name", sorted(set(ARCHITECTURES) - {"llama"})
)  # whose config here has biases on more than q, k, v
def test_every_parameter_is_counted(name):
    model = make(name, lora=False, tie_word_embeddings=True)
    assert families.architecture(model.config.to_dict()).parameters() == model.num_parameters()


@pytest.mark.parametrize("lora", [False, True])
def test_a_wrapped_model_is_what_is_inside(lora):
    model = make("llama", lora=lora)
    assert families.of(model) is families.LLAMA
    assert type(families.unwrap(model)).__name__ == "LlamaForCausalLM"


def test_a_subclass_may_do_something_else():
    model = make("qwen2", lora=False)
    model.__class__ = type("Qwen2ForSomethingElse", (type(model),), {})
    assert families.of(model) is None
    for walk in ("training", "generation"):
        assert "Qwen2ForSomethingElse is not one of" in families.why_not(model, walk)


@pytest.mark.parametrize("config, why", [
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, r"its rope \(dynamic\) changes"),
    ({"hidden_act": "gelu"}, "its activation is gelu"),
])  # fmt: skip
def test_both_walks_give_the_same_reason(config, why):
    model = make("llama", **config)
    reasons = {families.why_not(model, walk) for walk in ("training", "generation")}
    assert len(reasons) == 1
    with pytest.raises(ValueError, match=why):
        raise ValueError(reasons.pop())


def test_what_only_training_cannot():
    """Generation knows windows, and has no dropout."""
    for name, config, why in (("mistral", {}, "sliding window"), ("llama", {"attention_dropout": 0.1}, "dropout")):
        model = make(name, **config)
        assert why in families.why_not(model, "training") and families.why_not(model, "generation") is None


def test_a_window_by_layer():
    config = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    model = make("qwen2", lora=False, **config)
    family, layers = families.of(model), families.skeleton(model).layers
    assert [families.window(family, layer.self_attn) for layer in layers] == [None, 6]
    assert families.config_window(family, model.config) == 6
    plain = make("qwen2", lora=False)
    assert families.config_window(family, plain.config) is None


def test_an_embedding_that_is_wrapped_is_named():
    model = make("llama", lora=False)
    model.model.embed_tokens = nn.Sequential(model.model.embed_tokens)
    assert "its embedding is a Sequential" in families.why_not(model, "generation")


def test_several_devices_are_named():
    model = make("llama", lora=False)
    model.model.norm.weight = nn.Parameter(torch.empty(64, device="meta"))
    assert families.why_not(model, "training") == "it is spread over several devices"
