"""Log-probabilities without the logits: the reference by gradcheck, Triton's against it."""

import sys

import interpreter  # first: before anything that imports triton
import pytest
import torch
import torch.nn.functional as F
from matmul_cases import DTYPES, nf4, same

from nbhelpers import kernels
from nbhelpers.kernels import reference


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_reference_linear_logprob_gradcheck():
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, 3, -100, 2, 2])

    def function(hidden, weight):  # three chunks: scratch for two tokens
        return reference.linear_logprob(
            hidden, weight, target, temperature=0.7, vocab_size=7, bias=torch.ones(9), scratch_bytes=72
        )

    assert torch.autograd.gradcheck(function, (hidden, weight))

    def both(hidden, weight):
        return reference.linear_logprob(
            hidden, weight, target, temperature=0.7, entropy=True, entropy_grad=True, scratch_bytes=72
        )

    assert torch.autograd.gradcheck(both, (hidden, weight))


def test_reference_linear_logprob_is_log_softmax():
    hidden, weight, target = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randint(0, 10, (2, 5))
    logp, entropy = kernels.linear_logprob(hidden, weight, target, temperature=0.7, vocab_size=10, entropy=True)
    whole = F.log_softmax(hidden @ weight[:10].t() / 0.7, dim=-1)
    torch.testing.assert_close(logp, whole.gather(-1, target[..., None]).squeeze(-1))
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(-1))
    assert not entropy.requires_grad


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
    @pytest.mark.parametrize("of_weight", [False, True])
    def test_the_gradient_of_the_entropy(self, of_weight, dtype):
        """Weighed by more and by less than the log-probability; one token has neither, one target is ignored."""
        h, w, target = torch.randn(8, 16, dtype=dtype), torch.randn(40, 16, dtype=dtype), torch.randint(0, 37, (8,))
        target[5] = -100
        of_logp, of_entropy = torch.linspace(-1, 2, 8), torch.tensor([3.0, -1, 0, 1e-4, 0.5, 1, 0, 2])
        of_logp[2] = 0
        options = {"vocab_size": 37, "bias": torch.randn(40).to(dtype), "temperature": 0.7, "entropy": True}
        options |= {"entropy_grad": True, "scratch_bytes": 3 * 37 * dtype.itemsize}
        results = []
        for backend in ("triton", "torch"):
            a, b = h.clone().requires_grad_(), w.clone().requires_grad_(of_weight)
            with kernels.use(backend):
                logp, entropy = kernels.linear_logprob(a * 1.0, b, target, **options)
            loss = (logp * of_logp + entropy * of_entropy).sum()
            results.append([logp.detach(), entropy.detach(), *torch.autograd.grad(loss, [a, b] if of_weight else [a])])
        same(*results, 1e-5 if dtype == torch.float32 else 5e-3)

    @DTYPES
    @pytest.mark.parametrize("tile", [None, (4, 13), (2, 300)])
    def test_without_gradient_in_tiles(self, monkeypatch, tile, dtype):
        module = sys.modules["nbhelpers.kernels.triton.linear_logprob"]
        monkeypatch.setattr(module, "FORWARD_TOKENS", 3)
        h, w, target = torch.randn(10, 16).to(dtype), torch.randn(300, 16).to(dtype), torch.randint(0, 290, (10,))
        options = {"vocab_size": 290, "bias": torch.randn(300).to(dtype), "entropy": True}
        with torch.no_grad():
            mine = module.linear_logprob(h, w, target, scratch_bytes=3 * 128 * dtype.itemsize, tile=tile, **options)
            theirs = reference.linear_logprob(h, w, target, **options)
        same(mine, theirs, 1e-5 if dtype == torch.float32 else 5e-3)

    @DTYPES
    def test_nf4_head_in_slices(self, monkeypatch, dtype):
        monkeypatch.setattr(sys.modules["nbhelpers.kernels.triton.linear_logprob"], "SLICE_WORDS", 64)
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
