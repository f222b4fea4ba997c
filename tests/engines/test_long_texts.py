"""A long text goes in pieces as large as there is room for; what a prompt costs Python is counted."""

import sys
from collections import Counter

import pytest
import torch
from engine_models import make, prompts
from torch.utils._python_dispatch import TorchDispatchMode

from nbhelpers import kernels
from nbhelpers.engines import Sampling, kv_cache
from nbhelpers.engines import graph as graph_module
from nbhelpers.engines.base import Writer, inference
from nbhelpers.engines.cuda_graphs import ModelRunner
from nbhelpers.engines.forward import Decoder
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.kv_cache import KVCache
from nbhelpers.engines.scheduler import Request, Scheduler
from nbhelpers.memory import Room, kv, room

GREEDY = Sampling(max_tokens=8, temperature=0.0)
TOKEN = 4 * (2 * 128 + 4 * 64)  # bytes of a token's activations in engine_models' shape


def tokens(completions):
    return [completion.token_ids for completion in completions]


@pytest.fixture
def pieces(monkeypatch):
    """(texts, tokens of each) of what is computed at a time; 16 tokens are computed together without room."""
    seen, hidden = [], graph_module.Decoder.hidden

    def counted(self, ids, *rest):
        if ids.shape[1] > 1:
            seen.append(tuple(ids.shape))
        return hidden(self, ids, *rest)

    monkeypatch.setattr(graph_module.Decoder, "hidden", counted)
    monkeypatch.setattr(kv, "PREFILL_BYTES", 0)
    return seen


def give(monkeypatch, bytes_of_room):
    """As on a GPU with so many bytes for the pieces of a long text."""
    monkeypatch.setattr(Room, "for_long_text", lambda self: bytes_of_room)


@pytest.mark.parametrize("bits", [16, 8])
def test_with_free_memory_one_piece_and_else_several_of_the_same_tokens(bits, pieces, monkeypatch):
    model, texts = make("llama"), [list(range(3, 90)), [5, 6, 7], [8, 9]]
    engine = GraphEngine(model, kv_bits=bits)
    wanted = tokens(engine.generate(texts, GREEDY))
    assert pieces == 5 * [(1, 15)] + [(1, 12)] + [(2, 3)]  # 87 tokens in pieces of similar size
    engine._runner.cache.lower_right = True  # as on Ampere and newer
    for room_for, expected in ((0, pieces[:6]), (40, [(1, 29)] * 3), (86, [(1, 44), (1, 43)]), (87, [(1, 87)])):
        pieces.clear()
        give(monkeypatch, room_for * TOKEN)
        assert tokens(engine.generate(texts, GREEDY)) == wanted
        assert pieces == [*expected, (2, 3)]  # short ones as ever


def test_no_larger_piece_where_it_would_need_a_larger_mask(pieces, monkeypatch):
    """A card before Ampere takes the whole text or small pieces; a window shorter than the text always masks."""
    give(monkeypatch, 86 * TOKEN)
    text = [list(range(3, 90))]
    GraphEngine(make("llama")).generate(text, GREEDY)
    assert max(pieces) == (1, 15)
    give(monkeypatch, 87 * TOKEN)
    pieces.clear()
    GraphEngine(make("llama")).generate(text, GREEDY)
    assert pieces == [(1, 87)]
    pieces.clear()
    GraphEngine(make("mistral")).generate(text, GREEDY)
    assert max(pieces) == (1, 15)


def test_a_piece_that_does_not_fit_makes_pieces_smaller_and_nothing_else(pieces, monkeypatch):
    model, texts = make("qwen2"), [list(range(3, 90)), [5, 6, 7]]
    engine = GraphEngine(model)
    wanted = tokens(engine.generate(texts, GREEDY))
    small, allocate, stages = pieces[:], KVCache.allocate, []
    attend = kv_cache.kernels.rope

    def full(q, *rest):
        if q.shape[2] > 16:
            raise torch.OutOfMemoryError
        return attend(q, *rest)

    monkeypatch.setattr(KVCache, "allocate", lambda self, *args: stages.append(args) or allocate(self, *args))
    monkeypatch.setattr(kernels, "rope", full)
    give(monkeypatch, 1e9)
    pieces.clear()
    assert tokens(engine.generate(texts, GREEDY)) == wanted
    assert pieces == [(1, 87), *small]
    assert stages[0] == stages[1] and len(stages) == 2  # the same rows, slots and bytes for keys and values


def test_room_is_what_is_free_beyond_what_generation_may_need(monkeypatch):
    assert room.long_text_budget(0.5e9) == room.long_text_budget(room.BESIDE_BYTES) == 0
    assert 0 < room.long_text_budget(10e9) < 10e9 - room.BESIDE_BYTES
    assert Room(torch.device("cpu")).for_long_text() == 0  # nothing is counted there
    monkeypatch.setattr(Room, "_left", lambda self: (40e9, 10e9))
    assert Room(torch.device("cuda")).for_long_text() == room.long_text_budget(10e9)


def test_rows_that_are_evenly_spaced_are_views():
    cache = KVCache(Decoder(make("llama")))
    for rows, wanted in (([3], slice(3, 4, 1)), ([2, 3, 4], slice(2, 5, 1)), ([0, 8, 16], slice(0, 17, 8))):
        assert cache._place(rows) == wanted
        assert torch.arange(20)[wanted].tolist() == rows
    for rows in ([4, 3], [0, 1, 3], [5, 2, 9]):
        assert cache._place(rows).tolist() == rows
    cache.allocate(5, 32, 10**9)
    keys, _ = cache._read(1, cache._place([1, 3]), slice(None), 7, None, 8)
    assert keys.untyped_storage().data_ptr() == cache.data.untyped_storage().data_ptr()


# ---- counted, not timed: on a fast card short prompts wait for Python ----


class Calls(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(layers: int, monkeypatch) -> tuple[Counter, Counter]:
    """Launches of kernels, and torch's operations, of a prompt of two texts through so many layers."""
    plain = {"attention_bias": False, "mlp_bias": False}
    launches, jit = Counter(), pytest.importorskip("triton").runtime.jit.JITFunction
    monkeypatch.setattr(jit, "run", lambda fn, *_, **how: launches.update([fn.__name__]))
    with kernels.use("triton"), inference(model := make("llama", four_bit=True, layers=layers, **plain)):
        cache = KVCache(decoder := Decoder(model))
        cache.allocate(2, 32, 10**9)
        cache.shared_heads = True  # as on Ampere and newer
        runner = ModelRunner(decoder, cache, 2)
        runner.prepare(decoder, GREEDY)
        texts = prompts(n=2, longest=12)
        scheduler = Scheduler(runner, [Request(text, 1, Writer(GREEDY)) for text in texts], GREEDY)
        scheduler._prefill(texts, [0, 1])  # the table of adapters
        launches.clear()
        with Calls() as calls:
            scheduler._prefill(texts, [0, 1])
    return launches, calls.made


def test_what_a_layer_of_a_prompt_costs(monkeypatch):
    pytest.importorskip("bitsandbytes")
    if kernels.triton is None or "triton.runtime.interpreter" in sys.modules:
        pytest.skip("counts what Triton would launch")
    (launches, calls), (more, most) = counted(1, monkeypatch), counted(4, monkeypatch)
    each = {name: (more[name] - launches[name]) / 3 for name in more if more[name] != launches[name]}
    assert each == {"_stack_layer": 1, "_dequantize_group": 2, "_dequantize_kernel": 2, "_forward": 3, "_rotate": 1}
    per_layer = Counter({name: (most[name] - calls[name]) / 3 for name in most})
    assert (per_layer["mm"] + per_layer["addmm"], per_layer["addmm_"]) == (8, 4)  # thin products, and wide ones
    print(per_layer)
    assert per_layer.total() <= 70
