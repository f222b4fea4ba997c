"""Rows taken several times: their gradient, by the reference and in Triton's interpreter, against index_add in fp64."""

import interpreter  # first: before anything that imports triton
import pytest
import torch

from nbhelpers import kernels
from nbhelpers.kernels.taken import Taken, take

ROWS = torch.tensor([4, 0, 1, 0, 0, 5, 1])  # of 7: 2, 3 and 6 are not taken


def of_gradient(backend, x, upstream, rows=ROWS):
    """(what is taken, the gradient of x)."""
    leaf = x.clone().requires_grad_()
    with kernels.use(backend):
        out = take(leaf, Taken.of(rows, len(x)))
        return out, *torch.autograd.grad(out, leaf, upstream)


def check(backend, dtype):
    torch.manual_seed(0)
    for shape in ((2, 3), (1, 1030), (8,)):  # one piece, and two
        x, upstream = torch.randn(7, *shape).to(dtype), torch.randn(len(ROWS), *shape).to(dtype)
        out, grad = of_gradient(backend, x, upstream)
        exact = torch.zeros(x.shape, dtype=torch.float64).index_add_(0, ROWS, upstream.double())
        assert torch.equal(out, x[ROWS]) and grad.dtype == dtype
        assert (grad[[2, 3, 6]] == 0).all()
        wanted = exact.float().to(dtype) if dtype != torch.float32 else exact
        torch.testing.assert_close(grad.double(), wanted.double(), rtol=1e-6, atol=1e-6)


class TestInterpreted:
    __test__ = interpreter.ON

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_gradient(self, dtype):
        check("triton", dtype)

    def test_of_a_strided_gradient_and_of_no_row(self):
        upstream = torch.randn(3, 2, len(ROWS)).permute(2, 1, 0)
        same = [of_gradient(backend, torch.randn(7, 2, 3), upstream)[1] for backend in ("triton", "torch")]
        torch.testing.assert_close(*same)
        none = torch.zeros(0, dtype=torch.int64)
        _, grad = of_gradient("triton", torch.randn(4, 3), torch.zeros(0, 3), none)
        assert torch.equal(grad, torch.zeros(4, 3))


def test_in_the_interpreter():
    interpreter.run(__file__, "TestInterpreted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference(dtype):
    check("torch", dtype)


def test_sums_are_not_rounded_in_between():
    """In bf16 256 + 1 is 256: eight completions of one prompt would lose seven of their gradients."""
    rows, upstream = torch.zeros(9, dtype=torch.int64), torch.tensor([[256.0]] + 8 * [[1.0]]).bfloat16()
    assert of_gradient("torch", torch.zeros(2, 1).bfloat16(), upstream, rows)[1][0, 0] == 264
