"""The contract and the sampler, the same for every engine."""

import pytest
import tiny_model
import torch
from engine_models import by_forward, by_generate, make, prompts
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from nbhelpers import kernels
from nbhelpers.engines import Sampling
from nbhelpers.engines.base import Writer
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.hf import HFEngine
from nbhelpers.engines.sampler import sample

ENGINES = pytest.mark.parametrize("make_engine", [GraphEngine, HFEngine])
FILTERS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.8},
]


def processed(logits, seen, sampling: Sampling):
    """What transformers' own processors and warpers make of logits [B, V]."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1.0:
        steps.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        steps.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(hf.MinPLogitsWarper(sampling.min_p))
    return steps(seen, logits.clone())


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f))
def test_frequencies_and_logprobs_are_those_of_transformers_filters(filters):
    """Chi-square of 40,000 draws against the softmax, and the log-probability of every word that can be drawn."""
    sampling, n, vocabulary = Sampling(**filters), 40_000, 40
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, vocabulary, generator=generator) * 2
    context = torch.tensor([[1, 4, 4, 7, 30, 31]])
    wanted = processed(logits, context, sampling).log_softmax(-1)[0]
    seen = torch.zeros(n, vocabulary, dtype=torch.bool)
    seen[:, context[0]] = True
    before = seen.clone()
    token, logp = sample(
        logits.expand(n, -1), torch.arange(n) * 7919, torch.full((n,), 3), sampling, torch.zeros(0).long(), seen
    )
    assert torch.equal(seen, before.scatter(1, token[:, None], True))
    torch.testing.assert_close(logp, wanted[token], atol=1e-5, rtol=1e-5)
    counts, expected = torch.bincount(token, minlength=vocabulary), wanted.exp() * n
    possible = expected > 0
    assert counts[~possible].sum() == 0 and possible.sum() > 3
    assert chi_square(counts, expected) < 3.0


def chi_square(counts, expected) -> float:
    """In standard deviations above what chance gives; rare words count together."""
    rare = expected < 10
    counts, expected = (torch.cat([t[~rare], t[rare].sum()[None]]).double() for t in (counts, expected))
    kept = expected > 0
    degrees = int(kept.sum()) - 1
    value = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    return (value - degrees) / (2 * degrees) ** 0.5


def test_chi_square_would_see_a_wrong_temperature():
    logits, n = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2, 40_000
    token, _ = kernels.draw(logits.expand(n, -1) / 1.05, torch.arange(n), torch.zeros(n).long())
    assert chi_square(torch.bincount(token, minlength=40), logits.softmax(-1)[0] * n) > 5.0


def test_draws_are_independent_over_tokens_and_seeds():
    """Pairs of successive draws of one request, and of neighbouring seeds, are uniform over the square."""
    n = 40_000
    flat = torch.zeros(1, 8).expand(n, -1)
    by_count, _ = kernels.draw(flat, torch.full((n,), 12345), torch.arange(n))
    by_seed, _ = kernels.draw(flat, torch.arange(n), torch.full((n,), 5))
    for drawn in (by_count, by_seed):
        pairs = torch.bincount(drawn[:-1] * 8 + drawn[1:], minlength=64)
        assert chi_square(pairs, torch.full((64,), (n - 1) / 64)) < 3.5


def test_a_word_without_probability_is_never_drawn():
    logits = torch.full((5000, 300), float("-inf"))
    logits[:, 7], logits[:, 299] = 0.0, -20.0
    token, logp = kernels.draw(logits, torch.arange(5000), torch.zeros(5000).long())
    assert set(token.tolist()) <= {7, 299} and logp.isfinite().all()


# ---- what an engine does with it ----


@ENGINES
def test_minimum_length_and_stop_ids(make_engine):
    engine, stops = make_engine(make("qwen2")), tuple(range(0, 97, 3))
    short = engine.generate(prompts(), Sampling(max_tokens=20, num_generations=4, stop_ids=stops, seed=0))
    assert min(len(c.token_ids) for c in short) < 5
    for completion in short:
        assert completion.reason == "stop_id" and completion.token_ids[-1] in stops
        assert not set(completion.token_ids[:-1]) & set(stops)
    sampling = Sampling(max_tokens=20, min_tokens=7, num_generations=4, stop_ids=stops, seed=0)
    for completion in engine.generate(prompts(), sampling):
        assert len(completion.token_ids) > 7 and not set(completion.token_ids[:7]) & set(stops)


@ENGINES
def test_stop_strings_end_with_the_token_that_completes_them(make_engine):
    tokenizer = tiny_model.tokenizer()
    model = make("qwen2", vocab_size=len(tokenizer))
    engine, texts = make_engine(model, tokenizer), prompts(8, vocabulary=90)
    free = engine.generate(texts, Sampling(max_tokens=30, seed=2))
    written = [tokenizer.decode(c.token_ids) for c in free]
    stop = written[0][11:14]  # three characters, three tokens
    for old, text, new in zip(free, written, engine.generate(
        texts, Sampling(max_tokens=30, seed=2, stop_strings=(stop, written[1][5:7]))), strict=True):  # fmt: skip
        ends = [text.index(s) + len(s) for s in (stop, written[1][5:7]) if s in text]
        assert new.reason == ("stop_string" if ends else "length")
        assert new.token_ids == old.token_ids[: min(ends, default=30)]
        assert new.logprobs == pytest.approx(old.logprobs[: len(new.token_ids)], abs=1e-5)
    assert [c.reason for c in engine.generate(texts[:1], Sampling(max_tokens=9, stop_strings=("zzzz",)))] == ["length"]
    with pytest.raises(ValueError, match="give the engine the tokenizer"):
        make_engine(model).generate(texts, Sampling(max_tokens=9, stop_strings=("a",)))


@ENGINES
def test_repetition_penalty_over_a_whole_completion(make_engine):
    """Greedy with the penalty, token by token by hand; the prompt's padding is not counted as seen."""
    model, texts = make("qwen2"), [[0, 5, 9], [4], [8, 8, 20, 30, 40, 50]]
    written = make_engine(model).generate(texts, Sampling(max_tokens=12, temperature=0.0, repetition_penalty=1.5))
    for text, completion in zip(texts, written, strict=True):
        ids = list(text)
        for token in completion.token_ids:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[:, -1]
            assert token == hf.RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([ids]), logits).argmax()
            ids.append(token)


@ENGINES
def test_the_engine_draws_and_counts_alike(make_engine):
    """At temperature alone log-probabilities are the forward's; at 0 they are the plain softmax's."""
    model, texts = make("llama"), prompts()
    for temperature in (0.0, 1.7):
        sampling = Sampling(max_tokens=9, temperature=temperature, seed=5)
        for text, completion in zip(texts, make_engine(model).generate(texts, sampling), strict=True):
            wanted = by_forward(model, text, completion.token_ids, temperature or 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-4, rtol=0)
            if temperature == 0.0:
                assert completion.token_ids == by_generate(model, text, 9)


@ENGINES
def test_refusals_name_the_row_and_the_remedy(make_engine):
    engine = make_engine(make("qwen2"))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([[3], []], Sampling(max_tokens=9))
    with pytest.raises(ValueError, match=r"prompt 1 has 200 tokens.*lower max_tokens to 56"):
        engine.generate([[3], [3] * 200], Sampling(max_tokens=57))
    with pytest.raises(ValueError, match="2 seeds for 3 completions"):
        engine.generate([[3]], Sampling(max_tokens=9, num_generations=3, seed=[1, 2]))
    assert engine.generate([], Sampling()) == []


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 0}, {"num_generations": 0}, {"min_tokens": 300}, {"temperature": -1.0}, {"top_p": 0.0},
     {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"stop_strings": "abc"}, {"stop_strings": ("",)}],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError):
        Sampling(**wrong)


def test_a_writer_drops_what_comes_after_the_end():
    writer = Writer(Sampling(max_tokens=5, stop_ids=(9,)))
    writer.add([1, 2], [-0.1, -0.2])
    assert not writer.ended
    writer.add([9, 9, 4], [-0.3, -0.4, -0.5])
    writer.add([7], [-0.6])
    assert (
        writer.ended and writer.completion.token_ids == [1, 2, 9] and writer.completion.logprobs == [-0.1, -0.2, -0.3]
    )
