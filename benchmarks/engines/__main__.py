"""Generation by engine on one GPU: tokens/s, seconds to the first token, memory; and whole GRPO steps under a cap.

    python -m benchmarks.engines --first      about a minute: is it right on this GPU, and one speed
    python -m benchmarks.engines              every model, graph and transformers, and the GRPO steps
    python -m benchmarks.engines --only dynamic    decoding where some layers are in 16 bits, as in dynamic 4-bit
    python -m benchmarks.engines --only grpo --gpus 2    the step of two cards, and of one with half the texts
    python -m benchmarks.engines --only eight-bits    keys and values in 8 bits: right, how far off, how fast
    python -m benchmarks.engines --vllm       vLLM as well, where it is installed
    python -m benchmarks.engines --trl        the peer's whole GRPO step as well: stock TRL with vLLM beside it
    python -m benchmarks.engines --profile    what a step's time goes to, kernel by kernel
    python -m benchmarks.engines --quick      tiny shapes on a CPU: proves the script, writes nothing

Several calls, one after another or each on a GPU of its own, and then one file of all their rows:

    CUDA_VISIBLE_DEVICES=1 python -m benchmarks.engines --only --vllm --out runs/vllm
    python -m benchmarks.engines --join runs/vllm/engines.json runs/trl/engines.json

NF4 with a live LoRA of rank 16 on all linear layers, random weights at the real shapes, prompts of 200 tokens, 512 new
tokens without an early stop, unless a row says otherwise. tokens/s counts all new tokens of the call over all its time,
the prompts' included. Each case runs in a process of its own; results are written after each.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, harness
from benchmarks.harness import Job
from nbhelpers import gpu, host

from . import cases, check, eight_bits, grpo, trl

MODELS = ("qwen2.5-1.5b", "llama-3.1-8b", "phi-4")
TRL = MODELS[:1]
ENVIRONMENT = {  # of a case; what the user has set stays
    "VLLM_HOST_IP": "127.0.0.1",  # the machine may have no network
    "VLLM_NO_USAGE_STATS": "1",
}
CAPS = {"qwen2.5-1.5b": 4.0, "llama-3.1-8b": 8.0, "phi-4": 12.0}  # GB of driver memory for a whole GRPO step
KINDS = {
    "ready": cases.ready,
    "decode": cases.decode,
    "eight-bits": eight_bits.measure,
    "transformers": cases.transformers,
    "vllm": cases.vllm,
    "grpo": grpo.steps,
    "trl": trl.steps,
}


def jobs(args: argparse.Namespace) -> list[Job]:
    """What to run, in the order of what is most wanted."""
    wanted: list[Job] = []
    for model in args.models or MODELS:
        base = {"model": model, "quick": args.quick}
        if "ready" in args.only:
            wanted.append({**base, "kind": "ready", "triton_cache": "cold", "ahead": False})
            wanted.append({**base, "kind": "ready", "triton_cache": "cold"})
            wanted.append({**base, "kind": "ready", "triton_cache": "warm"})
        if "decode" in args.only:
            wanted.append({**base, "kind": "decode", "batches": args.batches, "profile": args.profile, "t4": args.t4})
        if "dynamic" in args.only:
            wanted.append({**base, "kind": "decode", "batches": args.batches, "dynamic": True})
        if "eight-bits" in args.only:
            wanted.append({**base, "kind": "eight-bits", "weights": args.weights})
        if "transformers" in args.only:
            wanted.append({**base, "kind": "transformers", "batches": [b for b in args.batches if b <= 32]})
        if "grpo" in args.only:
            job = {**base, "kind": "grpo", "cap": args.cap or CAPS[model], "t4": args.t4, "context": args.context,
                   "steps": args.steps, "kv_bits": args.kv_bits}  # fmt: skip
            if args.gpus == 1:
                wanted.append(job | ({"lengths": ["equal"]} if args.whole else {}))
            else:  # several cards, and then one with the same texts, cut as theirs were: it has room for that
                shared = {**job, "lengths": args.lengths, "shared_by": args.gpus}
                wanted += [{**shared, "gpus": n} for n in (args.gpus, 1)]
        if args.vllm:
            wanted.append({**base, "kind": "vllm", "batches": args.batches})
    for model in (args.models or TRL) if args.trl else ():
        wanted.append({"model": model, "quick": args.quick, "kind": "trl", "context": args.context})
    return wanted


def run(job: Job, folder: Path, seconds: float) -> list[common.Row]:
    """One job in a process of its own; a failure is printed, and what was done before it counts."""
    out = folder / "rows.jsonl"
    out.unlink(missing_ok=True)
    gpus = job.get("gpus", 1)  # and no more are seen: TRL refuses one process that sees several
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    environment = ENVIRONMENT | os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:gpus])}
    if "triton_cache" in job:
        cache = folder / f"triton-{job['model']}"
        if job["triton_cache"] == "cold":
            shutil.rmtree(cache, ignore_errors=True)
        environment["TRITON_CACHE_DIR"] = str(cache)
    if job["kind"] in ("vllm", "trl"):  # vLLM alone takes two minutes or more to start
        seconds *= 2
    started = time.perf_counter()
    code = harness.run_child("benchmarks.engines", {**job, "out": str(out)}, seconds, environment, processes=gpus)
    print(f"-- {job['kind']} {job['model']}: {time.perf_counter() - started:.0f} s, exit {code}", flush=True)
    return harness.read_rows(out)


def child(job: Job) -> None:
    """One case in this process: its rows go to the file `out` and to the screen."""

    def row(metric: str, value: float, unit: str, who: str = "graph", **more: Any) -> None:
        if host.is_first_process():
            harness.append_row(common.row(f"{job['model']}/{metric}", who, round(value, 4), unit, **more), job["out"])
            print(f"{job['model']}/{metric} {who} {value:,.3f} {unit} {more or ''}", flush=True)

    if torch.cuda.is_available():
        if job.get("gpus", 1) > 1:  # else not: vLLM looks whether somebody has begun with CUDA
            torch.cuda.set_device(gpu.device())
        if job.get("t4"):
            harness.play_t4()
    try:
        KINDS[job["kind"]](job, row)
    except Exception:  # its end alone: vLLM's logs are long, and this is what a reader of their last lines needs
        print(f"FAILED {job['kind']} {job['model']}:\n{traceback.format_exc()[-3500:]}", flush=True)
        raise SystemExit(1) from None


def first(quick: bool) -> int:
    """--first: the checks, then one speed. Returns how many checks failed."""

    def say(text: str) -> None:
        print(text, flush=True)

    def row(metric: str, value: float, unit: str, **more: Any) -> None:
        say(f"{metric} {value:,.3f} {unit} {more or ''}")

    dtypes = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32]
    failed = check.run(harness.device(), dtypes, quick or not torch.cuda.is_available(), say)
    failed += eight_bits.kernel(harness.device(), quick, say)
    cases.decode({"model": "qwen2.5-1.5b", "batches": [8], "quick": quick, "profile": True}, row)
    print(f"{failed} checks failed", file=sys.stderr)
    return failed


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--t4", action="store_true", help="decode and GRPO steps in fp16, as a T4 would")
    parser.add_argument("--gpus", type=int, default=1, help="GRPO by so many processes, then by one, 8 texts each")
    parser.add_argument("--lengths", nargs="*", choices=("equal", "ragged"), default=["equal", "ragged"],
                        help="of the completions where --gpus are compared, all in one process")  # fmt: skip
    parser.add_argument(
        "--whole", action="store_true", help="completions of a GRPO step end at their full length alone"
    )
    parser.add_argument("--trl", action="store_true", help=f"of {', '.join(TRL)} unless --models says otherwise")
    parser.add_argument("--models", nargs="*", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batches", nargs="*", type=int, default=[8, 32, 128])
    parser.add_argument("--kv-bits", type=int, default=16, help="of keys and values in the GRPO steps, 16 or 8")
    parser.add_argument("--weights", help="a checkpoint or GGUF file whose probabilities eight-bits compares")
    parser.add_argument("--only", nargs="*", default=["ready", "decode", "transformers", "grpo"])
    parser.add_argument("--cap", type=float, help="GB of driver memory for the GRPO steps")
    parser.add_argument("--context", type=int, default=1024, help="tokens of prompt and completion in the GRPO steps")
    parser.add_argument("--steps", type=int, default=3, help="GRPO steps; the first is not timed, the rest "
                        "are a multiple of --gpus")  # fmt: skip
    parser.add_argument("--seconds", type=int, default=240, help="limit of one case, twice that for one with vLLM")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    if args.join:
        common.join("engines", args.join, args.out or common.RESULTS)
        return
    if args.first:
        raise SystemExit(first(args.quick))
    if args.quick:
        args.batches = [2, 4]
    rows: list[common.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(args):
            if job.get("shared_by"):
                job["work_gb"] = grpo.work_gb(rows, job["model"])
            rows += run(job, Path(folder), args.seconds)
            if rows and not args.quick:
                common.publish("engines", rows + grpo.efficiencies(rows), args.out)
    shares = grpo.efficiencies(rows)
    rows += shares
    if rows:
        print(*shares, common.table(rows), sep="\n")


if __name__ == "__main__":
    main()
