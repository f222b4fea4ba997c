"""What is known of each family holds for transformers' own models, and both walks are told the same reasons."""

import pytest
import torch
from engine_models import ARCHITECTURES, make
from torch import nn

from nbhelpers.models import families, patch


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


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_another_activation_in_one_layer_is_computed_or_refused(name):
    """On the kernels, too: their MLP computes silu alone."""
    model, tokens = make(name, lora=False).eval(), torch.arange(3, 9)[None]
    mlp = model.model.layers[1].mlp
    setattr(mlp, "activation_fn" if name == "phi3" else "act_fn", nn.GELU())
    for walk in ("training", "generation"):
        assert families.why_not(model, walk) == "the activation of its layers.1.mlp is not silu"
    want = model(tokens).logits
    patch.with_kernels(model)
    torch.testing.assert_close(model(tokens).logits, want, atol=1e-5, rtol=1e-5)


def test_an_attention_of_ones_own_is_refused():
    """The walks have one attention; a function that is registered by hand may compute another."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_of_mine", sdpa_attention_forward)
    model = make("llama", lora=False)
    for name in ("eager", "sdpa"):
        model.config._attn_implementation = name
        assert families.why_not(model, "training") is None
    model.config._attn_implementation = "sdpa_of_mine"
    for walk in ("training", "generation"):
        assert "its attention is 'sdpa_of_mine'" in families.why_not(model, walk)


def test_a_head_with_a_bias_gets_its_gradient_from_trls_loss():
    model = make("llama", lora=False)
    model.lm_head = nn.Linear(*reversed(model.lm_head.weight.shape))
    assert families.why_not(model, "training") == "its head has a bias"
    assert families.why_not(model, "generation") is None


def test_several_devices_are_named():
    model = make("llama", lora=False)
    model.model.norm.weight = nn.Parameter(torch.empty(64, device="meta"))
    assert families.why_not(model, "training") == "it is spread over several devices"
