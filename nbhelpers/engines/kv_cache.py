"""Keys and values of the rows that are being written, in slots: row i of the batch is slot i of the cache.

A token takes 28 kB in Qwen2.5-1.5B and 131 kB in Llama-3.1-8B in 16 bits (memory.kv). The memory is allocated at the
start of each stage of a generation and freed at the end of the last one. A captured CUDA graph keeps addresses, so the
kernels read the cache's address from `table`, which never moves.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nbhelpers import kernels
from nbhelpers.gpu import capability
from nbhelpers.kernels import HeadNorms
from nbhelpers.memory.kv import kv_bytes_per_token

from .forward import Decoder

Tables = tuple[Tensor, Tensor]  # cos and sin


class KVCache:
    """`allocate`, then `prompt` and `step` as a Decoder's attend, then `free`.

    Args:
        decoder (`Decoder`): The model whose keys and values these are.
    """

    def __init__(self, decoder: Decoder):
        self.layers, self.heads, self.dim = len(decoder.layers), decoder.kv_heads, decoder.dim
        self.dtype, self.device, self.scale = decoder.dtype, decoder.device, decoder.scale
        self.table = torch.zeros(4, dtype=torch.int64, device=self.device)
        self.most = 0  # elements of its largest allocation so far
        self.data: Tensor | None = None  # [layers, 2, rows, kv heads, length, D]
        self.shared_heads = capability(self.device) >= (8, 0)
        # FlashAttention takes no mask of a long text's later pieces
        self.lower_right = self.shared_heads and self.dtype != torch.float32 and lower_right(self.device, self.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return kv_bytes_per_token(self.layers, self.heads, self.dim, self.dtype.itemsize)

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
        shape = (self.layers, 2, rows, self.heads, length, self.dim)
        size = math.prod(shape)
        if not size <= self.most <= budget // self.dtype.itemsize:
            self.most = size  # torch would keep the old block besides the new one
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        # as large as the largest, so that torch reuses the same block; zeroed, as attention multiplies what it masks
        # by 0, and 0 * nan is nan
        self.data = torch.empty(self.most, dtype=self.dtype, device=self.device)[:size].zero_().view(shape)
        strides = self.data.stride()
        self.table.copy_(torch.tensor([self.data.data_ptr(), strides[0], strides[2], strides[3]]))

    def free(self) -> None:
        """Hand the memory back to torch's allocator, for training to use."""
        self.data = None

    def copy(self, source: int, rows: list[int], tokens: int) -> None:
        """Copy the first `tokens` positions of row `source`'s slot to those of `rows`: a prompt to its whole group."""
        data = self._allocated()
        for row in rows:
            if row != source:
                data[:, :, row, :, :tokens] = data[:, :, source, :, :tokens]

    def prompt(self, rows: Tensor, start: int) -> Callable[..., Tensor]:
        """An attend for S tokens of each of P rows.

        Texts shorter than start + S are padded on the right: what is computed there is never read, and overwritten.

        Args:
            rows (`Tensor`): int64 [P].
            start (`int`): Position of the first of the S tokens; those before it are in the cache.
        """

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, tables: Tables, window: int | None, norms: HeadNorms | None
        ) -> Tensor:
            q, k = kernels.rope(q, k, *tables, norms)
            end = start + q.shape[2]
            keys, values = self._allocated()[layer]
            keys[rows, :, start:end], values[rows, :, start:end] = k, v
            if start == 0 and (window is None or end <= window):
                if not self.shared_heads:  # enable_gqa would take SDPA's slow path on a T4
                    k, v = self._for_every_head(q, k, v)
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.shared_heads
                )
            elif window is None and self.lower_right:
                k, v = keys[rows, :, :end], values[rows, :, :end]
                corner = causal_lower_right(q.shape[2], end)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=corner, scale=self.scale, enable_gqa=True)
            else:
                query = torch.arange(start, end, device=q.device)[:, None]
                key = torch.arange(end, device=q.device)
                mask = key <= query if window is None else (key <= query) & (key > query - window)
                outs = []  # one key head at a time: repeated for all query heads, those of a long text are large
                for i, group in enumerate(q.chunk(self.heads, dim=1)):
                    k, v = self._for_every_head(group, keys[rows, i : i + 1, :end], values[rows, i : i + 1, :end])
                    outs.append(F.scaled_dot_product_attention(group, k, v, attn_mask=mask, scale=self.scale))
                out = torch.cat(outs, dim=1)
            return out.transpose(1, 2).flatten(2)

        return attend

    def _for_every_head(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    def step(self, positions: Tensor, longest: int) -> Callable[..., Tensor]:
        """An attend for one token in each of the first B rows.

        Args:
            positions (`Tensor`): int64 [B], the tokens'.
            longest (`int`): All positions are below.
        """

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, tables: Tables, window: int | None, norms: HeadNorms | None
        ) -> Tensor:
            return kernels.decode_attention(
                q, k, v, *tables, self._allocated(), self.table, layer, positions, longest, self.scale, window, norms
            )

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
