"""Every Triton kernel compiled ahead of time for a T4 (sm_75), an A100 (sm_80) and an H100 (sm_90), on no GPU at all.

The public functions run on CPU tensors of the models' true widths with the launch replaced: instead of running, each
launch's kernel is compiled for the target with exactly the arguments that it was launched with. What comes out of the
functions is then noise; what is looked at is the compiler's output. (Not in the interpreter: see interpreter.py.)
"""

import sys
from importlib import import_module

import interpreter
import pytest
import torch

from nbhelpers import kernels
from nbhelpers.kernels import HeadNorms, Projection

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from nbhelpers.kernels.triton import common, nf4_few_rows, plain_few_rows  # noqa: E402

if interpreter.ON:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

TARGETS = {"sm_75": torch.float16, "sm_80": torch.bfloat16, "sm_90": torch.bfloat16}
# of a program at most: a T4's, a gaming card's of that generation (less than an A100's), an H100's
SHARED_MEMORY = {"sm_75": 64 * 1024, "sm_80": 99 * 1024, "sm_90": 227 * 1024}
POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8",
           torch.int64: "*i64", torch.int32: "*i32"}  # fmt: skip


def describe(fn: JITFunction, args, options) -> tuple[dict, dict, dict, dict]:
    """What Triton's own launcher derives from the arguments: types, constants, divisibility by 16, and options."""
    names = [param.name for param in fn.params]
    values = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in names if name in options}
    types, constants, hints = {}, {}, {}
    for i, param in enumerate(fn.params):
        value = values[param.name]
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        is_one = type(value) is int and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or is_one:
            types[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[param.name] = POINTER[value.dtype]
        else:
            types[param.name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(address, int) and address % 16 == 0 and not param.do_not_specialize:
            hints[(i,)] = [["tt.divisibility", 16]]
    return types, constants, hints, options


@pytest.fixture
def launches(monkeypatch):
    """Launches collect here instead of running: {what is launched: (fn, types, constants, hints, options)}."""
    found = {}

    def launch(fn, *args, grid, warmup, **options):
        made = describe(fn, args, options)
        found[fn.__name__, fn.__module__, str(made)] = (fn, *made)

    monkeypatch.setattr(JITFunction, "run", launch)
    return found


def nf4(rows: int, width: int, nested: bool):
    functional = pytest.importorskip("bitsandbytes").functional
    return functional.quantize_4bit(torch.randn(rows, width), quant_type="nf4", compress_statistics=nested)


def elementwise(hidden: int, wide: int, heads: int, kv_heads: int, dtype: torch.dtype, tokens: int = 3) -> None:
    """The element-wise kernels, forward and backward, on a few tokens of a model's widths."""
    x, residual = (torch.empty(1, tokens, hidden, dtype=dtype, requires_grad=True) for _ in range(2))
    for frozen in (True, False):
        weight = torch.empty(hidden, dtype=dtype, requires_grad=not frozen)
        s, y = kernels.rms_norm(x, weight, 1e-6, residual)
        (s + y).sum().backward()
        kernels.rms_norm(x, weight, 1e-6).sum().backward()
    gate_up = torch.empty(tokens, 2 * wide, dtype=dtype, requires_grad=True)
    kernels.swiglu_packed(gate_up).sum().backward()
    gate, up = (torch.empty(tokens, wide, dtype=dtype, requires_grad=True) for _ in range(2))
    kernels.swiglu(gate, up).sum().backward()
    for rotary in (128, 96):
        cos, sin = torch.empty(2, 1, tokens, rotary, dtype=dtype)
        q, k = (
            torch.empty(1, tokens, n, 128, dtype=dtype, requires_grad=True).transpose(1, 2) for n in (heads, kv_heads)
        )
        norms = HeadNorms(*torch.empty(2, 128, dtype=dtype), 1e-6)
        for each in (None, norms):
            rotated = kernels.rope(q, k, cos, sin, each)
            (rotated[0].sum() + rotated[1].sum()).backward()


def products(dtype: torch.dtype) -> None:
    """The kernels around matrix products, at small widths: their launches do not depend on the model's."""
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    for nested in (True, False):
        lora = {"lora_a": torch.randn(8, 64, requires_grad=True), "lora_b": torch.randn(128, 8, requires_grad=True)}
        gate, up = (Projection(*nf4(128, 64, nested), **lora, scale=2.0) for _ in range(2))
        kernels.lora_mlp(x, (gate, up), Projection(*nf4(64, 128, nested)), x).sum().backward()
    for bias in (None, torch.randn(512, dtype=dtype)):
        weight = torch.randn(512, 64, dtype=dtype, requires_grad=bias is None)
        for entropy, entropy_grad in ((False, False), (True, False), (True, True)):
            options = {"bias": bias, "temperature": 0.7, "entropy": entropy, "vocab_size": 500}
            options |= {"entropy_grad": entropy_grad}
            out = kernels.linear_logprob(x, weight, torch.randint(500, (3,)), **options)
            (sum(out) if entropy_grad else out[0] if entropy else out).sum().backward()


def decoding(rows: int, heads: int, kv_heads: int, vocabulary: int, dtype: torch.dtype, ranks=(16,)) -> None:
    """The kernels of a decoding step for some rows of a model; several ranks: also in all their variants."""
    q, k, v = (torch.empty(rows, 1, n * 128, dtype=dtype).unflatten(-1, (n, 128)).transpose(1, 2)
               for n in (heads, kv_heads, kv_heads))  # fmt: skip
    cache, table = torch.empty(1, 2, rows, kv_heads, 4, 128, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    positions, (cos, sin) = torch.zeros(rows, dtype=torch.int64), torch.empty(2, rows, 1, 128, dtype=dtype)
    norms = HeadNorms(*torch.empty(2, 128, dtype=dtype), 1e-6)
    for window, each in ((None, None), (512, None), (None, norms)):
        kernels.decode_attention(q, k, v, cos, sin, cache, table, 1, positions, 1, 0.1, window, each)
    kernels.draw(torch.empty(rows, vocabulary), positions, positions)
    x = torch.randn(rows, 1, 64, dtype=dtype)
    dense = {"lora_a": torch.randn(8, 64), "lora_b": torch.randn(128, 8), "scale": 2.0}
    plain = Projection(torch.randn(128, 64, dtype=dtype), None, **dense)  # a layer left in 16 bits
    kernels.decode_linear(x, (plain,))
    kernels.decode_linear(x, (plain, Projection(*nf4(128, 64, True)), plain._replace(lora_a=None, lora_b=None)))
    for rank in ranks:
        lora = {"lora_a": torch.randn(rank, 64), "lora_b": torch.randn(128, rank), "scale": 2.0}
        parts = tuple(Projection(*nf4(128, 64, True), **lora) for _ in range(3))
        kernels.decode_linear(x, parts)
        down = {"lora_a": torch.randn(rank, 128), "lora_b": torch.randn(64, rank), "scale": 1.0}
        kernels.decode_mlp(x, parts[:2], Projection(*nf4(64, 128, True), **down), x)
        for master in (dtype, torch.float32)[: len(ranks) - 1]:  # a bias beside, and adapters in 16 bits
            one = lora | {name: lora[name].to(master) for name in ("lora_a", "lora_b")}
            first = Projection(*nf4(128, 64, True), torch.randn(128, dtype=dtype), **one)
            kernels.decode_linear(x, (first,))
            kernels.decode_linear(x, (first, first._replace(bias=None)))
            kernels.decode_linear(x, (first._replace(lora_a=None, lora_b=None), first))
            kernels.decode_linear(x, (first._replace(lora_a=None, lora_b=None),))
        lora["lora_b"] = torch.randn(256, rank)
        kernels.decode_mlp(x, (Projection(*nf4(256, 64, True), **lora),), Projection(*nf4(64, 128, True), **down), x)


def kernels_of_the_package() -> set[tuple[str, str]]:
    """Every function under @triton.jit that is launched (helpers of kernels too: see INLINED)."""
    modules = [module for name, module in sys.modules.items() if name.startswith("nbhelpers.kernels.triton.")]
    return {(fn.__name__, fn.__module__) for m in modules for fn in vars(m).values() if isinstance(fn, JITFunction)}


INLINED = {"_delta", "_head_rows", "_rotated", "_sum", "_within_fp16", "_rotate_heads", "_load", "_store",
           "_base", "_adapter", "_load_weights", "eight_weights", "_fetch", "_unnested", "_put",
           "_in_registers", "_block", "begin", "wait"}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target, launches, monkeypatch):
    dtype = TARGETS[target]
    most = nf4_few_rows.MOST_IN_REGISTERS if target == "sm_75" else nf4_few_rows.MOST_ROWS
    monkeypatch.setattr(nf4_few_rows, "serves", lambda x, parts: x.shape[0] <= most and nf4_few_rows.fits(x, parts))
    if target != "sm_75":
        for name in (
            "decode_attention",
            "decode_linear",
            "nf4_few_rows",
            "plain_few_rows",
        ):  # not functions of these names
            monkeypatch.setattr(import_module(f"nbhelpers.kernels.triton.{name}"), "tensor_cores", lambda device: True)
    monkeypatch.setattr(common, "supports_early_launch", lambda device: target == "sm_90")
    with kernels.use("triton"):
        elementwise(1536, 8960, 12, 2, dtype)  # Qwen2.5-1.5B
        elementwise(4096, 14336, 32, 8, dtype)  # Llama-3.1-8B
        elementwise(5120, 17920, 40, 10, dtype)  # Phi-4
        elementwise(5120, 17920, 40, 10, dtype, tokens=300)  # training's tiles, not decoding's
        products(dtype)
        decoding(8, 12, 2, 151936, dtype, ranks=(8, 16, 64))
        decoding(16, 12, 2, 151936, dtype)
        decoding(128, 32, 8, 128256, dtype)
        decoding(128, 40, 10, 100352, dtype)
        decoding(256, 4, 4, 1000, dtype)
    launched = {(name, module) for name, module, _ in launches}
    elsewhere = (
        {("_few_rows", plain_few_rows.__name__)}
        if target == "sm_75"
        else {("_thin", "nbhelpers.kernels.triton.decode_linear")}
    )
    left_out = {one for one in kernels_of_the_package() - launched - elsewhere if one[0] not in INLINED}
    assert not left_out, f"no launch of {left_out} above: add one"

    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    for (name, module, _), (fn, types, constants, hints, options) in launches.items():
        compiled = triton.compile(ASTSource(fn, types, constants, hints), target=gpu, options=options)
        where = f"{module}.{name} {constants} for {target}"
        assert "cubin" in compiled.asm, where
        early = constants.get("EARLY", False)
        assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == early == options.get("launch_pdl", False), where
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
