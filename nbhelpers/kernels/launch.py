"""Launches that begin before the one ahead ends (CUDA's "programmatic dependent launch", from Hopper on).

A step of decoding is some hundred short kernels, each waiting for the one ahead. Launched so, a kernel is on the
multiprocessors already when the one ahead ends, and may have read what no kernel writes, the weights: it must `wait`
before it reads anything else, and before it writes. `begin` lets the next kernel do likewise; as every kernel waits for
the one ahead to end, all before that have ended too. A captured CUDA graph keeps this.
"""

import torch
import triton
import triton.language as tl
from triton.backends.nvidia.compiler import CUDAOptions

from .sizes import capability


@triton.jit
def begin(EARLY: tl.constexpr):
    """The next kernel may be launched as soon as all programs of this one run."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until the kernel ahead has ended, and what it wrote can be read."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


def able(device: torch.device) -> bool:
    """Whether this card and this Triton launch so."""
    return capability(device) >= (9, 0) and hasattr(CUDAOptions, "launch_pdl")


def early(device: torch.device, wanted: bool = True) -> dict:
    """A kernel's arguments for such a launch, or for a usual one."""
    return {"EARLY": True, "launch_pdl": True} if wanted and able(device) else {"EARLY": False}
