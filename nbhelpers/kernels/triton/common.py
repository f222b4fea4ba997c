"""What the launches share: sizes, which cards have tensor cores, and programmatic dependent launch.

`ceil_div` and `power_of_2` compute what triton.cdiv and triton.next_power_of_2 do at 2 us per call, because those also
work inside kernels. A decoder layer makes about a hundred such calls, and with a small model the GPU waits for Python.

Programmatic dependent launch (CUDA's term; from Hopper on) starts a kernel before the previous one ends. A decoding
step is a sequence of a hundred or more short kernels, each waiting for the one before. Launched this way, a kernel is
already resident on the multiprocessors when its predecessor ends, and may by then have read what no kernel writes, the
weights. It must `wait` before it reads anything else and before it writes. `begin` allows the next kernel to do the
same. Since every kernel waits for its predecessor to end, all earlier kernels have ended too. A captured CUDA graph
keeps this.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.nvidia.compiler import CUDAOptions

from nbhelpers.gpu import capability


def ceil_div(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def tensor_cores(device: torch.device) -> bool:
    """Whether Triton's tl.dot uses tensor cores there: from Ampere on. Below, it compiles to scalar multiplications."""
    return capability(device) >= (8, 0)


def turing(device: torch.device) -> bool:
    """Whether the card has tensor cores that inline PTX can use: a T4 (Turing) or later."""
    return capability(device) >= (7, 5)


MOST_PARTS = 3  # Q, K and V


def pad_to_three(values: Sequence[Any], filler: Any) -> tuple[Any, ...]:
    """The values, padded to three: a launch for one, two or three layers takes three of every argument."""
    return (*values, *[filler] * (3 - len(values)))


def fill_none(tensors: Sequence[Tensor | None], filler: Tensor) -> list[Tensor]:
    """The tensors, with None replaced by any other of them: a kernel's branches need pointers of one type."""
    some = next((tensor for tensor in tensors if tensor is not None), filler)
    return [(some if tensor is None else tensor).detach().contiguous() for tensor in tensors]


def in_16_bytes(x: Tensor) -> Tensor:
    """x [rows, K] in 16 bits, or a copy, whose rows a kernel can load 16 bytes at a time."""
    if x.stride(0) % 8 or x.stride(1) != 1 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


@triton.jit
def begin(EARLY: tl.constexpr):
    """Let the next kernel launch as soon as all programs of this one are running."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(EARLY: tl.constexpr):
    """Block until the previous kernel has ended and its writes are visible."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


def supports_early_launch(device: torch.device) -> bool:
    """Whether this card and this Triton support programmatic dependent launch."""
    return capability(device) >= (9, 0) and hasattr(CUDAOptions, "launch_pdl")


def early(device: torch.device, wanted: bool = True) -> dict[str, bool]:
    """Launch keywords for a kernel: a programmatic dependent launch if `wanted` and supported, else a plain one."""
    return {"EARLY": True, "launch_pdl": True} if wanted and supports_early_launch(device) else {"EARLY": False}
