"""Keys and values in 8 bits: what is written comes from attention that reads them so, and from nothing else."""

from dataclasses import replace

import pytest
import torch
from engine_models import ARCHITECTURES, by_forward, make, prompts
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nbhelpers.engines import Sampling, choose, forward
from nbhelpers.engines import graph as graph_module
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.hf import HFEngine
from nbhelpers.engines.kv_cache import KVCache
from nbhelpers.kernels import eight_bits
from nbhelpers.memory import kv

SAMPLING = Sampling(max_tokens=40, num_generations=2, temperature=0.8, seed=1)


def model_with_large_bias(name="qwen2", **sizes):
    """As in Qwen2.5's first layers: hundreds of times the rest in two channels of each head that are rotated slowly."""
    model = make(name, **sizes)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.k_proj.bias.data.view(2, -1)[:, [6, 15]] += 100.0
    return model


def off(model, texts, completions, sampling=SAMPLING):
    """Each token's log-probability against the training forward's; fp32 [tokens of all]."""
    n = sampling.num_generations
    return torch.cat(
        [
            (torch.tensor(c.logprobs) - by_forward(model, texts[i // n], c.token_ids, sampling.temperature)).abs()
            for i, c in enumerate(completions)
        ]
    )


@pytest.fixture
def read_in_8_bits(monkeypatch):
    """transformers' own attention, from keys and values that were in 8 bits."""
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, q, k, v, *rest, **more):
        rotary, projection = rotaries[module], getattr(module, "k_proj", None)
        bias = None if projection is None or hasattr(module, "k_norm") else projection.bias
        cos, sin = (t[0] for t in rotary(k, torch.arange(k.shape[2])[None]))
        half = cos.shape[-1] // 2
        angles = eight_bits.angles_of(cos, sin, k.shape[-1])
        bias = None if bias is None else bias.view(k.shape[1], -1)
        turned = eight_bits.rotated_bias(bias, angles, half)
        k = eight_bits.dequantise(*eight_bits.quantise(k if turned is None else k - turned), k.dtype, turned)
        return inner(module, q, k, eight_bits.dequantise(*eight_bits.quantise(v), v.dtype), *rest, **more)

    rotaries = {}

    def of(model):
        body = model.base_model.model.model
        rotaries.update({layer.self_attn: body.rotary_emb for layer in body.layers})
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attention)

    return of


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_probabilities_are_those_of_attention_over_what_is_kept(name, read_in_8_bits):
    """A number between two steps may be rounded to either, so not to the last digit."""
    model, texts = make(name), prompts()
    written = GraphEngine(model, kv_bits=8).generate(texts, SAMPLING)
    gap = off(model, texts, written)
    assert 5e-3 < gap.mean() < 0.03
    read_in_8_bits(model)
    assert off(model, texts, written).mean() < 0.05 * gap.mean()


@pytest.mark.parametrize("bias", [False, True], ids=["llama", "qwen2"])
def test_a_large_bias_costs_nothing(bias, monkeypatch):
    texts = prompts()
    model = model_with_large_bias() if bias else make("llama", attention_bias=False)
    assert off(model, texts, GraphEngine(model).generate(texts, SAMPLING)).mean() < 1e-4
    gap = off(model, texts, GraphEngine(model, kv_bits=8).generate(texts, SAMPLING)).mean()
    assert gap < 0.03
    if bias:
        of = forward.Layer.of
        monkeypatch.setattr(forward.Layer, "of", lambda modules: of(modules)._replace(key_bias=None))
        assert off(model, texts, GraphEngine(model, kv_bits=8).generate(texts, SAMPLING)).mean() > 5 * gap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3"])
def test_in_16_bits_and_nf4_too(name, dtype):
    model, texts = make(name, dtype=dtype, four_bit=True), prompts()
    gaps = [off(model, texts, GraphEngine(model, kv_bits=bits).generate(texts, SAMPLING)).mean() for bits in (16, 8)]
    assert gaps[1] < gaps[0] + 0.03


def alike(ours, theirs):
    """A rounding to the other side changes a probability by a thousandth, and now and then a word."""
    pairs = list(zip(ours, theirs, strict=True))
    same = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
    differ = torch.tensor([x - y for a, b in same for x, y in zip(a.logprobs, b.logprobs, strict=True)])
    return len(same) >= 0.75 * len(pairs) and differ.abs().mean() < 2e-3


@pytest.mark.parametrize("name", ["qwen2", "mistral", "phi3"])
def test_rows_slots_prompts_and_stages_do_not_matter(name, monkeypatch):
    model = model_with_large_bias() if name == "qwen2" else make(name)
    texts, sampling = prompts(n=6, longest=40, seed=3), replace(SAMPLING, max_tokens=70)
    engine = GraphEngine(model, kv_bits=8)
    wanted = engine.generate(texts, sampling)
    assert engine.generate(texts, sampling) == wanted  # seeds
    assert alike(GraphEngine(model, kv_bits=8, max_rows=3).generate(texts, sampling), wanted)  # slots are used again
    seeds = [2 * i for i in range(12)]
    alone = engine.generate(
        [text for text in texts for _ in range(2)], replace(sampling, num_generations=1, seed=seeds)
    )
    assert alike(engine.generate(texts, replace(sampling, seed=seeds)), alone)  # a group's prompt is computed once
    monkeypatch.setattr(graph_module, "STAGE_TOKENS", 8)
    token = kv.kv_bytes_per_token(2, 2, 16, 4, bits=8)
    assert token == engine._runner.cache.token_bytes == 2 * 2 * 2 * (16 + 4)
    stages, allocate = [], graph_module.KVCache.allocate

    def counted(self, *sizes):
        stages.append(sizes)
        allocate(self, *sizes)
        assert self.data.untyped_storage().nbytes() <= sizes[-1]

    monkeypatch.setattr(graph_module.KVCache, "allocate", counted)
    staged = GraphEngine(model, kv_bits=8, kv_bytes=int(7.9 * 112 * token)).generate(texts, sampling)
    assert alike(staged, wanted) and len(stages) > 1
    monkeypatch.setattr(kv, "PREFILL_BYTES", 0)  # prompts in pieces of 16 tokens
    pieces = GraphEngine(model, kv_bits=8)
    assert alike(pieces.generate(texts, sampling), wanted)
    pieces._runner.cache.lower_right = True  # as on Ampere and newer
    assert alike(pieces.generate(texts, sampling), wanted)


def test_the_same_bytes_hold_about_twice_as_many():
    asked = graph_module.Request([1] * 100, 0, graph_module.Writer(Sampling(max_tokens=20_380)))
    rows = {}
    for bits in kv.KV_BITS:
        engine = object.__new__(GraphEngine)
        engine.max_rows = 128
        token = kv.kv_bytes_per_token(32, 8, 128, 2, bits)  # Llama-3.1-8B
        rows[bits], _ = engine._stage([asked], 20_380, int(7.2e9), token)
        assert kv.rows_that_fit(int(7.2e9), 20_480, token) == {16: 2, 8: 5}[bits]
    assert kv.kv_bytes_per_token(32, 8, 128, 2, 8) < 0.52 * kv.kv_bytes_per_token(32, 8, 128, 2)


def test_angles_are_made_before_the_block_that_takes_all_there_is(monkeypatch):
    """In fp32 those of 128K tokens take 0.3 GB for a moment."""
    cache, order, empty = KVCache(forward.Decoder(make("qwen2")), 8), [], torch.empty
    rotary = cache.rotary

    def counted(*size, **options):
        order.extend(["block"] * (options.get("dtype") == torch.uint8))
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", counted)
    cache.rotary = lambda *inputs: order.append("angles") or rotary(*inputs)
    for _ in range(2):  # the second time the block is there already
        cache.allocate(2, 32, 10**9)
        assert cache.data is not None and cache.table[5] == cache.angles.data_ptr()
    assert order == ["angles", "block"] * 2


def test_a_text_of_zeros_is_not_divided_by_zero():
    numbers, scale = eight_bits.quantise(torch.zeros(2, 3, 8))
    assert torch.equal(eight_bits.dequantise(numbers, scale, torch.float32), torch.zeros(2, 3, 8))
    x = torch.randn(50, 64)
    numbers, scale = eight_bits.quantise(x)
    assert numbers.abs().amax(-1).eq(127).all()
    assert ((eight_bits.dequantise(numbers, scale, x.dtype) - x).abs() <= 0.5001 * scale[:, None]).all()


def test_who_has_no_8_bits_says_so():
    model = make("llama")
    for engine in ("hf", "vllm"):
        with pytest.raises(ValueError, match='kv_bits=8 is an option of the graph engine: take engine="graph"'):
            choose(engine, model, kv_bits=8)
    with pytest.raises(ValueError, match="kv_bits=8, and the engine was made with 16"):
        choose(HFEngine(model), model, kv_bits=8)
    with pytest.raises(ValueError, match="kv_bits=4: it is 16, or 8"):
        GraphEngine(model, kv_bits=4)
    model.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="which cannot serve here: its activation is gelu"):
        choose("auto", model, kv_bits=8, quiet=True)
    model.config.hidden_act = "silu"
    made = choose("auto", model, kv_bits=8, quiet=True)
    assert made.kv_bits == 8 and choose(made, model, kv_bits=8) is made
