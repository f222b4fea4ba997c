"""The fused kernels against eager torch, torch.compile, Liger and the bytes that have to move.

    python -m benchmarks.kernels --check   first every kernel against fp64 in bf16 and fp16, then the timings
    python -m benchmarks.kernels --profile also where the time of a decoder layer goes, kernel by kernel
    python -m benchmarks.kernels --quick   tiny shapes on a CPU, Triton interpreted: does the script run at all?

Writes benchmarks/results/kernels.json (and $OUT/kernels.json), after each section, so that a crash loses little. With
--only SECTION ... the other rows of a file from the same host stay; --join FILE ... puts files together.

How it measures. Training (8 x 1,024 tokens): CUDA events around one call, the L2 cache overwritten before each, the
median. `forward` is without autograd; `forward+backward` takes both, since backward alone cannot be repeated where it
writes over what was kept. `peak` is the most memory above what was there before, results included.

Element-wise forward+backward and decoding (8 rows) are shorter than autograd's and Python's work around them. There 20
calls are captured in a CUDA graph and replayed, for every contestant alike, and the time per call is the kernels' own
(rows with "method": "cuda graph"); `forward+backward/eager_launch` is ours launched from Python, as in training.
Between two calls the graph reads a buffer larger than the L2 and the time of these reads alone is subtracted, except
for element-wise kernels in decoding, which find their data in the cache there as they do in a model.

`floor` is the bytes that must be read and written once, at the bandwidth of a large copy on this card (so a cached
kernel may beat it); `cublas` is the bare 16-bit matrix products of an operation. torch.compile of LoRA layers is timed
for one model: compiling takes long.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks import common


def measure_all(args: argparse.Namespace) -> list[str]:
    """The checks and sections that the arguments name; returns what failed."""
    import torch  # and all that follows: not before main() has set the environment

    from nbhelpers import kernels

    from . import check, measure, sections

    torch.manual_seed(0)
    chosen = set(args.only or sections.SECTIONS.keys() - {"profile"})
    chosen |= {name for name in ("check", "profile") if vars(args)[name] or args.quick}
    begin = time.perf_counter()
    run = sections.Run(args.quick, keep=bool(args.only))
    with kernels.use("triton"):
        if "check" in chosen:
            measure.attempt("check", check.run, measure.DEVICE, args.quick, measure.row, measure.FAILED)
            run.write()
        run.speed = measure.bandwidth()
        for name in [name for name in sections.SECTIONS if name in chosen]:
            print(f"---- {name}, {time.perf_counter() - begin:.0f} s so far", flush=True)
            measure.attempt(name, sections.SECTIONS[name], run)
            if measure.DEVICE.type == "cuda":
                torch.cuda.empty_cache()
            run.write()
    print(f"{len(measure.ROWS)} rows, {time.perf_counter() - begin:.0f} s, {len(measure.FAILED)} failures")
    return measure.FAILED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--join", nargs="+", type=Path, help="measure nothing, put the rows of these files together")
    parser.add_argument("--only", nargs="*", help="sections: check elementwise lora few_rows logprob layer profile")
    args = parser.parse_args()
    if args.join:
        common.join("kernels", args.join)
        return
    if args.quick:  # Triton and torch read it once, when they are imported
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if failed := measure_all(args):
        sys.exit("\n".join(["FAILED", *failed]))


if __name__ == "__main__":
    main()
