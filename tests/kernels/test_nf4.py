"""NF4 dequantised: the reference against bitsandbytes, Triton's against the reference."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

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

    @pytest.mark.parametrize("nested", [(True, True, True), (False, False, False), (True, False, True)])
    @pytest.mark.parametrize(
        "rows, width", [((280, 24, 31), 64), ((300, 300), 320), ((24, 8), 140), ((3, 4, 5, 6), 64)]
    )
    def test_several_below_each_other(self, rows, width, nested, monkeypatch):
        """In one launch if two or three are alike and of whole blocks."""
        module = sys.modules["nbhelpers.kernels.triton.nf4"]
        one, ones = module.dequantize_nf4, []
        monkeypatch.setattr(module, "dequantize_nf4", lambda *args: ones.append(1) or one(*args))
        pairs = [nf4(torch.randn(n, width), nested[i % 3]) for i, n in enumerate(rows)]
        out = torch.empty(sum(rows), width)
        module.dequantize_group(*zip(*pairs, strict=True), torch.float32, out)
        assert out.equal(torch.cat([reference.dequantize_nf4(*pair, torch.float32) for pair in pairs]))
        alike = len(set(nested[: len(rows)])) == 1 and width % 64 == 0 and len(rows) < 4
        assert len(ones) == (0 if alike else len(rows))

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


class TestFewRowsBeforeAmpere:
    """Which product a T4 takes: what is asked of the card is replaced, for there is none here."""

    WIDTHS = (64, 128, 256, 512, 704, 896, 1024, 1536, 2048, 2560, 3584, 4096, 4864, 5120, 8960, 11008, 14336, 17920)
    ROWS = (5, 7, 8, 9, 16, 17, 23, 24, 32, 33, 64, 65, 96, 97, 128, 129, 320, 321, 512)

    @pytest.fixture
    def takes(self, monkeypatch):
        """takes(rows, out, inside, dtype, capability): whether bitsandbytes' fused product is taken."""
        triton_nf4 = pytest.importorskip("nbhelpers.kernels.triton.nf4")
        from nbhelpers.kernels.triton import common

        def ask(rows, out, inside, dtype=torch.float16, capability=(7, 5)):
            monkeypatch.setattr(common, "capability", lambda device: capability)
            monkeypatch.setattr(triton_nf4, "multiprocessors", lambda device: 40)  # a T4's
            x = SimpleNamespace(shape=(rows, inside), is_cuda=True, dtype=dtype, device=None)
            return triton_nf4.few_rows(x, SimpleNamespace(shape=(out, inside)))

        return ask

    @pytest.mark.parametrize(
        ("rows", "out", "inside", "fused"),
        [
            (17, 8960, 1536, True), (128, 8960, 1536, True), (129, 8960, 1536, False),  # Qwen2.5-1.5B's gate and up
            (64, 1536, 8960, True), (65, 1536, 8960, False),  # its down
            (64, 1536, 1536, True), (65, 1536, 1536, False), (64, 256, 1536, True),  # its q, o and k, v
            (128, 14336, 4096, True), (64, 4096, 14336, True), (128, 4096, 14336, False),  # Llama-3.1-8B's MLP
        ],
    )  # fmt: skip
    def test_of_a_models_shapes(self, takes, rows, out, inside, fused):
        assert takes(rows, out, inside) == fused

    @pytest.mark.parametrize(("dtype", "capability"), [(torch.bfloat16, (7, 5)), (torch.float16, (7, 0))])
    def test_without_tensor_cores_for_it(self, takes, dtype, capability):
        assert takes(7, 8960, 1536, dtype, capability) and not takes(8, 8960, 1536, dtype, capability)

    def test_newer_cards_keep_their_measured_rule(self, takes):
        assert not takes(33, 8960, 1536, torch.bfloat16, (9, 0))

    def test_is_bitsandbytes_own_rule(self, takes):
        rule = bitsandbytes_rule(processors=40, capability=(7, 5))
        shapes = [(rows, out, inside) for rows in self.ROWS for out in self.WIDTHS for inside in self.WIDTHS]
        differ = [shape for shape in shapes if takes(*shape) != rule(0, torch.float16, *shape)]
        assert not differ, f"{len(differ)} of {len(shapes)}, such as (rows, out, in) {differ[:5]}"


def bitsandbytes_rule(processors, capability):
    """bitsandbytes' own choice, as a function of (device, dtype, rows, out, in): taken out of its source, for the
    module around it loads on a GPU only."""
    package = Path(pytest.importorskip("bitsandbytes").__file__).parent
    module = ast.parse((package / "backends" / "cuda" / "ops.py").read_text())
    own = next(node for node in module.body if getattr(node, "name", "") == "_gemm_4bit_use_custom_cuda")
    own.decorator_list = []
    names = {"torch": torch, "_GEMM_4BIT_CUSTOM_FLOOR_M": 4}
    names["_gpu_dispatch_props"] = lambda index: (processors, *capability)
    exec(compile(ast.Module([own], []), "bitsandbytes", "exec"), names)
    return names["_gemm_4bit_use_custom_cuda"]
