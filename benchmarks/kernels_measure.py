"""Time, memory and bandwidth on a GPU, and the one form in which benchmarks/kernels.py writes its results.

On a machine without a GPU everything runs once and the numbers mean nothing: that is for trying the script.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = Path(__file__).resolve().parent / "results"
ROWS: list[dict] = []


def row(what, who, value, unit):
    ROWS.append({"what": what, "who": who, "value": float(f"{value:.5g}"), "unit": unit})
    print(f"{what:58s} {who:14s} {value:12.4f} {unit}", flush=True)


def versions():
    found = {"gpu": "none", "driver": "none", "python": platform.python_version()}
    if DEVICE.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    for name in ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel"):
        try:
            found[name] = torch.__version__ if name == "torch" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def write(keep=False):
    """The rows so far, in the one form of all results files; keep: beside other rows of an older file of this host."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = "python benchmarks/kernels.py " + " ".join(sys.argv[1:])
    host, known = versions(), {(r["what"], r["who"]) for r in ROWS}
    folders = [RESULTS] if DEVICE.type == "cuda" else []
    for folder in [*folders, *([Path(os.environ["OUT"])] if "OUT" in os.environ else [])]:
        folder.mkdir(parents=True, exist_ok=True)
        file, rows = folder / "kernels.json", list(ROWS)
        if keep and file.exists() and (old := json.loads(file.read_text()))["host"] == host:
            rows = [r for r in old["rows"] if (r["what"], r["who"]) not in known] + rows
        result = {"host": host, "date": date, "command": command.strip(), "rows": rows}
        file.write_text(json.dumps(result, indent=1) + "\n")


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(call, budget=0.15):
    """Median time of a call, each after the L2 cache has been overwritten; about `budget` seconds in all."""
    call()
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    once = time.perf_counter() - begin
    if DEVICE.type == "cpu":
        return once * 1e3
    runs = max(5, min(60, int(budget / once)))
    # 1 GB: also long enough for Python to queue the call meanwhile, so that the GPU's time is measured and not Python's
    flush = torch.empty(10**9, dtype=torch.int8, device=DEVICE)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def graph_milliseconds(call, cold=False, calls=20):
    """Time of one call in a replayed CUDA graph of `calls` of them; cold: its data are not in the L2 cache."""
    if DEVICE.type == "cpu":
        return milliseconds(call)
    if not cold:
        return replay_milliseconds([call] * calls) / calls
    buffer = torch.ones(64 * 2**20, dtype=torch.float16, device=DEVICE)
    flushes = [buffer.sum] * calls
    both = [step for flush in flushes for step in (flush, call)]
    return (replay_milliseconds(both) - replay_milliseconds(flushes)) / calls


def replay_milliseconds(calls):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2] * 3:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_gb(call):
    """(most memory above what was there before, what of it stays when the call has returned), GB of 1e9 bytes."""
    if DEVICE.type == "cpu":
        call()
        return 0.0, 0.0
    call()  # scratch buffers and library workspaces that stay exist after this
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    stays = torch.cuda.memory_allocated() - before
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 1e9, stays / 1e9


def bandwidth():
    """Bytes a second of a copy of 1 GB, read and write counted."""
    source = torch.empty(10**9 if DEVICE.type == "cuda" else 10**5, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    speed = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3
    row("host/copy/bandwidth", "copy", speed / 1e12, "TB/s")
    return speed
