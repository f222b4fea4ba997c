"""A run whose completions are written from keys and values in 8 bits: it trains, resumes bit for bit, and is refused by
name where nobody has them."""

import pytest
from resume_cases import At, curve, make, same, undisturbed, weights
from transformers import AutoTokenizer

from nbhelpers.presets import WORKSHOP
from nbhelpers.training import identity

EIGHT = {"max_steps": 4, "save_steps": 2, "engine": "graph", "kv_bits": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tokenizer, tmp_path):
    wanted, losses = undisturbed(tokenizer, tmp_path / "whole", **EIGHT)
    stopped = make(tokenizer, tmp_path / "run", At(3, KeyboardInterrupt), **EIGHT)
    assert stopped.engine.kv_bits == 8
    stopped.train()
    # the ratio of trainer to sampler is TRL's to weigh: near 1, and no longer 1
    ratios = [log["sampling/importance_sampling_ratio/min"] for log in stopped.state.log_history if "loss" in log]
    assert all(0.5 < ratio < 0.99999 for ratio in ratios)
    other = make(tokenizer, tmp_path / "run", **{**EIGHT, "kv_bits": 16})
    with pytest.raises(identity.AnotherRun, match="kv_bits: 8 there, 16 here"):
        other.train(resume_from_checkpoint="auto")
    again = make(tokenizer, tmp_path / "run", **EIGHT)
    again.train(resume_from_checkpoint="auto")
    assert same(weights(again), wanted) and curve(again) == losses


@pytest.mark.parametrize("engine, changes", [(None, {}), ("auto", {"generation_kwargs": {"no_repeat_ngram_size": 3}})])
def test_trls_own_generation_has_none(tokenizer, tmp_path, engine, changes):
    with pytest.raises(ValueError, match="kv_bits=8 is an option of the graph engine, and TRL's own generation"):
        make(tokenizer, tmp_path, engine=engine, kv_bits=8, **changes)


def test_nor_has_transformers_generate(tokenizer, tmp_path):
    with pytest.raises(ValueError, match='kv_bits=8 is an option of the graph engine: take engine="graph"'):
        make(tokenizer, tmp_path, engine="hf", kv_bits=8)
