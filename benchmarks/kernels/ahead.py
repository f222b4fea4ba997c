"""Every Triton kernel of the package, compiled ahead of time for a card that is not there.

The public functions run on CPU tensors of the models' true widths with the launch replaced: instead of running, each
launch's kernel is noted with exactly the arguments that it was launched with, and can be compiled for the target. What
comes out of the functions is then noise; what is looked at is the compiler's output. (Not in Triton's interpreter.)
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from nbhelpers import kernels
from nbhelpers.kernels import EightBits, HeadNorms, Projection, decode_step, eight_bits
from nbhelpers.kernels.adapters import by_layer
from nbhelpers.kernels.taken import Taken, take
from nbhelpers.kernels.triton import common, nf4_few_rows

TARGETS = {"sm_75": torch.float16, "sm_80": torch.bfloat16, "sm_90": torch.bfloat16}
POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8",
           torch.int64: "*i64", torch.int32: "*i32"}  # fmt: skip


class Launch(NamedTuple):
    """What Triton's own launcher derives from the arguments of one launch."""

    fn: JITFunction
    types: dict[str, str]
    constants: dict[str, Any]
    hints: dict[tuple[int, ...], Any]  # divisibility by 16
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """ "rms_norm._forward": the file, and the function in it."""
        return f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"

    def compile(self, target: str) -> Any:
        """For "sm_75" or another of TARGETS."""
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        source = ASTSource(self.fn, self.types, self.constants, self.hints)
        return triton.compile(source, target=gpu, options=self.options)


def describe(fn: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """The launch of `fn` with these arguments; keyword arguments that are no parameters stay in `options`."""
    names = [param.name for param in fn.params]
    values = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in names if name in options}
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
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
    return Launch(fn, types, constants, hints, options)


@contextmanager
def noted(target: str) -> Iterator[dict[str, Launch]]:
    """Within it launches collect instead of running, and the package believes to be on a card of this target."""
    found: dict[str, Launch] = {}
    most = nf4_few_rows.MOST_IN_REGISTERS if target == "sm_75" else nf4_few_rows.MOST_ROWS

    def launch(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = describe(fn, args, options)
        found[f"{made.name} {made[1:]}"] = made

    def serves(x: torch.Tensor, parts: Any) -> bool:
        return x.shape[0] <= most and nf4_few_rows.fits(x, parts)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", launch))
        patches.enter_context(mock.patch.object(nf4_few_rows, "serves", serves))
        patches.enter_context(mock.patch.object(common, "supports_early_launch", lambda device: target == "sm_90"))
        if target != "sm_75":
            for name in ("decode_attention", "decode_linear", "nf4_few_rows", "plain_few_rows"):
                module = import_module(f"nbhelpers.kernels.triton.{name}")  # not the function of that name
                patches.enter_context(mock.patch.object(module, "tensor_cores", lambda device: True))
        patches.enter_context(kernels.use("triton"))
        yield found


def every_launch(target: str) -> dict[str, Launch]:
    """The launches of the models' widths on a card of this target."""
    dtype = TARGETS[target]
    with noted(target) as found:
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
    return found


def nf4(rows: int, width: int, nested: bool) -> tuple[torch.Tensor, Any]:
    """A random matrix, packed."""
    from bitsandbytes import functional

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
    for shape in ((tokens, hidden), (tokens, kv_heads, 128)):
        taken = Taken.of(torch.tensor([0, *range(tokens)]), tokens)
        take(torch.empty(shape, dtype=dtype, requires_grad=True), taken).sum().backward()


def products(dtype: torch.dtype) -> None:
    """The kernels around matrix products, at small widths: their launches do not depend on the model's."""
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    for nested in (True, False):
        lora = {"lora_a": torch.randn(8, 64, requires_grad=True), "lora_b": torch.randn(128, 8, requires_grad=True)}
        gate, up = (Projection(*nf4(128, 64, nested), **lora, scale=2.0) for _ in range(2))
        kernels.lora_mlp(x, (gate, up), Projection(*nf4(64, 128, nested)), x).sum().backward()
    stacked = by_layer([[(gate, up)]], x)
    assert stacked is not None
    stacked(0)
    for bias in (None, torch.randn(512, dtype=dtype)):
        weight = torch.randn(512, 64, dtype=dtype, requires_grad=bias is None)
        for entropy, entropy_grad in ((False, False), (True, False), (True, True)):
            options = {"bias": bias, "temperature": 0.7, "entropy": entropy, "vocab_size": 500}
            options |= {"entropy_grad": entropy_grad}
            out = kernels.linear_logprob(x, weight, torch.randint(500, (3,)), **options)
            (sum(out) if entropy_grad else out[0] if entropy else out).sum().backward()


def decoding(
    rows: int, heads: int, kv_heads: int, vocabulary: int, dtype: torch.dtype, ranks: tuple[int, ...] = (16,)
) -> None:
    """The kernels of a decoding step for some rows of a model; several ranks: also in all their variants."""
    q, k, v = (torch.empty(rows, 1, n * 128, dtype=dtype).unflatten(-1, (n, 128)).transpose(1, 2)
               for n in (heads, kv_heads, kv_heads))  # fmt: skip
    cache, table = torch.empty(1, 2, rows, kv_heads, 4, 128, dtype=dtype), torch.zeros(6, dtype=torch.int64)
    positions, (cos, sin) = torch.zeros(rows, dtype=torch.int64), torch.empty(2, rows, 1, 128, dtype=dtype)
    norms = HeadNorms(*torch.empty(2, 128, dtype=dtype), 1e-6)
    for window, each in ((None, None), (512, None), (None, norms)):
        decode_step.decode_attention(q, k, v, cos, sin, cache, table, 1, positions, 1, 0.1, window, each)
    angles = torch.empty(4, 128, dtype=dtype)
    eight = EightBits(*eight_bits.quantise(cache)[1:], angles)
    biased = eight._replace(bias=torch.empty(kv_heads, 128, dtype=dtype))
    for window, each, kept in ((None, None, eight), (512, None, eight), (None, norms, eight), (None, None, biased)):
        decode_step.decode_attention(q, k, v, cos, sin, cache, table, 1, positions, 1, 0.1, window, each, kept)
    logits = torch.empty(rows, vocabulary)
    kernels.draw(logits, positions, positions)
    state, stops, tick, tokens = (torch.zeros(*size, dtype=torch.int64) for size in ((5, rows), (2,), (1,), (8, rows)))
    writing = decode_step.Rows(state, stops, tick, tokens, torch.zeros(8, rows))
    decode_step.embed(writing, torch.empty(vocabulary, heads * 128, dtype=dtype), angles, table, 64)
    for temperature in (1.0, 0.7):
        decode_step.append_drawn(writing, logits, temperature)
    decode_step.append(writing, positions, torch.empty(rows))
    x = torch.randn(rows, 1, 64, dtype=dtype)
    dense = {"lora_a": torch.randn(8, 64), "lora_b": torch.randn(128, 8), "scale": 2.0}
    plain = Projection(torch.randn(128, 64, dtype=dtype), None, **dense)  # a layer left in 16 bits
    decode_step.decode_linear(x, (plain,))
    decode_step.decode_linear(x, (plain, Projection(*nf4(128, 64, True)), plain._replace(lora_a=None, lora_b=None)))
    for rank in ranks:
        lora = {"lora_a": torch.randn(rank, 64), "lora_b": torch.randn(128, rank), "scale": 2.0}
        parts = tuple(Projection(*nf4(128, 64, True), **lora) for _ in range(3))
        decode_step.decode_linear(x, parts)
        down = {"lora_a": torch.randn(rank, 128), "lora_b": torch.randn(64, rank), "scale": 1.0}
        norm = (torch.ones(64, dtype=dtype), 1e-6)
        decode_step.decode_mlp(x, parts[:2], Projection(*nf4(64, 128, True), **down), x, norm)
        decode_step.decode_out(torch.randn(rows, 1, 128, dtype=dtype), Projection(*nf4(64, 128, True), **down), x, norm)
        for master in (dtype, torch.float32)[: len(ranks) - 1]:  # a bias beside, and adapters in 16 bits
            one = lora | {name: lora[name].to(master) for name in ("lora_a", "lora_b")}
            first = Projection(*nf4(128, 64, True), torch.randn(128, dtype=dtype), **one)
            decode_step.decode_linear(x, (first,))
            decode_step.decode_linear(x, (first, first._replace(bias=None)))
            decode_step.decode_linear(x, (first._replace(lora_a=None, lora_b=None), first))
            decode_step.decode_linear(x, (first._replace(lora_a=None, lora_b=None),))
        lora["lora_b"] = torch.randn(256, rank)
        decode_step.decode_mlp(
            x, (Projection(*nf4(256, 64, True), **lora),), Projection(*nf4(64, 128, True), **down), x, norm
        )


def kernels_of_the_package() -> set[tuple[str, str]]:
    """Every function under @triton.jit that is launched (helpers of kernels too: see INLINED)."""
    modules = [module for name, module in sys.modules.items() if name.startswith("nbhelpers.kernels.triton.")]
    return {(fn.__name__, fn.__module__) for m in modules for fn in vars(m).values() if isinstance(fn, JITFunction)}
