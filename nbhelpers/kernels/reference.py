"""The kernels' functions in plain torch, differentiated by autograd: the tests' oracle and the CPU's implementation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nbhelpers.gpu import LOGITS_BYTES

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


class Projection(NamedTuple):
    """A frozen linear layer with an optional LoRA term, as the kernels take it: x W^T + bias + scale (x A^T) B^T.

    The products run in x's dtype; gradients of A and B are returned in their own dtype (fp32 master weights get fp32).
    """

    weight: Tensor  # [out, in] of any float dtype, or bitsandbytes' packed NF4 (uint8)
    quant_state: "QuantState | None" = None  # of a packed weight
    bias: Tensor | None = None  # [out]
    lora_a: Tensor | None = None  # [r, in]
    lora_b: Tensor | None = None  # [out, r]
    scale: float = 0.0

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return (self.weight if self.quant_state is None else self.quant_state).shape[0]

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return (self.weight if self.quant_state is None else self.quant_state).shape[1]


class HeadNorms(NamedTuple):
    """RMSNorms over the D channels of each head of Q and of K (Qwen3)."""

    q: Tensor  # [D]
    k: Tensor  # [D]
    eps: float


Stacked = tuple[Tensor, Tensor] | tuple[None, None]  # (A, B) of parts that read the same x; no part has a LoRA


# ---------------------------------------------------------------------------------------------- element-wise


def _saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, clamped to fp16's range if that is the dtype: the only dtype whose range activations exceed."""
    return x.clamp(-65504.0, 65504.0).to(dtype) if dtype == torch.float16 else x.to(dtype)


def _compute(x: Tensor) -> Tensor:
    """x in the dtype to compute in: fp32 for 16-bit tensors, their own for wider ones (gradcheck needs fp64)."""
    return x.float() if x.element_size() < 4 else x


def residual_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(s, y) of `rms_norm`, where s is x if there is no residual."""
    s = x
    if residual is not None:
        s = _saturate(_compute(x) + _compute(residual), torch.promote_types(x.dtype, residual.dtype))
    if s.dtype == weight.dtype == torch.float32:
        return s, F.rms_norm(s, weight.shape, weight, eps)  # the same arithmetic in one call
    wide = _compute(s)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _compute(weight)
    return s, y.to(torch.promote_types(s.dtype, weight.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """See nbhelpers.kernels.rms_norm."""
    s, y = residual_norm(x, weight, eps, residual)
    return y if residual is None else (s, y)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None = None) -> tuple[Tensor, Tensor]:
    """See nbhelpers.kernels.rope."""
    dtypes = q.dtype, k.dtype  # a norm whose weight is fp32 makes fp32 of 16-bit heads, but v stays what it is
    if norms is not None:
        q, k = residual_norm(q, norms.q, norms.eps, None)[1], residual_norm(k, norms.k, norms.eps, None)[1]
    half = cos.shape[-1] // 2
    c, s = (_compute(t)[..., :half].unsqueeze(1) for t in (cos, sin))  # [1 or B, 1, S, R/2]

    def rotate(x: Tensor, dtype: torch.dtype) -> Tensor:
        x1, x2, rest = _compute(x).split([half, half, x.shape[-1] - 2 * half], dim=-1)
        rotated = (x1 * c - x2 * s, x2 * c + x1 * s)
        return torch.cat((*rotated, rest) if rest.shape[-1] else rotated, dim=-1).to(dtype)

    return rotate(q, dtypes[0]), rotate(k, dtypes[1])


def rope_packed(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, kv_heads: int, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See nbhelpers.kernels.rope_packed."""
    heads = qkv.unflatten(-1, (q_heads + 2 * kv_heads, -1)).transpose(1, 2)  # [B, heads, S, D]
    q, k, v = heads.split([q_heads, kv_heads, kv_heads], dim=1)
    return *rope(q, k, cos, sin, norms), v


def sum_rows(x: Tensor, places: Tensor, first: Tensor) -> Tensor:
    """y[i] = sum over j in first[i] .. first[i + 1] - 1 of x[places[j]]; see triton/sum_rows.py."""
    groups = torch.arange(len(first) - 1, device=x.device).repeat_interleave(first.diff())
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(len(first) - 1, *x.shape[1:], dtype=wide, device=x.device)
    return total.index_add_(0, groups, x[places].to(wide)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See nbhelpers.kernels.swiglu."""
    if gate.dtype == torch.float16:  # an infinite gate or up would make 0 * inf
        gate, up = (_saturate(t.float(), torch.float16) for t in (gate, up))
    return _saturate(F.silu(_compute(gate)) * _compute(up), gate.dtype)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """See nbhelpers.kernels.swiglu_packed."""
    return swiglu(*gate_up.chunk(2, dim=-1))


# ------------------------------------------------------------------------------------- quantised and LoRA products


def dequantize_nf4(
    weight: Tensor,
    quant_state: "QuantState",
    dtype: torch.dtype,
    out: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """See nbhelpers.kernels.dequantize_nf4. This follows the format, as bitsandbytes does on a GPU.

    Where in_features is not a multiple of the block of 64 weights, bitsandbytes 0.50.2 on a CPU can differ (31 x 96
    does). It is wrong there, with three times this function's distance from the weight that was quantised, so the
    difference is deliberate. No model of this package has such a layer.
    """
    state, nested = quant_state, quant_state.state2
    absmax = state.absmax
    if nested is not None:
        absmax = nested.code[absmax.long()] * nested.absmax.repeat_interleave(nested.blocksize)[: absmax.numel()]
        absmax = absmax + state.offset
    packed = weight.detach().reshape(-1).view(torch.uint8).long()
    n = state.shape.numel()
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[:n]
    dense = state.code[codes] * absmax.repeat_interleave(state.blocksize)[:n]
    dense = dense.view(state.shape)[slice(*rows) if rows else slice(None)].to(dtype)
    return dense if out is None else out.copy_(dense)


def stack_adapters(parts: Sequence[Projection], dtype: torch.dtype) -> Stacked:
    """(A, B) of the parts in `dtype`, stacked as in triton/lora_stack.py; (None, None) without a LoRA. No gradients."""
    a_list = [part.lora_a.detach().to(dtype) for part in parts if part.lora_a is not None]
    if not a_list:
        return None, None
    a = torch.cat(a_list)
    blocks = [
        a.new_empty(part.out_features, 0) if part.lora_b is None else (part.lora_b.detach() * part.scale).to(dtype)
        for part in parts
    ]
    return a, torch.block_diag(*blocks)


def layer_adapters(layers: Sequence[Sequence[Sequence[Projection]]], dtype: torch.dtype) -> None:
    """See nbhelpers.kernels.adapters.by_layer: torch stacks none."""


def lora_linear(x: Tensor, projection: Projection) -> Tensor:
    """See nbhelpers.kernels.lora_linear."""
    weight, quant_state, bias, a, b, scale = projection
    if weight.requires_grad:
        raise ValueError("lora_linear gives W no gradient: freeze it (requires_grad_(False)) or use nn.Linear")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    w = weight.detach().to(x.dtype) if quant_state is None else dequantize_nf4(weight, quant_state, x.dtype)
    y = F.linear(x, w, None if bias is None else bias.detach().to(x.dtype))
    if a is None or b is None:
        return y
    return y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


def lora_linear_group(
    x: Tensor, projections: tuple[Projection, ...], norm: tuple[Tensor, float] | None = None, packed: bool = False,
    adapters: Stacked | None = None,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """See nbhelpers.kernels.lora_linear_group."""
    x = x if norm is None else residual_norm(x, *norm, None)[1]
    outputs = tuple(lora_linear(x, projection) for projection in projections)
    return torch.cat(outputs, dim=-1) if packed else outputs


def lora_mlp(
    x: Tensor,
    gate_up: tuple[Projection, ...],
    down: Projection,
    residual: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    value: bool = True,  # no effect: autograd needs the last product to differentiate it
    adapters: tuple[Stacked, Stacked] | None = None,
) -> Tensor:
    """See nbhelpers.kernels.lora_mlp."""
    if norm is not None:
        residual, x = residual_norm(x, *norm, residual)
    outputs = [lora_linear(x, projection) for projection in gate_up]
    gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
    if gate.dtype != torch.float16:
        y = lora_linear(swiglu(gate, up), down)
        return y if residual is None else residual + y
    # fp16's largest number is 65504: the product is kept divided by 16, and the sum saturates
    gate, up = (_saturate(t.float(), torch.float16).float() for t in (gate, up))
    if down.bias is not None:
        down = down._replace(bias=down.bias / 16)
    y = lora_linear(_saturate(F.silu(gate) * up / 16, torch.float16), down).float() * 16
    return _saturate(y if residual is None else residual.float() + y, torch.float16)


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, quant_state: "QuantState | None" = None,
    bias: Tensor | None = None, temperature: float = 1.0, vocab_size: int | None = None, entropy: bool = False,
    entropy_grad: bool = False, scratch_bytes: int = LOGITS_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """See nbhelpers.kernels.linear_logprob."""
    if quant_state is not None:
        weight = dequantize_nf4(weight, quant_state, _compute(hidden[:0]).dtype)
    bias = None if bias is None else bias.detach()[:vocab_size]

    def of_chunk(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        z = _compute(_compute(h) @ _compute(weight[:vocab_size]).t())  # autocast gives a 16-bit product
        z = (z if bias is None else z + bias) / temperature
        logps = z.log_softmax(-1)
        chosen = logps.gather(-1, t.clamp(min=0)[:, None]).squeeze(-1).masked_fill(t == -100, 0.0)
        entropies = -(logps.exp() * logps).sum(-1)
        return chosen, entropies if entropy_grad else entropies.detach()

    # a chunk's logits are recomputed in the backward, so that all of them are never in memory, on a CPU either
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    tokens = max(1, scratch_bytes // (4 * weight.shape[0]))
    pairs = zip(flat.split(tokens), targets.split(tokens), strict=True)
    chunks = [checkpoint(of_chunk, h, t, use_reentrant=False) for h, t in pairs]
    logp, entropies = (torch.cat(parts).view(target.shape) for parts in zip(*chunks, strict=True))
    return (logp, entropies) if entropy else logp


def draw(logits: Tensor, seeds: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
    """See nbhelpers.kernels.draw."""
    # 64 bits per row (splitmix64's finalizer; constants above 2^63 as negative numbers), 32 per token of the row
    key = seeds + counters * -0x61C8864680B583EB
    key = (key ^ (key >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    key = (key ^ (key >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    key = key ^ (key >> 31 & 0x1FFFFFFFF)
    add, times = key.to(torch.int32)[:, None], (key >> 32 | 1).to(torch.int32)[:, None]
    h = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    h = (h + add) * times  # int32 products wrap around: the murmur3 finalizer
    h = (h ^ (h >> 16 & 0xFFFF)) * -0x7A143595
    h = (h ^ (h >> 13 & 0x7FFFF)) * -0x3D4D51CB
    h = (h ^ (h >> 16)) & 0x7FFFFFFF
    # -E_i; u_i stays below 1, where it would be rounded to it: E_i were infinite, and a word that is alone would lose
    exponential = torch.log1p(((h.float() + 0.5) * -(2.0**-31)).clamp_(min=2.0**-24 - 1.0))
    probabilities = logits.softmax(-1)
    token = exponential.div_(probabilities).argmax(-1)  # the largest -E_i / p_i: same winner as logit_i - log E_i
    return token, probabilities.gather(-1, token[:, None]).squeeze(-1).log()
