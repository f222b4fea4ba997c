"""with_kernels in every way a model is used: generation, adapters on and off, hooks, dropout, saving."""

import pytest
import torch
from patch_cases import ARCHITECTURES, CONFIGS, SIZES, batch, eval_logits, make, step, worst
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config, Qwen2Config

from nbhelpers.models import patch, projection


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@ARCHITECTURES
def test_generation_with_a_cache_and_padding(name):
    """Padded on the left, as generation needs it."""
    model, inputs = make(name).eval(), batch(padding=slice(0, 4))
    model.base_model.model.set_attn_implementation("eager")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    before = model.generate(**inputs, **settings)
    patch.with_kernels(model)
    assert torch.equal(model.generate(**inputs, **settings), before)


def test_attention_outputs_and_hidden_states_are_still_recorded():
    model, inputs = make("qwen2").eval(), batch()
    model.base_model.model.set_attn_implementation("eager")
    before = model(**inputs, output_attentions=True, output_hidden_states=True)
    patch.with_kernels(model)
    after = model(**inputs, output_attentions=True, output_hidden_states=True)
    for kind in ("attentions", "hidden_states"):
        assert len(after[kind]) == len(before[kind]) > 0
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(after[kind], before[kind], strict=True)), kind


@pytest.mark.parametrize("four_bit", [False, True])
def test_adapter_switches(four_bit):
    """disable_adapter, several adapters, merging: what peft's own forward does, the patched model does."""
    from peft import LoraConfig

    model, inputs = make("llama", four_bit=four_bit), batch()
    base, adapted = [], eval_logits(model, inputs)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    two = eval_logits(model, inputs)
    model.set_adapter("default")
    for patched in (False, True):
        if patched:
            patch.with_kernels(model)
            assert torch.allclose(eval_logits(model, inputs), adapted, atol=1e-5)
        with model.disable_adapter():
            base.append(eval_logits(model, inputs))
    assert torch.allclose(*base, atol=1e-5) and not torch.allclose(base[0], adapted, atol=1e-2)

    model.set_adapter("other")
    other = eval_logits(model, inputs)
    assert not torch.allclose(other, adapted, atol=1e-2)
    model.base_model.set_adapter(["default", "other"])  # two at once: the linear layers run as they are
    assert torch.allclose(eval_logits(model, inputs), two, atol=1e-5)
    model.set_adapter("default")
    model.merge_adapter()
    merged = eval_logits(model, inputs)
    patch.undo(model)
    assert torch.allclose(merged, eval_logits(model, inputs), atol=1e-5)


def test_adapters_that_the_kernels_do_not_serve_run_as_they_are():
    inputs = batch()
    for options, why in (({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "LoRA with a bias")):
        model = make("qwen2", **options)
        before = step(model, inputs)
        report = patch.with_kernels(model)
        assert report.linears == 0 and report.left and all(why in reason for _, reason in report.left)
        assert why in str(report)
        assert worst(step(model, inputs), before, inputs["attention_mask"]) < 1e-4
    model = make("qwen2")
    model.base_model.set_adapter([*model.peft_config])
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    assert "several active adapters" in str(patch.with_kernels(model))


def test_lora_dropout_runs_as_it_is_while_training_and_fused_in_eval():
    model, inputs = make("llama", dropout=0.5), batch()
    torch.manual_seed(3)
    before, quiet = step(model, inputs), eval_logits(model, inputs)
    model.train()
    report = patch.with_kernels(model)
    assert all(why == projection.DROPOUT for _, why in report.left) and report.linears == 0
    torch.manual_seed(3)
    assert worst(step(model, inputs), before, inputs["attention_mask"]) < 1e-4, "another mask was drawn"
    assert torch.allclose(eval_logits(model, inputs), quiet, atol=1e-5)


def test_hooked_modules_are_called():
    """Someone who watches a linear layer sees it run; its neighbours of the same input go with it."""
    model, inputs = make("qwen2"), batch()
    before, seen = step(model, inputs), []
    layer = model.base_model.model.model.layers[0]
    layer.self_attn.k_proj.register_forward_hook(lambda *_: seen.append("k"))
    layer.mlp.down_proj.base_layer.register_forward_pre_hook(lambda *_: seen.append("down"))
    report = patch.with_kernels(model)
    assert set(report.left) == {("q_proj + k_proj + v_proj", projection.HOOKED), ("down_proj", projection.HOOKED)}
    assert worst(step(model, inputs), before, inputs["attention_mask"]) < 1e-4
    assert seen == ["k", "down"]


@ARCHITECTURES
@pytest.mark.parametrize("part", ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"])
def test_hooks_on_a_part_of_a_layer_see_what_they_see_in_stock(name, part):
    """The norms are folded into what follows them, but not behind the back of someone who watches."""
    model, inputs, seen = make(name), batch(), []
    first = lambda values: next(t for t in values if isinstance(t, torch.Tensor))  # noqa: E731
    for layer in model.base_model.model.model.layers:
        layer.get_submodule(part).register_forward_hook(
            lambda m, args, kwargs, out: seen.append((first([*args, *kwargs.values()]), first([*out]))),
            with_kwargs=True,
        )
    before = step(model, inputs)
    patch.with_kernels(model)
    assert worst(step(model, inputs), before, inputs["attention_mask"]) < 1e-4
    assert len(seen) == 4  # twice two layers
    for stock, ours in zip(seen[:2], seen[2:], strict=True):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(stock, ours, strict=True))


def test_weights_that_are_trained_get_their_gradients():
    model, inputs = make("mistral", lora=False).requires_grad_(True), batch()
    before = step(model, inputs)
    report = patch.with_kernels(model)
    assert report.linears == 0 and "its own weight is being trained" in str(report)
    assert worst(step(model, inputs), before, inputs["attention_mask"]) < 1e-4


def test_another_activation_is_left_alone():
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, hidden_act="gelu")).requires_grad_(False)
    inputs = batch()
    before = eval_logits(model, inputs)
    assert "its activation is not silu" in str(patch.with_kernels(model))
    assert torch.allclose(eval_logits(model, inputs), before, atol=1e-5)


def test_residual_dropout_of_phi3():
    config = Phi3Config.from_dict({**CONFIGS["phi3"].to_dict(), "resid_pdrop": 0.5})
    model, inputs = make("phi3", config=config), batch()
    torch.manual_seed(3)
    before = step(model, inputs)
    patch.with_kernels(model)
    torch.manual_seed(3)
    assert worst(step(model, inputs), before, inputs["attention_mask"]) < 1e-4


def test_names_stay_and_adapters_save_and_load(tmp_path):
    from peft import PeftModel

    model, inputs = make("qwen2"), batch()
    names, logits = list(model.state_dict()), eval_logits(model, inputs)
    patch.with_kernels(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    fresh = make("qwen2", lora=False)
    patch.with_kernels(fresh)  # before the adapter comes: it is found all the same
    fresh = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.allclose(eval_logits(fresh, inputs), logits, atol=1e-5)


def test_one_instance_only_once_and_off_again():
    model, twin = make("qwen2"), make("qwen2")
    stock = [type(module) for module in twin.modules()]
    report = patch.with_kernels(model)
    assert [type(module) for module in twin.modules()] == stock
    assert [type(module) for module in model.modules()] != stock
    again = patch.with_kernels(model)
    assert not again.modules and "already on the kernels" in str(again)
    again.undo()
    assert [type(module) for module in model.modules()] != stock, "a report undid what it had not done"
    report.undo()
    assert [type(module) for module in model.modules()] == stock
    patch.with_kernels(model)
    patch.undo(model)
    assert [type(module) for module in model.modules()] == stock


def test_an_unknown_architecture_is_left_alone():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=97, eos_token_id=2))
    before = [type(module) for module in model.modules()]
    report = patch.with_kernels(model)
    assert "not an architecture that the kernels know (Qwen2, Qwen3, Llama, Mistral, Phi3)" in str(report)
    assert "no kernels" in str(report) and [type(module) for module in model.modules()] == before


@ARCHITECTURES
def test_under_autocast(name):
    """As a trainer runs it: fp32 weights, products in bf16. Both sides round, so the bound is loose."""
    model, inputs = make(name), batch()
    truth = step(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = step(model, inputs)
        patch.with_kernels(model)
        ours = step(model, inputs)
    assert ours[0].dtype == stock[0].dtype and ours[1].keys() == stock[1].keys()
    assert worst(ours, truth, inputs["attention_mask"]) < 1.5 * worst(stock, truth, inputs["attention_mask"])
