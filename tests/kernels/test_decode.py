"""The decoding kernels against plain torch, in Triton's interpreter; `check_on` runs the same on a GPU."""

from importlib import import_module

import interpreter  # first: before anything that imports triton
import numpy as np
import ptx
import pytest
import torch

from nbhelpers import kernels
from nbhelpers.kernels import EightBits, HeadNorms, Projection, decode_step, eight_bits


def attention_case(
    rows,
    heads,
    kv_heads,
    dim,
    positions,
    window=None,
    dtype=torch.float32,
    device="cpu",
    layer=1,
    rotary=None,
    norms=False,
    bits=16,
    bias=False,
    length=48,
):
    """The arguments, with more rows in the cache than in the batch. bits=8: in int8, with angles of a real rope;
    bias: and k has one that is far larger than what is beside it in two channels of each head."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 2, rows + 1, kv_heads, length, dim, generator=generator).to(device, dtype)
    # as a projection leaves them: [B, 1, heads * D] seen as [B, heads, 1, D]
    q, k, v = (
        torch.randn(rows, 1, n * dim, generator=generator).to(device, dtype).unflatten(-1, (n, dim)).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    angles = torch.rand(rows, 1, (rotary or dim) // 2, generator=generator).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    positions, eight, addresses = torch.tensor(positions, device=device), None, [0, 0]
    if bits == 8:
        half = (rotary or dim) // 2
        angles = (torch.arange(length)[:, None] * 10 ** (-3 * torch.arange(half) / half)).repeat(1, 2)  # [length, R]
        every = [t.to(device, dtype) for t in (angles.cos(), angles.sin())]
        cos, sin = (t[positions][:, None] for t in every)
        cache, scales = eight_bits.quantise(cache)
        offset = None
        if bias:
            offset = torch.randn(kv_heads, dim, generator=generator)
            offset[:, [1, dim // 2]] *= 100
            offset = offset.to(device, dtype)
            k = k + offset[:, None]
        eight = EightBits(scales, eight_bits.angles_of(*every, dim), offset)
        addresses = [eight.scales.data_ptr(), eight.angles.data_ptr()]
    strides = cache.stride()
    table = torch.tensor([cache.data_ptr(), strides[0], strides[2], strides[3], *addresses], device=device)
    weights = [(torch.randn(dim, generator=generator) + 1).to(device, dtype) for _ in range(2)]
    head_norms = HeadNorms(*weights, 1e-6) if norms else None
    longest = int(positions.max()) + 1
    return (q, k, v, cos, sin, cache, table, layer, positions, longest, dim**-0.5, window, head_norms, eight)


def check_attention(tolerance=1e-5, **case):
    ours, truth = attention_case(**case), attention_case(**case)
    with kernels.use("triton"):
        got = decode_step.decode_attention(*ours)
    with kernels.use("torch"):
        wanted = decode_step.decode_attention(*truth)
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    # the cache: K and V of the new token at its place, and nothing else
    if ours[-1] is None:
        torch.testing.assert_close(ours[5], truth[5], atol=tolerance, rtol=tolerance)
    else:  # what lies between two steps may be rounded to either
        assert (ours[5].int() - truth[5].int()).abs().max() <= 1
        torch.testing.assert_close(ours[-1].scales, truth[-1].scales, atol=0, rtol=max(tolerance, 1e-5))
    assert ((ours[5] != attention_case(**case)[5]).sum((-2, -1)) <= case["dim"]).all()


CASES = [
    {"rows": 3, "heads": 6, "kv_heads": 2, "dim": 16, "positions": [0, 17, 40]},
    {"rows": 2, "heads": 4, "kv_heads": 4, "dim": 24, "positions": [5, 33], "rotary": 16},
    {"rows": 3, "heads": 8, "kv_heads": 1, "dim": 32, "positions": [47, 3, 16], "window": 7},
    {"rows": 3, "heads": 4, "kv_heads": 2, "dim": 16, "positions": [0, 17, 40], "norms": True},
    {"rows": 2, "heads": 6, "kv_heads": 2, "dim": 24, "positions": [5, 33], "norms": True, "rotary": 16},
    {"rows": 1, "heads": 2, "kv_heads": 1, "dim": 64, "positions": [30], "window": 100, "layer": 0},
    {"rows": 2, "heads": 4, "kv_heads": 2, "dim": 16, "positions": [9, 21], "dtype": torch.float16, "tolerance": 2e-3},
]
IN_8_BITS = [
    {"rows": 3, "heads": 6, "kv_heads": 2, "dim": 16, "positions": [0, 17, 40], "bits": 8},
    {"rows": 3, "heads": 4, "kv_heads": 2, "dim": 16, "positions": [0, 17, 40], "bits": 8, "norms": True},
    {"rows": 3, "heads": 6, "kv_heads": 2, "dim": 16, "positions": [0, 17, 40], "bits": 8, "bias": True,
     "tolerance": 1e-4},
    {"rows": 2, "heads": 4, "kv_heads": 2, "dim": 24, "positions": [5, 33], "rotary": 16, "bits": 8, "bias": True,
     "window": 9, "layer": 0, "tolerance": 1e-4},
    {"rows": 2, "heads": 4, "kv_heads": 2, "dim": 16, "positions": [9, 21], "dtype": torch.float16, "bits": 8,
     "tolerance": 2e-3},
    {"rows": 2, "heads": 24, "kv_heads": 1, "dim": 24, "positions": [0, 33], "dtype": torch.float16, "bits": 8,
     "rotary": 16, "window": 20, "tolerance": 2e-3},
    {"rows": 2, "heads": 6, "kv_heads": 2, "dim": 32, "positions": [5, 40], "dtype": torch.float16, "bits": 8,
     "bias": True, "tolerance": 1e-2},
]  # fmt: skip
LONG = {"rows": 2, "heads": 6, "kv_heads": 1, "dim": 16, "positions": [590, 9], "length": 600, "tolerance": 1e-4}


@pytest.fixture(params=[False, True], ids=["sums", "dot"])
def dot(request, monkeypatch):
    """With tl.dot, as from Ampere on, or without."""
    for name in ("decode_attention", "decode_linear", "nf4_few_rows", "plain_few_rows"):
        module = import_module(f"nbhelpers.kernels.triton.{name}")  # the package has functions of the first two names
        monkeypatch.setattr(module, "tensor_cores", lambda device: request.param)
    return request.param


class TestAttention:
    __test__ = interpreter.ON

    @pytest.mark.parametrize("splits", [1, 4])
    @pytest.mark.parametrize("case", CASES + IN_8_BITS, ids=str)
    def test_equals_torch(self, case, splits, dot, monkeypatch):
        module = import_module("nbhelpers.kernels.triton.decode_attention")
        monkeypatch.setattr(module, "attention_splits", lambda *_: splits)
        monkeypatch.setattr(module, "TILE", 1024)  # several blocks a split
        monkeypatch.setattr(module, "BLOCK", 16)
        with ptx.emulated():
            check_attention(**case)

    @pytest.mark.parametrize("splits, bits, bias, window", [(32, 16, False, None), (64, 8, False, 400),
                                                            (32, 8, True, None), (64, 8, True, 400)])  # fmt: skip
    def test_a_long_text_in_many_splits_equals_torch(self, splits, bits, bias, window, dot, monkeypatch):
        self.test_equals_torch(LONG | {"bits": bits, "bias": bias, "window": window}, splits, dot, monkeypatch)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_each_pair_of_int8_numbers_is_unpacked_exactly(kind):
    module = pytest.importorskip("nbhelpers.kernels.triton.decode_attention")
    words = np.random.default_rng(0).permutation(2**16).astype(np.uint32)
    words |= words[::-1] << np.uint32(16)  # two pairs each
    unpacked = ptx.run({"bf16": module.TO_BF16, "fp16": module.TO_FP16}[kind].value, [words], 2)
    numbers = words.view(np.int8).reshape(-1, 2, 2)  # [word, position, channel]
    for channel, halves in enumerate(unpacked):
        got = halves.view(np.uint16 if kind == "bf16" else np.float16).reshape(-1, 2)
        got = (got.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else got
        assert np.array_equal(got, numbers[:, :, channel])


# (counter, word) at seed 123456789 whose hash is one of the 64 largest of 2^31: u would be rounded to 1, and E infinite
LARGEST_HASH = [(24452608, 7), (51, 107406), (54, 87677), (396, 129736), (423, 57220)]


def check_the_only_word(words=160_000):
    """The word that is alone, by a filter or by certainty, is drawn and has all of the probability."""
    counters, only = torch.tensor(LARGEST_HASH).unbind(1)
    for others in (float("-inf"), -1000.0):  # ruled out, and too unlikely for fp32
        logits = torch.full((len(only), words), others).scatter_(1, only[:, None], 0.0)
        token, logp = kernels.draw(logits, torch.full_like(only, 123456789), counters)
        assert torch.equal(token, only) and torch.equal(logp, torch.zeros(len(only)))


def test_the_only_word_is_drawn_whatever_its_number():
    check_the_only_word()


class TestDraw:
    __test__ = interpreter.ON

    def test_the_only_word_is_drawn_whatever_its_number(self):
        with kernels.use("triton"):
            check_the_only_word()

    @pytest.mark.parametrize("words", [37, 5000])
    def test_of_nan_a_word_of_the_vocabulary(self, words):
        """The next step reads its embedding, whatever the model has become."""
        logits = torch.full((3, words), float("nan"))
        logits[1, : words // 2] = 0.0
        with kernels.use("triton"):
            token, logp = kernels.draw(logits, torch.arange(3), torch.arange(3))
        assert token.min() >= 0 and token.max() < words and logp.isnan().all()

    @pytest.mark.parametrize("words", [37, 5000])
    def test_the_same_words_as_torch(self, words):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(20, words + 3, generator=generator)[:, :words] * 3
        logits[:, 5] = float("-inf")
        logits[3, : words - 1] = float("-inf")
        seeds, counters = torch.randint(2**62, (20,), generator=generator), torch.arange(20) * 7
        with kernels.use("triton"):
            token, logp = kernels.draw(logits, seeds, counters)
        wanted, wanted_logp = kernels.draw(logits, seeds, counters)
        assert torch.equal(token, wanted) and len(set(token.tolist())) > 10
        torch.testing.assert_close(logp, wanted_logp, atol=2e-5, rtol=1e-5)


def projections(rank, width, outs, dtype=torch.float32, nf4=False, bias=True, device="cpu"):
    generator = torch.Generator().manual_seed(2)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(device)

    parts = []
    for out in outs:
        weight, state = make(out, width).to(dtype), None
        if nf4:
            functional = pytest.importorskip("bitsandbytes").functional
            weight, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        lora = {"lora_a": make(rank, width), "lora_b": make(out, rank), "scale": 0.5} if rank else {}
        parts.append(Projection(weight, state, make(out).to(dtype) if bias else None, **lora))
    return tuple(parts)


class TestLinear:
    __test__ = interpreter.ON

    @pytest.mark.parametrize("rows", [1, 40])
    def test_logits_are_not_rounded_to_16_bits(self, rows, dot):
        """On tensor cores; without them by the CPU's own product, and they are."""
        generator = torch.Generator().manual_seed(rows)
        x, weight = (torch.randn(n, 64, generator=generator).half() for n in (rows, 150))
        with kernels.use("triton"):
            logits = decode_step.decode_head(x, weight)
        exact = x.float() @ weight.float().t()
        assert logits.dtype == torch.float32 and logits.shape == (rows, 150)
        torch.testing.assert_close(logits, exact, atol=1e-5 if dot else 0.02, rtol=0)

    @pytest.mark.parametrize("rows", [1, 19])
    @pytest.mark.parametrize("rank, width, outs", [(4, 40, (50,)), (3, 300, (130, 20)), (16, 520, (200, 24, 24))])
    @pytest.mark.parametrize("kind", ["plain", "plain fused", "nf4", "nf4 fused", "mixed", "two plain"])
    def test_equals_torch(self, rows, rank, width, outs, kind, dot, monkeypatch):
        few = (rows == 1) == (len(outs) == 1) if kind != "two plain" else rows == 1 and len(outs) == 3
        if kind in ("plain fused", "mixed", "two plain") and not (dot and few):
            pytest.skip("products by tl.dot alone, and few of them: the interpreter is slow")
        if kind != "plain":
            width, outs = 64 * (width // 64 + 1), tuple(out + out % 2 for out in outs)
        nf4, dense = (import_module(f"nbhelpers.kernels.triton.{name}_few_rows") for name in ("nf4", "plain"))
        if kind not in ("plain", "nf4"):  # as with 16-bit x on a card
            monkeypatch.setattr(nf4, "serves", nf4.fits)
            monkeypatch.setattr(dense, "suits", lambda x: True)
            monkeypatch.setattr(dense, "serves", dense.fits)
            monkeypatch.setattr(dense, "tile", lambda rows: dense.Tile(16, 32, 64, 1, 4, 1))  # several blocks of rows
            for module in (nf4, dense):
                monkeypatch.setattr(module, "splits_for", lambda *_: 2)
            monkeypatch.delattr(import_module("nbhelpers.kernels.triton.decode_linear"), "project")
        parts, x = projections(rank, width, outs, nf4="nf4" in kind), torch.randn(rows, 1, width)
        packed = projections(rank, width, outs, nf4=True)
        if kind == "mixed":  # the plain one, without a LoRA, is not the last
            parts = (packed[0], parts[0]._replace(lora_a=None, lora_b=None), *packed[1:2])
        if kind == "two plain":
            parts = (parts[0], packed[1], parts[2])
        with kernels.use("triton"):
            got = decode_step.decode_linear(x, parts)
        for ours, wanted in zip(got, decode_step.decode_linear(x, parts), strict=True):
            assert ours.shape == wanted.shape
            torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-4)

    @pytest.mark.parametrize("ranks", [(4, 4), (5, 0), (0, 3), (0, 0)], ids=str)
    @pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_the_mlp_equals_torch(self, dtype, packed, ranks, dot):
        hidden, wide = 36, 150
        gate_up = projections(ranks[0], hidden, (2 * wide,) if packed else (wide, wide), dtype)
        (down,) = projections(ranks[1], wide, (hidden,), dtype)
        x, residual = torch.randn(2, 9, 1, hidden, generator=torch.Generator().manual_seed(3)).to(dtype)
        arguments = (x * 0.3, gate_up, down, residual, (torch.rand(hidden).to(dtype), 1e-5))
        with kernels.use("triton"):
            got = decode_step.decode_mlp(*arguments)
        for ours, wanted, most in zip(got, decode_step.decode_mlp(*arguments), (1.0, 0.02), strict=True):
            assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
            close = {"atol": 1e-3, "rtol": 1e-4} if dtype == torch.float32 else {"atol": most, "rtol": 2e-2}
            torch.testing.assert_close(ours, wanted, **close)

    @pytest.mark.parametrize("rows", [1, 3, 17])
    @pytest.mark.parametrize("rank, width", [(0, 40), (5, 40), (3, 2100), (20, 1100)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_the_output_with_its_norm_equals_torch(self, rows, rank, width, dtype, dot):
        """2,100 columns are too many for one program, 20 ranks beside 1,100 too, and 17 rows for a program each."""
        (part,) = projections(rank, 24, (width,), dtype, bias=rank != 5)
        x, generator = torch.randn(rows, 1, 24).to(dtype), torch.Generator().manual_seed(1)
        residual = torch.randn(rows, 1, width, generator=generator).to(dtype)
        arguments = (x, part, residual, (torch.rand(width, generator=generator).to(dtype), 1e-5))
        with kernels.use("triton"):
            got = decode_step.decode_out(*arguments)
        for ours, wanted in zip(got, decode_step.decode_out(*arguments), strict=True):
            assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
            close = {"atol": 1e-3, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 1e-2}
            torch.testing.assert_close(ours, wanted, **close)

    def test_fp16_saturates_where_it_would_overflow(self):
        gate_up, (down,) = projections(2, 16, (32, 32), torch.float16), projections(2, 32, (16,), torch.float16)
        x = torch.full((2, 1, 16), 90.0, dtype=torch.float16)
        with kernels.use("triton"):
            got, _ = decode_step.decode_mlp(x, gate_up, down, torch.zeros_like(x), (torch.ones(16).half(), 1e-5))
        assert got.isfinite().all() and got.abs().max() == 65504.0

    def test_a_group_where_only_some_have_a_lora(self):
        parts, x = projections(4, 40, (50, 20)), torch.randn(3, 1, 40)
        parts = (parts[0], parts[1]._replace(lora_a=None, lora_b=None))
        with kernels.use("triton"):
            got = decode_step.decode_linear(x, parts)
        for ours, wanted in zip(got, decode_step.decode_linear(x, parts), strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-4)


def test_torch_attention_equals_the_whole_softmax():
    """The reference itself: one row at a time, by the formula."""
    for case in CASES[:4]:
        arguments = attention_case(**{k: v for k, v in case.items() if k != "tolerance"})
        q, k, v, cos, sin, cache, _, layer, positions, _, scale, window, norms, _ = arguments
        q, k = kernels.rope(q, k, cos, sin, norms)
        before = cache.clone()
        got = decode_step.decode_attention(*arguments)
        for row, position in enumerate(positions.tolist()):
            first = 0 if window is None else max(0, position - window + 1)
            keys, values = (
                torch.cat((before[layer, i, row, :, first:position], new[row]), dim=1) for i, new in ((0, k), (1, v))
            )
            group = q.shape[1] // keys.shape[0]
            for head in range(q.shape[1]):
                weights = (keys[head // group] @ q[row, head, 0] * scale).softmax(0)
                part = got[row, 0].view(q.shape[1], -1)[head]
                torch.testing.assert_close(part, weights @ values[head // group], atol=1e-5, rtol=1e-5)


def test_in_the_interpreter():
    interpreter.run(__file__)
