"""transformers' `generate` draws what we ask for, whatever the model's own generation_config says."""

import pytest
import torch
from engine_models import make, prompts
from transformers import GenerationConfig

from nbhelpers.engines import Sampling
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.hf import HFEngine

DRAWN = Sampling(max_tokens=12, num_generations=2, temperature=1.5, seed=1, stop_ids=(5, 7))
DEFAULTS = {
    "do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1,
    "repetition_penalty": 5.0, "encoder_repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "num_beams": 2,
    "max_length": 3, "max_new_tokens": 2, "min_length": 90, "min_new_tokens": 9, "max_time": 1e-9,
    "suppress_tokens": list(range(3, 90)), "begin_suppress_tokens": list(range(3, 90)),
    "bad_words_ids": [[i] for i in range(3, 90)], "sequence_bias": [[[4], 50.0]],
    "forced_bos_token_id": 4, "forced_eos_token_id": 4, "exponential_decay_length_penalty": [0, 9.0],
    "guidance_scale": 3.0, "stop_strings": ["a"], "num_return_sequences": 2, "return_dict_in_generate": True,
    "output_scores": True, "prompt_lookup_num_tokens": 3, "renormalize_logits": True, "remove_invalid_values": True,
    "eos_token_id": list(range(10, 97)), "pad_token_id": 9, "cache_implementation": "static", "token_healing": True,
}  # fmt: skip


def told(**defaults):
    """A generation_config as a hub model's file makes it: transformers checks nothing until `generate`."""
    config = GenerationConfig()
    for name, value in defaults.items():
        setattr(config, name, value)
    return config


@pytest.fixture(scope="module")
def plain():
    return HFEngine(make("qwen2", lora=False)).generate(prompts(3), DRAWN)


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_models_default_does_not_reach_the_draws(plain, name):
    model = make("qwen2", lora=False)
    model.generation_config = own = told(**{name: DEFAULTS[name]})
    assert HFEngine(model).generate(prompts(3), DRAWN) == plain
    assert model.generation_config is own and getattr(own, name) == DEFAULTS[name]


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_without_stop_ids_nothing_ends_a_text_before_its_limit(lora):
    """As in the graph engine, though the model declares end tokens."""
    model = make("llama", lora=lora)
    model.generation_config.eos_token_id = [5, 7, 9, 11, 13]
    sampling = Sampling(max_tokens=24, num_generations=2, temperature=1.5, seed=1)
    wanted = GraphEngine(model).generate(prompts(4), sampling)
    written = HFEngine(model).generate(prompts(4), sampling)
    assert any(set(completion.token_ids) & {5, 7, 9, 11, 13} for completion in written)
    for completion, other in zip(written, wanted, strict=True):
        assert (completion.token_ids, completion.reason) == (other.token_ids, "length")
        assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert len(completion.token_ids) == 24


def test_the_models_default_is_back_after_an_error():
    model = make("qwen2", lora=False)
    own = model.generation_config
    model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        HFEngine(model).generate([[3, 4]], DRAWN)
    assert model.generation_config is own


def test_a_default_on_pefts_wrapper_does_not_reach_the_draws_either():
    """peft's `generate` hands the wrapper's down to the model."""
    model = make("qwen2")
    wanted = HFEngine(model).generate(prompts(3), DRAWN)
    below = model.get_base_model().generation_config
    model.generation_config = own = told(suppress_tokens=list(range(3, 90)))
    assert HFEngine(model).generate(prompts(3), DRAWN) == wanted
    assert model.generation_config is own and model.get_base_model().generation_config is below


def test_after_a_generation_the_wrapper_still_shows_the_models_default():
    model = make("qwen2")
    HFEngine(model).generate([[3, 4]], DRAWN)
    model.get_base_model().generation_config = other = GenerationConfig(eos_token_id=3)
    assert model.generation_config is other and torch.is_grad_enabled()
