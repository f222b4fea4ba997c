"""The NF4 product of a few rows by itself, and by its PTX, which numpy runs."""

from importlib import import_module

import interpreter  # first: before anything that imports triton
import ptx
import pytest
import torch

from nbhelpers import kernels
from nbhelpers.kernels import Projection


@pytest.fixture(params=[False, True], ids=["sums", "dot"])
def dot(request, monkeypatch):
    """With tl.dot, as from Ampere on, or without."""
    module = import_module("nbhelpers.kernels.triton.nf4_few_rows")
    monkeypatch.setattr(module, "tensor_cores", lambda device: request.param)
    return request.param


class TestProduct:
    __test__ = interpreter.ON

    @pytest.mark.parametrize("nested", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_the_weights_of_the_fused_product_are_those_of_nf4_bit_for_bit(self, dtype, nested, monkeypatch):
        """Unit vectors pick single weights: they are those that dequantize_nf4 gives, and the splits add up to them."""
        module = import_module("nbhelpers.kernels.triton.nf4_few_rows")
        monkeypatch.setattr(module, "splits_for", lambda *_: 4)
        functional = pytest.importorskip("bitsandbytes").functional
        parts = []
        for out in (70, 64, 3):
            weight = torch.randn(out, 256, generator=torch.Generator().manual_seed(out))
            parts.append(Projection(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)))
        x = torch.eye(256, dtype=dtype)[[0, 1, 63, 64, 128, 255]]
        y, _ = module.few_rows_product(x, tuple(parts))
        dense = torch.cat([kernels.reference.dequantize_nf4(part.weight, part.quant_state, dtype) for part in parts])
        assert y.shape == (4, 6, 137) and torch.equal(y.sum(0), dense[:, [0, 1, 63, 64, 128, 255]].t().float())

    @pytest.mark.parametrize("rows", [1, 8, 13, 16, 20])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("nested, width", [(True, 320), (False, 1280)], ids=["nested", "plain"])
    def test_the_product_by_its_ptx(self, rows, dtype, nested, width, dot, monkeypatch):
        """Emulated: unit vectors pick single weights bit for bit, dense rows and LoRA come close. 20 rows: `_base`."""
        if rows == 20 and dtype == torch.bfloat16:
            pytest.skip("the interpreter's tl.dot is wrong in bf16")
        module = import_module("nbhelpers.kernels.triton.nf4_few_rows")
        monkeypatch.setattr(module, "PTX", True)
        monkeypatch.setattr(module, "splits_for", lambda *_: 2)
        functional = pytest.importorskip("bitsandbytes").functional
        generator, parts = torch.Generator().manual_seed(rows), []
        for out in (18, 16, 3):
            weight = torch.randn(out, width, generator=generator)
            lora = {} if out == 16 else {"lora_a": torch.randn(5, width, generator=generator)}
            quantised = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
            parts.append(Projection(*quantised, **lora))
        dense = torch.cat([kernels.reference.dequantize_nf4(p.weight, p.quant_state, dtype) for p in parts]).float()
        positions = torch.randint(width, (rows,), generator=generator)
        ones = torch.zeros(rows, width, dtype=dtype)
        ones[torch.arange(rows), positions] = 1
        x = torch.randn(rows, width + 4, generator=generator).to(dtype)[:, 4:]  # neither rows nor start at 16 bytes
        with ptx.emulated():
            assert torch.equal(module.few_rows_product(ones, tuple(parts))[0].sum(0), dense[:, positions].t())
            y, t = module.few_rows_product(x, tuple(parts))
        torch.testing.assert_close(y.sum(0), x.float() @ dense.t(), atol=1e-3, rtol=1e-4)
        assert (t is not None) == dot
        if dot and dtype == torch.float16:
            a = torch.cat([part.lora_a for part in parts if part.lora_a is not None]).to(dtype).float()
            torch.testing.assert_close(t.sum(0), x.float() @ a.t(), atol=1e-3, rtol=1e-4)

    @pytest.mark.parametrize("rows", [1, 8, 16])
    @pytest.mark.parametrize("heights", [(20,), (3, 33)], ids=str)
    def test_layers_in_16_bits_are_more_columns(self, rows, heights, monkeypatch):
        """Of another LoRA's rank each, by the PTX too; 576 columns of K are no whole iterations."""
        module = import_module("nbhelpers.kernels.triton.nf4_few_rows")
        monkeypatch.setattr(module, "tensor_cores", lambda device: True)
        monkeypatch.setattr(module, "PTX", True)
        monkeypatch.setattr(module, "splits_for", lambda *_: 2)
        functional, generator = pytest.importorskip("bitsandbytes").functional, torch.Generator().manual_seed(rows)
        width = 576
        packed = functional.quantize_4bit(torch.randn(18, width, generator=generator), quant_type="nf4")
        nf4 = kernels.reference.dequantize_nf4(*packed, torch.float16)
        plain = [torch.randn(height, width, generator=generator).half() for height in heights]
        loras = [torch.randn(3, width, generator=generator), None, torch.randn(5, width, generator=generator)]
        x = torch.randn(rows, width, generator=generator).half()
        with ptx.emulated():
            y, t = module.few_rows_product(x, (Projection(*packed),), plain, loras[: 1 + len(plain)])
        a = torch.cat([lora for lora in loras[: 1 + len(plain)] if lora is not None]).half()
        for got, weights in ((y, torch.cat([nf4, *plain])), (t, a)):
            torch.testing.assert_close(got.sum(0), x.float() @ weights.float().t(), atol=1e-3, rtol=1e-4)


def test_in_the_interpreter():
    interpreter.run(__file__)
