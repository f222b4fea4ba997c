"""What launches share: sizes, what the card has tensor cores for, and launches that overlap.

`ceil_div` and `power_of_2` do what triton.cdiv and triton.next_power_of_2 do at 2 us per call, because those also serve
inside kernels. A decoder layer makes about a hundred such calls, and a small model waits for Python, not for the GPU.

Launches that begin before the one ahead ends (CUDA's "programmatic dependent launch", from Hopper on).

A step of decoding is some hundred short kernels, each waiting for the one ahead. Launched so, a kernel is on the
multiprocessors already when the one ahead ends, and may have read what no kernel writes, the weights: it must `wait`
before it reads anything else, and before it writes. `begin` lets the next kernel do likewise; as every kernel waits for
the one ahead to end, all before that have ended too. A captured CUDA graph keeps this.
"""

import torch
import triton
import triton.language as tl
from triton.backends.nvidia.compiler import CUDAOptions

from nbhelpers.gpu import capability


def ceil_div(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def tensor_cores(device: torch.device) -> bool:
    """Whether Triton's tl.dot has tensor cores there: from Ampere on; below, it becomes scalar multiplications."""
    return capability(device) >= (8, 0)


def turing(device: torch.device) -> bool:
    """Whether the card has tensor cores at all that inline PTX can use: a T4's, or later ones."""
    return capability(device) >= (7, 5)


def three(values, filler) -> tuple:
    """The values, filled up to three: a launch for one, two or three layers takes three of everything."""
    return (*values, *[filler] * (3 - len(values)))


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
