"""The planner: counted by hand where that is possible, monotone everywhere, quick, and of one mind with the step and
the graph engine."""

import functools
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from nbhelpers import architecture, gpu, memory, presets
from nbhelpers.architecture import GB
from nbhelpers.engines import Sampling, graph
from nbhelpers.engines.base import Writer
from nbhelpers.memory import kv, micro_batches, residents, seconds
from nbhelpers.models import families
from nbhelpers.training import lean_step

LONG = {"max_prompt_length": 480, "max_completion_length": 20_000, "num_generations": 8}
LLAMA = {"lora_rank": 16, "quantization": "nf4", "max_prompt_length": 256, "max_completion_length": 768}


def test_parts_by_hand():
    """Llama-3.1-8B: 6.98e9 weights in 4 bits and 64ths, 2 x 128256 x 4096 in 16 bits, 42 million LoRA numbers."""
    plan = memory.plan("llama-3.1-8b", card_gb=80, num_generations=8, **LLAMA)
    linear = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    weights = linear * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert plan.training["weights"] == pytest.approx(weights / GB, rel=1e-3)
    numbers = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert plan.training["adapters"] == pytest.approx(8 * numbers / GB)  # fp32, and its gradient
    assert plan.generation["adapters"] == pytest.approx(4 * numbers / GB)
    assert plan.training["dense scratch"] == pytest.approx(2 * 4096 * 14336 / GB)
    assert plan.generation["KV cache"] == pytest.approx(8 * 1024 * 32 * 2 * 8 * 128 * 2 / GB)
    wide = memory.plan("llama-3.1-8b", card_gb=80, optimizer="adamw", **LLAMA)
    assert wide.training["optimizer"] == pytest.approx(8 * numbers / GB)
    assert plan.training_peak == pytest.approx(sum(plan.training.values()) - memory.CONTEXT_GB)


def test_a_budget_is_kept_and_used():
    for gb in (7.3, 9.0, 14.0):
        plan = memory.plan("llama-3.1-8b", card_gb=80, budget_gb=gb, attention="flash", **LLAMA)
        assert plan.fits and 0.9 * gb < plan.training_peak <= gb
    assert memory.plan("llama-3.1-8b", card_gb=80, **LLAMA).verdict()[0].endswith("no layer computed twice.")
    assert "computed twice" in memory.plan("llama-3.1-8b", card_gb=80, budget_gb=7.3, **LLAMA).verdict()[0]


def test_the_goals_of_the_issue_can_be_planned():
    goals = {"qwen2.5-1.5b": (2.0, 2.2, 3.0), "llama-3.1-8b": (7.4, 7.8, 9.4), "phi-4": (11.5, 12.0, 14.0)}
    for name, goal in goals.items():
        for length, gb in zip((1024, 4096, 20480), goal, strict=True):
            plan = memory.plan(
                name, card_gb=140, budget_gb=gb - 0.05, attention="flash", num_generations=8,
                **LLAMA | {"max_completion_length": length - 256},
            )  # fmt: skip
            assert plan.micro_batches and plan.training_peak <= gb, (name, length)


def test_what_fits_and_what_does_not():
    plan = memory.plan("llama-3.1-8b", card_gb=15)
    assert plan.fits and plan.nearest is None
    assert plan.longest_context > 20_000 and plan.largest_group >= 8
    again = memory.plan("llama-3.1-8b", card_gb=15, max_completion_length=plan.longest_context - 256)
    assert again.fits
    assert not memory.plan("llama-3.1-8b", card_gb=15, max_completion_length=plan.longest_context - 255).fits
    tight = memory.plan("phi-4", card_gb=12.2, max_completion_length=30_000, lora_rank=32)
    assert not tight.fits and tight.nearest is not None
    near = tight.nearest
    assert memory.plan(
        "phi-4", card_gb=12.2, max_completion_length=near.max_completion_length, lora_rank=near.lora_rank,
        num_generations=near.num_generations, rows=near.rows, quantization=near.quantization,
    ).fits  # fmt: skip
    none = memory.plan("phi-4", card_gb=6)
    assert not none.fits and none.nearest is None and none.longest_context == none.largest_group == 0
    assert "no setting of this model does" in str(none) and "qwen2.5-1.5b" in str(none)


def test_more_of_anything_needs_more():
    def peak(**changes):
        plan = memory.plan("qwen2.5-3b", card_gb=24, budget_gb=23, **{**LLAMA, **changes})
        return sum(plan.generation.values())

    assert peak(max_completion_length=1536) > peak() > peak(lora_rank=8)
    assert peak(num_generations=16) > peak() and peak(quantization="none") > peak(quantization="dynamic") > peak()


def test_dropout_needs_what_the_step_reckons_for_it():
    preset = presets.get("llama-3.1-8b")
    plain, dropping = (memory.plan(replace(preset, lora_dropout=p), card_gb=80, **LLAMA) for p in (0.0, 0.1))
    assert dropping.training_peak > plain.training_peak and dropping.generation_peak == plain.generation_peak


def test_long_contexts_are_generated_in_stages():
    plan = memory.plan("llama-3.1-8b", card_gb=15, max_completion_length=20_224)
    assert plan.fits and plan.at_once < plan.setting.rows
    assert f"{plan.at_once} at a time at the end" in str(plan)
    assert sum(plan.generation.values()) <= 15


def test_text_and_html_say_the_same():
    plan = memory.plan("qwen2.5-1.5b", card_gb=15, max_completion_length=1000)
    for shown in (str(plan), plan._repr_html_()):
        assert "Qwen2.5 1.5B Instruct" in shown and "256 + 1000" in shown and "It fits" in shown
        assert f"{plan.training['weights']:.2f}" in shown and "KV cache" in shown
    assert str(plan).startswith("It fits. ") and plan._repr_html_().startswith("<div><p><b>It fits. ")
    assert repr(plan) == str(plan) and max(map(len, str(plan).splitlines()[:12])) < 100


def test_each_part_has_a_colour_of_its_own():
    page = memory.plan("qwen2.5-1.5b", card_gb=15)._repr_html_()
    hues = [int(hue) % 360 for hue in re.findall(r"color:hsl\((\d+) [^\"]*\">■", page)]
    assert len(set(hues)) == len(hues) == page.count("■") >= 9


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="adamw_8bit"):
        memory.plan("phi-4", optimizer="sgd")
    with pytest.raises(ValueError, match="train='every'"):
        memory.plan("phi-4", train="every")
    with pytest.raises(ValueError, match=r"presets\.get"):
        memory.plan("phi-5")


def test_every_preset_in_under_a_second_without_torch():
    code = (
        "import sys, time\nfrom nbhelpers import memory, presets\nstart = time.process_time()\n"
        "for name in presets.names(): str(memory.plan(name))\n"
        "print((time.process_time() - start) / len(presets.names()), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 1.0 and out[1] == "False"
    start = time.process_time()
    memory.plan("phi-4", card_gb=12.2, max_completion_length=30_000)  # the search for the nearest included
    assert time.process_time() - start < 1.0


def test_the_sizes_of_the_kernels_buffers_are_the_kernels_own():
    pytest.importorskip("triton")
    from nbhelpers.kernels.triton.linear_logprob import SCRATCH_BYTES
    from nbhelpers.kernels.triton.lora_linear import DENSE_BYTES

    assert (gpu.DEQUANTIZE_BYTES, gpu.LOGITS_BYTES) == (DENSE_BYTES, SCRATCH_BYTES)
    by_hand = {"qwen2.5-1.5b": 2 * 2 * 8960 * 1536, "llama-3.1-8b": 2 * 14336 * 4096, "phi-4": DENSE_BYTES}
    for name, size in by_hand.items():
        assert residents.scratch_bytes(presets.get(name).architecture) == size


def test_the_step_cuts_as_the_planner_said():
    """One source: the micro-batches that a step plans for a batch are those of the plan of the same numbers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    a = architecture.Architecture(
        families.QWEN2, 32, 48, 3, 4, 2, 8, 100, False, attention_bias=True, max_position_embeddings=256
    )
    model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in a.config().items() if k != "model_type"}))
    one = lean_step.LeanStep(model, budget_gb=2e-4)
    rows = [lean_step.Row(i, 0, 10, 30) for i in range(8)]
    cost = micro_batches.StepCost(a, 4, "rows", whole=True)  # every weight of this model is trained
    wanted = cost.split([(0, 10, 30)] * 8, 2e-4 * GB, fresh=4 * a.parameters())
    assert one.plan(rows) == wanted and len(wanted) > 1


CARDS = (4, 6, 8, 12, 15, 16, 24, 40, 80)


def written_at_once(plan, texts, monkeypatch):
    """How many of `texts` completions the graph engine itself writes at the same time to their full length, with the
    bytes that this plan leaves free for it."""
    s, a = plan.setting, plan.preset.architecture
    resident = sum(plan.generation.get(part, 0) for part in ("weights", "adapters", "optimizer", "dense scratch"))
    free = (plan.card_gb - memory.CONTEXT_GB) * (1 - memory.FRAGMENTED) - resident
    width = 2 if s.lora_rank else 4
    token = memory.kv_bytes_per_token(a.num_hidden_layers, a.num_key_value_heads, a.head_dim, width, s.kv_bits)
    engine, sampling = object.__new__(graph.GraphEngine), Sampling(s.max_completion_length)
    engine.max_rows = kv.MAX_ROWS
    requests = [graph.Request([1] * s.max_prompt_length, i, Writer(sampling)) for i in range(texts)]
    monkeypatch.setattr(graph, "STAGE_TOKENS", 10**9)  # no stage is worth it: the last one alone
    try:
        rows, length = engine._stage(requests, s.max_completion_length, memory.kv_budget(max(0.0, free) * GB), token)
    except MemoryError:
        return 0
    assert length >= s.max_prompt_length + s.max_completion_length and length % 16 == 0
    return min(rows, texts)


@pytest.mark.parametrize("name", presets.names())
def test_the_graph_engine_writes_as_many_at_once_as_planned(name, monkeypatch):
    for gb in CARDS:
        for changes in ({}, {"max_completion_length": 1003}, {"max_completion_length": 64, "rows": 96}, {"kv_bits": 8}):
            plan = memory.plan(name, card_gb=gb, **changes)
            assert plan.at_once == written_at_once(plan, plan.setting.rows, monkeypatch), (gb, changes)
            affordable = written_at_once(plan, kv.MAX_ROWS, monkeypatch)
            if plan.fits:
                assert plan.largest_group == (affordable if affordable > 1 else 0), (gb, changes)


def test_keys_and_values_in_8_bits_are_planned_in_half_the_room():
    plans = [memory.plan("llama-3.1-8b", card_gb=15, **{**LONG, "kv_bits": bits}) for bits in (16, 8)]
    assert [plan.at_once for plan in plans] == [2, 5] and all(plan.fits for plan in plans)
    assert plans[1].generation["KV cache"] / 5 < 0.52 * plans[0].generation["KV cache"] / 2
    assert plans[1].training == plans[0].training
    assert plans[1].step_seconds < 0.75 * plans[0].step_seconds  # fewer one after another
    assert "keys and values in 8 bits" in str(plans[1].setting) and "8 bits" not in str(plans[0].setting)
    preset = replace(presets.get("llama-3.1-8b"), kv_bits=8)
    assert memory.plan(preset, card_gb=15, **LONG) == replace(plans[1], preset=preset.on_card(15))
    for wrong in (4, 8.0, True):
        with pytest.raises(ValueError, match=f"kv_bits={wrong}: it is 16, or 8"):
            memory.plan("llama-3.1-8b", card_gb=15, kv_bits=wrong)


def test_on_tight_cards_fewer_are_written_than_fit_beside_nothing():
    """What these plans said before they asked the engine: 13, 16, 12 and 26."""
    cases = {("phi-4", 12): 10, ("llama-3.1-8b", 8): 13, ("mistral-7b", 6): 9, ("qwen2.5-3b", 4): 20}
    assert {case: memory.plan(*case).largest_group for case in cases} == cases


def test_a_budget_holds_for_the_engine_too():
    tight = memory.plan("llama-3.1-8b", card_gb=80, budget_gb=7.3, **LLAMA)
    resident = sum(tight.generation[part] for part in ("weights", "adapters", "optimizer", "dense scratch"))
    assert tight.at_once == memory.kv_budget((7.3 - resident) * GB) // (1024 * 131_072) < 8
    assert tight.generation_peak <= 7.3


that_fit = functools.cache(memory.that_fit)  # of every preset, and asked again for each


@pytest.mark.parametrize("name", presets.names())
def test_the_smallest_card_is_the_one_that_a_plan_is_found_for(name):
    preset = presets.get(name)
    floor = memory.floor_gb(preset)
    for gb in (0.1, floor - 0.1, floor, floor + 0.1, *range(1, 25), 40, 80):
        plan = memory.plan(preset, card_gb=gb)
        assert (plan.fits or plan.nearest is not None) == memory.can_train(preset, gb) == (gb >= floor), gb
        assert (name in that_fit(gb)) == (gb >= floor)


def test_what_fits():
    assert memory.that_fit(0.1) == ()
    assert "phi-4" not in memory.that_fit(8.6) and "qwen2.5-1.5b" in memory.that_fit(8.6)
    large = {"llama-3.3-70b"}
    assert set(memory.that_fit(25.4)) == set(presets.names()) - large
    assert set(memory.that_fit(48)) == set(presets.names())
    for name in presets.names():
        preset = presets.get(name)
        assert memory.floor_gb(replace(preset, lora_rank=preset.lora_rank or 64)) > memory.CONTEXT_GB


def test_a_plan_for_texts_has_no_generation_and_cuts_as_the_step_does():
    """Of each text every token but the first may count, and none is shared."""
    given = {"card_gb": 80, "attention": "flash", "budget_gb": 9.0, **LLAMA}
    plan = memory.plan("llama-3.1-8b", method="sft", rows=24, **given)
    assert plan.fits and plan.generation == {} and plan.generation_peak == 0
    assert "24 texts of 1024 tokens" in str(plan) and "group" not in str(plan)
    assert 0.9 * 9.0 < plan.training_peak <= 9.0
    preset = presets.get("llama-3.1-8b")
    shape = preset.architecture
    held = residents.resident(shape, "nf4", 16, preset.lora_targets, "adamw_8bit")
    room = memory.step_budget(70 * GB, 9.0 * GB - held.generating, coming=held.gradients)
    card = seconds.card_of(80)  # what its launches take decides the cut too
    launches, adapted = seconds.launch_tokens(shape, card), 16 * len(preset.lora_targets)
    step = micro_batches.StepCost(shape, 2, "flash", adapted=adapted, launches=launches)
    assert plan.micro_batches == tuple(step.split([(i, 256, 768) for i in range(24)], room))
    assert memory.plan("llama-3.1-8b", method="rloo", **given).training == memory.plan("llama-3.1-8b", **given).training
    with pytest.raises(ValueError, match="method is one of grpo, rloo, sft"):
        memory.plan("llama-3.1-8b", method="dpo")


def test_long_completions_are_cut_one_by_one_where_attention_to_one_sequence_is_quicker():
    shape = presets.get("llama-3.1-8b").architecture
    packed = micro_batches.StepCost(shape, launches=2000)
    alone = replace(packed, alone=8192)

    def cut(cost, *rows):
        return [batch.rows for batch in cost.split([*rows], 1e12)]

    long, short, prompted = (0, 256, 20_000), (0, 256, 768), (0, 13_000, 20_000)
    assert cut(packed, long, long, short) == [(0, 1, 2)] and cut(alone, long, long, short) == [(0,), (1,), (2,)]
    assert cut(alone, short, long, short, long) == [(1,), (3,), (0, 2)]
    assert cut(alone, short, short) == [(0, 1)] and cut(alone, prompted, prompted) == [(0, 1)]
    assert cut(alone, (0, 256, 8192), (0, 256, 8192)) == [(0, 1)] and cut(alone, long) == [(0,)]
    assert alone.split([long], 1e12, fresh=10) == packed.split([long], 1e12, fresh=10)


def test_a_small_card_is_told_shorter_texts():
    given = {"card_gb": 8, "method": "sft", **LLAMA}
    plan = memory.plan("llama-3.1-8b", **(given | {"max_completion_length": 40_000}))
    assert not plan.fits and plan.nearest is not None and plan.nearest.num_generations == 1
    nearest = {"quantization": plan.nearest.quantization, "lora_rank": plan.nearest.lora_rank}
    nearest["max_completion_length"] = plan.nearest.max_completion_length
    assert memory.plan("llama-3.1-8b", **(given | nearest)).fits


def test_every_weight_in_16_bits_takes_six_bytes_a_weight():
    setting = {"max_prompt_length": 256, "max_completion_length": 768, "attention": "flash"}
    plan = memory.plan("qwen2.5-3b", card_gb=24, train="all", **setting)
    numbers = presets.get("qwen2.5-3b").architecture.parameters()
    assert plan.fits and "every weight trained in 16 bits" in str(plan)
    assert plan.training["weights"] == plan.training["gradients"] == pytest.approx(2 * numbers / GB)
    assert plan.training["optimizer"] == pytest.approx(2.04 * numbers / GB) and "gradients" not in plan.generation
    wide = memory.plan("qwen2.5-3b", card_gb=24, lora_rank=0, quantization="none", **setting)
    assert not wide.fits and "in 32 bits" in str(wide) and wide.training["weights"] == 2 * plan.training["weights"]
    small = memory.plan("qwen2.5-1.5b", card_gb=12, train="all", num_generations=8, **setting)
    assert small.fits and sum(small.training.values()) < 12


@pytest.mark.parametrize("method", ["online_dpo", "ppo"])
def test_a_method_that_needs_an_adapter_is_not_planned_without(method):
    with pytest.raises(ValueError, match=f"{method} measures .* leave out train="):
        memory.plan("llama-3.2-1b", card_gb=24, method=method, train="all")
    with pytest.raises(ValueError, match="leave out lora_rank=0"):
        memory.plan("llama-3.2-1b", card_gb=24, method=method, lora_rank=0)


def test_a_trained_heads_gradient_counts_unless_those_of_the_layers_are_put_aside_and_not_there_yet():
    a = presets.get("qwen2.5-1.5b").architecture
    cost, tokens = micro_batches.StepCost(a, whole=True), micro_batches.Tokens(1000, 900, 1000)
    head = 6 * a.vocab_size * a.hidden_size
    frozen = micro_batches.StepCost(a).peak(tokens, 0, 0, 1024)
    assert cost.peak(tokens, 0, 0, 1024) > frozen + 0.7 * head
    assert cost.peak(tokens, 0, 0, 1024, fresh=2 * a.parameters()) < frozen + 0.2 * head


def test_layers_wait_on_the_host_where_nothing_else_fits():
    assert not memory.plan("llama-3.1-8b", card_gb=5, **LLAMA).fits
    plan = memory.plan("llama-3.1-8b", card_gb=5, swap=True, **LLAMA)
    n, a = plan.setting.swapped, plan.preset.architecture
    each = sum(m.out_features * m.in_features for m in a.linears()) / 2 / GB
    assert plan.fits and 2 < n <= 32 and f"{n} layers wait on the host" in str(plan)
    without = memory.plan("llama-3.1-8b", card_gb=80, **LLAMA)
    assert plan.training["weights"] == pytest.approx(without.training["weights"] - (n - 2) * each)
    stages = -(-plan.setting.rows // plan.at_once)
    assert plan.swap_gb == pytest.approx(n * each * (768 * stages + 2 * len(plan.micro_batches)))
    assert "GB go over PCIe in a step" in str(plan)
    enough = memory.plan("llama-3.1-8b", card_gb=24, swap=True, **LLAMA)
    assert enough.setting.swapped == enough.swap_gb == 0 and "PCIe" not in str(enough)
    assert not memory.plan("qwen2.5-3b", card_gb=8, train="all", swap=True).setting.swapped  # nothing is frozen


def test_the_pieces_of_a_long_prompt_are_planned_as_large_as_they_get_and_stay_within_the_budget():
    how = {"max_prompt_length": 13_000, "max_completion_length": 256, "rows": 8, "num_generations": 8}
    work = {}
    for gb in (10, 12, 15, 24, 48):
        plan = memory.plan("llama-3.1-8b", 80.0, budget_gb=float(gb), **how)
        assert plan.fits and plan.generation_peak <= gb
        work[gb] = plan.generation["layer work"]
    assert work[15] < work[24] == work[48]  # keys and values leave little of 15 GB; of 24 the whole prompt is one piece
    short = how | {"max_prompt_length": 200}
    tight, roomy = (memory.plan("llama-3.1-8b", 80.0, budget_gb=gb, **short) for gb in (10.0, 48.0))
    assert tight.generation == roomy.generation
