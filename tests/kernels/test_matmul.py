"""Linear layers and MLPs with a LoRA: references by gradcheck, Triton's against those."""

import importlib.util
import sys

import interpreter  # first: before anything that imports triton
import pytest
import torch
import torch.nn.functional as F
from matmul_cases import DTYPES, TOLERANCE, keeping, layer, run, same

from nbhelpers import kernels
from nbhelpers.kernels import reference

no_triton = importlib.util.find_spec("triton") is None
# hidden and intermediate sizes of Qwen2.5-1.5B, Llama-3.1-8B and Phi-4, cut by 64, and primes
SIZES = [(24, 140), (64, 224), (80, 280), (13, 29)]
ROWS = [1, 7, 12]
# x is drawn in fp32 and rounded: what randn draws in fp16 differs between versions of torch, and with some draws a
# gradient of A cancels, so that the reference in fp16 is itself further from the truth than the tolerance


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------- the references


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


# ------------------------------------------------------------------------- the hand-written backward, on plain torch


def plain_torch_dequantize(monkeypatch):
    """lora_linear's own code is torch: with the Triton calls in it replaced it runs anywhere, in any dtype."""
    pytest.importorskip("triton")
    module = sys.modules["nbhelpers.kernels.triton.lora_linear"]
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


class TestLoraLinear:
    __test__ = interpreter.ON

    @DTYPES
    @pytest.mark.parametrize("rows", ROWS)
    @pytest.mark.parametrize("hidden, wide", SIZES)
    def test_nf4(self, hidden, wide, rows, dtype):
        part = layer(hidden, wide, dtype, quantised=True)
        x = torch.randn(rows, hidden).to(dtype)
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
        x = torch.randn(2, 6, 64).to(dtype)
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
        x = torch.randn(2, 6, 64).to(dtype) * 3
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

    def test_keeps_x_and_what_is_thin(self):
        parts = [layer(64, 32, quantised=True) for _ in range(3)]
        x = torch.randn(100, 64, requires_grad=True)
        kept = []
        with keeping(kept), kernels.use("triton"):
            kernels.lora_linear_group(x, parts)
        leaves = {t.data_ptr() for p in parts for t in (p.lora_a, p.lora_b)}
        own = [t for t in kept if t.data_ptr() not in leaves]
        assert own[0].data_ptr() == x.data_ptr() and [t.shape for t in own[1:]] == [(100, 9)]  # x A^T


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
        x = torch.randn(5, hidden).to(dtype)
        for residual in (None, torch.randn(5, hidden).to(dtype)):
            rest = (gate_up, down, residual)
            same(*[run(b, kernels.lora_mlp, x, [*gate_up, down], *rest) for b in ("triton", "torch")], TOLERANCE[dtype])

    @DTYPES
    def test_with_a_norm_folded_in(self, dtype):
        gate_up, down = self.parts(64, 96, False, dtype=dtype, quantised=True)
        norm = (torch.rand(64).to(dtype) + 0.5, 1e-6)
        x = torch.randn(5, 64).to(dtype)
        for residual in (None, torch.randn(5, 64).to(dtype)):
            rest = (gate_up, down, residual, norm)
            same(*[run(b, kernels.lora_mlp, x, [*gate_up, down], *rest) for b in ("triton", "torch")], TOLERANCE[dtype])

    @pytest.mark.parametrize("packed", [False, True])
    def test_weights_undone_in_pieces(self, packed, monkeypatch):
        """Of at most DENSE_BYTES each: Phi-4's 35,840 rows are never dequantised at once."""
        module, sizes = sys.modules["nbhelpers.kernels.triton.lora_linear"], []
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
        module, places = sys.modules["nbhelpers.kernels.triton.lora_mlp"], []
        forward = module.swiglu_forward

        def spied(gate, up, *rest, **options):
            h = forward(gate, up, *rest, **options)
            places.append(h.data_ptr() == gate.data_ptr())
            return h

        monkeypatch.setattr(module, "swiglu_forward", spied)
        gate_up, down = self.parts(64, 1100, packed, dtype=dtype, quantised=True)
        x = torch.randn(2, 5, 64).to(dtype)
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

    def test_keeps_x_gate_up_and_what_is_thin(self):
        gate_up, down = self.parts(64, 96, False, quantised=True)
        kept = []
        with keeping(kept), kernels.use("triton"):
            kernels.lora_mlp(torch.randn(100, 64, requires_grad=True), gate_up, down)
        assert sum(t.numel() for t in kept if t.shape[0] == 100) == 100 * (64 + 96 + 96 + 3 * 3)

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


@pytest.mark.skipif(interpreter.ON, reason="already inside")
def test_in_the_interpreter():
    interpreter.run(__file__)
