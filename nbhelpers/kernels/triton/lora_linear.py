"""A linear layer with a frozen weight and a trained low-rank update (LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314).

    y  = x W^T + bias + (x A^T) (s B)^T      x [N, in]   W [out, in] NF4 or 16-bit   A [r, in]   B [out, r]

    u  = dy (s B)                            [N, r]
    dx = dy W + u A                          [N, in]
    dA = u^T x                               [r, in]     in A's dtype, summed in fp32
    dB = s dy^T (x A^T)                      [out, r]    in B's dtype, summed in fp32

W never gets a gradient, so the backward needs only x, and x A^T, which is thin (r columns): it is kept, since computing
it again reads all of x. W is dequantised again, into one scratch buffer that all layers share.

Layers that read the same x (Q, K and V; gate and up) are treated as one layer with the outputs side by side,
y [N, sum of out]: their A's and B's are stacked (lora_stack.py), their 4-bit weights are dequantised into one stacked
matrix and multiplied in one product. So each line above is one product whatever the number of layers, and dx is rounded
twice, not once per layer. Only weights stored in 16 bits, or together too large, are multiplied one by one, and a
large one in blocks of rows. The thin product always comes first: the wide one accumulates onto its result, which needs
no separate pass over y or dx. An RMSNorm in front can be folded in: then x is the norm's input, which is kept
elsewhere anyway, and the normalised rows n = w * x / rms are not needed again (`normed_grads`).
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nbhelpers.gpu import DEQUANTIZE_BYTES as DENSE_BYTES

from ..reference import Projection, Stacked
from .common import ceil_div
from .lora_stack import stack_adapters
from .nf4 import MOST_FEW_ROWS, dequantize_group, dequantize_nf4, few_rows, matmul_few_rows
from .rms_norm import backward as norm_backward
from .rms_norm import forward as norm_forward

_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in the one buffer that every layer dequantises into; it grows to the largest request and is kept.

    Its contents are valid until the next call. That is safe because the work of one stream runs in order: the product
    that reads a weight is queued before the kernel that overwrites it. So it takes one stream per device. While a CUDA
    graph is being captured the memory comes from the graph's own pool instead: a graph keeps addresses, and this buffer
    may be replaced by a larger one.

    Args:
        shape (`tuple[int, int]`): Of the tensor.
        dtype (`torch.dtype`): Of the tensor; there is one buffer per device and dtype.
        device (`torch.device`): Where the tensor is needed.
    """
    size = shape[0] * shape[1]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _scratch.get((device, dtype))
    if buffer is None or buffer.numel() < size:
        _scratch.pop((device, dtype), None)
        buffer = None  # free the smaller one before allocating
        buffer = _scratch[device, dtype] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)


def free_scratch(device: torch.device) -> None:
    """See nbhelpers.kernels.free_scratch."""
    for key in [key for key in _scratch if key[0] == device]:
        del _scratch[key]


def products(parts: Sequence[Projection], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns of y, W [columns, in]) for each product of y = x W^T; W is valid until the next one is made.

    Args:
        parts (`Sequence[Projection]`): Layers that read the same x.
        dtype (`torch.dtype`): What W is needed in.
        device (`torch.device`): Where W is needed.
    """
    shapes = tuple([_shape(part) for part in parts])
    for columns, numbers, rows in _cut(shapes, dtype.itemsize, DENSE_BYTES):
        if not shapes[numbers[0]][2]:  # a 16-bit weight
            yield columns, parts[numbers[0]].weight.detach().to(dtype)
            continue
        weight = scratch((columns.stop - columns.start, shapes[0][1]), dtype, device)
        states = [state for i in numbers if (state := parts[i].quant_state) is not None]
        if len(numbers) == 1:
            dequantize_nf4(parts[numbers[0]].weight, states[0], dtype, weight, rows)
        else:
            dequantize_group([parts[i].weight for i in numbers], states, dtype, weight)
        yield columns, weight


def _shape(part: Projection) -> tuple[int, int, int]:
    """(out, in, weights in a block of NF4) of a layer; in 16 bits: 0 for a block."""
    if (state := part.quant_state) is None:
        out, inputs = part.weight.shape
        return out, inputs, 0
    return (*state.shape, state.blocksize)


@cache
def _cut(
    shapes: tuple[tuple[int, int, int], ...], width: int, most: int
) -> tuple[tuple[slice, tuple[int, ...], tuple[int, int] | None], ...]:
    """The products of layers of these (out, in, block of NF4 or 0), `width` bytes a number.

    Returns (columns of y, numbers of the layers, rows of its NF4 weight if not all) of each. An NF4 weight that is too
    large comes in blocks of rows of at most `most` bytes. The narrow ones come first: a sum kept in 16 bits is rounded
    after each addition, relative to its size by then, so the large terms should come last.
    """
    out, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
    if len(shapes) > 1 and all(block for _, _, block in shapes) and out * inputs * width <= most:
        return ((slice(0, out), tuple(range(len(shapes))), None),)
    starts = list(accumulate((shape[0] for shape in shapes), initial=0))
    cuts: list[tuple[slice, tuple[int, ...], tuple[int, int] | None]] = []
    for i, (height, _, block) in sorted(enumerate(shapes), key=lambda pair: pair[1][0]):
        rows = height
        if block:  # this many rows are whole quantisation blocks, whatever their width
            blocks = max(1, most // (inputs * width * block))  # of rows
            rows = block * ceil_div(height, block * ceil_div(height, block * blocks))  # pieces of similar size
        for first in range(0, height, rows):
            last = min(first + rows, height)
            cuts.append((slice(starts[i] + first, starts[i] + last), (i,), (first, last) if rows < height else None))
    return tuple(cuts)


def project(x: Tensor, parts: Sequence[Projection], adapters: Stacked | None = None) -> tuple[Tensor, Tensor | None]:
    """y [N, sum of out] of all parts side by side, for x [N, in] in the dtype of the products, and x A^T [N, sum of r],
    None where no part has a LoRA. No autograd. adapters: their stacked A and B, if somebody has made them.
    """
    a, b = stack_adapters(parts, x.dtype) if adapters is None else adapters
    z = None if a is None else F.linear(x, a)
    if len(x) <= MOST_FEW_ROWS and (y := _few(x, parts)) is not None:
        return y if z is None or b is None else y.addmm_(z, b.t()), z
    bias = _stack_bias(parts, x.dtype)
    if z is None or b is None:
        y = x.new_empty(len(x), sum(part.out_features for part in parts))
    else:
        y = F.linear(z, b, bias)
    for columns, weight in products(parts, x.dtype, x.device):
        into = y if len(weight) == y.shape[1] else y[:, columns]
        if z is not None:
            into.addmm_(x, weight.t())
        elif bias is not None:
            torch.addmm(bias[columns], x, weight.t(), out=into)
        else:
            torch.mm(x, weight.t(), out=into)
    return y, z


def _few(x: Tensor, parts: Sequence[Projection]) -> Tensor | None:
    """`project` without LoRA by bitsandbytes' fused product, if that is faster for each part."""
    states = [part.quant_state for part in parts if part.quant_state is not None]
    if len(states) < len(parts) or not all(few_rows(x, state) for state in states):
        return None
    biases = [_stack_bias([part], x.dtype) for part in parts]  # added before the product is rounded
    triples = zip(parts, states, biases, strict=True)
    outputs = [matmul_few_rows(x, part.weight, state, bias) for part, state, bias in triples]
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def _stack_bias(parts: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    """The biases side by side in `dtype`, with zeros for a part without one; None if no part has one."""
    biases = [part.bias for part in parts if part.bias is not None]
    if not biases:
        return None
    if len(parts) == 1:
        return biases[0].detach().to(dtype)
    zeros = biases[0].new_zeros
    return torch.cat([zeros(p.out_features) if p.bias is None else p.bias.detach() for p in parts]).to(dtype)


def input_grad(dy: Tensor, parts: Sequence[Projection], a: Tensor | None, u: Tensor | None) -> Tensor:
    """dx [N, in] = u A + sum over the parts of dy W, accumulated by the matrix products; dy [N, sum of out]."""
    dx = None if a is None or u is None else u @ a
    for columns, weight in products(parts, dy.dtype, dy.device):
        dx = dy[:, columns] @ weight if dx is None else dx.addmm_(dy[:, columns], weight)
    assert dx is not None  # there is at least one product
    return dx


def lora_grads(
    x: Tensor, dy: Tensor, parts: Sequence[Projection], z: Tensor | None, u: Tensor | None, norm: Tensor | None = None
) -> list[Tensor]:
    """dA [r, in] and dB [out, r] of every part that has a LoRA, as a flat list: dA1, dB1, dA2, dB2, ...

    Args:
        x (`Tensor`): [N, in]: what the layers read, up to `norm`.
        dy (`Tensor`): [N, sum of out].
        parts (`Sequence[Projection]`): Layers that read x.
        z (`Tensor`, *optional*): x A^T [N, sum of r] for their stacked A; None where no part has a LoRA.
        u (`Tensor`, *optional*): dy times their stacked s B, [N, sum of r]; None like z.
        norm (`Tensor`, *optional*): [in], what each column of x is multiplied by.
    """
    if z is None or u is None:
        return []
    dtype = next(part.lora_a.dtype for part in parts if part.lora_a is not None)
    of_a = _mm(u.t(), x, dtype) if norm is None else _mm(u.t(), x, torch.float32).mul_(norm)
    of_b = _mm(dy.t(), z, dtype)  # dB_i are its diagonal blocks
    flat, row, column = [], 0, 0
    for part in parts:
        if part.lora_a is not None and part.lora_b is not None:
            rank = len(part.lora_a)
            rows, columns = slice(row, row + part.out_features), slice(column, column + rank)
            flat += [of_a[columns].to(part.lora_a.dtype), (of_b[rows, columns] * part.scale).to(part.lora_b.dtype)]
            column += rank
        row += part.out_features
    return flat


def normed_grads(
    x: Tensor, norm: tuple[Tensor, float] | None, r: Tensor | None, dy: Tensor, parts: Sequence[Projection],
    z: Tensor | None, u: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """`lora_grads` where x [.., in] goes through a norm first, of which 1 / rms [N] is kept.

    dA = u^T n = (u / rms)^T x * w: instead of the rows n only u is scaled, which is thin. Not so in fp16, where that
    could take u out of range, and where x is wider than the products.
    """
    dtype = dy.dtype
    if norm is None or r is None or u is None or dtype == torch.float16 or x.dtype != dtype:
        return lora_grads(normed(x, norm, dtype)[0], dy, parts, z, u)
    scaled = torch.mul(u, r[:, None], out=torch.empty_like(u))
    return lora_grads(x.reshape(-1, x.shape[-1]), dy, parts, z, scaled, norm[0])


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`. An fp32 result of 16-bit factors is not rounded to 16 bits in between: fp16 could overflow."""
    if dtype != torch.float32 or a.dtype == torch.float32:
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.float() @ b.float()


class LoraLinear(torch.autograd.Function):
    """The functions above for autograd. A's and B's are passed flat in addition to the parts, for autograd to see them.

    norm: (weight [in], eps) of an RMSNorm applied to x first, or None. dtype: what the products run in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parts: tuple[Projection, ...],
        norm: tuple[Tensor, float] | None,
        dtype: torch.dtype,
        *a_and_b: Tensor | None,
    ) -> Tensor:
        rows, r = normed(x, norm, dtype)
        y, z = project(rows, parts)
        ctx.save_for_backward(x, r, z, *a_and_b)
        ctx.parts, ctx.norm, ctx.dtype = without_lora(parts), norm, dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, r, z, *a_and_b = ctx.saved_tensors
        parts, dy = with_lora(ctx.parts, a_and_b), dy.reshape(-1, dy.shape[-1])
        a, b = stack_adapters(parts, ctx.dtype)
        u = None if b is None else dy @ b
        grads = iter(normed_grads(x, ctx.norm, r, dy, parts, z, u) if any(ctx.needs_input_grad[4:]) else ())
        flat = [None if tensor is None else next(grads, None) for tensor in a_and_b]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = input_grad(dy, parts, a, u).view(x.shape)
            if r is not None:
                dx, _ = norm_backward(dx, None, x, ctx.norm[0], r, weight_grad=False)
        return dx, None, None, None, *flat


def normed(x: Tensor, norm: tuple[Tensor, float] | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x as rows [N, in] of `dtype`, normalised if there is a norm; and the norm's fp32 1 / rms [N], or None."""
    if norm is None:
        return x.reshape(-1, x.shape[-1]).to(dtype), None
    _, y, r = norm_forward(x, *norm)
    return y.view(-1, x.shape[-1]).to(dtype), r


def without_lora(parts: Sequence[Projection]) -> list[Projection]:
    """The parts without A and B, which autograd saves (and version-checks) itself."""
    return [part._replace(lora_a=None, lora_b=None) for part in parts]


def with_lora(parts: Sequence[Projection], a_and_b: Sequence[Tensor | None]) -> list[Projection]:
    """The parts with their A and B put back; a_and_b is A1, B1, A2, B2, .."""
    pairs = zip(a_and_b[::2], a_and_b[1::2], strict=True)
    return [part._replace(lora_a=a, lora_b=b) for part, (a, b) in zip(parts, pairs, strict=True)]


def prepare(x: Tensor, parts: Sequence[Projection], norm: tuple[Tensor, float] | None = None) -> torch.dtype:
    """The dtype to compute in: autocast's if it is on, else x's.

    Raises ValueError where a part's W or the norm's weight requires a gradient, or a LoRA has only one of A and B.
    """
    if torch.is_grad_enabled():
        for part in parts:
            if part.weight.requires_grad:
                raise ValueError("lora_linear gives W no gradient: freeze it (requires_grad_(False)) or use nn.Linear")
        if norm is not None and norm[0].requires_grad:
            raise ValueError("a norm that is folded in gets no weight gradient: freeze it, or call rms_norm before")
    for part in parts:
        if (part.lora_a is None) != (part.lora_b is None):
            raise ValueError("a LoRA has both A and B, or neither")
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _side_by_side(
    x: Tensor, projections: tuple[Projection, ...], norm: tuple[Tensor, float] | None, adapters: Stacked | None = None
) -> Tensor:
    """The outputs of `lora_linear_group` as one tensor [..., sum of out]."""
    dtype = prepare(x, projections, norm)
    if not torch.is_grad_enabled():
        y, _ = project(normed(x, norm, dtype)[0], projections, adapters)
        return y.view(*x.shape[:-1], y.shape[-1])
    x = x.to(dtype) if norm is None else x  # cast a wider x before it is saved; a norm's input is kept elsewhere anyway
    a_and_b = [t for part in projections for t in (part.lora_a, part.lora_b)]
    return LoraLinear.apply(x, projections, norm, dtype, *a_and_b)


def lora_linear_group(
    x: Tensor, projections: tuple[Projection, ...], norm: tuple[Tensor, float] | None = None, packed: bool = False,
    adapters: Stacked | None = None,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """See nbhelpers.kernels.lora_linear_group."""
    y = _side_by_side(x, projections, norm, adapters)
    return y if packed else y.split([part.out_features for part in projections], dim=-1)


def lora_linear(x: Tensor, projection: Projection) -> Tensor:
    """See nbhelpers.kernels.lora_linear."""
    return _side_by_side(x, (projection,), None)
