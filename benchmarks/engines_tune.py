"""How the kernels of a decoding step are best cut: the few-row NF4 product with its LoRA, and attention.

    python benchmarks/engines_tune.py --warm    compiles every variant, in as many processes as there are cores
    python benchmarks/engines_tune.py           then prints microseconds a group of layers, the best first

Weights are cold (16 copies in turn, more than the second-level cache holds), launches captured as a CUDA graph. Set
MOST_SPLITS in nbhelpers/kernels/nf4_rows.py, OUT_COLUMNS and OUT_WARPS in decode_linear.py and BLOCK, WARPS, STAGES and
PROGRAMS in decode_attention.py.
"""

import sys
from pathlib import Path

# this folder's kernels.py would pass for the hub package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parents[1])

import os  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from importlib import import_module  # noqa: E402
from itertools import product  # noqa: E402

import torch  # noqa: E402

from nbhelpers.kernels import Projection
from nbhelpers.kernels.triton import nf4_few_rows  # noqa: E402

attention = import_module("nbhelpers.kernels.triton.decode_attention")
linear = import_module("nbhelpers.kernels.triton.decode_linear")
GROUPS = {  # outputs of the parts, inputs
    "1.5b qkv": ((1536, 256, 256), 1536), "1.5b o": ((1536,), 1536),
    "1.5b gate+up": ((8960, 8960), 1536), "1.5b down": ((1536,), 8960),
    "8b qkv": ((4096, 1024, 1024), 4096), "8b gate+up": ((14336, 14336), 4096), "8b down": ((4096,), 14336),
}  # fmt: skip


def weights(outs, width, copies):
    from bitsandbytes.functional import quantize_4bit

    def one(out):
        dense = torch.randn(out, width, device="cuda", dtype=torch.bfloat16)
        a, b = torch.randn(16, width, device="cuda"), torch.randn(out, 16, device="cuda")
        quantised = quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        return Projection(*quantised, lora_a=a, lora_b=b, scale=1.0)

    return [tuple(one(out) for out in outs) for _ in range(copies)]


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


def say(name: str, found: dict) -> None:
    best = sorted(found.items(), key=lambda item: item[1])
    print(f"{name}: " + "  ".join(f"{key} {value:.1f}" for key, value in best[:9]), flush=True)


def products(warm, mine):
    for name, (outs, width) in GROUPS.items():
        groups = weights(outs, width, 1 if warm else 16)
        for rows in (8, 32, 128):
            x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)

            def call(group, x=x, gated="gate" in name):
                return linear._gated(x, group, 1.0) if gated else linear._finish(x, group)

            found = {}
            for splits, columns, warps in product((4, 8, 16), (16, 32, 64), (1, 2, 4)):
                nf4_few_rows.MOST_SPLITS, linear.OUT_COLUMNS, linear.OUT_WARPS = splits, columns, warps
                if not mine():
                    continue
                if warm:
                    call(groups[0])
                else:
                    found[f"{splits}/{columns}/{warps}"] = microseconds(call, groups)
            if not warm:
                say(f"{name} x{rows}", found)
        del groups
        torch.cuda.empty_cache()


def attentions(warm, mine):
    for (heads, kv_heads), rows in product(((12, 2), (32, 8)), (8, 32, 128)):
        length = 720
        cache = torch.zeros(16, 2, rows, kv_heads, length, 128, device="cuda", dtype=torch.bfloat16)
        q, k, v = (
            torch.randn(rows, n, 1, 128, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
        )
        tables = torch.randn(2, rows, 1, 128, device="cuda", dtype=torch.bfloat16)
        strides = cache.stride()
        table = torch.tensor([cache.data_ptr(), strides[0], strides[2], strides[3]], device="cuda")
        found = {}
        for block, warps, stages, programs in product((32, 64, 128), (2, 4), (1, 2, 3), (264, 528, 1056)):
            attention.BLOCK, attention.WARPS, attention.STAGES, attention.PROGRAMS = block, warps, stages, programs
            if not mine():
                continue
            positions = torch.full((rows,), 450, device="cuda")

            def call(layer, q=q, k=k, v=v, tables=tables, cache=cache, table=table, positions=positions):
                attention.decode_attention(q, k, v, *tables, cache, table, layer, positions, 720, 0.1)

            if warm:
                call(0)
            else:
                found[f"{block}/{warps}/{stages}/{programs}"] = microseconds(call, list(range(16)))
        if not warm:
            floor = rows * kv_heads * 450 * 128 * 4 / 4.2e6
            say(f"attention {heads}/{kv_heads} x{rows} (floor {floor:.1f})", found)


def main(warm: bool, share: int = 0, of: int = 1):
    count = 0

    def mine():
        nonlocal count
        count += 1
        return count % of == share

    products(warm, mine)


if __name__ == "__main__":
    if "--warm" in sys.argv:
        cores = os.cpu_count()
        runs = [subprocess.Popen([sys.executable, __file__, "--share", str(i), str(cores)]) for i in range(cores)]
        sys.exit(max(run.wait() for run in runs))
    elif "--share" in sys.argv:
        main(True, int(sys.argv[2]), int(sys.argv[3]))
    else:
        main(False)
