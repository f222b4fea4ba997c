"""Log-probabilities of given tokens straight from hidden states: the [tokens, vocabulary] logits never exist.

    z = (h W^T + bias) / T                       logits of one token           h [N, H], W [V, H], z [V]
    lse = log sum_j exp(z_j)
    logp = z_target - lse                        [N] fp32
    entropy = lse - sum_j p_j z_j                [N] fp32, p_j = exp(z_j - lse)

    dlogp/dz_j = 1[j = target] - p_j    so    dh = (g / T) * G,    G = (1[target] - p) W     [N, H]
    dentropy/dz_j = -p_j (log p_j + entropy)

Tokens are processed in chunks: a cuBLAS product writes a chunk's logits into a buffer of at most SCRATCH_BYTES, a
Triton kernel reads them once (online log-sum-exp, arXiv:1805.02867), a second kernel turns them in place into
1[target] - p, and another product gives G. The upstream gradient g is one number per token, a factor outside the sum:
G is formed in the forward while the logits are in the buffer, and the backward is one multiplication. That is two
products, where recomputing the logits in the backward takes three. Three things are recomputed all the same: G of a
head that is trained too (its gradient has g inside the sum over tokens), G where the entropy has a gradient (two
upstream numbers per token), and the logits of a head that is not stored in 16 bits (NF4, or an fp32 master), which is
dequantised or cast 8,192 words at a time.

Without a gradient no step needs a token's whole vocabulary at once: there a chunk has more tokens and goes through the
vocabulary slice by slice, so that W is read from memory fewer times. A product whose result is kept in 16 bits leaves
cuBLAS in fp32 and is rounded once: cuBLAS may otherwise split a long sum and add its parts in 16 bits.

fp16's largest number is 65504. Rows of h with an element above 16 are divided by a power of two before the product
(exact except for what falls below 6e-8) and the logits multiplied by it in fp32; 1[target] - p is kept times 256, since
p of a rare word is below fp16's smallest number. bf16 and fp32 have the range and are not scaled.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nbhelpers.gpu import LOGITS_BYTES as SCRATCH_BYTES

from .common import ceil_div, power_of_2
from .nf4 import dequantize_nf4

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

SLICE_TOKENS, SLICE_WORDS = 4096, 8192  # of a head that is dequantised or cast slice by slice
FORWARD_TOKENS = 4096  # tokens of a chunk without gradients; its slice of words is what then fits the scratch buffer
IGNORE = -100


@triton.jit
def _logsumexp_kernel(
    z_ptr,  # [rows, words] logits before temperature, 16 or 32 bits
    z_stride,
    bias_ptr,  # [words] if BIAS
    target_ptr,  # int64 [rows]
    grow_ptr,  # fp32 [rows], the factor of the logits: 2^k / T
    max_ptr,  # fp32 [rows], like the next three: the running maximum
    sum_ptr,  # sum of exp(z - max)
    dot_ptr,  # sum of exp(z - max) z, if ENTROPY
    hit_ptr,  # z of the target, once its slice has been processed
    bias_factor,  # 1 / T
    first_word,
    words,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold a slice of the vocabulary into the running sums of a token; one program per token."""
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * z_stride
    grow = tl.load(grow_ptr + row)
    top, total, dot = tl.load(max_ptr + row), tl.load(sum_ptr + row), tl.load(dot_ptr + row)
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + word, mask=word < words, other=0.0).to(tl.float32) * grow
        if BIAS:
            z += tl.load(bias_ptr + word, mask=word < words, other=0.0).to(tl.float32) * bias_factor
        z = tl.where(word < words, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        e = tl.exp(z - higher)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(e, axis=0)
        if ENTROPY:
            dot = dot * shrink + tl.sum(tl.where(word < words, e * z, 0.0), axis=0)
        top = higher
    tl.store(max_ptr + row, top)
    tl.store(sum_ptr + row, total)
    if ENTROPY:
        tl.store(dot_ptr + row, dot)
    target = tl.load(target_ptr + row) - first_word
    if (target >= 0) & (target < words):
        z = tl.load(z_ptr + target).to(tl.float32) * grow
        if BIAS:
            z += tl.load(bias_ptr + target).to(tl.float32) * bias_factor
        tl.store(hit_ptr + row, z)


@triton.jit
def _gradient_kernel(
    z_ptr, z_stride, bias_ptr, target_ptr, grow_ptr, lse_ptr, mixed_ptr, mixed_stride, bias_factor, first_word, words,
    unit, ignore, BIAS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace z by unit * (1[target] - p) in place, by 0 in the row of an ignored target. Arguments as above.

    ENTROPY: by unit * (a (1[target] - p) - b p (log p + entropy)); mixed_ptr has fp32 [3, rows]: a, b and the entropy.
    """
    row = tl.program_id(0)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z_ptr += row.to(tl.int64) * z_stride
    target = tl.load(target_ptr + row)
    z = tl.load(z_ptr + word, mask=word < words, other=0.0).to(tl.float32) * tl.load(grow_ptr + row)
    if BIAS:
        z += tl.load(bias_ptr + word, mask=word < words, other=0.0).to(tl.float32) * bias_factor
    log_p = z - tl.load(lse_ptr + row)
    p = tl.exp(log_p)
    d = tl.where(word + first_word == target, 1.0 - p, -p) * tl.where(target == ignore, 0.0, unit)
    if ENTROPY:
        mixed_ptr += row
        entropy = tl.load(mixed_ptr + 2 * mixed_stride)
        d = d * tl.load(mixed_ptr) - p * (log_p + entropy) * (unit * tl.load(mixed_ptr + mixed_stride))
    tl.store(z_ptr + word, d.to(z_ptr.dtype.element_ty), mask=word < words)


class _Head:
    """The vocabulary matrix in `dtype`, whole if it is stored so, else slice by slice; and the sizes that follow.

    tile: (tokens, words) of one product. None: all words and as many tokens as the scratch buffer holds if the gradient
    is formed in the forward (`in_one`), else FORWARD_TOKENS.
    """

    def __init__(
        self, weight: Tensor, quant_state: "QuantState | None", bias: Tensor | None, words: int, temperature: float,
        dtype: torch.dtype, scratch_bytes: int, in_one: bool = True, tile: tuple[int, int] | None = None,
    ):  # fmt: skip
        self.weight, self.quant_state, self.bias = weight.detach(), quant_state, bias
        self.words, self.temperature, self.dtype = words, temperature, dtype
        self.whole = quant_state is None and weight.dtype == dtype
        self.unit = 256.0 if dtype == torch.float16 else 1.0
        room = scratch_bytes // dtype.itemsize
        if not self.whole:
            self.slice_words = min(words, SLICE_WORDS)
            self.tokens = _whole_tiles(min(room // self.slice_words, SLICE_TOKENS))
        elif in_one:
            self.slice_words, self.tokens = words, _whole_tiles(room // words)
        elif tile is not None:
            self.tokens, self.slice_words = tile[0], min(words, tile[1])
        else:
            slices = ceil_div(words * FORWARD_TOKENS, room)
            self.slice_words = min(words, ceil_div(ceil_div(words, slices), 64) * 64)
            self.tokens = _whole_tiles(room // self.slice_words)

    def slices(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first word, W [words, H] of the slice that begins there).

        A slice is valid until the next one is made, which may overwrite it.
        """
        spans = [(first, min(first + self.slice_words, self.words)) for first in range(0, self.words, self.slice_words)]
        if self.whole:
            yield from ((first, self.weight[first:last]) for first, last in spans)
            return
        width = (self.weight if self.quant_state is None else self.quant_state).shape[1]
        buffer = torch.empty(self.slice_words, width, dtype=self.dtype, device=self.weight.device)
        for first, last in spans:
            w = buffer[: last - first]
            if self.quant_state is None:
                w.copy_(self.weight[first:last])
            else:
                dequantize_nf4(self.weight, self.quant_state, self.dtype, w, rows=(first, last))
            yield first, w

    def chunks(self, hidden: Tensor, target: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield (slice of tokens, h as the product takes it, its targets, the factor of its logits)."""
        for start in range(0, hidden.shape[0], self.tokens):
            span = slice(start, start + self.tokens)
            h = hidden[span]
            grow = torch.full((h.shape[0],), 1 / self.temperature, dtype=torch.float32, device=h.device)
            if self.dtype == torch.float16:
                largest = torch.linalg.vector_norm(h, torch.inf, dim=-1).float()
                power = torch.ldexp(torch.ones_like(largest), 4 - torch.frexp(largest).exponent.clamp(min=4))
                h, grow = h * power[:, None].to(h.dtype), grow / power
            yield span, h, target[span], grow

    def logits(self, buffer: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """h W^T of a chunk and a slice, [tokens, words], written into the buffer."""
        z = buffer[: h.shape[0] * w.shape[0]].view(h.shape[0], w.shape[0])
        return torch.mm(h, w.t(), out=z)

    def fold(
        self, z: Tensor, first: int, target: Tensor, grow: Tensor, sums: tuple[Tensor, ...], entropy: bool
    ) -> None:
        """Fold the logits z of a slice into the chunk's running (max, sum, dot, hit)."""
        bias = z if self.bias is None else self.bias[first:]
        block = min(4096, power_of_2(z.shape[1]))
        _logsumexp_kernel[(z.shape[0],)](
            z, z.stride(0), bias, target, grow, *sums, 1 / self.temperature, first, z.shape[1],
            BIAS=self.bias is not None, ENTROPY=entropy, BLOCK=block, num_warps=8,
        )  # fmt: skip

    def to_gradient(
        self, z: Tensor, first: int, target: Tensor, grow: Tensor, lse: Tensor, mixed: Tensor | None = None
    ) -> None:
        """Replace the logits z of a slice by unit * (1[target] - p), or as `mixed` says: see the kernel."""
        bias = z if self.bias is None else self.bias[first:]
        block = min(4096, power_of_2(z.shape[1]))
        _gradient_kernel[(z.shape[0], ceil_div(z.shape[1], block))](
            z, z.stride(0), bias, target, grow, lse, lse if mixed is None else mixed,
            0 if mixed is None else mixed.stride(0), 1 / self.temperature, first, z.shape[1], self.unit, IGNORE,
            BIAS=self.bias is not None, ENTROPY=mixed is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip


def _whole_tiles(tokens: int) -> int:
    """`tokens` rounded down to whole tiles of a matrix product (128), if there is at least one; at least 1."""
    return max(1, tokens // 128 * 128 or tokens)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with total in fp32 and the product not rounded to 16 bits before it is added."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _forward(
    head: _Head, hidden: Tensor, target: Tensor, entropy: bool, with_direction: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(logp, entropy or None, lse, G or None) of all tokens."""
    tokens, device = hidden.shape[0], hidden.device
    buffer = torch.empty(min(head.tokens, tokens) * head.slice_words, dtype=head.dtype, device=device)
    lse = torch.empty(tokens, dtype=torch.float32, device=device)
    logp, entropies = torch.empty_like(lse), torch.empty_like(lse) if entropy else None
    direction = torch.empty(hidden.shape, dtype=hidden.dtype, device=device) if with_direction else None
    for span, h, wanted, grow in head.chunks(hidden, target):
        top, total, dot, hit = sums = torch.zeros(4, h.shape[0], dtype=torch.float32, device=device).unbind()
        top.fill_(-torch.inf)
        hit.fill_(-torch.inf)
        for first, w in head.slices():
            z = head.logits(buffer, h, w)
            head.fold(z, first, wanted, grow, sums, entropy)
        torch.add(top, total.log(), out=lse[span])
        torch.sub(hit, lse[span], out=logp[span])
        logp[span].masked_fill_(wanted == IGNORE, 0.0)
        if entropies is not None:
            torch.sub(lse[span], dot / total, out=entropies[span])
        if direction is not None and head.whole:  # the logits of all words are still in the buffer
            head.to_gradient(z, 0, wanted, grow, lse[span])
            direction[span] = _product(z, w)
        elif direction is not None:
            direction[span] = _direction(head, buffer, h, wanted, grow, lse[span])
    return logp, entropies, lse, direction


def _direction(
    head: _Head, buffer: Tensor, h: Tensor, target: Tensor, grow: Tensor, lse: Tensor,
    weight_grad: Tensor | None = None, h_scaled: Tensor | None = None, mixed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """unit * G [tokens, H] of one chunk, from recomputed logits; with `mixed` that of both gradients: see the kernel.

    Adds the chunk's share, h_scaled^T (1[target] - p) with the upstream gradient in h_scaled, to weight_grad if given.
    """
    total = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    for first, w in head.slices():
        z = head.logits(buffer, h, w)
        head.to_gradient(z, first, target, grow, lse, mixed)
        _add_product(total, z, w)
        if weight_grad is not None and h_scaled is not None:
            _add_product(weight_grad[first : first + len(w)], z.t(), h_scaled)
    return total


class LinearLogprob(torch.autograd.Function):
    """`linear_logprob` for autograd; see the module's docstring for what is kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, head: _Head, entropy: bool, entropy_grad: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ctx.head = head
        with_direction = grad_enabled and hidden.requires_grad and not (weight.requires_grad or entropy_grad)
        logp, entropies, lse, direction = _forward(head, hidden, target, entropy, with_direction)
        if direction is not None:
            ctx.save_for_backward(direction)
        elif grad_enabled:
            ctx.save_for_backward(hidden, target, lse, entropies if entropy_grad else None)
        if entropies is not None and not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logp, entropies

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        head, saved = ctx.head, ctx.saved_tensors
        if len(saved) == 1:
            (direction,) = saved
            return direction.mul_((g.float() / (head.temperature * head.unit))[:, None]), *[None] * 6
        hidden, target, lse, entropies = saved
        dh = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.zeros(head.weight.shape, dtype=torch.float32, device=hidden.device)
        factor, mixed = g.float(), None
        if entropies is not None and g_entropy is not None:
            # the larger of the two is the factor, so that what is kept in 16 bits is of size 1
            factor = torch.maximum(g.abs(), g_entropy.abs())
            mixed = torch.stack((*(torch.stack((g, g_entropy)) / factor).nan_to_num(), entropies))
        factor = (factor / (head.temperature * head.unit))[:, None]
        buffer = torch.empty(min(head.tokens, len(hidden)) * head.slice_words, dtype=head.dtype, device=hidden.device)
        for span, h, wanted, grow in head.chunks(hidden, target):
            scaled = (hidden[span] * factor[span]).to(head.dtype)
            of_span = None if mixed is None else mixed[:, span]
            direction = _direction(head, buffer, h, wanted, grow, lse[span], dw, scaled, of_span)
            if dh is not None:
                dh[span] = direction.mul_(factor[span])
        return dh, None if dw is None else dw.to(head.weight.dtype), *[None] * 5


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, quant_state: "QuantState | None" = None,
    bias: Tensor | None = None, temperature: float = 1.0, vocab_size: int | None = None, entropy: bool = False,
    entropy_grad: bool = False, scratch_bytes: int = SCRATCH_BYTES, tile: tuple[int, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """See nbhelpers.kernels.linear_logprob; tile is for benchmarks: (tokens, words) of a product without gradient."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if bias is not None and bias.requires_grad:
        raise ValueError("linear_logprob gives the head's bias no gradient: freeze it")
    words = vocab_size or (weight if quant_state is None else quant_state).shape[0]
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    head = _Head(weight, quant_state, bias, words, temperature, hidden.dtype, scratch_bytes, learns, tile)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logp, entropies = LinearLogprob.apply(
        flat, weight, target.reshape(-1), head, entropy, entropy_grad, torch.is_grad_enabled()
    )
    logp = logp.view(target.shape)
    return logp if entropies is None else (logp, entropies.view(target.shape))
