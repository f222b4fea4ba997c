"""NF4 dequantised: the reference against bitsandbytes, Triton's against the reference."""

import interpreter  # first: before anything that imports triton
import pytest
import torch
from matmul_cases import DTYPES, nf4

from nbhelpers import kernels
from nbhelpers.kernels import reference


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


@pytest.mark.skipif(interpreter.ON, reason="already inside")
def test_in_the_interpreter():
    interpreter.run(__file__)
