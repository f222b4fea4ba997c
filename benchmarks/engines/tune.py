"""How the kernels of a decoding step are best cut: the few-row NF4 product with its LoRA, and attention.

    python -m benchmarks.engines.tune --warm         compiles every variant, in as many processes as there are cores
    python -m benchmarks.engines.tune                then prints microseconds a group of layers, the best first
    python -m benchmarks.engines.tune --attention    the same for attention

Weights are cold (16 copies in turn, more than the second-level cache holds), launches captured as a CUDA graph. In
nbhelpers/kernels/triton set MOST_SPLITS and `tile` of nf4_few_rows.py, OUT_COLUMNS and OUT_WARPS of decode_linear.py,
and BLOCK, WARPS, STAGES, PROGRAMS and what `attention_splits` goes by, of decode_attention.py.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import count, product
from typing import Any

import torch

from benchmarks import common
from nbhelpers.kernels import Projection
from nbhelpers.kernels.triton import nf4_few_rows

# by their full names: the package's faces have a function under the same name
attention: Any = import_module("nbhelpers.kernels.triton.decode_attention")
linear: Any = import_module("nbhelpers.kernels.triton.decode_linear")
GROUPS = {  # outputs of the parts, inputs
    "1.5b qkv": ((1536, 256, 256), 1536), "1.5b o": ((1536,), 1536),
    "1.5b gate+up": ((8960, 8960), 1536), "1.5b down": ((1536,), 8960),
    "8b qkv": ((4096, 1024, 1024), 4096), "8b gate+up": ((14336, 14336), 4096), "8b down": ((4096,), 14336),
}  # fmt: skip


class Sweep:
    """Variants of a kernel, compiled or timed; with `of` processes that share the compiling, every `of`-th alone."""

    def __init__(self, warm: bool, share: int = 0, of: int = 1):
        self.warm, self.share, self.of = warm, share, of
        self.numbers = count()

    def mine(self) -> bool:
        """Whether the next variant is this process's."""
        return next(self.numbers) % self.of == self.share

    def run(
        self, label: str, variants: Mapping[str, Callable[[], None]], call: Callable, groups: Sequence[Any]
    ) -> None:
        """Compile each variant, or time it and print the nine best. A variant's function sets its constants."""
        times: dict[str, float] = {}
        for name, choose in variants.items():
            if not self.mine():
                continue
            choose()
            if self.warm:
                call(groups[0])
            else:
                times[name] = microseconds(call, groups)
        if times:
            best = sorted(times.items(), key=lambda item: item[1])
            print(f"{label}: " + "  ".join(f"{key} {value:.1f}" for key, value in best[:9]), flush=True)


def weights(outs: tuple[int, ...], width: int, copies: int) -> list[tuple[Projection, ...]]:
    """`copies` groups of random NF4 layers with a LoRA of rank 16, from `width` inputs to `outs` outputs."""
    from bitsandbytes.functional import quantize_4bit

    def one(out: int) -> Projection:
        dense = torch.randn(out, width, device="cuda", dtype=torch.bfloat16)
        a, b = torch.randn(16, width, device="cuda"), torch.randn(out, 16, device="cuda")
        quantised = quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        return Projection(*quantised, lora_a=a, lora_b=b, scale=1.0)

    return [tuple(one(out) for out in outs) for _ in range(copies)]


def microseconds(call: Callable, groups: Sequence[Any]) -> float:
    """Of call(group), over all groups, as a graph."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        call(groups[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for group in groups:
            call(group)
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 10 / len(groups) * 1e6


def products(sweep: Sweep) -> None:
    """The products of each group of layers, for 8, 32 and 128 rows."""

    def choose(splits: int, columns: int, warps: int) -> None:
        nf4_few_rows.MOST_SPLITS, linear.OUT_COLUMNS, linear.OUT_WARPS = splits, columns, warps

    cuts = product((4, 8, 16), (16, 32, 64), (1, 2, 4))
    variants = {"/".join(map(str, cut)): partial(choose, *cut) for cut in cuts}
    for name, (outs, width) in GROUPS.items():
        groups = weights(outs, width, 1 if sweep.warm else 16)
        for rows in (8, 32, 128):
            x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)

            def call(group: tuple[Projection, ...], x: torch.Tensor = x, gated: bool = "gate" in name) -> None:
                # decode_mlp is the gated product and the one down: there is no public name for the first alone
                linear._gated(x, group, 1.0) if gated else linear.decode_linear(x, group)

            sweep.run(f"{name} x{rows}", variants, call, groups)
        del groups
        torch.cuda.empty_cache()


def attentions(sweep: Sweep) -> None:
    """Attention of one new token for each of 8, 32 and 128 rows, 450 tokens before it."""

    def choose(block: int, warps: int, stages: int, programs: int) -> None:
        attention.BLOCK, attention.WARPS, attention.STAGES, attention.PROGRAMS = block, warps, stages, programs

    cuts = product((32, 64, 128), (2, 4), (1, 2, 3), (264, 528, 1056))
    variants = {"/".join(map(str, cut)): partial(choose, *cut) for cut in cuts}
    length = 720
    for (heads, kv_heads), rows in product(((12, 2), (32, 8)), (8, 32, 128)):
        cache = torch.zeros(16, 2, rows, kv_heads, length, 128, device="cuda", dtype=torch.bfloat16)
        q, k, v = (
            torch.randn(rows, n, 1, 128, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
        )
        tables = torch.randn(2, rows, 1, 128, device="cuda", dtype=torch.bfloat16)
        strides = cache.stride()
        table = torch.tensor([cache.data_ptr(), strides[0], strides[2], strides[3]], device="cuda")
        positions = torch.full((rows,), 450, device="cuda")
        inputs = (q, k, v, *tables, cache, table)

        def call(layer: int, inputs: tuple = inputs, positions: torch.Tensor = positions) -> None:
            attention.decode_attention(*inputs, layer, positions, length, 0.1)

        floor = rows * kv_heads * 450 * 128 * 4 / 4.2e6
        sweep.run(f"attention {heads}/{kv_heads} x{rows} (floor {floor:.1f})", variants, call, list(range(16)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--share", nargs=2, type=int, help=argparse.SUPPRESS)  # a process of --warm: which, of how many
    args = parser.parse_args()
    run = attentions if args.attention else products
    if not args.warm:
        run(Sweep(False))
    elif args.share:
        run(Sweep(True, *args.share))
    else:
        cores = os.cpu_count() or 1
        command = [sys.executable, "-m", "benchmarks.engines.tune", *sys.argv[1:], "--share"]
        children = [subprocess.Popen([*command, str(i), str(cores)], cwd=common.ROOT) for i in range(cores)]
        sys.exit(max(child.wait() for child in children))


if __name__ == "__main__":
    main()
