"""Keys and values in 8 bits: one scale for the D numbers of a token and key head, and keys without their bias.

    numbers = round(x / scale)      scale = max |x| / 127

The bias of Qwen2.5's k_proj is hundreds of times what the weights add to it in a few channels, and would leave the
other channels no digits. It is the same for every token, so it is taken off before a key is rotated, and comes back
rotated by the key's position, exactly: R(p) (W x + b) = R(p) W x + R(p) b.

Attention reads keys and values as they are kept, those of a prompt and a token's own too, so that what is written does
not depend on where a text was cut into pieces.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class EightBits(NamedTuple):
    """What belongs to a cache of int8 numbers, as attention in one layer needs it."""

    scales: Tensor  # fp32 [layers, 2, rows, kv heads, length]
    angles: Tensor  # [length, D], of `angles_of`
    bias: Tensor | None = None  # [kv heads, D]: the layer's keys are kept without it


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> int8 [..., D] and fp32 [...], what they are multiplied by."""
    scale = x.abs().amax(-1).float() / 127
    steps = x.float() / torch.where(scale > 0, scale, 1.0)[..., None]
    return (steps + 0.5).floor_().to(torch.int8), scale


def dequantise(numbers: Tensor, scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """`quantise` undone, and a bias put back: int8 [..., D], fp32 [...], fp32 like [..., D] -> [..., D]."""
    x = numbers.float().mul_(scale[..., None])
    return (x if bias is None else x.add_(bias)).to(dtype)


def angles_of(cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """cos and sin [length, R] as `kernels.rope` takes them -> [length, D]: each frequency's cosine, each one's sine,
    and 1 for the channels that are not rotated."""
    half = cos.shape[-1] // 2
    return torch.cat((cos[:, :half], sin[:, :half], torch.ones_like(cos[:, :1]).expand(-1, dim - 2 * half)), dim=-1)


def rotated_bias(bias: Tensor | None, angles: Tensor, half: int) -> Tensor | None:
    """fp32 [heads, length, D]: R(p) b of each position p; None without a bias.

    Args:
        bias (`Tensor`, *optional*): [heads, D].
        angles (`Tensor`): [length, D], of `angles_of`.
        half (`int`): Frequencies, R / 2.
    """
    if bias is None:
        return None
    c, s = angles[:, :half].float(), angles[:, half : 2 * half].float()
    b1, b2, rest = bias.float()[:, None].split([half, half, bias.shape[-1] - 2 * half], dim=-1)
    return torch.cat((b1 * c - b2 * s, b2 * c + b1 * s, rest.expand(-1, angles.shape[0], -1)), dim=-1)


def without(k: Tensor, bias: Tensor | None) -> Tensor:
    """Keys [B, heads, S, D] that are not rotated yet, without their bias [heads, D]."""
    return k if bias is None else k - bias[:, None].to(k.dtype)


def store(numbers: Tensor, scales: Tensor, index: tuple, k: Tensor, v: Tensor) -> None:
    """Write keys (without their bias) and values at [index] of a layer's int8 [2, rows, kv heads, length, D] and fp32
    [2, rows, kv heads, length]."""
    for i, x in enumerate((k, v)):
        numbers[i][index], scales[i][index] = quantise(x)
