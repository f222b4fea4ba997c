"""Seconds of a call and GB of a card, with torch alone: ratios/cases.py measures other trees with it."""

import time
from collections.abc import Callable
from typing import Any

import torch

GB = 1e9


def wait() -> None:
    """Until the GPU has done all that was asked of it; nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable, *args: Any) -> float:
    """Seconds of `call(*args)`, until the GPU is done with it."""
    wait()
    start = time.perf_counter()
    call(*args)
    wait()
    return time.perf_counter() - start


def driver_gb() -> float:
    """Memory in use on the card, whoever uses it: run it alone. GB; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GB
