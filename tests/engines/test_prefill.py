"""A prompt is computed in little memory: what of it is held, and later pieces of a long one without a mask."""

import weakref

import torch
from engine_models import make, prompts
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from nbhelpers import kernels
from nbhelpers.engines import Sampling, kv_cache
from nbhelpers.engines.forward import Decoder
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.memory import kv

GREEDY = Sampling(max_tokens=24, temperature=0.0)


def tokens(completions):
    return [completion.token_ids for completion in completions]


def test_what_attention_read_is_gone_when_the_mlp_begins(monkeypatch):
    # 0.1 GB at 8 prompts of Llama-8B: with q, k and v between them the MLP's tensors took new blocks
    attended, looked, mlp = [], [], kernels.lora_mlp

    def attend(i, layer, q, k, v, tables):
        attended[:] = map(weakref.ref, (q, k, v))
        return q.transpose(1, 2).flatten(2)

    def watched(*args, **how):
        looked.append([one() for one in attended])
        return mlp(*args, **how)

    monkeypatch.setattr(kernels, "lora_mlp", watched)
    decoder = Decoder(make("qwen3"))
    with torch.no_grad():
        decoder.hidden(torch.zeros(2, 3, dtype=torch.long), torch.arange(3)[None], attend)
    assert looked == [[None] * 3] * 2


def test_later_pieces_of_a_long_prompt_without_a_mask_in_memory(monkeypatch):
    """As on Ampere and newer; a sliding window keeps its mask."""
    made = []

    def counted(*size):
        made.append(size)
        return causal_lower_right(*size)

    monkeypatch.setattr(kv_cache, "causal_lower_right", counted)
    monkeypatch.setattr(kv, "PREFILL_BYTES", 0)  # 16 tokens at once
    texts = prompts(n=3, longest=60, seed=3)
    for name in ("llama", "mistral"):
        engine = GraphEngine(make(name))
        wanted = engine.generate(texts, GREEDY)
        assert not made
        engine._runner.cache.lower_right = True
        got = engine.generate(texts, GREEDY)
        assert tokens(got) == tokens(wanted)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)
        assert max(end for _, end in made) > 32 if name == "llama" else not made
        made.clear()


def test_the_lower_right_corner_is_tried_before_it_is_relied_upon(monkeypatch):
    for dtype in (torch.bfloat16, torch.float16):
        assert kv_cache.lower_right.__wrapped__(torch.device("cpu"), dtype)
    monkeypatch.setattr(kv_cache, "causal_lower_right", causal_upper_left)  # what another torch might make of it
    assert not kv_cache.lower_right.__wrapped__(torch.device("cpu"), torch.bfloat16)


def test_the_corner_is_tried_for_a_text_in_pieces_alone(monkeypatch):
    """A first token does not wait for it."""
    tried = []
    monkeypatch.setattr(kv_cache, "capability", lambda device: (9, 0))
    monkeypatch.setattr(kv_cache, "lower_right", lambda device, dtype: tried.append(dtype) or True)
    engine = GraphEngine(make("llama", dtype=torch.bfloat16))
    engine.generate(prompts(), GREEDY)
    assert not tried
    monkeypatch.setattr(kv, "PREFILL_BYTES", 0)  # 16 tokens at once
    engine.generate([list(range(3, 43))], GREEDY)
    assert tried == [torch.bfloat16]
