"""ggml's blocks of quantised numbers, dequantised by torch: for a card, where numpy would take minutes.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. What is computed is bit for bit what the gguf
package computes (tests/loader/test_gguf.py). On a processor its numpy is the faster of the two.

A block of B numbers takes W bytes; here they are uint8 [n, W], and come back as fp32 [n, B].
"""

from collections.abc import Callable

import torch
from torch import Tensor


def dequantise(raw: Tensor, kind: str) -> Tensor:
    """uint8 [n, W] of the type `kind` (a name of ggml's) -> fp32 [n, B]."""
    return _KINDS[kind](raw)


def _half(raw: Tensor) -> Tensor:
    """uint8 [n, 2] -> fp32 [n, 1]: a scale, stored in fp16."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """uint8 [..., m] -> [..., 2, m]: the low halves of the bytes, then the high ones."""
    return torch.stack((raw & 15, raw >> 4), -2)


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda raw: raw.view(dtype).float()


def _q8_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * raw[:, 2:].view(torch.int8).float()


def _q4_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * (_nibbles(raw[:, 2:]).flatten(1).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * _nibbles(raw[:, 4:]).flatten(1).float() + _half(raw[:, 2:4])


def _fifth_bits(raw: Tensor) -> Tensor:
    """uint8 [n, 4] -> [n, 32]: bit i is number i's fifth, worth 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)
    return ((raw.unsqueeze(-1) >> shifts & 1) << 4).flatten(1)


def _q5_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * ((_nibbles(raw[:, 6:]).flatten(1) | _fifth_bits(raw[:, 2:6])).float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    q = _nibbles(raw[:, 8:]).flatten(1) | _fifth_bits(raw[:, 4:8])
    return _half(raw[:, :2]) * q.float() + _half(raw[:, 2:4])


def _scales_and_minima(raw: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [n, 16] -> fp32 [n, 8, 1], twice: the step and the offset of each 32 numbers of a Q4_K or Q5_K block.

    Two fp16 scales, then 8 + 8 numbers of 6 bits in 12 bytes: the first four of each in the low bits of 4 bytes each,
    of the last four 4 bits in the last 4 bytes and 2 bits at the top of the first 8.
    """
    first, second, last = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scale = torch.cat((first & 63, last & 15 | first >> 6 << 4), 1)
    offset = torch.cat((second & 63, last >> 4 | second >> 6 << 4), 1)
    return (_half(raw[:, :2]) * scale.float()).unsqueeze(-1), (_half(raw[:, 2:4]) * offset.float()).unsqueeze(-1)


def _q4_k(raw: Tensor) -> Tensor:
    scale, offset = _scales_and_minima(raw)
    q = _nibbles(raw[:, 16:].unflatten(1, (4, 32))).flatten(1, 2)
    return (scale * q.float() - offset).flatten(1)


def _q5_k(raw: Tensor) -> Tensor:
    scale, offset = _scales_and_minima(raw)
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device).unsqueeze(-1)
    fifth = (raw[:, None, 16:48] >> shifts & 1) << 4
    q = _nibbles(raw[:, 48:].unflatten(1, (4, 32))).flatten(1, 2) | fifth
    return (scale * q.float() - offset).flatten(1)


def _q6_k(raw: Tensor) -> Tensor:
    low = _nibbles(raw[:, :128].unflatten(1, (2, 64))).unflatten(-1, (2, 32)).flatten(2, 3)  # [n, 2, 4, 32]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=raw.device).unsqueeze(-1)
    high = raw[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3
    q = (low | high << 4).to(torch.int8) - 32
    scale = _half(raw[:, 208:]) * raw[:, 192:208].contiguous().view(torch.int8).float()
    return (scale.unsqueeze(-1) * q.flatten(1).unflatten(1, (16, 16)).float()).flatten(1)


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _plain(torch.float32), "F16": _plain(torch.float16), "BF16": _plain(torch.bfloat16), "Q8_0": _q8_0,
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
