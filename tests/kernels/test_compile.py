"""Every Triton kernel compiled ahead of time for a T4 (sm_75), an A100 (sm_80) and an H100 (sm_90), on no GPU at all
(benchmarks/kernels/ahead.py)."""

import interpreter
import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

if interpreter.ON:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from benchmarks import t4  # noqa: E402
from benchmarks.kernels import ahead  # noqa: E402
from nbhelpers.kernels import Projection, decode_step  # noqa: E402, decode_step
from nbhelpers.kernels.triton import nf4_few_rows, plain_few_rows  # noqa: E402

# of a program at most: a T4's, a gaming card's of that generation (less than an A100's), an H100's
SHARED_MEMORY = {"sm_75": 64 * 1024, "sm_80": 99 * 1024, "sm_90": 227 * 1024}

INLINED = {"_delta", "_head_rows", "_rotated", "_of_bias", "_sum", "_within_fp16", "_rotate_heads", "_load", "_store",
           "_base", "_dense", "_join", "_rows_of_b", "_load_weights", "eight_weights", "_fetch", "_scales", "_put",
           "in_registers", "_in_16_bits", "_block", "_best", "_undo", "begin", "wait", "whose"}  # fmt: skip


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_kernel_compiles(target):
    launches = ahead.every_launch(target).values()
    launched = {(launch.fn.__name__, launch.fn.__module__) for launch in launches}
    elsewhere = (
        {("_few_rows", plain_few_rows.__name__)}
        if target == "sm_75"
        else {("_thin", "nbhelpers.kernels.triton.decode_linear")}
    )
    left_out = {one for one in ahead.kernels_of_the_package() - launched - elsewhere if one[0] not in INLINED}
    assert not left_out, f"no launch of {left_out} above: add one"

    for launch in launches:
        compiled = launch.compile(target)
        where = f"{launch.name} {launch.constants} for {target}"
        assert "cubin" in compiled.asm, where
        early = launch.constants.get("EARLY", False)
        assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == early == launch.options.get("launch_pdl", False), where
        assert compiled.metadata.shared <= SHARED_MEMORY[target], f"{where}: {compiled.metadata.shared} bytes shared"
        if target == "sm_75":
            # below sm_80 tl.dot has no tensor cores: products belong to cuBLAS there
            assert "tt.dot" not in compiled.asm["ttir"], where
            assert "tt.dot" not in compiled.asm["ttgir"], where


def test_a_dot_would_be_seen():
    """The check above can fail: Triton still calls the operation tt.dot."""
    import triton.language as tl

    @triton.jit
    def product(x, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        a = tl.load(x + i)
        tl.store(x + i, tl.dot(a, a).to(tl.float16))

    source = ASTSource(product, {"x": "*fp16", "BLOCK": "constexpr"}, {"BLOCK": 16})
    compiled = triton.compile(source, target=GPUTarget("cuda", 75, 32))
    assert "tt.dot" in compiled.asm["ttir"]


def test_products_of_a_few_rows_have_one_variant_for_every_group_of_layers():
    x = torch.randn(8, 1, 64, dtype=torch.bfloat16)
    with ahead.noted("sm_90") as found:
        for rank in (8, 16):
            lora = {"lora_a": torch.randn(rank, 64), "lora_b": torch.randn(128, rank), "scale": 2.0}
            packed = Projection(*ahead.nf4(128, 64, True), **lora)
            plain = Projection(torch.randn(128, 64, dtype=torch.bfloat16), None, **lora)
            for part in (packed, plain):
                for parts in (
                    (part,),
                    (part, part),
                    (part, part, part),
                    (part, part._replace(lora_a=None, lora_b=None)),
                ):
                    decode_step.decode_linear(x, parts)
    products = [launch.name for launch in found.values() if launch.name.endswith("._few_rows")]
    assert sorted(products) == ["nf4_few_rows._few_rows", "plain_few_rows._few_rows"]


def test_as_many_programs_are_resident_as_the_tile_of_64_rows_says():
    """By its own count of registers: capped, the loop over K was 243 instructions on an H100 and not 228."""
    packed = Projection(*ahead.nf4(128, 64, True), lora_a=torch.randn(16, 64), lora_b=torch.randn(128, 16))
    with ahead.noted("sm_90") as found:
        decode_step.decode_linear(torch.randn(32, 1, 64, dtype=torch.bfloat16), (packed, packed))
    (launch,) = [launch for launch in found.values() if launch.name == "nf4_few_rows._few_rows"]
    compiled, warps = launch.compile("sm_90"), nf4_few_rows.WARPS
    use = t4.assembled(compiled.asm["ptx"], compiled.metadata.shared, warps, "sm_90a")
    of_a_thread = -(-use.registers // 8) * 8
    assert launch.options.get("maxnreg") is None and use.spilled == 0
    assert 65536 // (of_a_thread * 32 * warps) >= nf4_few_rows.tile(32).resident
