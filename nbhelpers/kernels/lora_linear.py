"""A linear layer with a frozen weight and a low-rank update that learns (LoRA, arXiv:2106.09685; QLoRA, 2305.14314).

    y  = x W^T + bias + s (x A^T) B^T        x [N, in]   W [out, in] NF4 or 16-bit   A [r, in]   B [out, r]

    u  = s dy B                              [N, r]
    dx = dy W + u A                          [N, in]
    dA = u^T x                               [r, in]     in A's dtype, summed in fp32
    dB = s dy^T (x A^T)                      [out, r]    in B's dtype, summed in fp32

W never gets a gradient, so the backward needs x alone: W is undone again from its 4 bits, into one scratch buffer that
all layers share, and x A^T (r columns) is computed again. Layers that read the same x (Q, K and V; gate and up) go
together: one product with all their A's, one read of x, and in the backward one dx that each of them adds to inside
its matrix product. The thin product goes first everywhere, so that the wide one adds to it on its way out and no
separate pass over y or dx is needed. An RMSNorm in front can be folded in: then x is what comes before the norm, which
somebody keeps anyway, and the normed rows are computed again in the backward.
"""

import torch
import torch.nn.functional as F

from .nf4 import dequantize_nf4, few_rows, matmul_few_rows
from .reference import Projection
from .rms_norm import backward as norm_backward
from .rms_norm import forward as norm_forward

_scratch: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def scratch(shape, dtype, device):
    """A tensor from the one buffer that every layer dequantises into; it grows to the largest layer and stays.

    What is in it holds until the next call. That is safe because the work of one stream runs in order: the product
    that reads a weight is queued before the kernel that overwrites it. So: one stream per device. While a CUDA graph
    is being captured the memory comes from the graph's own pool instead, since a graph keeps addresses and this
    buffer may be replaced by a larger one.
    """
    size = shape[0] * shape[1]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _scratch.get((device, dtype))
    if buffer is None or buffer.numel() < size:
        _scratch.pop((device, dtype), None)
        buffer = None  # the smaller one goes first
        buffer = _scratch[device, dtype] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)


def dense(part: Projection, dtype, device):
    """W [out, in] in `dtype`: the weight itself, or its 4 bits undone into the scratch buffer."""
    if part.quant_state is None:
        return part.weight.detach().to(dtype)
    return dequantize_nf4(part.weight, part.quant_state, dtype, scratch(part.quant_state.shape, dtype, device))


def _out_features(part: Projection) -> int:
    return (part.weight if part.quant_state is None else part.quant_state).shape[0]


def project(x, parts):
    """y of every part. x [N, in]; returns a list of [N, out]. No autograd in here."""
    loras = [part for part in parts if part.lora_a is not None]
    if loras:
        t = x @ _stack_a(loras, x.dtype).t()  # [N, sum of r]
        t = iter(t.split([part.lora_a.shape[0] for part in loras], dim=1))
    outputs = []
    for part in parts:
        bias = None if part.bias is None else part.bias.detach().to(x.dtype)
        if part.quant_state is not None and few_rows(x, part.quant_state):
            y = matmul_few_rows(x, part.weight, part.quant_state, bias)
            if part.lora_a is not None:
                y.addmm_(next(t), part.lora_b.detach().to(x.dtype).t(), alpha=part.scale)
        elif part.lora_a is None:
            y = F.linear(x, dense(part, x.dtype, x.device), bias)
        else:
            y = x.new_empty(x.shape[0], _out_features(part)) if bias is None else bias.expand(x.shape[0], -1)
            y = torch.addmm(y, next(t), part.lora_b.detach().to(x.dtype).t(), beta=bias is not None, alpha=part.scale)
            y.addmm_(x, dense(part, x.dtype, x.device).t())
        outputs.append(y)
    return outputs


def lora_signal(parts, grads):
    """u [N, sum of r], s dy B of every part that has a LoRA; None where none has. grads: dy [N, out] of every part."""
    u = [(dy @ part.lora_b.detach().to(dy.dtype)).mul_(part.scale) for part, dy in _with_lora(parts, grads)]
    return torch.cat(u, dim=1) if len(u) > 1 else u[0] if u else None


def input_grad(parts, grads, u):
    """dx [N, in], summed over the parts inside their matrix products."""
    dx = None if u is None else u @ _stack_a([part for part, _ in _with_lora(parts, grads)], u.dtype)
    for part, dy in zip(parts, grads, strict=True):
        weight = dense(part, dy.dtype, dy.device)
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx


def lora_grads(x, parts, grads, u):
    """dA [r, in] and dB [out, r] of every part that has a LoRA, flat: dA1, dB1, dA2, dB2, ..."""
    loras = _with_lora(parts, grads)
    ranks = [part.lora_a.shape[0] for part, _ in loras]
    dA = _mm(u.t(), x, loras[0][0].lora_a.dtype).split(ranks)
    t = (x @ _stack_a([part for part, _ in loras], x.dtype).t()).split(ranks, dim=1)
    dB = [_mm(dy.t(), ti, part.lora_b.dtype).mul_(part.scale) for (part, dy), ti in zip(loras, t, strict=True)]
    return [grad for pair in zip(dA, dB, strict=True) for grad in pair]


def _with_lora(parts, grads):
    return [(part, dy) for part, dy in zip(parts, grads, strict=True) if part.lora_a is not None]


def _stack_a(parts, dtype):
    """The A's of several parts as one [sum of r, in] matrix in `dtype`."""
    if len(parts) == 1:
        return parts[0].lora_a.detach().to(dtype)
    return torch.cat([part.lora_a.detach() for part in parts]).to(dtype)


def _mm(a, b, dtype):
    """a @ b in `dtype`. An fp32 result of 16-bit factors is not rounded to 16 bits on the way: fp16 could overflow."""
    if dtype != torch.float32 or a.dtype == torch.float32:
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.float() @ b.float()


class LoraLinear(torch.autograd.Function):
    """The functions above for autograd. A's and B's are passed flat besides the parts, for it to see them.

    norm: (weight [in], eps) of an RMSNorm that x goes through first, or None; dtype: what the products run in.
    """

    @staticmethod
    def forward(ctx, x, parts, norm, dtype, *a_and_b):
        ctx.set_materialize_grads(False)  # an output nobody used brings None, not a matrix of zeros
        ctx.save_for_backward(x, *a_and_b)
        ctx.parts, ctx.norm, ctx.dtype = without_lora(parts), norm, dtype
        outputs = project(normed(x, norm, dtype)[0], parts)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    def backward(ctx, *grads):
        x, *a_and_b = ctx.saved_tensors
        parts = with_lora(ctx.parts, a_and_b)
        used = [i for i, dy in enumerate(grads) if dy is not None]
        parts, grads = [parts[i] for i in used], [grads[i].reshape(-1, grads[i].shape[-1]) for i in used]
        u = lora_signal(parts, grads)
        rows, r = normed(x, ctx.norm, ctx.dtype)
        dx, flat = None, [None] * len(a_and_b)
        if u is not None and any(ctx.needs_input_grad[4:]):
            slots = [2 * i + j for i in used if a_and_b[2 * i] is not None for j in (0, 1)]
            for slot, grad in zip(slots, lora_grads(rows, parts, grads, u), strict=True):
                flat[slot] = grad
        del rows
        if ctx.needs_input_grad[0] and used:
            dx = input_grad(parts, grads, u).view(x.shape)
            if ctx.norm is not None:
                dx, _ = norm_backward(dx, None, x, ctx.norm[0], r, weight_grad=False)
        return dx, None, None, None, *flat


def normed(x, norm, dtype):
    """x as rows [N, in] of `dtype`, through the RMSNorm if there is one; and that one's 1 / rms [N] or None."""
    if norm is None:
        return x.reshape(-1, x.shape[-1]).to(dtype), None
    _, y, r = norm_forward(x, *norm)
    return y.view(-1, x.shape[-1]).to(dtype), r


def without_lora(parts):
    """The parts without A and B, which autograd keeps (and checks) itself."""
    return [part._replace(lora_a=None, lora_b=None) for part in parts]


def with_lora(parts, a_and_b):
    pairs = zip(a_and_b[::2], a_and_b[1::2], strict=True)
    return [part._replace(lora_a=a, lora_b=b) for part, (a, b) in zip(parts, pairs, strict=True)]


def prepare(x, parts, norm=None):
    """The dtype to compute in (autocast's if it is on, else x's), and the errors a caller can make."""
    for part in parts:
        if part.weight.requires_grad:
            raise ValueError("lora_linear gives W no gradient: freeze it (requires_grad_(False)) or use nn.Linear")
        if (part.lora_a is None) != (part.lora_b is None):
            raise ValueError("a LoRA has both A and B, or neither")
    if norm is not None and norm[0].requires_grad:
        raise ValueError("a norm that is folded in gets no weight gradient: freeze it, or call rms_norm before")
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def lora_linear_group(x, projections, norm=None):
    """See nbhelpers.kernels.lora_linear_group."""
    dtype = prepare(x, projections, norm)
    x = x.to(dtype) if norm is None else x  # a wider x is cast before it is kept, unless it is kept anyway
    a_and_b = [t for part in projections for t in (part.lora_a, part.lora_b)]
    return LoraLinear.apply(x, projections, norm, dtype, *a_and_b)


def lora_linear(x, projection):
    """See nbhelpers.kernels.lora_linear."""
    return lora_linear_group(x, (projection,))[0]
