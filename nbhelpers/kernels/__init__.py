"""Fused operations of a decoder layer. One name for each, two implementations, chosen by where the tensors lie.

`triton` (Triton, one file a kernel) serves tensors on a CUDA device when triton is installed; `reference` (the same
functions in plain torch, differentiated by autograd) serves everything else, so a CPU always works.

    with kernels.use("torch"):      # or "triton": a test or a benchmark decides for itself
        ...

Shapes: T tokens (any leading shape is accepted where the text says [..., n]), H hidden, I intermediate, r LoRA rank.
"""

from contextlib import contextmanager
from importlib.util import find_spec

from torch import Tensor
from torch.cuda import device_of  # a kernel runs on the current device, wherever its tensors lie; nothing on a CPU

from . import reference
from .reference import Projection

if find_spec("triton"):
    from . import triton
else:  # macOS, Windows
    triton = None

__all__ = [
    "Projection",
    "decode_attention",
    "decode_linear",
    "decode_mlp",
    "dequantize_nf4",
    "draw",
    "linear_logprob",
    "lora_linear",
    "lora_linear_group",
    "lora_mlp",
    "rms_norm",
    "rope",
    "rope_packed",
    "swiglu",
    "swiglu_packed",
    "use",
]

_forced: str | None = None


@contextmanager
def use(backend: str | None):
    """Inside the block every function runs on `backend`: "torch", "triton", or None to choose by device again.

    Raises ValueError for another name and RuntimeError for "triton" without triton.
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


def _for(x: Tensor):
    """The module that serves x: `triton` or `reference`."""
    if _forced is not None:
        return triton if _forced == "triton" else reference
    return triton if x.is_cuda and triton is not None else reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """y = weight * s / sqrt(mean(s^2) + eps) with s = x + residual; statistics in fp32 (arXiv 1910.07467).

    x, residual [..., H]; weight [H]. Returns y [..., H] in the wider of the dtypes of s and weight, or (s, y) when a
    residual is given. In fp16 s saturates at 65504 instead of becoming infinite.
    """
    with device_of(x):
        return _for(x).rms_norm(x, weight, eps, residual)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
    """Rotary position embedding, pairs (i, i + R/2): q1' = q1 cos - q2 sin, q2' = q2 cos + q1 sin (arXiv 2104.09864).

    q [B, heads, S, D] and k [B, kv heads, S, D] with any strides; cos, sin [1 or B, S, R], R <= D, each frequency
    twice as transformers makes them, scaled in any way (Llama 3, longrope); channels past R pass through.
    Returns (q', k'). Triton writes them over q and k: use the returned tensors, forget the arguments.
    """
    with device_of(q):
        return _for(q).rope(q, k, cos, sin)


def rope_packed(qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, kv_heads: int):
    """`rope` where Q, K and V come as one tensor [B, S, (q_heads + 2 kv_heads) D], as in Phi-3.

    Returns (q', k', v) [B, heads, S, D], views of one storage; in Triton that of qkv.
    """
    with device_of(qkv):
        return _for(qkv).rope_packed(qkv, cos, sin, q_heads, kv_heads)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all [..., I] of one dtype (arXiv 2002.05202). In fp16 the result saturates at 65504.

    Triton's backward writes the gradients over gate and up (unless they are leaves, or share memory): after
    `backward` do not read them. Autograd raises its usual error if another operation still needs them.
    """
    with device_of(gate):
        return _for(gate).swiglu(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """`swiglu` of the two halves of gate_up [..., 2 I] (gate first, as in Phi-3). Same contract."""
    with device_of(gate_up):
        return _for(gate_up).swiglu_packed(gate_up)


def dequantize_nf4(weight: Tensor, quant_state, dtype, out: Tensor | None = None, rows=None) -> Tensor:
    """The dense [out, in] weight behind an NF4 tensor in `dtype`: written into `out` if given, else a new tensor.

    weight uint8 [out * in / 2, 1]; quant_state bitsandbytes'; rows (first, last) for a part of the rows. ValueError
    for another quantisation or an `out` that does not fit.
    """
    with device_of(weight):
        return _for(weight).dequantize_nf4(weight, quant_state, dtype, out, rows)


def lora_linear(x: Tensor, projection: Projection) -> Tensor:
    """y = x W^T + bias + scale (x A^T) B^T (arXiv 2106.09685, 2305.14314): x [..., in] -> [..., out] in x's dtype.

    W and bias get no gradient: ValueError if W asks for one. Keeps x alone.
    """
    with device_of(x):
        return _for(x).lora_linear(x, projection)


def lora_linear_group(x: Tensor, projections: tuple[Projection, ...], norm=None, packed: bool = False):
    """`lora_linear` of one x through several projections (QKV, gate and up): x read once, one product with all A's.

    norm: (weight, eps) of an RMSNorm that x goes through first; its output is not kept. ValueError if it is not frozen.
    Returns a tuple of [..., out]; with `packed` one tensor [..., sum of out], which is how Triton makes it: a gradient
    that comes packed too (`rope_packed`, say) need not be put together.
    """
    with device_of(x):
        return _for(x).lora_linear_group(x, projections, norm, packed)


def lora_mlp(
    x: Tensor,
    gate_up: tuple[Projection, ...],
    down: Projection,
    residual: Tensor | None = None,
    norm=None,
    value: bool = True,
) -> Tensor:
    """residual + down(swiglu(gate(x), up(x))): x, residual [..., H] -> [..., H].

    gate_up: two projections H -> I, or one H -> 2 I in Phi-3's layout. norm (weight, eps) makes it the second half of a
    decoder layer: s + down(swiglu(gate(n), up(n))) with s = x + residual, n = rms_norm(s). Triton keeps x (or s), gate
    and up; its backward may run once (a second one raises). In fp16 the product may reach 1e6, and sums saturate.
    value=False: only the result's backward is wanted (a checkpoint is computed again). Its numbers are then undefined,
    and its last product, a third of the work, is not computed.
    """
    with device_of(x):
        return _for(x).lora_mlp(x, gate_up, down, residual, norm, value)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    quant_state=None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy: bool = False,
    scratch_bytes: int = 263_000_000,
):
    """log softmax(hidden W^T / temperature)[target], the [tokens, V] logits never made; softmax and sums in fp32.

    hidden [..., H]; weight [V, H] in 16 or 32 bits, or NF4 with its quant_state; target [...] int64, where -100 gives 0
    and no gradient; bias [V], frozen; vocab_size: words from there on are padding and get no probability.
    Returns [...] in fp32, or with `entropy` also the entropy [...] in fp32, which is for watching: no gradient flows
    through it. Gradients flow to hidden and, if it wants one, to a 16- or 32-bit weight (summed in fp32).
    scratch_bytes bounds the buffer for logits, whatever the number of tokens. A second backward through the same
    result raises autograd's error: the first one writes the gradient over what was kept.
    """
    with device_of(hidden):
        return _for(hidden).linear_logprob(
            hidden,
            weight,
            target,
            quant_state=quant_state,
            bias=bias,
            temperature=temperature,
            vocab_size=vocab_size,
            entropy=entropy,
            scratch_bytes=scratch_bytes,
        )


def draw(logits: Tensor, seeds: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row, drawn from softmax(logits), by the exponential race (arXiv 1611.01144): the largest
    logit_i - log E_i wins, E_i = -log(1 - u_i), where u_i is a hash of (seed, counter, i) and of nothing else.

    logits fp32 [B, V], -inf where a token is ruled out; seeds, counters int64 [B]. Returns the tokens, int64 [B], and
    their log-probabilities, fp32 [B].
    """
    with device_of(logits):
        return _for(logits).draw(logits, seeds, counters)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, table: Tensor,
                     layer: int, positions: Tensor, longest: int, scale: float,
                     window: int | None = None) -> Tensor:  # fmt: skip
    """Attention of one new token a row over what the cache holds of that row, after its K and V were put there.

    q [B, heads, 1, D], k, v [B, kv heads, 1, D], q and k not rotated yet; cos, sin [1 or B, 1, R] as for `rope`;
    positions int64 [B]: where the token stands in its row. cache
    [layers, 2, rows, kv heads, length, D] with B <= rows, K and V written in place; table int64 [4]: its address and
    its strides in elements of layer, row and head: the Triton kernel looks there, not at `cache`, so that a captured
    CUDA graph stays valid when the cache is made anew. longest: no position reaches it (torch reads so far; Triton
    reads each row to its own position). window: positions that a token looks back to, itself included.
    Returns [B, 1, heads * D].
    """
    with device_of(q):
        return _for(q).decode_attention(q, k, v, cos, sin, cache, table, layer, positions, longest, scale, window)


def decode_linear(x: Tensor, parts: tuple[Projection, ...]) -> tuple[Tensor, ...]:
    """`lora_linear_group` for a step of decoding: few rows, no gradient, at most three parts.

    x [..., in] -> [..., out] for each part, in x's dtype. The LoRA term is added in fp32, to a base product that only
    some ways of making it round to x's dtype first.
    """
    with device_of(x):
        return _for(x).decode_linear(x, parts)


def decode_mlp(x: Tensor, gate_up: tuple[Projection, ...], down: Projection, residual: Tensor) -> Tensor:
    """`lora_mlp` for a step of decoding: residual + down(swiglu(gate(x), up(x))), without a gradient."""
    with device_of(x):
        return _for(x).decode_mlp(x, gate_up, down, residual)
