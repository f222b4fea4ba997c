"""Keys and values of the rows that are being written, in slots: row i of the batch is slot i of the cache.

A token takes 2 * layers * kv heads * D numbers, in 16 bits 28 kB in Qwen2.5-1.5B and 131 kB in Llama-3.1-8B. The memory
is taken at the start of each stage of a generation and handed back at its end. A captured CUDA graph keeps addresses,
so the kernels look the cache's address up in `table`, which stays where it is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nbhelpers import kernels
from nbhelpers.gpu import capability
from nbhelpers.kernels import HeadNorms

from .forward import Decoder

Tables = tuple[Tensor, Tensor]  # cos and sin


class KVCache:
    """`allocate(rows, length)`, then `prompt` and `step` as a Decoder's attend, then `free()`."""

    def __init__(self, decoder: Decoder):
        self.layers, self.heads, self.dim = len(decoder.layers), decoder.kv_heads, decoder.dim
        self.dtype, self.device, self.scale = decoder.dtype, decoder.device, decoder.scale
        self.table = torch.zeros(4, dtype=torch.int64, device=self.device)
        self.most = 0  # numbers that it held at its largest
        self.data: Tensor | None = None  # [layers, 2, rows, kv heads, length, D]
        self.shared_heads = capability(self.device) >= (8, 0)

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.heads * self.dim * self.dtype.itemsize

    def allocate(self, rows: int, length: int, budget: int) -> None:
        """Room for `rows` texts of up to `length` tokens, which fit `budget` bytes; what was there before is gone."""
        self.free()  # first: the old block and the new one need not fit beside each other
        shape = (self.layers, 2, rows, self.heads, length, self.dim)
        size = math.prod(shape)
        if not size <= self.most <= budget // self.dtype.itemsize:
            self.most = size  # torch would keep the block of the last time beside the new one
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        # as large as ever, so that the same block is taken again; zeros, not whatever lay there: attention multiplies
        # what it masks by 0, and 0 * nan is nan
        self.data = torch.empty(self.most, dtype=self.dtype, device=self.device)[:size].zero_().view(shape)
        strides = self.data.stride()
        self.table.copy_(torch.tensor([self.data.data_ptr(), strides[0], strides[2], strides[3]]))

    def free(self) -> None:
        """Hand the memory back to torch's allocator, for training to use."""
        self.data = None

    def copy(self, source: int, rows: list[int], tokens: int) -> None:
        """The first `tokens` positions of row `source` into other rows: a prompt for its whole group."""
        for row in rows:
            if row != source:
                self.data[:, :, row, :, :tokens] = self.data[:, :, source, :, :tokens]

    def prompt(self, rows: Tensor, start: int):
        """An attend for S tokens of some rows (int64 [P]) from position `start` on, all before it being in the cache.

        Rows shorter than S are padded on the right: what is computed there is looked at by nobody, and overwritten.
        """

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, tables: Tables, window: int | None, norms: HeadNorms | None
        ) -> Tensor:
            q, k = kernels.rope(q, k, *tables, norms)
            end = start + q.shape[2]
            keys, values = self.data[layer]
            keys[rows, :, start:end], values[rows, :, start:end] = k, v
            if start == 0 and (window is None or end <= window):
                if not self.shared_heads:  # enable_gqa would take SDPA's slow path on a T4
                    k, v = self._for_every_head(q, k, v)
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.shared_heads
                )
            else:
                here = torch.arange(start, end, device=q.device)[:, None]
                there = torch.arange(end, device=q.device)
                mask = there <= here if window is None else (there <= here) & (there > here - window)
                outs = []  # a key head at a time: those of a long text, repeated for all query heads, are large
                for i, part in enumerate(q.chunk(self.heads, dim=1)):
                    k, v = self._for_every_head(part, keys[rows, i : i + 1, :end], values[rows, i : i + 1, :end])
                    outs.append(F.scaled_dot_product_attention(part, k, v, attn_mask=mask, scale=self.scale))
                out = torch.cat(outs, dim=1)
            return out.transpose(1, 2).flatten(2)

        return attend

    def _for_every_head(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    def step(self, positions: Tensor, longest: int):
        """An attend for one token in each of the first B rows; positions int64 [B], all below `longest`."""

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, tables: Tables, window: int | None, norms: HeadNorms | None
        ) -> Tensor:
            return kernels.decode_attention(
                q, k, v, *tables, self.data, self.table, layer, positions, longest, self.scale, window, norms
            )

        return attend
