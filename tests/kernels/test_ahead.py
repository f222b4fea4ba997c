import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import interpreter
import pytest
import torch
from engine_models import make, prompts
from step_cases import make_model

pytest.importorskip("triton")
if interpreter.ON:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import no_card
from triton.runtime import _async_compile

from nbhelpers import kernels
from nbhelpers.engines import Sampling
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.scheduler import Scheduler
from nbhelpers.kernels import Projection, ahead, decode_step
from nbhelpers.kernels.triton import sampling
from nbhelpers.kernels.triton.swiglu import _forward
from nbhelpers.training import rehearsal
from nbhelpers.training.lean_step import LeanStep

CPU = torch.device("cpu")
DRAWS = [
    Sampling(max_tokens=2, seed=1),
    Sampling(max_tokens=3, min_tokens=2, stop_ids=(5,), top_k=7, top_p=0.9, repetition_penalty=1.2, seed=1),
]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("draws", DRAWS, ids=["plain", "filtered"])
@pytest.mark.parametrize("name", ["qwen2", "mistral", "qwen3", "phi3"])
def test_the_engines_dry_pass_compiles_what_the_first_tokens_launch(name, draws, bits, monkeypatch):
    model = make(name, four_bit=True, dtype=torch.bfloat16, layers=3)
    texts = [text for text in prompts(3) for _ in range(2)]
    with no_card.played() as card, kernels.use("triton"):
        monkeypatch.setattr(ahead, "dry", lambda: True)  # nothing is launched in the real pass either
        GraphEngine(model, max_rows=4, kv_bytes=10**8, kv_bits=bits).generate(texts[:4], draws)
    assert card.launched and card.dry
    assert card.launched <= card.compiled, sorted(card.launched - card.compiled)


def test_what_takes_longest_is_compiled_first(monkeypatch):
    """On two cores the threads end together then."""
    model, order = make("qwen2", four_bit=True, dtype=torch.bfloat16), []
    submit = ahead._Loading.submit

    def noted(loading, compile_one):
        return submit(loading, lambda: (order.append(found := compile_one()), found)[1])

    with no_card.played(), kernels.use("triton"):
        monkeypatch.setattr(ahead, "dry", lambda: True)
        monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _: {0}, raising=False)  # one after the other
        monkeypatch.setattr(ahead._Loading, "submit", noted)
        GraphEngine(model, max_rows=4, kv_bytes=10**8).generate(prompts(3), DRAWS[0])
    names = [kernel.source for kernel in order]
    assert {"_attend", "_dequantize_group", "_stack_layer", "_rotate"} <= set(names)
    last = names[names.index("_append") + 1 :]  # what prompts alone need
    assert {"_dequantize_group", "_stack_layer", "_rotate"} <= set(last) and "_attend" not in last


def test_of_long_prompts_it_compiles_attention_in_as_many_parts_as_they_have(monkeypatch):
    monkeypatch.setattr(import_module("nbhelpers.kernels.triton.decode_attention"), "SHARE", 1)  # 17 tokens are long
    test_the_engines_dry_pass_compiles_what_the_first_tokens_launch("qwen2", DRAWS[0], 16, monkeypatch)


@pytest.mark.parametrize("budget", [None, 0.0006], ids=["all saved", "some computed again"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_steps_dry_pass_compiles_what_its_rehearsal_launches(family, budget):
    model = make_model(family, num_hidden_layers=3)
    with no_card.played() as card, kernels.use("triton"):
        rehearsal.rehearse(LeanStep(model, budget_gb=budget, attention="rows"), 4, 2, 6, 10)
    assert card.launched and card.dry
    assert card.launched <= card.compiled, sorted(card.launched - card.compiled)
    assert all(parameter.grad is None for parameter in model.parameters())


def gated(width):
    return kernels.swiglu(*torch.zeros(2, 3, width, dtype=torch.bfloat16))


def test_kernels_are_compiled_in_threads_and_found_by_the_launch():
    with no_card.played(real=True) as card, kernels.use("triton"):
        seen = set()
        before = ahead._Loading.submit

        def submit(loading, compile_one):
            return before(loading, lambda: (seen.add(threading.current_thread().name), compile_one())[1])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ahead._Loading, "submit", submit)
            with ahead.side_by_side(CPU):
                gated(64)
                gated(64)
                gated(30)  # not divisible by 16: another kernel
        found = list(no_card.kernels_of(_forward).values())
        assert len(found) == 2 and all("cubin" in kernel.asm for kernel in found)
        assert not any(isinstance(kernel, _async_compile.FutureKernel) for kernel in found)
        assert seen and all(name.startswith("compile") for name in seen)
        gated(64)
        gated(30)
    assert card.launched == card.compiled


def test_a_dry_pass_waits_for_what_was_begun(monkeypatch):
    pool, ended = ThreadPoolExecutor(1), []
    futures = [pool.submit(lambda: 1 / 0), pool.submit(lambda: (time.sleep(0.2), ended.append(True)))]
    monkeypatch.setattr(ahead, "_begun", lambda: futures)
    with no_card.played(), kernels.use("triton"), ahead.side_by_side(CPU):
        assert ended
        gated(64)


def test_it_begins_where_an_engine_is_made_and_nowhere_without_a_card(monkeypatch):
    begun = []
    monkeypatch.setattr(ahead, "_begun", lambda: begun.append(True))
    GraphEngine(make("qwen2"))
    assert not begun
    monkeypatch.setattr(ahead, "possible", lambda device: True)
    GraphEngine(make("qwen2"))
    assert begun


def test_what_is_begun_is_what_a_first_kernel_waits_for(monkeypatch):
    from triton.runtime import cache

    with no_card.played():
        cache.triton_key.cache_clear()
        for fn in ahead._compiled_kernels():
            fn.hash = None
        ahead._hash()
        assert cache.triton_key.cache_info().currsize == 1
        assert all(fn.hash for fn in ahead._compiled_kernels())


def test_all_is_as_before_after_an_error():
    with no_card.played(), kernels.use("triton"):
        with pytest.raises(ZeroDivisionError), ahead.side_by_side(CPU):
            assert ahead.dry() and "run" in vars(_forward)
            gated(64)
            raise ZeroDivisionError
        assert not ahead.dry() and _async_compile.active_mode.get() is None
        assert not any("run" in vars(fn) for fn in ahead._compiled_kernels())
        with ahead.side_by_side(CPU):
            gated(64)
        assert len(no_card.kernels_of(_forward)) == 1


def test_a_kernel_that_cannot_be_compiled_is_asked_for_again_by_its_launch():
    with no_card.played(fail=("_forward",)), kernels.use("triton"):
        with ahead.side_by_side(CPU):
            gated(64)
        assert not no_card.kernels_of(_forward)


def test_a_dry_pass_that_fails_is_said_and_no_more(capsys):
    with no_card.played():
        ahead.compile_for(CPU, lambda: 1 / 0)
    assert "one by one" in capsys.readouterr().out
    assert not ahead.dry()


def test_a_token_that_was_not_drawn_is_0():
    with no_card.played(), kernels.use("triton"), ahead.side_by_side(CPU):
        rows = torch.zeros(3, dtype=torch.int64)
        assert sampling.draw(torch.zeros(3, 97), rows, rows)[0].tolist() == [0, 0, 0]


def test_the_sampler_has_one_variant_for_every_number_of_rows():
    with no_card.played() as card, kernels.use("triton"):
        for rows in (1, 2, 3, 8):
            index = torch.zeros(rows, dtype=torch.int64)
            sampling.draw(torch.zeros(rows, 151936), index, index)
    assert len(card.launched) == 2


def test_without_tensor_cores_the_thin_product_has_one_variant_for_every_group_of_layers():
    x = torch.zeros(8, 1, 64)
    lora = {"lora_a": torch.zeros(16, 64), "lora_b": torch.zeros(32, 16), "scale": 2.0}
    part = Projection(torch.zeros(32, 64), None, **lora)
    bare = Projection(torch.zeros(32, 64))
    with no_card.played() as card, kernels.use("triton"):
        for parts in ((part,), (part, part), (part, part, part), (part, bare, part)):
            decode_step.decode_linear(x, parts)
    assert sum(name == "_thin" for _, name, _ in card.launched) == 1


@pytest.fixture
def run_for_real(monkeypatch):
    """Dry passes that compute all, with torch: they leave more behind than any real one."""
    passes = []
    monkeypatch.setattr(ahead, "possible", lambda device: True)
    monkeypatch.setattr(ahead, "compile_for", lambda device, dry_pass: passes.append(dry_pass()))
    return passes


@pytest.mark.parametrize("draws", DRAWS, ids=["plain", "filtered"])
@pytest.mark.parametrize("kv_bytes", [None, 30_000], ids=["one stage", "stages"])
@pytest.mark.parametrize("bits", [16, 8])
def test_an_engines_tokens_are_the_same_after_a_dry_pass(draws, kv_bytes, bits, monkeypatch, run_for_real):
    model, draws = make("qwen2"), replace(draws, max_tokens=12, num_generations=3)
    engine = partial(GraphEngine, model, max_rows=4, kv_bytes=kv_bytes, kv_bits=bits)
    after = engine().generate(prompts(), draws)
    assert len(run_for_real) == 1
    monkeypatch.undo()
    assert after == engine().generate(prompts(), draws)


def test_a_dry_pass_leaves_an_empty_cache(monkeypatch):
    """Attention multiplies what it masks by 0: noise that is not a number would stay, in scales of 8 bits as well."""
    left = []

    def noisy(device, dry_pass):
        dry_pass()
        cache = engine._runner.cache
        cache.data.fill_(77)
        if cache.scales is not None:
            cache.scales.fill_(float("nan"))

    def looked(scheduler):
        left.append([t.abs().sum().item() for t in (scheduler.cache.data, scheduler.cache.scales) if t is not None])
        run(scheduler)

    run = Scheduler.run
    monkeypatch.setattr(ahead, "possible", lambda device: True)
    monkeypatch.setattr(ahead, "compile_for", noisy)
    monkeypatch.setattr(Scheduler, "run", looked)
    for bits in (16, 8):
        engine = GraphEngine(make("qwen2"), max_rows=4, kv_bits=bits)
        engine.generate(prompts(), DRAWS[0])
    assert left == [[0], [0, 0]]


def hook(*seen):
    """A module's, or a parameter's."""


def test_no_dry_pass_where_a_hook_would_see_its_noise(run_for_real):
    hooked = {
        "a linear layer": lambda layer: layer.mlp.down_proj.register_forward_hook(hook),
        "a norm": lambda layer: layer.input_layernorm.register_forward_hook(hook),
        "a gradient": lambda layer: trained(layer).register_hook(hook),
        "a gradient that is there": lambda layer: trained(layer).register_post_accumulate_grad_hook(hook),
    }
    for what, set_hook in hooked.items():
        model = make_model("qwen2")
        set_hook(model.get_base_model().model.layers[0])
        rehearsal.rehearse(LeanStep(model, attention="rows"), 4, 2, 6, 10)
        assert not run_for_real, what
    step = LeanStep(make_model("qwen2"), attention="rows")
    step.decoder.swapped = SimpleNamespace(need=hook)  # layers that wait on the host
    rehearsal.rehearse(step, 4, 2, 6, 10)
    model = make("qwen2")
    next(module for name, module in model.named_modules() if name.endswith("down_proj")).register_forward_hook(hook)
    GraphEngine(model, max_rows=4).generate(prompts(), DRAWS[0])
    assert not run_for_real


def trained(layer):
    return next(parameter for parameter in layer.parameters() if parameter.requires_grad)


def test_gradients_that_are_there_get_no_noise(monkeypatch):
    model = make_model("qwen2")
    step = LeanStep(model, attention="rows")
    for parameter in step.trained:
        parameter.grad = torch.ones_like(parameter)

    def noisy(device, dry_pass):
        dry_pass()
        for parameter in filter(lambda parameter: parameter.grad is not None, step.trained):
            parameter.grad.fill_(float("nan"))

    monkeypatch.setattr(ahead, "compile_for", noisy)
    rehearsal.rehearse(step, 4, 2, 6, 10)
    assert all(bool((parameter.grad == 1).all()) for parameter in step.trained)


def test_a_steps_random_numbers_are_the_same_after_a_dry_pass(monkeypatch, run_for_real):
    model = make_model("qwen2")
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.3)
    step, states = LeanStep(model, attention="rows"), []
    for _ in range(2):
        torch.manual_seed(3)
        rehearsal.rehearse(step, 4, 2, 6, 10)
        states.append(torch.get_rng_state())
        monkeypatch.undo()
    assert len(run_for_real) == 1 and torch.equal(*states)
    assert all(parameter.grad is None for parameter in model.parameters())
