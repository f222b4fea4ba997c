"""How the few-row NF4 product is best cut, and up to how many rows it beats its rivals.

    python benchmarks/engines_tune.py

Prints microseconds a launch for the groups of one layer, weights cold (16 copies in turn, more than the second-level
cache holds), captured as a CUDA graph. Then set UNROLL, PROGRAMS and MOST_ROWS in nbhelpers/kernels/nf4_rows.py.
"""

import sys
from pathlib import Path

# this folder's kernels.py would pass for the hub package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parents[1])

import time  # noqa: E402
from itertools import product  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from nbhelpers.kernels import Projection, dequantize_nf4, nf4_rows  # noqa: E402
from nbhelpers.kernels.nf4 import matmul_few_rows  # noqa: E402

GROUPS = {  # outputs of the parts, inputs
    "1.5b qkv": ((1536, 256, 256), 1536), "1.5b o": ((1536,), 1536),
    "1.5b gate+up": ((8960, 8960), 1536), "1.5b down": ((1536,), 8960),
    "8b qkv": ((4096, 1024, 1024), 4096), "8b gate+up": ((14336, 14336), 4096), "8b down": ((4096,), 14336),
}  # fmt: skip
COPIES = 16


def weights(outs, width):
    from bitsandbytes.functional import quantize_4bit

    def one(out):
        dense = torch.randn(out, width, device="cuda", dtype=torch.bfloat16)
        return Projection(*quantize_4bit(dense, quant_type="nf4", compress_statistics=True))

    return [tuple(one(out) for out in outs) for _ in range(COPIES)]


def microseconds(call, groups) -> float:
    """Of call(group), over all copies, as a graph."""
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


def main():
    for name, (outs, width) in GROUPS.items():
        groups = weights(outs, width)
        for rows in (8, 32, 64, 128):
            x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
            found = {
                "bitsandbytes": microseconds(
                    lambda g, x=x: [matmul_few_rows(x, p.weight, p.quant_state) for p in g], groups
                ),
                "dequantise": microseconds(
                    lambda g, x=x: [F.linear(x, dequantize_nf4(p.weight, p.quant_state, x.dtype)) for p in g], groups
                ),
            }
            for unroll, programs in product((1, 2, 4), (264, 528, 1056)):
                nf4_rows.UNROLL, nf4_rows.PROGRAMS = unroll, programs
                key = f"{unroll}/{programs}"
                found[key] = microseconds(lambda g, x=x: nf4_rows.few_rows_product(x, g), groups)
            print(f"{name} x{rows}: " + "  ".join(f"{k} {v:.1f}" for k, v in found.items()), flush=True)
        del groups
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
