"""The beginning and the end of a decoding step against plain torch, bit for bit, in Triton's interpreter; `check_begin`
and `check_end` run the same on a GPU."""

from importlib import import_module

import interpreter  # first: before anything that imports triton
import pytest
import torch
import torch.nn.functional as F
from engine_models import ARCHITECTURES, make

from nbhelpers import kernels
from nbhelpers.engines import kv_cache
from nbhelpers.engines.forward import Decoder
from nbhelpers.engines.kv_cache import KVCache
from nbhelpers.kernels import decode_step
from nbhelpers.kernels.decode_step import LEFT, POSITION, SEED, TOKEN, WRITTEN, Rows

STEPS = 3
LEFTS = [0, 1, 2, 5]  # of rows that have ended or are empty, that end now, and that go on


def some_rows(count, stops, vocabulary, tick=0, device="cpu"):
    """In buffers that are wider than the batch, as an engine's are."""
    generator = torch.Generator().manual_seed(count)
    state = torch.stack(
        [torch.randint(high, (count + 3,), generator=generator) for high in (vocabulary, 40, 2**62, 20, 9)]
    )
    state[LEFT] = torch.tensor(LEFTS * count)[: count + 3]
    tokens, logprobs = torch.zeros(STEPS, count + 3, dtype=torch.int64), torch.zeros(STEPS, count + 3)
    stops, ticks = torch.tensor(stops, dtype=torch.int64), torch.tensor([tick])
    state, stops, ticks, tokens, logprobs = (t.to(device) for t in (state, stops, ticks, tokens, logprobs))
    return Rows(state[:, :count], stops, ticks, tokens[:, :count], logprobs[:, :count])


def same(ours: Rows, theirs: Rows):
    """Past the batch too."""
    for a, b in zip(ours, theirs, strict=True):
        a, b = (t if t._base is None else t._base for t in (a, b))
        assert torch.equal(a, b)


def check_begin(hidden, dtype, name="phi3", device="cpu"):
    decoder = Decoder(make(name, dtype=dtype, device=device))  # Phi3's: half of each head is rotated
    cache = KVCache(decoder)
    cache.allocate(2, 48, 10**9)
    weight = torch.randn(97, hidden, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    results = []
    for backend in ("triton", "torch"):
        rows = some_rows(5, (), 97, tick=1, device=device)
        with kernels.use(backend):
            x, tables = cache.embed(rows, weight)
        results.append((x, *tables, rows.tick))
    for ours, wanted in zip(*results, strict=True):
        assert ours.dtype == wanted.dtype and ours.shape == wanted.shape and torch.equal(ours, wanted)
    assert results[0][-1].item() == 2


def check_end(count, words, temperature, stops, device="cpu"):
    """In a chain of steps; the winner is `draw`'s, from logits that were divided before."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs, chosen = (some_rows(count, stops, words, device=device) for _ in range(3))
    for _ in range(STEPS):
        logits = (torch.randn(count, words + 3, generator=generator) * 3)[:, :words].to(device)
        before = ours.state.clone()
        for rows in (ours, theirs, chosen):
            rows.tick.add_(1)  # `embed` has done that
        with kernels.use("triton"):
            divided = logits / torch.tensor(float(temperature), device=device)
            drawn = kernels.draw(divided, before[SEED], before[WRITTEN])
            decode_step.append_drawn(ours, logits, temperature)
            decode_step.append(chosen, *drawn)
        with kernels.use("torch"):
            decode_step.append(theirs, *drawn)
        same(ours, theirs)
        same(chosen, theirs)
        assert ours.tokens[ours.tick - 1][0].tolist() == drawn[0].tolist()
    assert theirs.logprobs.abs().min() > 0 and len(set(theirs.tokens.flatten().tolist())) > 3


class TestAStep:
    __test__ = interpreter.ON

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("hidden", [40, 2100])  # in one piece, in three
    def test_begins_as_in_torch(self, hidden, dtype):
        check_begin(hidden, dtype)

    @pytest.mark.parametrize("stops", [(), (5,), tuple(range(0, 4500, 30))], ids=len)
    @pytest.mark.parametrize("temperature", [1.0, 0.7, 2])
    @pytest.mark.parametrize("words", [37, 5000])
    def test_ends_as_in_torch(self, words, temperature, stops):
        check_end(9, words, temperature, stops)


@pytest.mark.parametrize("drawn", [True, False])
def test_the_end_of_a_step_in_torch_row_by_row(drawn):
    rows, words = some_rows(12, (3, 8), 11), 11
    before = rows.state.tolist()
    logits = torch.randn(12, words, generator=torch.Generator().manual_seed(2))
    token, logp = kernels.draw(logits / 0.7, rows.state[SEED], rows.state[WRITTEN])
    rows.tick.fill_(2)
    if drawn:
        decode_step.append_drawn(rows, logits, 0.7)
    else:
        decode_step.append(rows, token, logp)
    assert torch.equal(rows.tokens[1], token) and torch.equal(rows.logprobs[1], logp)
    assert not rows.tokens[[0, 2]].any() and not rows.logprobs[[0, 2]].any() and rows.tick.item() == 2
    ended = set()
    for row, new in enumerate(token.tolist()):
        old, position, seed, written, left = (before[i][row] for i in (TOKEN, POSITION, SEED, WRITTEN, LEFT))
        wanted = [old, position, seed, written, 0]
        if left:
            wanted = [new, position + 1, seed, written + 1, 0 if new in (3, 8) else left - 1]
        ended.add((left > 1, new in (3, 8)))
        assert rows.state[:, row].tolist() == wanted
    assert len(ended) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_is_rotated_by_what_the_models_own_module_says(name, dtype, monkeypatch):
    """Bit for bit, made in pieces or not, at the last position too."""
    decoder = Decoder(make(name, dtype=dtype))
    cache, rows = KVCache(decoder), some_rows(6, (), 97)
    rows.state[POSITION] = torch.tensor([0, 1, 18, 19, 40, 63])
    x = F.embedding(rows.state[TOKEN, :, None], decoder.embedding)
    wanted = decoder.rotary(x, rows.state[POSITION, :, None])
    for piece in (kv_cache.PIECE, 19):
        monkeypatch.setattr(kv_cache, "PIECE", piece)
        cache.allocate(2, 64, 10**9)
        assert cache.angles.dtype == dtype and cache.table[5] == cache.angles.data_ptr()
        got, tables = cache.embed(rows, decoder.embedding)
        for ours, theirs in zip((got, *tables), (x, *wanted), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    cache.free()
    assert cache.angles is None


def test_few_rows_of_long_texts_are_cut_into_more_parts(monkeypatch):
    """(rows, heads, key heads, positions): those that were timed on an H100, and around where the number changes."""
    splits = {
        (1, 12, 2, 20_000): 32, (2, 12, 2, 20_000): 32, (1, 12, 2, 131_000): 64, (1, 32, 8, 131_000): 64,
        (2, 32, 8, 20_000): 32, (8, 12, 2, 20_000): 16, (8, 12, 2, 456): 8, (8, 12, 2, 1025): 16,
        (8, 32, 8, 456): 8, (1, 32, 8, 456): 16, (1, 12, 2, 16_384): 16, (1, 12, 2, 16_385): 32,
        (1, 12, 2, 32_769): 64, (4, 32, 8, 131_000): 16, (128, 12, 2, 20_000): 2, (128, 32, 8, 20_000): 1,
    }  # fmt: skip
    x = torch.zeros(1)
    if kernels.triton is not None:
        attention = import_module("nbhelpers.kernels.triton.decode_attention")
        monkeypatch.setattr(attention, "tensor_cores", lambda device: True)
        with kernels.use("triton"):
            assert {case: decode_step.attention_splits(x, *case) for case in splits} == splits
    assert decode_step.attention_splits(x, 1, 12, 2, 131_000) == 1


def test_in_the_interpreter():
    interpreter.run(__file__)


def test_the_parts_are_a_power_of_two_and_have_counters():
    """Of any number of rows: a batch may have as many as fit. Heads of the presets, and a single key head."""
    pytest.importorskip("triton")
    module, device = import_module("nbhelpers.kernels.triton.decode_attention"), torch.device("cpu")
    for cores in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "tensor_cores", lambda device, cores=cores: cores)
            for heads, kv_heads in ((12, 2), (14, 2), (16, 2), (28, 4), (32, 8), (40, 10), (8, 1)):
                parts = {
                    (rows, longest): module.attention_splits(device, rows, heads, kv_heads, longest)
                    for rows in range(1, 257) for longest in (456, 1025, 16_385, 32_769, 131_000)
                }  # fmt: skip
                assert all(n & (n - 1) == 0 and 1 <= n <= 64 for n in parts.values())
                assert max(rows * kv_heads for (rows, _), n in parts.items() if n > 1) < len(module.counters(device))
