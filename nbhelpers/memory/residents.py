"""The bytes that are on the card all the time: weights, adapters, gradients, the optimizer, the kernels' scratch."""

from dataclasses import dataclass

from nbhelpers import gpu
from nbhelpers.architecture import Architecture


@dataclass(frozen=True)
class Resident:
    """Bytes that are on the card all the time. Sources: Architecture counts, bitsandbytes for 8-bit Adam."""

    weights: int
    adapters: int  # fp32; 0 where every weight is trained
    gradients: int  # freed by the update: while an engine generates they are not there
    optimizer: int
    scratch: int  # the one buffer for dequantised weights

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer + self.scratch

    @property
    def generating(self) -> int:
        """Bytes while an engine generates."""
        return self.total - self.gradients


def scratch_bytes(a: Architecture, width: int = 2) -> int:
    """Bytes of the kernels' scratch for dequantised weights of `width` bytes a number.

    It takes the largest matrix or a piece of it, or several matrices that read the same input if they are small.
    """
    sizes = {m.name: m.out_features * m.in_features * width for m in a.linears()}
    joined = [sum(sizes[name] for name in names) for names in (a.family.qkv, a.family.gate_up)]
    one = min(max(sizes.values()), gpu.DEQUANTIZE_BYTES)
    return max(size for size in (one, *joined) if size <= gpu.DEQUANTIZE_BYTES)


# for each trained number: two moments, and in 8 bits a scale for each 256 of them
OPTIMIZER_BYTES = {"adamw_8bit": 2.04, "adamw": 8.0}


def resident(
    a: Architecture,
    quantization: str,
    rank: int,
    targets: tuple[str, ...] | None,
    optimizer: str,
    width: int = 2,
    trained_width: int = 4,
) -> Resident:
    """What a model with an adapter keeps on the card.

    Args:
        a (`Architecture`): The model's shapes.
        quantization (`str`): "dynamic", "nf4" or "none".
        rank (`int`): Of the LoRA; 0: every weight is trained.
        targets (`tuple[str, ...]`, *optional*): The layers with a LoRA; None: all linear ones.
        optimizer (`str`): A key of OPTIMIZER_BYTES.
        width (`int`): Bytes of a frozen 16- or 32-bit number.
        trained_width (`int`): Bytes of a weight where every weight is trained.
    """
    state = OPTIMIZER_BYTES[optimizer]
    if rank == 0:
        numbers = a.parameters()
        return Resident(trained_width * numbers, 0, trained_width * numbers, round(state * numbers), 0)
    numbers = a.lora_parameters(rank, targets)
    scratch = 0 if quantization == "none" else scratch_bytes(a, width)
    return Resident(a.weight_bytes(quantization, width), 4 * numbers, 4 * numbers, round(state * numbers), scratch)
