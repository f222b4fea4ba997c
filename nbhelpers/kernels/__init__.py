"""Fused operations of a decoder layer: one contract, two implementations, chosen by the tensors' device.

`triton` (one file per kernel) serves tensors on a CUDA device when triton is installed; `reference` (the same functions
in plain torch, differentiated by autograd) serves everything else, so a CPU always works.

    with kernels.use("torch"):      # or "triton": a test or a benchmark forces one of them
        ...

Shapes: any leading shape is accepted where the text says [..., n]; B rows of the batch, S positions, D channels of a
head, H hidden, I intermediate, V vocabulary, r LoRA rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.cuda import device_of  # kernels launch on the current device, not on their tensors'; no effect on a CPU

from nbhelpers.gpu import LOGITS_BYTES

from . import reference
from .eight_bits import EightBits as EightBits
from .reference import HeadNorms, Projection, Stacked

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

# None on macOS and Windows
triton: ModuleType | None = import_module(".triton", __name__) if find_spec("triton") else None

_forced: str | None = None


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Force `backend` for every function inside the block.

    Args:
        backend (`str`, *optional*): "torch", "triton", or None to choose by device again.

    Raises ValueError for another name and RuntimeError for "triton" where triton is not installed.
    """
    global _forced
    if backend not in ("torch", "triton", None):
        raise ValueError(f'backend is "torch", "triton" or None, not {backend!r}')
    if backend == "triton" and triton is None:
        raise RuntimeError("triton is not installed here: pip install triton (Linux only)")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def _for(x: Tensor) -> ModuleType:
    """The implementation that serves x: the module `triton` or `reference`."""
    if triton is None or _forced == "torch":
        return reference
    return triton if x.is_cuda or _forced == "triton" else reference


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """y = weight * s / sqrt(mean(s^2) + eps) with s = x + residual; statistics in fp32 (RMSNorm, arXiv:1910.07467).

    Args:
        x (`Tensor`): [..., H].
        weight (`Tensor`): [H].
        eps (`float`): Added to the mean square.
        residual (`Tensor`, *optional*): [..., H], added to x before the norm.

    Returns y [..., H] in the wider of the dtypes of s and weight, or (s, y) when a residual is given. In fp16 s
    saturates at 65504 instead of becoming infinite.
    """
    with device_of(x):
        return _for(x).rms_norm(x, weight, eps, residual)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None = None) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, pairs (i, i + R/2): q1' = q1 cos - q2 sin, q2' = q2 cos + q1 sin (arXiv:2104.09864).

    Args:
        q (`Tensor`): [B, heads, S, D] with any strides.
        k (`Tensor`): [B, kv heads, S, D] with any strides.
        cos (`Tensor`): [1 or B, S, R], R <= D, each frequency twice as transformers makes them, scaled in any way
            (Llama 3, longrope). Channels past R pass through.
        sin (`Tensor`): Like cos.
        norms (`HeadNorms`, *optional*): RMSNorms that the heads of q and k go through first.

    Returns (q', k'). Without norms Triton writes them over q and k: use the returned tensors, not the arguments.
    """
    with device_of(q):
        return _for(q).rope(q, k, cos, sin, norms)


def rope_packed(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, kv_heads: int, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope` where Q, K and V are one tensor, as in Phi-3.

    Args:
        qkv (`Tensor`): [B, S, (q_heads + 2 kv_heads) D].
        cos (`Tensor`): As for `rope`.
        sin (`Tensor`): As for `rope`.
        q_heads (`int`): Heads of Q.
        kv_heads (`int`): Heads of K, and of V.
        norms (`HeadNorms`, *optional*): As for `rope`.

    Returns (q', k', v), each [B, heads, S, D]; without norms views of one storage, which in Triton is that of qkv.
    """
    with device_of(qkv):
        return _for(qkv).rope_packed(qkv, cos, sin, q_heads, kv_heads, norms)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, arXiv:2002.05202). In fp16 the result saturates at 65504.

    Args:
        gate (`Tensor`): [..., I].
        up (`Tensor`): [..., I] in gate's dtype.

    Returns [..., I] in the same dtype. Triton's backward writes the gradients over gate and up (unless they are leaves,
    or share memory): do not read them after `backward`. Autograd raises its usual error if another operation still
    needs them.
    """
    with device_of(gate):
        return _for(gate).swiglu(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """`swiglu` of the two halves of gate_up [..., 2 I] (gate first, as in Phi-3). The same contract."""
    with device_of(gate_up):
        return _for(gate_up).swiglu_packed(gate_up)


def dequantize_nf4(
    weight: Tensor,
    quant_state: "QuantState",
    dtype: torch.dtype,
    out: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """The dense weight of an NF4 tensor (QLoRA, arXiv:2305.14314).

    Args:
        weight (`Tensor`): uint8 [out * in / 2, 1], `Linear4bit.weight` (another storage type is read as bytes).
        quant_state (`QuantState`): bitsandbytes' state of that weight, nested (double quantisation) or not.
        dtype (`torch.dtype`): Of the result, 16 or 32 bits.
        out (`Tensor`, *optional*): Contiguous, in `dtype` and of the result's shape, to write into instead of a new
            tensor.
        rows (`tuple[int, int]`, *optional*): (first, last), to dequantise only rows first <= i < last; first * in must
            be a multiple of the block size.

    Returns [out, in], or [last - first, in] with rows. The Triton implementation raises ValueError for another
    quantisation, an `out` that does not fit, and rows that do not begin a block.
    """
    with device_of(weight):
        return _for(weight).dequantize_nf4(weight, quant_state, dtype, out, rows)


def free_scratch(device: torch.device) -> None:
    """Free the buffer that weights are dequantised into. It is made again when a layer needs it; graphs that were
    captured do not."""
    if triton is not None:
        triton.free_scratch(device)


def lora_linear(x: Tensor, projection: Projection) -> Tensor:
    """y = x W^T + bias + scale (x A^T) B^T (LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314).

    Args:
        x (`Tensor`): [..., in].
        projection (`Projection`): W [out, in], which is frozen, with its bias and its LoRA.

    Returns [..., out] in x's dtype, or in autocast's where that is on. W and bias get no gradient: raises ValueError if
    W requires one. The backward keeps only x.
    """
    with device_of(x):
        return _for(x).lora_linear(x, projection)


def lora_linear_group(
    x: Tensor, projections: tuple[Projection, ...], norm: tuple[Tensor, float] | None = None, packed: bool = False,
    adapters: Stacked | None = None,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """`lora_linear` of one x through several projections (QKV, gate and up): x read once, one product with all A's.

    Args:
        x (`Tensor`): [..., in].
        projections (`tuple[Projection, ...]`): Each with the same `in`.
        norm (`tuple[Tensor, float]`, *optional*): (weight [in], eps) of an RMSNorm on x; not kept for the backward.
        packed (`bool`): Return the outputs side by side in one tensor, as Triton computes them.
        adapters (`tuple`, *optional*): Of adapters.py, for them, where no gradient is wanted.

    Returns a tuple of [..., out], or with `packed` one tensor [..., sum of out]. Triton raises ValueError if the norm's
    weight requires a gradient; both do if a W does.
    """
    with device_of(x):
        return _for(x).lora_linear_group(x, projections, norm, packed, adapters)


def lora_mlp(
    x: Tensor,
    gate_up: tuple[Projection, ...],
    down: Projection,
    residual: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    value: bool = True,
    adapters: tuple[Stacked, Stacked] | None = None,
) -> Tensor:
    """residual + down(swiglu(gate(x), up(x))).

    Args:
        x (`Tensor`): [..., H].
        gate_up (`tuple[Projection, ...]`): Two projections H -> I, or one H -> 2 I in Phi-3's layout.
        down (`Projection`): I -> H.
        residual (`Tensor`, *optional*): [..., H].
        norm (`tuple[Tensor, float]`, *optional*): (weight [H], eps) of an RMSNorm. With it this is the second half of a
            decoder layer: s + down(swiglu(gate(n), up(n))) with s = x + residual, n = rms_norm(s).
        value (`bool`): False where only the backward is wanted (a checkpoint is recomputed): the result's values are
            then undefined, and the last product, a third of the work, is skipped.
        adapters (`tuple`, *optional*): As for `lora_linear_group`: of gate_up, and of down.

    Returns [..., H]. Triton keeps x (or s), gate and up; its backward can run only once (a second one raises). In fp16
    the product may reach 1e6, and sums saturate.
    """
    with device_of(x):
        return _for(x).lora_mlp(x, gate_up, down, residual, norm, value, adapters)


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, quant_state: "QuantState | None" = None,
    bias: Tensor | None = None, temperature: float = 1.0, vocab_size: int | None = None,
    entropy: Literal[False] = False, scratch_bytes: int = LOGITS_BYTES,
) -> Tensor: ...  # fmt: skip
@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, quant_state: "QuantState | None" = None,
    bias: Tensor | None = None, temperature: float = 1.0, vocab_size: int | None = None,
    entropy: Literal[True], entropy_grad: bool = False, scratch_bytes: int = LOGITS_BYTES,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, quant_state: "QuantState | None" = None,
    bias: Tensor | None = None, temperature: float = 1.0, vocab_size: int | None = None,
    entropy: bool = False, entropy_grad: bool = False, scratch_bytes: int = LOGITS_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """log softmax((hidden W^T + bias) / temperature)[target] without the [tokens, V] logits; softmax and sums in fp32.

    Args:
        hidden (`Tensor`): [..., H].
        weight (`Tensor`): W [V, H] in 16 or 32 bits, or NF4 (uint8) with its quant_state.
        target (`Tensor`): int64 [...]; -100 gives 0 and no gradient.
        quant_state (`QuantState`, *optional*): bitsandbytes' state of an NF4 weight.
        bias (`Tensor`, *optional*): [V], frozen: Triton raises ValueError if it requires a gradient.
        temperature (`float`): Divides the logits.
        vocab_size (`int`, *optional*): Words from this index on are padding and get no probability.
        entropy (`bool`): Return the entropy too.
        entropy_grad (`bool`): Let a gradient flow through it. The logits are then computed again in the backward: three
            products, not two.
        scratch_bytes (`int`): Bounds the buffer for logits, whatever the number of tokens.

    Returns fp32 [...], or with `entropy` a pair of those, in nats. Gradients flow to hidden and, if it requires one, to
    a 16- or 32-bit weight (summed in fp32). A second backward through the same result raises autograd's error: the
    first one writes the gradient over what was kept.
    """
    with device_of(hidden):
        return _for(hidden).linear_logprob(
            hidden, weight, target, quant_state=quant_state, bias=bias, temperature=temperature, vocab_size=vocab_size,
            entropy=entropy, entropy_grad=entropy_grad, scratch_bytes=scratch_bytes,
        )  # fmt: skip


def draw(logits: Tensor, seeds: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row, sampled from softmax(logits) by the exponential race (arXiv:1611.01144).

    The largest logit_i - log E_i wins, E_i = -log(1 - u_i), where u_i is a hash of (seed, counter, i) and of nothing
    else.

    Args:
        logits (`Tensor`): fp32 [B, V], -inf where a token is excluded.
        seeds (`Tensor`): int64 [B].
        counters (`Tensor`): int64 [B]; another counter gives an independent sample.

    Returns the tokens, int64 [B], and their log-probabilities, fp32 [B].
    """
    with device_of(logits):
        return _for(logits).draw(logits, seeds, counters)
