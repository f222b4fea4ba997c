"""Time, memory and bandwidth on a GPU, and the rows of `python -m benchmarks.kernels`.

On a machine without a GPU everything runs once and the numbers mean nothing: that is for trying the script.
"""

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common

from . import cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ROWS: list[common.Row] = []
FAILED: list[str] = []


def row(what: str, who: str, value: float, unit: str, **more: Any) -> None:
    """One measurement, kept and printed."""
    ROWS.append(common.row(what, who, float(f"{value:.5g}"), unit, **more))
    print(f"{what:58s} {who:14s} {value:12.4f} {unit}", flush=True)


def write(keep: bool = False) -> None:
    """The rows so far into results/kernels.json (from a GPU only) and $OUT/kernels.json; keep: beside the other rows of
    an older file from this host."""
    known = {(r["what"], r["who"]) for r in ROWS}
    folders = [common.RESULTS] if DEVICE.type == "cuda" else []
    for folder in [*folders, *([Path(os.environ["OUT"])] if "OUT" in os.environ else [])]:
        file, rows = folder / "kernels.json", list(ROWS)
        if keep and file.exists() and (old := json.loads(file.read_text()))["host"] == common.host():
            rows = [r for r in old["rows"] if (r["what"], r["who"]) not in known] + rows
        common.write("kernels", rows, folder)


class Run:
    """What one call of the script measures, at which sizes.

    Args:
        quick (`bool`): Tiny shapes, for a CPU.
        keep (`bool`): `write` leaves the other rows of an older file from this host.
    """

    def __init__(self, quick: bool, keep: bool):
        self.quick, self.keep = quick, keep
        self.shapes = cases.QUICK if quick else cases.MODELS
        self.batch, self.length, self.few = (2, 4, 2) if quick else (8, 1024, 8)
        self.tokens = self.batch * self.length  # of training; `few` rows are decoding
        self.speed = 0.0  # bytes a second of a large copy on this card, once it is measured

    def compiled(self, function: Callable) -> Callable:
        """The function as torch.compile makes it."""
        return torch.compile(function, dynamic=False, backend="eager" if self.quick else "inductor")

    def write(self) -> None:
        """The rows so far: see `write` of this file."""
        write(self.keep)


def synchronize() -> None:
    """Until the GPU has done all that was asked of it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Callable, budget: float = 0.15) -> float:
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


def graph_milliseconds(call: Callable, cold: bool = False, calls: int = 20) -> float:
    """Time of one call in a replayed CUDA graph of `calls` of them; cold: its data are not in the L2 cache."""
    if DEVICE.type == "cpu":
        return milliseconds(call)
    if not cold:
        return replay_milliseconds([call] * calls) / calls
    buffer = torch.ones(64 * 2**20, dtype=torch.float16, device=DEVICE)
    flushes = [buffer.sum] * calls
    both = [step for flush in flushes for step in (flush, call)]
    return (replay_milliseconds(both) - replay_milliseconds(flushes)) / calls


def replay_milliseconds(calls: list[Callable]) -> float:
    """Median time of a CUDA graph of these calls."""
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


def kernel_times(call: Callable, steps: int = 5) -> list[tuple[str, float, float]]:
    """[(kernel, launches a call, ms a call)], the longest first, of everything that a call runs on the GPU."""
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            call()
        synchronize()
    sums: dict[str, tuple[int, float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count, total = sums.get(event.name, (0, 0.0))
            sums[event.name] = count + 1, total + event.time_range.elapsed_us()
    times = [(name, count / steps, total / steps / 1e3) for name, (count, total) in sums.items()]
    return sorted(times, key=lambda item: -item[2])


def wall_milliseconds(call: Callable, steps: int = 10) -> tuple[float, float]:
    """(time of a call, time until Python has queued it): nearly equal where Python is the limit.

    Between two calls the GPU is waited for, so that a full queue does not hold Python up.
    """
    call()
    whole, queued = [], []
    for _ in range(steps):
        synchronize()
        begin = time.perf_counter()
        call()
        queued.append(time.perf_counter() - begin)
        synchronize()
        whole.append(time.perf_counter() - begin)
    return statistics.median(whole) * 1e3, statistics.median(queued) * 1e3


def peak_gb(call: Callable) -> tuple[float, float]:
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


def bandwidth() -> float:
    """Bytes a second of a copy of 1 GB, read and write counted."""
    source = torch.empty(10**9 if DEVICE.type == "cuda" else 10**5, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    speed = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3
    row("host/copy/bandwidth", "copy", speed / 1e12, "TB/s")
    return speed


def attempt(what: str, function: Callable, *args: Any) -> Any:
    """function(*args), or None after its failure has been printed and remembered."""
    try:
        return function(*args)
    except Exception:
        FAILED.append(what)
        print(f"FAILED {what}\n{traceback.format_exc()}", flush=True)
        return None


def autocast(enabled: bool) -> AbstractContextManager:
    """16 bits where it is `enabled` and there is a GPU."""
    return torch.autocast(DEVICE.type, DTYPE) if enabled and DEVICE.type == "cuda" else nullcontext()


def both(
    contestant: Callable, case: cases.Case, grads: list[Tensor], with_autocast: bool = False
) -> tuple[Tensor, ...]:
    """Forward and backward once."""
    with autocast(with_autocast):
        outs = contestant(*case.inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    learn = [t for t in [*case.inputs, *case.parameters] if t.requires_grad]
    return torch.autograd.grad(outs, learn, grads)


GRAPH = {"method": "cuda graph"}


def train_rows(name: str, case: cases.Case, speed: float, with_autocast: bool = False, graph: bool = False) -> None:
    """forward, forward+backward and peak of every contestant of a case; graph: forward+backward as a graph's replay."""
    for who, contestant in case.contestants.items():

        def measure(who: str = who, contestant: Callable = contestant) -> None:
            with torch.no_grad(), autocast(with_autocast):
                row(f"{name}/forward", who, milliseconds(lambda: contestant(*case.inputs)), "ms")
                row(f"{name}/forward/peak", who, peak_gb(lambda: contestant(*case.inputs))[0], "GB")
                outs = contestant(*case.inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            grads = [torch.randn_like(y) for y in outs]  # of its own: Liger writes over them
            del outs
            step = partial(both, contestant, case, grads, with_autocast)
            row(f"{name}/forward+backward/peak", who, peak_gb(step)[0], "GB")
            if not graph:
                row(f"{name}/forward+backward", who, milliseconds(step), "ms")
                return
            if who == "ours":
                row(f"{name}/forward+backward/eager_launch", who, milliseconds(step), "ms")
            row(f"{name}/forward+backward", who, graph_milliseconds(step, cold=True), "ms", **GRAPH)

        attempt(f"{name} {who}", measure)
    if case.bytes_forward:
        row(f"{name}/forward", "floor", case.bytes_forward / speed * 1e3, "ms")
        row(f"{name}/forward+backward", "floor", case.bytes_both / speed * 1e3, "ms")


def decode_rows(name: str, case: cases.Case, speed: float, cold: bool = False) -> None:
    """Time of one call at 8 rows, in a CUDA graph; cold: with weights that are not in the L2 cache."""
    inputs = [t.detach() for t in case.inputs]
    for who, contestant in case.contestants.items():

        def measure(who: str = who, contestant: Callable = contestant) -> None:
            with torch.no_grad():
                row(f"{name}/decode", who, graph_milliseconds(lambda: contestant(*inputs), cold), "ms", **GRAPH)

        attempt(f"{name} decode {who}", measure)
    row(f"{name}/decode", "floor", case.bytes_forward / speed * 1e3, "ms")
