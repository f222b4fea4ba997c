"""A decoding step: one token for each of a few rows, without gradients, in as few launches as can be.

    embed            the last tokens' embeddings, and cosines and sines of their positions
    decode_linear    Q, K and V, or other layers that read the same
    decode_attention over a row's keys and values, which the new token's join
    decode_out       the output projection, added to what it read, and the norm behind it
    decode_mlp       likewise for a whole MLP
    decode_head      the words' logits
    append_drawn     a token for each row, drawn from its logits, and all that follows from it
    append           the same for tokens that were chosen elsewhere: greedily, or behind filters

The rows' state and the results stay where they are, so that a captured CUDA graph can be replayed: `Rows`.
"""

from types import ModuleType

from torch import Tensor
from torch.cuda import device_of

from . import _for, reference, reference_step
from .eight_bits import EightBits
from .reference import HeadNorms, Projection
from .reference_step import LEFT, POSITION, SEED, TOKEN, WRITTEN, Rows, advance

__all__ = [
    "LEFT", "POSITION", "SEED", "TOKEN", "WRITTEN", "Rows", "advance", "append", "append_drawn", "attention_splits",
    "decode_attention", "decode_head", "decode_linear", "decode_mlp", "decode_out", "embed",
]  # fmt: skip


def _step(x: Tensor) -> ModuleType:
    """The implementation that serves x."""
    return reference_step if (found := _for(x)) is reference else found


def embed(rows: Rows, weight: Tensor, angles: Tensor, table: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """A step begins: `rows.tick` grows by one.

    Args:
        rows (`Rows`): The last token of each is embedded, and its position looked up.
        weight (`Tensor`): [V, H], the embedding.
        angles (`Tensor`): [length, D] in weight's dtype, of `eight_bits.angles_of`; no position is beyond.
        table (`Tensor`): As for `decode_attention`; the Triton kernel reads the address of `angles` there.
        half (`int`): Frequencies of the rotation, R / 2.

    Returns x [B, 1, H] and the cosines and sines [B, 1, R], each frequency twice, as for `rope`.
    """
    with device_of(weight):
        return _step(weight).embed(rows, weight, angles, table, half)


def append_drawn(rows: Rows, logits: Tensor, temperature: float) -> None:
    """`append` of what `kernels.draw` draws from logits / temperature for the rows' seeds and their tokens so far.

    Args:
        rows (`Rows`): B of them.
        logits (`Tensor`): fp32 [B, V].
        temperature (`float`): Above 0.
    """
    with device_of(logits):
        _step(logits).append_drawn(rows, logits, temperature)


def append(rows: Rows, token: Tensor, logp: Tensor) -> None:
    """Write a step's tokens to row `tick - 1` of the results, and bring the state up to date as `advance` does.

    Args:
        rows (`Rows`): B of them.
        token (`Tensor`): int64 [B].
        logp (`Tensor`): fp32 [B], their log-probabilities.
    """
    with device_of(logp):
        _step(logp).append(rows, token, logp)


def attention_splits(x: Tensor, rows: int, heads: int, kv_heads: int, longest: int) -> int:
    """How many parts `decode_attention` cuts each row's positions into; a captured CUDA graph keeps their number.

    Args:
        x (`Tensor`): Any, on the device.
        rows (`int`): B.
        heads (`int`): Of q.
        kv_heads (`int`): Of the cache.
        longest (`int`): As for `decode_attention`; or the window, where that is shorter.

    Returns 1 in torch.
    """
    return _step(x).attention_splits(x.device, rows, heads, kv_heads, longest)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, table: Tensor,
                     layer: int, positions: Tensor, longest: int, scale: float, window: int | None = None,
                     norms: HeadNorms | None = None, eight: EightBits | None = None) -> Tensor:  # fmt: skip
    """Attention of one new token per row over that row's KV cache, into which the token's K and V are written first.

    Args:
        q (`Tensor`): [B, heads, 1, D], not rotated yet.
        k (`Tensor`): [B, kv heads, 1, D], not rotated yet.
        v (`Tensor`): [B, kv heads, 1, D].
        cos (`Tensor`): [1 or B, 1, R] as for `rope`.
        sin (`Tensor`): Like cos.
        cache (`Tensor`): [layers, 2, rows, kv heads, length, D] with B <= rows; K and V are written in place.
        table (`Tensor`): int64 [6], the cache's address and its strides of layer, row and head in elements, then the
            addresses of `eight`'s scales, or 0, and of the positions' angles. The Triton kernel reads these, not the
            tensors, so that a captured CUDA graph stays valid when the cache is reallocated.
        layer (`int`): Index into the cache's first dimension.
        positions (`Tensor`): int64 [B], each token's position in its row.
        longest (`int`): Greater than every position. torch reads this many positions; Triton reads each row up to its
            own position, in `attention_splits` parts.
        scale (`float`): Multiplies q K^T.
        window (`int`, *optional*): How many positions a token attends to, itself included.
        norms (`HeadNorms`, *optional*): RMSNorms that the heads of q and k go through before they are rotated.
        eight (`EightBits`, *optional*): Of a cache in int8.

    Returns [B, 1, heads * D].
    """
    with device_of(q):
        return _step(q).decode_attention(
            q, k, v, cos, sin, cache, table, layer, positions, longest, scale, window, norms, eight
        )


def decode_linear(x: Tensor, parts: tuple[Projection, ...]) -> tuple[Tensor, ...]:
    """`lora_linear_group` for a decoding step: few rows, no gradient, at most three parts.

    Args:
        x (`Tensor`): [..., in].
        parts (`tuple[Projection, ...]`): One to three, each with the same `in`.

    Returns [..., out] per part, in x's dtype. The LoRA term is added in fp32; whether the base product is rounded to
    x's dtype before depends on which kernel computes it.
    """
    with device_of(x):
        return _step(x).decode_linear(x, parts)


def decode_out(x: Tensor, part: Projection, residual: Tensor, norm: tuple[Tensor, float]) -> tuple[Tensor, Tensor]:
    """s = residual + `decode_linear`(x, (part,)), and `rms_norm` of s by norm's weight [H] and eps: both [..., H]."""
    with device_of(x):
        return _step(x).decode_out(x, part, residual, norm)


def decode_mlp(
    x: Tensor, gate_up: tuple[Projection, ...], down: Projection, residual: Tensor, norm: tuple[Tensor, float]
) -> tuple[Tensor, Tensor]:
    """`lora_mlp` for a decoding step, without a gradient: s = residual + down(swiglu(gate(x), up(x))).

    Args:
        x (`Tensor`): [..., H].
        gate_up (`tuple[Projection, ...]`): Two projections H -> I, or one H -> 2 I in Phi-3's layout.
        down (`Projection`): I -> H.
        residual (`Tensor`): [..., H].
        norm (`tuple[Tensor, float]`): Weight [H] and eps of an RMSNorm.

    Returns s in residual's dtype, and `rms_norm` of s: both [..., H].
    """
    with device_of(x):
        return _step(x).decode_mlp(x, gate_up, down, residual, norm)


def decode_head(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in fp32, never rounded to 16 bits: near 16, bf16's steps are 0.06.

    Args:
        x (`Tensor`): [B, H], of the last norm.
        weight (`Tensor`): [V, H] in x's dtype.

    Returns [B, V].
    """
    with device_of(x):
        return _step(x).decode_head(x, weight)
