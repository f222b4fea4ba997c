"""Hooks on every module there is: a walk computes what the stock forward computes with them, or it is refused."""

import pytest
import torch
from engine_models import by_forward, make, prompts
from step_cases import difference, make_model, make_trainer, rollout
from transformers.integrations.neftune import activate_neftune

from nbhelpers import engines
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.models import families
from nbhelpers.training import lean_step, trainer

# what a hook does to a module's output, input or gradient: a factor on every tensor of floats
MODELS = pytest.mark.parametrize("family, lora", [("qwen3", True), ("phi3", False)])


def scaled(value):
    if isinstance(value, tuple):
        return tuple(map(scaled, value))
    return value * 1.2 if isinstance(value, torch.Tensor) and value.is_floating_point() else value


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda _, args, out: scaled(out)),
    "before": lambda module: module.register_forward_pre_hook(lambda _, args: scaled(args)),
    "backward": lambda module: module.register_full_backward_hook(lambda _, grads, __: scaled(grads)),
}


def by_autograd(model, rows, weights):
    """(logps [B, T], gradients) of sum(weights * logps) through the model's own forward, a row at a time."""
    seen = torch.zeros(weights.shape)
    model.zero_grad()
    for row in rows.rows:
        prompt, completion = rows.prompts[row.prompt], rows.completions[row.number]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].float()
        logps = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        (logps * weights[row.number, : len(completion)]).sum().backward()
        seen[row.number, : len(completion)] = logps.detach()
    return seen, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_the_step(step, rows, weights):
    seen = torch.zeros(weights.shape)
    step.model.zero_grad()

    def objective(logps, entropies, packed):
        place = packed.number, packed.column
        seen[place] = logps.detach()
        return (logps * weights[place]).sum()

    step.differentiate(rows, objective)
    return seen, {n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None}


@MODELS
@pytest.mark.parametrize("kind", HOOKS)
def test_the_step_trains_with_every_hook_or_is_refused(family, lora, kind):
    model = make_model(family, lora=lora, num_hidden_layers=1)
    rows, weights = rollout(groups=1, size=2)
    step = lean_step.LeanStep(model)
    refused, called = set(), set()
    for name, module in model.named_modules():
        handle = HOOKS[kind](module)
        try:
            if (why := families.missed_hook(model, "training")) is not None:
                assert name in why
                with pytest.raises(ValueError, match="lean=False"):
                    step.differentiate(rows, lambda logps, *_: logps.sum())
                assert all(parameter.grad is None for parameter in step.trained)  # made without the hook
                with pytest.raises(ValueError, match="lean=False"):
                    step.score(rows, weights.shape)
                refused.add(name.removeprefix("base_model.model."))
            else:
                wanted_logps, wanted = by_autograd(model, rows, weights)
                logps, got = by_the_step(step, rows, weights)
                torch.testing.assert_close(logps, wanted_logps, rtol=1e-4, atol=1e-4, msg=name)
                assert difference(got, wanted) < 1e-4, name
                called.add(name.removeprefix("base_model.model."))
        finally:
            handle.remove()
    first = "model.layers.0"
    assert refused >= {first, f"{first}.self_attn", f"{first}.mlp", "model.embed_tokens", "lm_head", "model", ""}
    assert called >= {f"{first}.self_attn.o_proj", f"{first}.input_layernorm", "model.norm", f"{first}.mlp.down_proj"}


@MODELS
@pytest.mark.parametrize("kind", ["forward", "before"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_engine_writes_with_every_hook_or_is_refused(family, lora, kind, trained):
    model, prompt = make(family, lora=lora, layers=1), prompts()[1]
    model.requires_grad_(trained)  # a plain layer whose own weight is trained is taken as it is, but not its hooks
    engine, refused, called = GraphEngine(model), set(), set()
    sampling = engines.Sampling(max_tokens=4, temperature=0.0)
    for name, module in model.named_modules():
        handle = HOOKS[kind](module)
        try:
            if (why := families.missed_hook(model, "generation")) is not None:
                assert name in why
                with pytest.raises(ValueError, match='engine="hf"'):
                    engine.generate([prompt], sampling)
                refused.add(name.removeprefix("base_model.model."))
            else:
                (written,) = engine.generate([prompt], sampling)
                wanted = by_forward(model, prompt, written.token_ids)
                torch.testing.assert_close(torch.tensor(written.logprobs), wanted, atol=1e-4, rtol=1e-4, msg=name)
                called.add(name.removeprefix("base_model.model."))
        finally:
            handle.remove()
    first = "model.layers.0"
    assert refused >= {first, f"{first}.self_attn", f"{first}.mlp", "model.norm", "model.embed_tokens", "model", ""}
    assert called >= {f"{first}.self_attn.o_proj", f"{first}.mlp.down_proj", "lm_head"}


def test_another_engine_and_trls_loss_take_over_where_a_hook_was_set_before(tmp_path, capsys):
    model = make_model("llama")
    families.skeleton(model).layers[1].register_forward_hook(lambda *_: None)
    assert engines.choose("auto", model).name == "hf"
    assert "a hook on base_model.model.model.layers.1, which would not be called" in capsys.readouterr().out
    run = make_trainer(trainer.LeanGRPOTrainer, model, tmp_path)
    assert not run.lean and "model.layers.1" in capsys.readouterr().out
    assert run.train().global_step == 2


def test_hooks_on_all_modules_of_torch_are_refused():
    model = make_model("llama")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "register_module_forward_hook" in families.why_not(model, "training")
        assert "register_module_forward_hook" in families.why_not(model, "generation")
    finally:
        handle.remove()
    assert families.why_not(model, "training") is families.why_not(model, "generation") is None


def test_transformers_own_hooks_are_let_be():
    """With gradient checkpointing TRL has the embedding's output require a gradient, by a hook."""
    model = make_model("llama")
    model.enable_input_require_grads()
    families.unwrap(model)(torch.tensor([[5]]), output_hidden_states=True)  # leaves hooks on the layers
    assert families.why_not(model, "training") is families.why_not(model, "generation") is None


def test_noise_on_the_embedding_is_left_to_trls_loss(tmp_path, capsys):
    model = make_model("llama")
    activate_neftune(model, 5.0)
    assert families.why_not(model, "generation") is None  # it is drawn while training alone
    assert "embed_tokens" in families.why_not(model, "training")
    run = make_trainer(trainer.LeanGRPOTrainer, make_model("llama"), tmp_path, neftune_noise_alpha=5.0)
    assert not run.lean and "neftune_noise_alpha is asked for" in capsys.readouterr().out
    assert run.train().global_step == 2
