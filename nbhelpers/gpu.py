"""The GPU of this process: which it is, what it computes in, how much of its memory is free."""

import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Scratch buffers of the kernels, which the planner counts too. NF4 weights are dequantised this many bytes at a time:
# small ones stacked, a large one in blocks of rows (Phi-4's gate and up together would take 367 MB). Smaller blocks
# mean more launches, and with short batches the GPU would wait for Python.
DEQUANTIZE_BYTES = 2**27
LOGITS_BYTES = 263_000_000  # of linear_logprob: 1,024 tokens x 128,256 words in 16 bits

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # how torch is to allocate; the old name too


@dataclass(frozen=True)
class Card:
    """One GPU. `total` in bytes; `capability` is CUDA's, (7, 5) for a T4."""

    name: str
    total: int
    capability: tuple[int, int]


def cards() -> list[Card]:
    """The CUDA GPUs that this process sees; empty without any."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Card(p.name, p.total_memory, (p.major, p.minor)) for p in properties]


def free_bytes(index: int) -> int:
    """Bytes that no process uses on GPU `index`. Ask for your own card only: this creates a CUDA context, which takes
    some hundred MB of it."""
    import torch

    return torch.cuda.mem_get_info(index)[0]


def device() -> "torch.device":
    """What this process works on: its own GPU of several (LOCAL_RANK), or the CPU."""
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cards() else torch.device("cpu")


def card(index: int | None = None) -> Card | None:
    """The GPU `index`, by default the one that `device()` names; None without a GPU."""
    every = cards()
    index = int(os.environ.get("LOCAL_RANK", 0)) if index is None else index
    return every[index] if index < len(every) else None


@cache
def capability(device: "torch.device") -> tuple[int, int]:
    """The card's compute capability; (0, 0) where there is none."""
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def compute_dtype() -> "torch.dtype":
    """What to compute in: bfloat16 from compute capability 8.0, float16 below (a T4), float32 on a CPU.

    torch.cuda.is_bf16_supported() is not asked: it says yes on a T4, where bf16 is emulated.
    """
    import torch

    own = card()
    if own is None:
        return torch.float32
    return torch.bfloat16 if own.capability >= (8, 0) else torch.float16


def grow_blocks(yes: bool = True) -> None:
    """Whether torch's CUDA allocator lets its blocks grow ("expandable segments") instead of allocating new ones.

    Generation and training take turns in the same memory: blocks that grow leave it less fragmented for the other.
    vLLM's sleep mode does not work with it: after grow_blocks(False) it cannot be turned on again in this process.
    Where the user has set PYTORCH_ALLOC_CONF, that stays.
    """
    import torch

    if torch.cuda.is_available() and not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        setting = f"expandable_segments:{yes}"
        torch._C._accelerator_setAllocatorSettings(setting)
        if not yes:
            os.environ[ALLOCATOR_VARIABLES[0]] = setting
