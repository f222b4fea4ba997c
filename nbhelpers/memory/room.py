"""The bytes of one device and who may take how many of them: every share and every reserve stands here.

    room = Room(device, budget_gb=15)
    room.for_step()                 # what the work of the training half may take
    room.for_keys_and_values()      # what the graph engine's cache may take

The shares are plain arithmetic on free bytes, without torch, so that the planner asks what step and engines ask.
GB is 10^9 bytes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from nbhelpers.architecture import GB

if TYPE_CHECKING:
    import torch

# What of a card is not there for torch's own allocations; to be measured again on a new kind of card.
CONTEXT_GB = 0.55  # CUDA context, cuBLAS workspaces
FRAGMENTED = 0.03  # share of the rest that is lost between the allocator's blocks

STEP_RESERVE = 0.05  # share of the free bytes that the step leaves alone: other libraries, fragmentation
# Out of memory: the step goes on with SHRINK of its bytes, unless they are below LEAST_SHARE of the first already.
SHRINK, LEAST_SHARE = 0.8, 0.55

# Of what is free when a generation begins, keys and values get this share, or all but BESIDE_BYTES if that is more:
# activations of prompts, one dequantised weight and the graphs' own memory need at most that much.
KV_SHARE, BESIDE_BYTES = 0.7, 0.8e9
# Of what is free beyond that, the piece of a long text that is computed at a time: few pieces are quicker.
PIECE_SHARE = 0.7
VLLM_KV_SHARE = 0.6  # vLLM's activations, graphs and LoRA buffers take the rest
CPU_BYTES = 2e9  # counts as free on a CPU


def step_budget(free_bytes: float, within: float = float("inf"), coming: float = 0) -> float:
    """Bytes that the work of the training half may take; below 0 if there are none.

    Args:
        free_bytes (`float`): Bytes that the device has left.
        within (`float`): Bytes that the process's own budget has left. It is exact, so no reserve is taken off it.
        coming (`float`): Bytes that will be taken for good beside the work, such as gradients.
    """
    return min(free_bytes * (1 - STEP_RESERVE), within) - coming


def kv_budget(free_bytes: float) -> int:
    """Bytes for the graph engine's keys and values when `free_bytes` are free."""
    return int(max(KV_SHARE * free_bytes, free_bytes - BESIDE_BYTES))


def long_text_budget(free_bytes: float) -> float:
    """Bytes for the activations of a piece of a long text when `free_bytes` are free beside all keys and values."""
    return max(0.0, PIECE_SHARE * (free_bytes - BESIDE_BYTES))


def idle_bytes(device: "torch.device") -> int:
    """Bytes that torch has reserved on a GPU and no tensor uses now."""
    import torch

    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def vllm_kv_budget(free_bytes: float) -> int:
    """Bytes for vLLM's keys and values when `free_bytes` are free."""
    return int(VLLM_KV_SHARE * free_bytes)


class Reserved(NamedTuple):
    """Bytes of others that torch's own counters do not tell."""

    handed_back: int = 0  # torch counts them as allocated, and a sleeping engine has given them back to the driver
    coming: float = 0  # others will allocate them for good, such as an optimizer in its first update


class Room:
    """What this process may still allocate on one device.

    Args:
        device (`torch.device`): On a CPU nothing is counted: `for_step` knows the budget alone, `free` is CPU_BYTES.
        budget_gb (`float`, *optional*): What torch may allocate in this process in all, GB; on a CPU what the step's
            work may take. None: what the card has.
        reserved (`Callable[[], Reserved]`): Asked each time.
    """

    def __init__(
        self, device: "torch.device", budget_gb: float | None = None, reserved: Callable[[], Reserved] = Reserved
    ):
        self.device, self.budget_gb, self.reserved = device, budget_gb, reserved
        self.share = 1.0  # of its bytes that the step takes; less once memory has run out

    def free(self) -> float:
        """Bytes that can be allocated now, the budget respected."""
        return CPU_BYTES if self.device.type != "cuda" else min(self._left())

    def for_step(self, coming: float = 0) -> float:
        """Bytes that the step's work may take on top of what is allocated now, `coming` bytes of its own put aside."""
        if self.device.type != "cuda":
            return float("inf") if self.budget_gb is None else self.budget_gb * GB * self.share
        return step_budget(*self._left()) * self.share - self.reserved().coming - coming

    def for_keys_and_values(self) -> int:
        """Bytes that the graph engine's keys and values may take."""
        return kv_budget(self.free())

    def for_long_text(self) -> float:
        """Bytes that the activations of a piece of a long text may take; 0 on a CPU, where nothing is counted."""
        return long_text_budget(self.free()) if self.device.type == "cuda" else 0.0

    def shrink(self) -> bool:
        """Memory has run out: the step gets less from now on. False if it has little already, and nothing changes."""
        if self.share < LEAST_SHARE:
            return False
        self.share *= SHRINK
        return True

    def _left(self) -> tuple[float, float]:
        """(bytes that the card has left for this process, bytes that the budget has left), both at least 0.

        The first: what is free, within the process's share of the card (torch.cuda.set_per_process_memory_fraction),
        and what torch has reserved and does not use.
        """
        import torch

        handed_back = self.reserved().handed_back
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device) - handed_back
        allocated = torch.cuda.memory_allocated(self.device) - handed_back
        capped = torch.cuda.get_per_process_memory_fraction(self.device) * total - reserved
        left = min(free, capped) + reserved - allocated
        within = float("inf") if self.budget_gb is None else self.budget_gb * GB - allocated
        return max(0.0, left), max(0.0, within)
