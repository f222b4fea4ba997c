"""What is reported of a token is the model's own log-probability at the temperature, whatever decided the draw."""

import pytest
import torch
from engine_models import by_forward, make, prompts

from nbhelpers.engines import Sampling
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.hf import HFEngine
from nbhelpers.engines.sampler import next_token, sample

ENGINES = pytest.mark.parametrize("make_engine", [GraphEngine, HFEngine])
STOPS = tuple(range(0, 97, 5))
ALL = {"top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 20, "stop_ids": STOPS}
SETTINGS = [
    {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.3}, {"repetition_penalty": 1.5}, {"repetition_penalty": 0.7},
    {"min_tokens": 20, "stop_ids": STOPS}, ALL, {**ALL, "temperature": 0.6}, {**ALL, "temperature": 1.4},
    {"top_k": 1}, {"temperature": 0.0, "repetition_penalty": 1.5}, {"temperature": 0.0, **ALL},
]  # fmt: skip


@ENGINES
@pytest.mark.parametrize(
    "settings", SETTINGS, ids=lambda s: "+".join(f"{k}{v}" for k, v in s.items() if k != "stop_ids")
)
def test_logprobs_are_the_training_forwards_over_256_tokens(make_engine, settings):
    model, texts = make("llama", max_position_embeddings=300), prompts(2)
    sampling = Sampling(max_tokens=256, num_generations=2, seed=4, **settings)
    longest = 0
    for i, completion in enumerate(make_engine(model).generate(texts, sampling)):
        wanted = by_forward(model, texts[i // 2], completion.token_ids, sampling.temperature or 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-4, rtol=0)
        assert (wanted - torch.tensor(completion.logprobs)).sum().abs() < 1e-3  # the weight of the whole is 1
        longest = max(longest, len(completion.token_ids))
    assert longest == 256 or sampling.stop_ids


@ENGINES
def test_stages_and_waves_report_the_same(make_engine):
    model, texts = make("qwen2"), prompts(12)
    sampling = Sampling(max_tokens=24, top_p=0.7, temperature=0.8, seed=4)
    options = {"kv_bytes": 3 * 48 * 2 * 2 * 2 * 16 * 4} if make_engine is GraphEngine else {"batch_size": 5}
    for text, completion in zip(texts, make_engine(model, **options).generate(texts, sampling), strict=True):
        wanted = by_forward(model, text, completion.token_ids, 0.8)
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s))
def test_what_is_drawn_does_not_change(settings):
    """The token is `sample`'s, whose own log-probability is that of the distribution it drew from."""
    sampling = Sampling(**settings)
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(0)) * 2
    stops, counts = torch.tensor(sampling.stop_ids, dtype=torch.int64), torch.arange(50)
    seen = torch.rand(50, 97, generator=torch.Generator().manual_seed(1)) < 0.3
    token, logp = next_token(logits.clone(), counts, counts, sampling, stops, seen.clone())
    drawn, within = sample(logits.clone(), counts, counts, sampling, stops, seen.clone())
    assert torch.equal(token, drawn) and not torch.allclose(logp, within)


def test_what_is_plain_penalises_and_rules_out_nothing():
    assert Sampling(temperature=0.3, stop_ids=(4,)).plain and Sampling(min_tokens=4).plain
    assert not any(Sampling(**settings).plain for settings in SETTINGS)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", ["qwen2", "llama", "phi3"])
def test_norms_kept_in_fp32_leave_keys_and_values_in_the_models_dtype(name, bits):
    """As some prepare a model for training; a kernel that takes its fp32 keys for the cache's would write past it."""
    model = make(name, dtype=torch.bfloat16)
    sampling = Sampling(max_tokens=6, seed=1)
    wanted = GraphEngine(model, kv_bits=bits).generate([[3, 4, 5], [6]], sampling)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("norm.weight"):
            parameter.data = parameter.data.float()  # the same numbers
    assert GraphEngine(model, kv_bits=bits).generate([[3, 4, 5], [6]], sampling) == wanted
