"""What the benchmarks share: small shapes, the models, what the driver says is taken, a T4 played, child processes.

A benchmark runs each case in a process of its own, which gets its job as JSON and appends its rows to a file:

    job = {"model": "phi-4", "kind": "decode", "out": str(file)}
    code = harness.run_child("benchmarks.engines", job, 240, os.environ)      # python -m benchmarks.engines --child JOB
    rows = harness.read_rows(file)
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from benchmarks import common, random_model
from nbhelpers import architecture, gpu, memory, presets
from nbhelpers.architecture import Architecture

from .timing import driver_gb as driver_gb
from .timing import timed as timed
from .timing import wait as wait

GB = architecture.GB
Job = dict[str, Any]
RESERVE = 0.15  # GB: Triton's and cuBLAS's own modules
POOL = 0.1  # GB: what torch holds beyond what it has given out


# ---- models ----


def device() -> torch.device:
    """The one GPU that a case sees, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def small(shape: Architecture) -> Architecture:
    """The same architecture at a size that a CPU runs in no time."""
    return replace(
        shape, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=320,
    )  # fmt: skip


def shape(job: Job) -> Architecture:
    """The architecture of a job's preset, `model`; small in a `quick` job."""
    real = presets.get(job["model"]).architecture
    return small(real) if job.get("quick") else real


def build(job: Job) -> random_model.Model:
    """A job's model on this card: random NF4 weights, LoRA of rank 16 on all linear layers, the card's dtype."""
    return random_model.make(shape(job), device(), gpu.compute_dtype())


@contextmanager
def checkpoint(job: Job) -> Iterator[str]:
    """Yields a folder with a bf16 checkpoint of random weights and a tokenizer, for those who load from disk."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model"
        random_model.write_checkpoint(shape(job), made, 4e9)
        yield str(made)


def kv_token_bytes(shape: Architecture, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return memory.kv_bytes_per_token(shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, dtype.itemsize)


# ---- time and memory ----


def hold(cap: float) -> float:
    """From now on this process may take at most `cap` GB of the card, its context and libraries included. Returns the
    GB that torch may give out. Call it before there is anything on the card."""
    torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")  # the context, and cuBLAS
    held = cap - driver_gb() - RESERVE
    torch.cuda.set_per_process_memory_fraction(held * GB / torch.cuda.mem_get_info()[1])
    return held - POOL


@contextmanager
def peak_driver() -> Iterator[list[float]]:
    """Yields a list whose only element is the largest driver_gb() seen, looked at every 5 ms."""
    seen, over = [driver_gb()], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            seen[0] = max(seen[0], driver_gb())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def play_t4() -> None:
    """From now on this card says that it is a T4, to torch and to us: fp16, no `tl.dot`, memory-efficient attention.

    torch.cuda.get_device_properties is the one place where the card is asked what it is: `gpu.cards`,
    `gpu.capability` and torch's own get_device_capability all go by it. Call it before anything has asked.
    """
    from triton.runtime import driver

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # 8 MB, as torch gives a T4; an H200 gets 33
    target = driver.active.get_current_target()
    driver.active.get_current_target = lambda: target  # Triton goes on compiling for the card that is there
    asked = torch.cuda.get_device_properties

    def played(device: torch.device | int | str | None = None) -> SimpleNamespace:
        real = asked(device)
        facts = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
        return SimpleNamespace(**facts | {"name": "Tesla T4 (played)", "major": 7, "minor": 5})

    torch.cuda.get_device_properties = played  # type: ignore[assignment]
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


# ---- child processes ----


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with what every benchmark in processes of its own has: --out, --join and --child."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, help="folder of the results file, instead of benchmarks/results")
    arguments.add_argument("--join", nargs="+", type=Path, help="measure nothing, put the rows of these files together")
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    return arguments


def run_child(
    module: str,
    job: Job,
    seconds: float | None,
    environment: Mapping[str, str],
    processes: int = 1,
    log: IO[str] | None = None,
) -> int | str:
    """Run `python -m module --child JOB` and wait for its end.

    Args:
        module (`str`): "benchmarks.engines". It starts in the repository root, which `-m` puts on its path. benchmarks/
            itself must never be there: transformers would take benchmarks/kernels for the hub package of that name.
        job (`dict`): What the child shall do, as JSON.
        seconds (`float`): After that it is killed; `None`: never.
        environment (`Mapping`): All of its environment.
        processes (`int`): That many of it, by torchrun.
        log (file): Where it writes, stderr too; `None`: to this process's own.

    Returns the exit code, or words for a child that was killed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", module, "--child", json.dumps(job)]
    errors = subprocess.STDOUT if log else None
    child = subprocess.Popen(
        command, cwd=common.ROOT, env=dict(environment), stdout=log, stderr=errors, process_group=0
    )
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"more than {seconds:.0f} s"
    finally:  # a process of vLLM's that outlived its parent would keep its memory
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def append_row(row: common.Row, file: str | Path) -> None:
    """Add a row to a file of JSON lines."""
    with open(file, "a") as lines:
        lines.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[common.Row]:
    """The rows that a child has appended, those before a failure too; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
