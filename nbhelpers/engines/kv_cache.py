"""Keys and values of the rows that are being written, in slots: row i of the batch is slot i of the cache.

A token takes 28 kB in Qwen2.5-1.5B and 131 kB in Llama-3.1-8B in 16 bits (memory.kv), and about half of it in 8
(kernels.eight_bits). Beside them is one table of cosines and sines for all rows and layers, 256 bytes a position with
heads of 128 channels in 16 bits: 5 MB for 20K. The memory is allocated at the start of each stage of a generation and
freed at the end of the last one. A captured CUDA graph keeps addresses, so the kernels read those of the cache from
`table`, which never moves.
"""

import math
from collections.abc import Callable
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nbhelpers import kernels
from nbhelpers.gpu import capability
from nbhelpers.kernels import EightBits, decode_step, eight_bits
from nbhelpers.kernels.decode_step import Rows
from nbhelpers.memory.kv import kv_bytes_per_token

from .forward import Decoder, Layer

Tables = tuple[Tensor, Tensor]  # cos and sin
PIECE = 2048  # positions whose cosines and sines are computed at once: in fp32 those of a long slot are large


class KVCache:
    """`allocate`, then `prompt` and `step` as a Decoder's attend, then `free`.

    Args:
        decoder (`Decoder`): The model whose keys and values these are.
        bits (`int`): Of a number: 16, as wide as the model's own, or 8.
    """

    def __init__(self, decoder: Decoder, bits: int = 16):
        self.layers, self.heads, self.dim = len(decoder.layers), decoder.kv_heads, decoder.dim
        self.dtype, self.device, self.scale = decoder.dtype, decoder.device, decoder.scale
        self.bits, self.rotary = bits, decoder.rotary
        self.table = torch.zeros(6, dtype=torch.int64, device=self.device)
        self.most = 0  # bytes of its largest allocation so far
        self.data: Tensor | None = None  # [layers, 2, rows, kv heads, length, D]
        self.scales: Tensor | None = None  # with 8 bits: fp32 [layers, 2, rows, kv heads, length]
        self.angles: Tensor | None = None  # [length, D], see eight_bits: what each position is rotated by
        self.half = 0  # frequencies in them
        self.shared_heads = capability(self.device) >= (8, 0)

    @cached_property
    def lower_right(self) -> bool:
        """Whether a long text's later pieces need no mask, which FlashAttention does not take. Asked by such a text
        alone: a first token would wait until the kernels that answer it are loaded."""
        return self.shared_heads and self.dtype != torch.float32 and lower_right(self.device, self.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return kv_bytes_per_token(self.layers, self.heads, self.dim, self.dtype.itemsize, self.bits)

    def slots(self) -> tuple[int, int]:
        """(slots, tokens of each) that are allocated. Raises RuntimeError before `allocate`."""
        _, _, rows, _, length, _ = self._allocated().shape
        return rows, length

    def _allocated(self) -> Tensor:
        if self.data is None:
            raise RuntimeError("the cache is not allocated")
        return self.data

    def allocate(self, rows: int, length: int, budget: int) -> None:
        """Make the slots, empty; those of before are freed.

        Args:
            rows (`int`): How many.
            length (`int`): Of each, in tokens.
            budget (`int`): Bytes that the cache may take; rows * length tokens fit.
        """
        self.free()  # first: the old block and the new one need not fit at the same time
        # before the block, which may take all there is
        self.angles = torch.empty(length, self.dim, dtype=self.dtype, device=self.device)
        for start in range(0, length, PIECE):
            positions = torch.arange(start, min(start + PIECE, length), device=self.device)
            cos, sin = self.rotary(self.angles, positions[:, None])  # each on its own, as the rows of a step
            self.angles[start : start + PIECE] = eight_bits.angles_of(cos[:, 0], sin[:, 0], self.dim)
            self.half = cos.shape[-1] // 2
        size = rows * length * self.token_bytes
        if not size <= self.most <= budget:
            self.most = size  # torch would keep the old block besides the new one
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        # as large as the largest, so that torch reuses the same block; zeroed, as attention multiplies what it masks
        # by 0, and 0 * nan is nan
        block = torch.empty(self.most, dtype=torch.uint8, device=self.device)[:size].zero_()
        shape, dtype = (self.layers, 2, rows, self.heads, length, self.dim), self.dtype
        if self.bits == 8:
            dtype, numbers = torch.int8, math.prod(shape)
            self.scales, block = block[numbers:].view(torch.float32).view(shape[:-1]), block[:numbers]
        self.data = block.view(dtype).view(shape)
        strides = self.data.stride()
        addresses = [0 if t is None else t.data_ptr() for t in (self.scales, self.angles)]
        self.table.copy_(torch.tensor([self.data.data_ptr(), strides[0], strides[2], strides[3], *addresses]))

    def free(self) -> None:
        """Hand the memory back to torch's allocator, for training to use."""
        self.data = self.scales = self.angles = None

    def _eight(self, layer: Layer) -> EightBits | None:
        """What kernels need beside int8 numbers; None with 16 bits."""
        if self.scales is None or self.angles is None:
            return None
        bias = None if layer.key_bias is None else layer.key_bias.view(self.heads, self.dim)
        return EightBits(self.scales, self.angles, bias)

    def copy(self, source: int, rows: list[int], tokens: int) -> None:
        """Copy the first `tokens` positions of row `source`'s slot to those of `rows`: a prompt to its whole group."""
        data = self._allocated()
        for row in rows:
            if row != source:
                data[:, :, row, :, :tokens] = data[:, :, source, :, :tokens]
                if self.scales is not None:
                    self.scales[:, :, row, :, :tokens] = self.scales[:, :, source, :, :tokens]

    def prompt(self, rows: list[int], start: int) -> Callable[..., Tensor]:
        """An attend for S tokens of each of P rows.

        Texts shorter than start + S are padded on the right: what is computed there is never read, and overwritten.

        Args:
            rows (`list[int]`): P of them.
            start (`int`): Position of the first of the S tokens; those before it are in the cache.
        """
        place = self._place(rows)

        def attend(i: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
            eight, window = self._eight(layer), layer.window
            end, half = start + q.shape[2], tables[0].shape[-1] // 2
            numbers, at = self._allocated()[i], (place, slice(None), slice(start, end))
            k = k if eight is None else eight_bits.without(k, eight.bias)
            q, k = kernels.rope(q, k, *tables, layer.head_norms)
            if eight is None:
                numbers[0][at], numbers[1][at] = k, v
            else:
                eight_bits.store(numbers, eight.scales[i], at, k, v)
            if start == 0 and (window is None or end <= window):
                if eight is not None:
                    k, v = self._read(i, place, slice(None), end, eight, half)
                if not self.shared_heads:  # enable_gqa would take SDPA's slow path on a T4
                    k, v = self._for_every_head(q, k, v)
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.shared_heads
                )
            elif window is None and self.lower_right:
                k, v = self._read(i, place, slice(None), end, eight, half)
                corner = causal_lower_right(q.shape[2], end)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=corner, scale=self.scale, enable_gqa=True)
            else:
                query = torch.arange(start, end, device=q.device)[:, None]
                key = torch.arange(end, device=q.device)
                mask = key <= query if window is None else (key <= query) & (key > query - window)
                outs = []  # one key head at a time: repeated for all query heads, those of a long text are large
                for head, group in enumerate(q.chunk(self.heads, dim=1)):
                    kept = self._read(i, place, slice(head, head + 1), end, eight, half)
                    k, v = self._for_every_head(group, *kept)
                    outs.append(F.scaled_dot_product_attention(group, k, v, attn_mask=mask, scale=self.scale))
                out = torch.cat(outs, dim=1)
            return out.transpose(1, 2).flatten(2)

        return attend

    def without_mask(self, layers: list[Layer], tokens: int, width: int) -> bool:
        """Whether attention in these layers needs no mask of [width, tokens] for pieces of so many tokens of a text."""
        windowed = any(layer.window is not None and layer.window < tokens for layer in layers)
        return not windowed and (width >= tokens or self.lower_right)

    def _place(self, rows: list[int]) -> slice | Tensor:
        """The rows as an index: a slice if they are evenly spaced, which makes views where int64 [P] makes copies."""
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        if step > 0 and rows == list(range(rows[0], rows[-1] + 1, step)):
            return slice(rows[0], rows[-1] + 1, step)
        return torch.tensor(rows, device=self.device)

    def _read(
        self, layer: int, rows: slice | Tensor, heads: slice, end: int, eight: EightBits | None, half: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [P, heads, end, D] in the model's dtype; half: frequencies of the rotation."""
        numbers = self._allocated()[layer]
        if eight is None:
            return numbers[0][rows, heads, :end], numbers[1][rows, heads, :end]
        which, scales = range(self.heads)[heads], eight.scales[layer]
        count = len(numbers[0, rows, 0])
        kept = torch.empty(2, count, len(which), end, self.dim, dtype=self.dtype, device=self.device)
        for n, head in enumerate(which):  # one at a time: in fp32 those of a long text are large
            bias = None if eight.bias is None else eight.bias[head : head + 1]
            bias = eight_bits.rotated_bias(bias, eight.angles[:end], half)
            for part, added in ((0, bias), (1, None)):
                at = (part, rows, head, slice(end))
                kept[part, :, n] = eight_bits.dequantise(numbers[at], scales[at], self.dtype, added)
        return kept[0], kept[1]

    def _for_every_head(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    def embed(self, rows: Rows, weight: Tensor) -> tuple[Tensor, Tables]:
        """A step begins: the rows' last tokens embedded, [B, 1, H], and the tables [B, 1, R] of their positions.

        Args:
            rows (`Rows`): No position is beyond the slots.
            weight (`Tensor`): [V, H], the embedding.
        """
        self._allocated()
        assert self.angles is not None
        x, cos, sin = decode_step.embed(rows, weight, self.angles, self.table, self.half)
        return x, (cos, sin)

    def step(self, positions: Tensor, longest: int) -> Callable[..., Tensor]:
        """An attend for one token in each of the first B rows.

        Args:
            positions (`Tensor`): int64 [B], the tokens'.
            longest (`int`): All positions are below.
        """

        def attend(i: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
            return decode_step.decode_attention(
                q, k, v, *tables, self._allocated(), self.table, i, positions, longest, self.scale, layer.window,
                layer.head_norms, self._eight(layer),
            )  # fmt: skip

        return attend


@cache
def lower_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's causal_lower_right, a prototype, means here what a mask means, for fewer key heads too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 64, generator=generator).to(device) for heads, n in ((4, 5), (2, 40), (2, 40)))
    mask = torch.arange(40, device=device) <= torch.arange(35, 40, device=device)[:, None]
    heads = [t.repeat_interleave(2, dim=1) for t in (k, v)]
    wanted = F.scaled_dot_product_attention(q, heads[0], heads[1], attn_mask=mask)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    try:
        got = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(5, 40), enable_gqa=True)
    except (RuntimeError, TypeError, ValueError):
        return False
    return bool((got.float() - wanted).norm() < 0.03 * wanted.norm())
