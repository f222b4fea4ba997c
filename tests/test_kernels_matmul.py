"""The kernels around matrix products: references by gradcheck and against bitsandbytes, Triton's against those."""

import importlib.util
import sys

import interpreter  # first: before anything that imports triton
import pytest
import torch
import torch.nn.functional as F

from nbhelpers import kernels
from nbhelpers.kernels import Projection, reference

no_triton = importlib.util.find_spec("triton") is None
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
# hidden and intermediate sizes of Qwen2.5-1.5B, Llama-3.1-8B and Phi-4, cut by 64, and primes
SIZES = [(24, 140), (64, 224), (80, 280), (13, 29)]
ROWS = [1, 7, 12]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def nf4(weight, nested=True):
    """(packed, quant_state) of a weight, by bitsandbytes."""
    functional = pytest.importorskip("bitsandbytes").functional
    return functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=nested)


def layer(inputs, outputs, dtype=torch.float32, r=3, quantised=False, bias=True, lora=True, master=None):
    """A random frozen layer with a LoRA whose B is not zero."""
    weight = torch.randn(outputs, inputs, dtype=torch.float64).mul_(inputs**-0.5).to(dtype)
    weight, state = nf4(weight) if quantised else (weight, None)
    a = torch.randn(r, inputs).mul_(inputs**-0.5).to(master or dtype).requires_grad_() if lora else None
    b = torch.randn(outputs, r).mul_(0.3).to(master or dtype).requires_grad_() if lora else None
    return Projection(weight, state, torch.randn(outputs).to(dtype) if bias else None, a, b, 0.7)


def run(backend, function, x, parts, *rest):
    """Outputs, and gradients of x and of every A and B, of one backend."""
    leaf = x.detach().clone().requires_grad_()
    with kernels.use(backend):
        out = function(leaf * 1.0, *rest)
    outs = out if isinstance(out, tuple) else (out,)
    loss = sum((y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum() for y in outs)
    loras = [t for p in parts for t in (p.lora_a, p.lora_b) if t is not None]
    return [*outs, *torch.autograd.grad(loss, [leaf, *loras])]


def same(got, wanted, tolerance):
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-6)
        assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}"


def keeping(kept):
    """What autograd keeps for the backward is also put into the list `kept`."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)


TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}


# ------------------------------------------------------------------------------------------------- the references


# bitsandbytes 0.50's own CPU dequantisation is wrong where a row is not a whole number of blocks (its GPU one is not),
# so it is the judge of whole blocks; of the others, the weight that went in
WHOLE_BLOCKS = [(1, 64), (7, 64), (31, 128), (280, 320)]
OTHERS = [(24, 140), (31, 96), (280, 80), (13, 29)]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", WHOLE_BLOCKS)
def test_reference_dequantize_is_bitsandbytes(shape, nested):
    packed, state = nf4(torch.randn(shape).half(), nested)
    theirs = pytest.importorskip("bitsandbytes").functional.dequantize_4bit(packed, state)
    assert torch.equal(reference.dequantize_nf4(packed, state, torch.float16), theirs)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", OTHERS)
def test_reference_dequantize_of_broken_rows(shape, nested):
    weight = torch.randn(shape)
    dense = reference.dequantize_nf4(*nf4(weight, nested), torch.float32)
    assert (dense - weight).norm() < 0.12 * weight.norm()


def test_reference_lora_linear_gradcheck():
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    part = layer(6, 4, torch.float64)
    a, b = part.lora_a, part.lora_b
    assert torch.autograd.gradcheck(
        lambda x, a, b: reference.lora_linear(x, part._replace(lora_a=a, lora_b=b)), (x, a, b)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_reference_lora_mlp_gradcheck(packed):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    gate_up = [layer(5, 14, torch.float64, r=2)] if packed else [layer(5, 7, torch.float64, r=2) for _ in range(2)]
    down = layer(7, 5, torch.float64, r=2)

    def function(x, *loras):
        *parts, last = (
            p._replace(lora_a=a, lora_b=b) for p, a, b in zip([*gate_up, down], loras[::2], loras[1::2], strict=True)
        )
        return reference.lora_mlp(x, parts, last, x)

    loras = [t for p in [*gate_up, down] for t in (p.lora_a, p.lora_b)]
    assert torch.autograd.gradcheck(function, (x, *loras))


def test_reference_linear_logprob_gradcheck():
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, 3, -100, 2, 2])

    def function(hidden, weight):  # three chunks: scratch for two tokens
        return reference.linear_logprob(
            hidden, weight, target, temperature=0.7, vocab_size=7, bias=torch.ones(9), scratch_bytes=72
        )

    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_reference_linear_logprob_is_log_softmax():
    hidden, weight, target = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randint(0, 10, (2, 5))
    logp, entropy = kernels.linear_logprob(hidden, weight, target, temperature=0.7, vocab_size=10, entropy=True)
    whole = F.log_softmax(hidden @ weight[:10].t() / 0.7, dim=-1)
    torch.testing.assert_close(logp, whole.gather(-1, target[..., None]).squeeze(-1))
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(-1))


# ------------------------------------------------------------------------- the hand-written backward, on plain torch


def plain_torch_dequantize(monkeypatch):
    """lora_linear's own code is torch: with the Triton calls in it replaced it runs anywhere, in any dtype."""
    pytest.importorskip("triton")
    module = sys.modules["nbhelpers.kernels.lora_linear"]
    monkeypatch.setattr(module, "dequantize_nf4", reference.dequantize_nf4)
    monkeypatch.setattr(module, "stack_adapters", reference.stack_adapters)
    return module


def test_lora_linear_gradcheck(monkeypatch):
    module = plain_torch_dequantize(monkeypatch)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    parts = [layer(6, n, torch.float64, r=r) for n, r in ((4, 2), (3, 1))] + [layer(6, 5, torch.float64, lora=False)]
    loras = [t for p in parts[:2] for t in (p.lora_a, p.lora_b)]

    def function(x, *loras):
        given = [parts[i]._replace(lora_a=loras[2 * i], lora_b=loras[2 * i + 1]) for i in (0, 1)]
        return module.lora_linear_group(x, (*given, parts[2]))

    assert torch.autograd.gradcheck(function, (x, *loras))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.skipif(no_triton, reason=""))])
def test_a_weight_that_learns_is_refused(backend):
    part = layer(6, 4)
    part.weight.requires_grad_()
    with pytest.raises(ValueError, match="gives W no gradient"), kernels.use(backend):
        kernels.lora_linear(torch.randn(2, 6), part)


# --------------------------------------------------------------------------------------------- Triton's, interpreted


class TestDequantize:
    __test__ = interpreter.ON

    @pytest.mark.parametrize("nested", [True, False])
    @pytest.mark.parametrize("shape", [*WHOLE_BLOCKS, *OTHERS])
    @DTYPES  # the interpreter truncates to bf16 instead of rounding
    def test_is_the_reference(self, shape, nested, dtype):
        packed, state = nf4(torch.randn(shape).to(dtype), nested)
        with kernels.use("triton"):
            dense = kernels.dequantize_nf4(packed, state, dtype)
        assert torch.equal(dense, reference.dequantize_nf4(packed, state, dtype))

    def test_rows(self):
        packed, state = nf4(torch.randn(150, 48))
        whole = reference.dequantize_nf4(packed, state, torch.float32)
        with kernels.use("triton"):
            assert torch.equal(kernels.dequantize_nf4(packed, state, torch.float32, rows=(64, 107)), whole[64:107])
            with pytest.raises(ValueError, match="does not begin a block"):
                kernels.dequantize_nf4(packed, state, torch.float32, rows=(1, 107))

    def test_into(self):
        packed, state = nf4(torch.randn(12, 64))
        out = torch.empty(12, 64, dtype=torch.float16)
        with kernels.use("triton"):
            assert kernels.dequantize_nf4(packed, state, torch.float16, out) is out
            assert torch.equal(out, reference.dequantize_nf4(packed, state, torch.float16))
            with pytest.raises(ValueError, match="out must be"):
                kernels.dequantize_nf4(packed, state, torch.float32, out)

    def test_fp4_is_refused(self):
        functional = pytest.importorskip("bitsandbytes").functional
        packed, state = functional.quantize_4bit(torch.randn(12, 64), quant_type="fp4")
        with kernels.use("triton"), pytest.raises(ValueError, match="not NF4"):
            kernels.dequantize_nf4(packed, state, torch.float32)


class TestLoraLinear:
    __test__ = interpreter.ON

    @DTYPES
    @pytest.mark.parametrize("rows", ROWS)
    @pytest.mark.parametrize("hidden, wide", SIZES)
    def test_nf4(self, hidden, wide, rows, dtype):
        part = layer(hidden, wide, dtype, quantised=True)
        x = torch.randn(rows, hidden, dtype=dtype)
        both = [run(b, kernels.lora_linear, x, [part], part) for b in ("triton", "torch")]
        same(*both, TOLERANCE[dtype])

    @DTYPES
    @pytest.mark.parametrize("master", [None, torch.float32], ids=["", "fp32 masters"])
    @pytest.mark.parametrize("quantised", [False, True])
    def test_group(self, quantised, master, dtype):
        options = {"dtype": dtype, "quantised": quantised, "master": master}
        parts = (
            layer(64, 96, **options),
            layer(64, 32, r=5, bias=False, **options),
            layer(64, 32, lora=False, **options),
        )
        x = torch.randn(2, 6, 64, dtype=dtype)
        both = [run(b, kernels.lora_linear_group, x, parts, parts) for b in ("triton", "torch")]
        same(*both, TOLERANCE[dtype])

    def test_not_contiguous(self):
        part = layer(64, 32, quantised=True)
        wide = torch.randn(6, 3, 128)
        for x in (wide[..., ::2], wide.transpose(0, 1)[..., :64], wide[:1, :1, :64].expand(2, 3, 64)):
            both = []
            for backend in ("triton", "torch"):
                leaf = x.detach().requires_grad_()
                with kernels.use(backend):
                    y = kernels.lora_linear(leaf, part)
                both.append([y, *torch.autograd.grad(y.transpose(0, 1).square().sum(), [leaf, part.lora_a])])
            same(*both, 2e-6)

    @DTYPES
    def test_with_a_norm_folded_in(self, dtype):
        norm = (torch.rand(64).to(dtype) + 0.5, 1e-6)
        parts = tuple(layer(64, n, dtype, quantised=True) for n in (32, 16))
        x = torch.randn(2, 6, 64, dtype=dtype) * 3
        both = [run(b, kernels.lora_linear_group, x, parts, parts, norm) for b in ("triton", "torch")]
        same(*both, TOLERANCE[dtype])

    def test_an_unused_output_and_a_frozen_lora(self):
        parts = [layer(64, 32, quantised=True) for _ in range(3)]
        x = torch.randn(5, 64, requires_grad=True)
        wanted = [x, parts[2].lora_a, parts[2].lora_b]
        grads = []
        for backend in ("triton", "torch"):
            with kernels.use(backend):
                _, _, y = kernels.lora_linear_group(x, parts)
            grads.append(torch.autograd.grad(y.square().sum(), wanted))
        same(*grads, 2e-6)
        frozen = parts[0]._replace(lora_a=parts[0].lora_a.detach(), lora_b=parts[0].lora_b.detach())
        with kernels.use("triton"):
            (dx,) = torch.autograd.grad(kernels.lora_linear(x, frozen).sum(), [x])
        with kernels.use("torch"):
            same([dx], torch.autograd.grad(kernels.lora_linear(x, frozen).sum(), [x]), 2e-6)

    def test_checkpointing(self):
        part = layer(64, 64, quantised=True)
        x = torch.randn(5, 64, requires_grad=True)
        twice = lambda x: kernels.lora_linear(kernels.lora_linear(x, part), part)  # noqa: E731
        with kernels.use("triton"):
            plain = torch.autograd.grad(twice(x).square().sum(), [x, part.lora_a])
            y = torch.utils.checkpoint.checkpoint(twice, x, use_reentrant=False)
            again = torch.autograd.grad(y.square().sum(), [x, part.lora_a])
        same(again, plain, 0)

    def test_autocast(self):
        part = layer(64, 32, master=torch.float32)
        x = torch.randn(5, 64, requires_grad=True)
        with kernels.use("triton"), torch.autocast("cpu", torch.bfloat16):
            y = kernels.lora_linear(x, part)
        assert y.dtype == torch.bfloat16
        dx, da = torch.autograd.grad(y.float().sum(), [x, part.lora_a])
        assert dx.dtype == da.dtype == torch.float32

    def test_keeps_x_alone(self):
        parts = [layer(64, 32, quantised=True) for _ in range(3)]
        x = torch.randn(100, 64, requires_grad=True)
        kept = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
            kernels.use("triton"),
        ):
            kernels.lora_linear_group(x, parts)
        leaves = {t.data_ptr() for p in parts for t in (p.lora_a, p.lora_b)}
        assert [t.data_ptr() for t in kept if t.data_ptr() not in leaves] == [x.data_ptr()]


class TestLoraMLP:
    __test__ = interpreter.ON

    @staticmethod
    def parts(hidden, wide, packed, **options):
        gate_up = [layer(hidden, 2 * wide, **options)] if packed else [layer(hidden, wide, **options) for _ in range(2)]
        return tuple(gate_up), layer(wide, hidden, **options)

    @DTYPES
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("hidden, wide", SIZES)
    def test_nf4(self, hidden, wide, packed, dtype):
        gate_up, down = self.parts(hidden, wide, packed, dtype=dtype, quantised=True)
        x = torch.randn(5, hidden, dtype=dtype)
        for residual in (None, torch.randn(5, hidden, dtype=dtype)):
            rest = (gate_up, down, residual)
            same(*[run(b, kernels.lora_mlp, x, [*gate_up, down], *rest) for b in ("triton", "torch")], TOLERANCE[dtype])

    @DTYPES
    def test_with_a_norm_folded_in(self, dtype):
        gate_up, down = self.parts(64, 96, False, dtype=dtype, quantised=True)
        norm = (torch.rand(64).to(dtype) + 0.5, 1e-6)
        x = torch.randn(5, 64, dtype=dtype)
        for residual in (None, torch.randn(5, 64, dtype=dtype)):
            rest = (gate_up, down, residual, norm)
            same(*[run(b, kernels.lora_mlp, x, [*gate_up, down], *rest) for b in ("triton", "torch")], TOLERANCE[dtype])

    @pytest.mark.parametrize("packed", [False, True])
    def test_weights_undone_in_pieces(self, packed, monkeypatch):
        """Of at most DENSE_BYTES each: Phi-4's 35,840 rows never lie there at once."""
        module, sizes = sys.modules["nbhelpers.kernels.lora_linear"], []
        scratch = module.scratch
        monkeypatch.setattr(module, "DENSE_BYTES", 64 * 64 * 4)  # 64 rows of gate and up, a block's 64 of down
        monkeypatch.setattr(module, "scratch", lambda shape, *rest: sizes.append(shape) or scratch(shape, *rest))
        gate_up, down = self.parts(64, 200, packed, quantised=True)
        x = torch.randn(5, 64)
        rest = (gate_up, down, torch.randn(5, 64))
        same(*[run(b, kernels.lora_mlp, x, [*gate_up, down], *rest) for b in ("triton", "torch")], TOLERANCE[x.dtype])
        each = 2 * [(64, 64)] + [(64, 64), (8, 64)] if not packed else 6 * [(64, 64)] + [(16, 64)]
        both = each if packed else 2 * each
        assert sizes == both + 2 * [(64, 200)] + both  # forward's down, backward's down

    @DTYPES
    @pytest.mark.parametrize("packed", [False, True])
    def test_without_gradients_the_same_in_less_memory(self, packed, dtype, monkeypatch):
        """The product of gate and up is written over gate."""
        module, places = sys.modules["nbhelpers.kernels.lora_mlp"], []
        forward = module.swiglu_forward

        def spied(gate, up, *rest, **options):
            h = forward(gate, up, *rest, **options)
            places.append(h.data_ptr() == gate.data_ptr())
            return h

        monkeypatch.setattr(module, "swiglu_forward", spied)
        gate_up, down = self.parts(64, 1100, packed, dtype=dtype, quantised=True)
        x = torch.randn(2, 5, 64, dtype=dtype)
        with kernels.use("triton"):
            wanted = kernels.lora_mlp(x, gate_up, down, x)
            with torch.no_grad():
                got = kernels.lora_mlp(x, gate_up, down, x)
        assert torch.equal(got, wanted.detach()) and places == [False, True]

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_backward_without_the_value(self, packed):
        """value=False: other numbers, the same gradients."""
        gate_up, down = self.parts(64, 96, packed, quantised=True)
        norm, (x, residual) = (torch.rand(64) + 0.5, 1e-6), torch.randn(2, 5, 64)
        leaves, found = [p for part in (*gate_up, down) for p in (part.lora_a, part.lora_b)], []
        for options in ({"norm": None}, {"norm": norm}):
            for value in (True, False):
                given = x.clone().requires_grad_()
                with kernels.use("triton"):
                    y = kernels.lora_mlp(given, gate_up, down, residual, value=value, **options)
                assert y.shape == x.shape
                found.append(torch.autograd.grad(y, [given, *leaves], torch.ones_like(y)))
            same(found[-1], found[-2], 0)

    def test_gradient_of_the_residual(self):
        gate_up, down = self.parts(64, 96, False)
        x, grads = torch.randn(2, 3, 64, requires_grad=True), []
        for backend in ("triton", "torch"):
            with kernels.use(backend):
                grads.append(torch.autograd.grad(kernels.lora_mlp(x, gate_up, down, x).square().sum(), [x]))
        same(*grads, 2e-6)

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_lora_on_some(self, which):
        gate_up, down = self.parts(64, 96, False)
        parts = [p if i == which else p._replace(lora_a=None, lora_b=None) for i, p in enumerate([*gate_up, down])]
        x = torch.randn(5, 64)
        rest = (tuple(parts[:2]), parts[2])
        same(*[run(b, kernels.lora_mlp, x, parts, *rest) for b in ("triton", "torch")], 2e-6)

    def test_keeps_x_gate_and_up(self):
        gate_up, down = self.parts(64, 96, False, quantised=True)
        kept = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
            kernels.use("triton"),
        ):
            kernels.lora_mlp(torch.randn(100, 64, requires_grad=True), gate_up, down)
        assert sum(t.numel() for t in kept if t.shape[0] == 100) == 100 * (64 + 96 + 96)

    def test_a_second_backward_raises(self):
        gate_up, down = self.parts(64, 96, False)
        x = torch.randn(5, 64, requires_grad=True)
        with kernels.use("triton"):
            y = kernels.lora_mlp(x, gate_up, down).sum()
        y.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()

    def test_fp16_does_not_overflow(self):
        gate_up, down = self.parts(64, 96, False, dtype=torch.float16, bias=False)
        x = torch.randn(5, 64).half() * 300
        plain = F.silu(F.linear(x, gate_up[0].weight)) * F.linear(x, gate_up[1].weight)
        assert not plain.isfinite().all(), "the planted activations are too small to show anything"
        residual = torch.full((5, 64), 6e4).half()
        out = [run(b, kernels.lora_mlp, x, [*gate_up, down], gate_up, down, residual)[0] for b in ("triton", "torch")]
        assert out[0].isfinite().all()
        same(out[:1], out[1:], 3e-3)


class TestLinearLogprob:
    __test__ = interpreter.ON

    @staticmethod
    def both(hidden, weight, target, of_weight=False, **options):
        results = []
        for backend in ("triton", "torch"):
            h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_(of_weight)
            with kernels.use(backend):
                logp, entropy = kernels.linear_logprob(h * 1.0, w, target, entropy=True, **options)
            assert logp.dtype == entropy.dtype == torch.float32 and not (backend == "triton" and entropy.requires_grad)
            loss = (logp.masked_fill(logp.isinf(), 0) * torch.linspace(-1, 2, logp.numel()).view(logp.shape)).sum()
            results.append([logp, entropy, *torch.autograd.grad(loss, [h, w] if of_weight else [h])])
        return results

    @DTYPES
    @pytest.mark.parametrize("of_weight", [False, True])
    @pytest.mark.parametrize("rows, hidden, words", [(1, 24, 151), (11, 64, 128), (7, 13, 4099)])
    def test_dense(self, rows, hidden, words, of_weight, dtype):
        h, w = torch.randn(rows, hidden, dtype=dtype), torch.randn(words, hidden, dtype=dtype)
        target = torch.randint(0, words, (rows,))
        same(*self.both(h, w, target, of_weight, temperature=0.8), 1e-5 if dtype == torch.float32 else 5e-3)

    @DTYPES
    @pytest.mark.parametrize("of_weight", [False, True])
    def test_chunks_padding_ignored_and_bias(self, of_weight, dtype):
        h, w = torch.randn(3, 5, 16, dtype=dtype), torch.randn(40, 16, dtype=dtype)
        target = torch.randint(0, 37, (3, 5))
        target[0, 0] = target[2, 1] = -100
        # scratch for four tokens of 37 words: the last chunk is shorter
        options = {"vocab_size": 37, "bias": torch.randn(40).to(dtype), "scratch_bytes": 4 * 37 * dtype.itemsize}
        mine, theirs = self.both(h, w, target, of_weight, **options)
        assert mine[0][0, 0] == 0 and (mine[2][0, 0] == 0).all()
        if of_weight:
            assert (mine[3][37:] == 0).all()
        same(mine, theirs, 1e-5 if dtype == torch.float32 else 5e-3)

    @DTYPES
    @pytest.mark.parametrize("tile", [None, (4, 13), (2, 300)])
    def test_without_gradient_in_tiles(self, monkeypatch, tile, dtype):
        module = sys.modules["nbhelpers.kernels.linear_logprob"]
        monkeypatch.setattr(module, "FORWARD_TOKENS", 3)
        h, w, target = torch.randn(10, 16).to(dtype), torch.randn(300, 16).to(dtype), torch.randint(0, 290, (10,))
        options = {"vocab_size": 290, "bias": torch.randn(300).to(dtype), "entropy": True}
        with torch.no_grad():
            mine = module.linear_logprob(h, w, target, scratch_bytes=3 * 128 * dtype.itemsize, tile=tile, **options)
            theirs = reference.linear_logprob(h, w, target, **options)
        same(mine, theirs, 1e-5 if dtype == torch.float32 else 5e-3)

    @DTYPES
    def test_nf4_head_in_slices(self, monkeypatch, dtype):
        monkeypatch.setattr(sys.modules["nbhelpers.kernels.linear_logprob"], "SLICE_WORDS", 64)
        h, target = torch.randn(9, 32, dtype=dtype), torch.randint(0, 200, (9,))
        packed, state = nf4(torch.randn(210, 32).to(dtype))
        options = {"quant_state": state, "vocab_size": 205, "scratch_bytes": 5 * 64 * dtype.itemsize}
        same(*self.both(h, packed, target, **options), 1e-5 if dtype == torch.float32 else 5e-3)

    @pytest.mark.parametrize("of_weight", [False, True])
    def test_a_head_in_another_dtype(self, of_weight):
        h, w, target = torch.randn(5, 16).half(), torch.randn(70, 16), torch.randint(0, 70, (5,))
        mine, theirs = self.both(h, w, target, of_weight)
        same(mine, theirs, 5e-3)

    def test_fp16_large_activations(self):
        """Hidden states of 1e3 to 3e4: stock fp16 logits are infinite, these are right."""
        h = torch.randn(6, 64).half() * torch.tensor([1e3, 3e3, 1e4, 1.0, 1e-3, 1e4])[:, None].half()
        w, target = torch.randn(50, 64).half(), torch.randint(0, 50, (6,))
        assert not F.linear(h, w).isfinite().all(), "the planted activations are too small to show anything"
        mine, theirs = self.both(h, w, target)
        assert all(t.isfinite().all() for t in mine)
        same(mine[:1], theirs[:1], 1e-3)

    def test_fp16_small_gradients_do_not_vanish(self):
        """A mean over 32,768 tokens makes g 3e-5, and p of a rare word is 1e-5: their product is zero in fp16."""
        h, w, target = torch.randn(4, 32).half() * 0.01, torch.randn(5000, 32).half(), torch.randint(0, 5000, (4,))
        grads = []
        for backend, dtype in (("triton", torch.float16), ("torch", torch.float64)):
            leaf = h.to(dtype).requires_grad_()
            with kernels.use(backend):
                logp = kernels.linear_logprob(leaf, w.to(dtype), target)
            grads.append(torch.autograd.grad(logp, [leaf], torch.full_like(logp, 3e-2))[0].double())
        assert (grads[0] - grads[1]).norm() / grads[1].norm() < 2e-3

    def test_a_second_backward_raises(self):
        h, w = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
        with kernels.use("triton"):
            logp = kernels.linear_logprob(h, w, torch.tensor([1, 2, 3])).sum()
        logp.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logp.backward()

    def test_without_gradient_keeps_nothing(self):
        h, w = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
        with kernels.use("triton"), torch.no_grad():
            assert not kernels.linear_logprob(h, w, torch.tensor([1, 2, 3])).requires_grad


@pytest.mark.skipif(interpreter.ON, reason="already inside")
def test_in_the_interpreter():
    interpreter.run(__file__)
