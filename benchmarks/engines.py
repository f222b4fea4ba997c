"""Generation by engine on one GPU: tokens/s, seconds to the first token, memory; and whole GRPO steps under a cap.

    python benchmarks/engines.py --first      about a minute: is it right on this GPU, and one speed
    python benchmarks/engines.py              every model, graph and transformers, and the GRPO steps
    python benchmarks/engines.py --vllm       vLLM as well, where it is installed
    python benchmarks/engines.py --trl        the peer's whole GRPO step as well: stock TRL with vLLM beside it
    python benchmarks/engines.py --profile    what a step's time goes to, kernel by kernel
    python benchmarks/engines.py --quick      tiny shapes on a CPU: proves the script, writes nothing

Several calls, one after another or each on a GPU of its own, and then one file of all their rows:

    CUDA_VISIBLE_DEVICES=1 python benchmarks/engines.py --only --vllm --out runs/vllm
    python benchmarks/engines.py --join runs/vllm/engines.json runs/trl/engines.json

NF4 with a live LoRA of rank 16 on all linear layers, random weights at the real shapes, prompts of 200 tokens, 512 new
tokens without an early stop, unless a row says otherwise. tokens/s counts all new tokens of the call over all its time,
the prompts' included. Each case runs in a process of its own; results are written after each.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# this folder's kernels.py would pass for the hub package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, engines_child  # noqa: E402

MODELS = ("qwen2.5-1.5b", "llama-3.1-8b", "phi-4")
TRL = MODELS[:1]
ENVIRONMENT = {  # of a case; what the user has set stays
    "VLLM_HOST_IP": "127.0.0.1",  # the machine may have no network
    "VLLM_NO_USAGE_STATS": "1",
}
CAPS = {"qwen2.5-1.5b": 4.0, "llama-3.1-8b": 8.0, "phi-4": 12.0}  # GB of driver memory for a whole GRPO step


def jobs(args) -> list[dict]:
    """What to run, in the order of what is most wanted."""
    found = []
    for model in args.models or MODELS:
        base = {"model": model, "quick": args.quick}
        if "ready" in args.only:
            found.append({**base, "kind": "ready", "triton_cache": "cold"})
            found.append({**base, "kind": "ready", "triton_cache": "warm"})
        if "decode" in args.only:
            found.append({**base, "kind": "decode", "batches": args.batches, "profile": args.profile, "t4": args.t4})
        if "transformers" in args.only:
            found.append({**base, "kind": "transformers", "batches": [b for b in args.batches if b <= 32]})
        if "grpo" in args.only:
            cap = args.cap or CAPS[model]
            found.append({**base, "kind": "grpo", "cap": cap, "t4": args.t4, "context": args.context,
                          "steps": args.steps, "gpus": args.gpus})  # fmt: skip
        if args.vllm:
            found.append({**base, "kind": "vllm", "batches": args.batches})
    for model in (args.models or TRL) if args.trl else ():
        found.append({"model": model, "quick": args.quick, "kind": "trl", "context": args.context})
    return found


def run(job: dict, folder: Path, seconds: int) -> list[dict]:
    """One job in a process of its own; a failure is printed, and gives no rows."""
    out = folder / "rows.json"
    out.unlink(missing_ok=True)
    gpus = job.get("gpus", 1)  # and no more are seen: TRL refuses one process that sees several
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))} | os.environ
    if "triton_cache" in job:
        cache = folder / f"triton-{job['model']}"
        if job["triton_cache"] == "cold":
            shutil.rmtree(cache, ignore_errors=True)
        environment["TRITON_CACHE_DIR"] = str(cache)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    child = json.dumps({**job, "out": str(out)})
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--child", child]
    started = time.perf_counter()
    seconds *= 1 + (job["kind"] in ("vllm", "trl"))  # vLLM alone takes two minutes or more to start
    process = subprocess.Popen(command, env=environment, process_group=0)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = f"more than {seconds} s"
    finally:  # a process of vLLM's that outlived its parent would keep its memory
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(f"-- {job['kind']} {job['model']}: {time.perf_counter() - started:.0f} s, exit {code}", flush=True)
    return json.loads(out.read_text()) if out.exists() else []  # what was done before a failure counts


def save(rows: list[dict], args) -> None:
    if rows and not args.quick:
        common.write("engines", rows, args.out or common.RESULTS)
        if out := os.environ.get("OUT"):  # by its own name there too: parallel calls may share $OUT
            common.write("engines", rows, Path(out, args.out.name) if args.out else Path(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--t4", action="store_true", help="decode and GRPO steps in fp16, as a T4 would")
    parser.add_argument("--gpus", type=int, default=1, help="processes of a GRPO step, each with a GPU and 8 texts")
    parser.add_argument("--trl", action="store_true", help=f"of {', '.join(TRL)} unless --models says otherwise")
    parser.add_argument("--models", nargs="*", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batches", nargs="*", type=int, default=[8, 32, 128])
    parser.add_argument("--only", nargs="*", default=["ready", "decode", "transformers", "grpo"])
    parser.add_argument("--cap", type=float, help="GB of driver memory for the GRPO steps")
    parser.add_argument("--context", type=int, default=1024, help="tokens of prompt and completion in the GRPO steps")
    parser.add_argument("--steps", type=int, default=3, help="GRPO steps, the first of which is not timed")
    parser.add_argument("--out", type=Path, help="where engines.json is written, instead of benchmarks/results")
    parser.add_argument("--join", nargs="+", type=Path, help="measure nothing, put the rows of these files together")
    parser.add_argument("--seconds", type=int, default=240, help="limit of one case, twice that for one with vLLM")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        engines_child.main(json.loads(args.child))
        return
    if args.join:
        common.join("engines", args.join, args.out or common.RESULTS)
        return
    if args.first:
        raise SystemExit(engines_child.first(args.quick))
    if args.quick:
        args.batches = [2, 4]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(args):
            rows += run(job, Path(folder), args.seconds)
            save(rows, args)
    if rows:
        print(common.table(rows))


if __name__ == "__main__":
    main()
