"""The functions of kernels/decode_step.py in plain torch: the tests' oracle and the CPU's implementation."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eight_bits
from .eight_bits import EightBits
from .reference import HeadNorms, Projection, draw, lora_linear, lora_mlp, residual_norm, rope

# of a row: the last token, its position, the request's seed, tokens written so far, and tokens still to come, which are
# 0 when the request has ended or the row is empty
TOKEN, POSITION, SEED, WRITTEN, LEFT = range(5)


class Rows(NamedTuple):
    """B rows that are being written, and where a decoding step puts what it has written: see kernels/decode_step.py."""

    state: Tensor  # int64 [5, B], see TOKEN and the others
    stops: Tensor  # int64 [stop ids]
    tick: Tensor  # int64 [1], steps that have begun: this one's results go to row tick - 1 of the next two
    tokens: Tensor  # int64 [steps, B]
    logprobs: Tensor  # fp32 [steps, B]


def embed(rows: Rows, weight: Tensor, angles: Tensor, table: Tensor | None, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """See nbhelpers.kernels.decode_step.embed."""
    rows.tick.add_(1)
    cos, sin = (angles[rows.state[POSITION], None, at : at + half].repeat(1, 1, 2) for at in (0, half))
    return F.embedding(rows.state[TOKEN, :, None], weight), cos, sin


def append_drawn(rows: Rows, logits: Tensor, temperature: float) -> None:
    """See nbhelpers.kernels.decode_step.append_drawn."""
    logits = logits / temperature if temperature != 1.0 else logits
    append(rows, *draw(logits, rows.state[SEED], rows.state[WRITTEN]))


def append(rows: Rows, token: Tensor, logp: Tensor) -> None:
    """See nbhelpers.kernels.decode_step.append."""
    rows.tokens.index_copy_(0, rows.tick - 1, token[None])
    rows.logprobs.index_copy_(0, rows.tick - 1, logp[None])
    advance(rows.state, token, rows.stops)


def advance(state: Tensor, new: Tensor, stops: Tensor) -> None:
    """Bring the state of n rows up to date with their new tokens, in place.

    A row that has ended stays as it is, and so does its slot: its last token is fed to the same position again.

    Args:
        state (`Tensor`): int64 [5, n], see TOKEN and the others.
        new (`Tensor`): int64 [n].
        stops (`Tensor`): int64 [stop ids].
    """
    token, position, _, written, left = state
    going = left > 0
    token.copy_(torch.where(going, new, token))
    position += going
    written += going
    stopped = (new[:, None] == stops).any(-1)
    left.copy_(torch.where(stopped, 0, (left - 1).clamp_(min=0)))


def attention_splits(device: torch.device, rows: int, heads: int, kv_heads: int, longest: int) -> int:
    """See nbhelpers.kernels.decode_step.attention_splits."""
    return 1


def decode_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, table: Tensor | None,
                     layer: int, positions: Tensor, longest: int, scale: float, window: int | None = None,
                     norms: HeadNorms | None = None, eight: EightBits | None = None) -> Tensor:  # fmt: skip
    """See nbhelpers.kernels.decode_step.decode_attention."""
    rows, q_heads, _, dim = q.shape
    row = torch.arange(rows, device=q.device)
    if eight is None:
        q, k = rope(q, k, cos, sin, norms)
        keys, values = cache[layer, 0, :rows], cache[layer, 1, :rows]  # [B, kv heads, length, D]
        keys[row, :, positions], values[row, :, positions] = k[:, :, 0], v[:, :, 0]
        keys, values = keys[:, :, :longest], values[:, :, :longest]
    else:
        q, k = rope(q, eight_bits.without(k, eight.bias), cos, sin, norms)
        at = (row, slice(None), positions)
        eight_bits.store(cache[layer], eight.scales[layer], at, k[:, :, 0], v[:, :, 0])
        numbers, scales = cache[layer, :, :rows, :, :longest], eight.scales[layer, :, :rows, :, :longest]
        bias = eight_bits.rotated_bias(eight.bias, eight.angles[:longest], cos.shape[-1] // 2)
        keys = eight_bits.dequantise(numbers[0], scales[0], q.dtype, bias)
        values = eight_bits.dequantise(numbers[1], scales[1], q.dtype)
    index = torch.arange(longest, device=q.device)
    mask = index <= positions[:, None]
    if window is not None:
        mask &= index > positions[:, None] - window
    # the query heads that share a key head take the place of the sequence dimension
    q = q.reshape(rows, keys.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None, None], scale=scale)
    return out.reshape(rows, 1, q_heads * dim)


def decode_linear(x: Tensor, parts: tuple[Projection, ...]) -> tuple[Tensor, ...]:
    """See nbhelpers.kernels.decode_step.decode_linear."""
    return tuple(lora_linear(x, part) for part in parts)


def decode_out(x: Tensor, part: Projection, residual: Tensor, norm: tuple[Tensor, float]) -> tuple[Tensor, Tensor]:
    """See nbhelpers.kernels.decode_step.decode_out."""
    return residual_norm(lora_linear(x, part), *norm, residual)


def decode_mlp(
    x: Tensor, gate_up: tuple[Projection, ...], down: Projection, residual: Tensor, norm: tuple[Tensor, float]
) -> tuple[Tensor, Tensor]:
    """See nbhelpers.kernels.decode_step.decode_mlp."""
    return residual_norm(lora_mlp(x, gate_up, down, residual), *norm, None)


def decode_head(x: Tensor, weight: Tensor) -> Tensor:
    """See nbhelpers.kernels.decode_step.decode_head. A CPU's own product rounds to x's dtype first."""
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x, weight).float()
