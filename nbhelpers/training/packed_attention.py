"""Causal attention over packed sequences, where a sequence may have more keys than queries (a shared prompt's).

Query i of a sequence with n queries and m keys sees the keys up to m - n + i: a causal mask aligned bottom-right.
Three backends compute it:

"flash"      one launch for all sequences, keys and values of fewer heads as they are; 16 bits, Ampere and later. A
             micro-batch of one long sequence goes through SDPA where that was timed to be quicker (`prefers_sdpa`)
"efficient"  one launch, keys and values expanded to all heads; what a T4 has
"rows"       one `scaled_dot_product_attention` per sequence; any device, and the reference for the other two

The first two are the operators behind torch's SDPA, called with sequence ends, which SDPA does not pass on. They are
not torch's public API, so `choose` runs them once on a small input before they are relied upon.
"""

import time
import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalVariant, causal_lower_right

from nbhelpers import gpu
from nbhelpers.kernels.taken import take

from .packing import Packed, pack, unpad

LONG = 8192  # tokens of a sequence for SDPA: cuDNN makes a plan for each new length, which shorter ones do not repay
TIMED = 4096  # tokens; on an H200 2.1 ms against 1.3
QUICKER = 0.9  # less than that and the two may be one kernel, timed twice


def attend(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float, backend: str) -> Tensor:
    """Attention of each token to those before it in its own text.

    Args:
        q (`Tensor`): [1, heads, T, D].
        k (`Tensor`), v (`Tensor`): [1, kv heads, T, D], in the dtype of q.
        packed (`Packed`): Which tokens see which.
        scale (`float`): What q · k is multiplied by.
        backend (`str`): "flash", "efficient" or "rows".

    Returns [1, T, heads * D] in the dtype of q.
    """
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))  # [T, heads, D], any strides
    if packed.keys is not None:
        k, v = take(k, packed.keys), take(v, packed.keys)
    return _BACKENDS[backend](q, k, v, packed, scale).reshape(1, q.shape[0], -1)


def _flash(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
    alone = len(packed.sequences) == 1 and len(q) == len(k) >= LONG
    if alone and prefers_sdpa(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2]):
        return _single(q, k, v, packed, scale)
    return _varlen(q, k, v, packed, scale)


def _single(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
    """One sequence with as many keys as queries, through SDPA's own choice, which is cuDNN on Hopper."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)[0].transpose(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
    return torch.ops.aten._flash_attention_forward(
        q, k, v, packed.q_ends, packed.k_ends, *packed.longest, 0.0, True, False, scale=scale
    )[0]


def _expand(t: Tensor, heads: int) -> Tensor:
    """[K, kv heads, D] -> [K, heads, D], each head standing for as many as share it."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1)


def _efficient(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
    k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    corner = int(CausalVariant.LOWER_RIGHT)
    return torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, packed.q_ends, packed.k_ends, *packed.longest, 0.0, corner, needs_grad,
        scale=scale,
    )[0][0]  # fmt: skip


def _rows(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
    k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
    queries = [end - first for first, end, _, _ in packed.sequences]
    keys = [end - first for _, _, first, end in packed.sequences]
    outputs = []
    # split, not sliced: the gradient of a slice is as long as all sequences together
    for row in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        mask = causal_lower_right(len(row[0]), len(row[1]))
        batched = [t.transpose(0, 1).unsqueeze(0) for t in row]
        outputs.append(F.scaled_dot_product_attention(batched[0], batched[1], batched[2], attn_mask=mask, scale=scale))
    return torch.cat([out.squeeze(0).transpose(0, 1) for out in outputs])


_BACKENDS = {"flash": _flash, "efficient": _efficient, "rows": _rows}


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest backend that this device has for tensors of `dtype`, and that gives what "rows" gives."""
    if device.type != "cuda":
        return "rows"
    backend = "flash" if gpu.capability(device) >= (8, 0) and dtype != torch.float32 else "efficient"
    wrong = check(backend, device, dtype)
    if wrong is None:
        return backend
    warnings.warn(
        f"torch {torch.__version__}'s {backend} attention for packed sequences is not used: {wrong}. Attention goes "
        "row by row instead, which is slower and just as right",
        stacklevel=2,
    )
    return "rows"


@cache
def check(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with `backend` on this device: an error, or how far it is from "rows" in fp32; None if nothing."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(9, (4, 150), generator=generator)
    lengths = torch.tensor([70, 1, 33, 40])[:, None]
    prompts = torch.tensor([[3], [3], [3], [4]]).expand(4, 20)
    batch = unpad(prompts, torch.ones(4, 20), ids, torch.arange(150) < lengths)
    packed = pack(batch, batch.rows, device)
    tokens = packed.ids.shape[1]
    tensors = [torch.randn(1, heads, tokens, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2)]
    upstream = torch.randn(1, tokens, 256, generator=generator).to(device)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in tensors)
        out = attend(q, k, v, packed, 0.125, backend)
        return [out, *torch.autograd.grad(out, (q, k, v), upstream.to(dtype))]

    try:
        with torch.enable_grad():
            got, wanted = run(backend, dtype), run("rows", torch.float32)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    worst = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))
    return None if worst < 0.03 else f"it is {worst:.3f} off"


@cache
def prefers_sdpa(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> bool:
    """Whether SDPA's own choice takes at most QUICKER of the time of "flash" for one sequence of TIMED tokens, forward
    and backward, and gives what that gives. Timed once for heads of this number and size; call it before memory is
    counted."""
    if device.type != "cuda":
        return False
    ids = torch.zeros(1, TIMED, dtype=torch.long)
    batch = unpad(ids[:, :1], torch.ones(1, 1), ids[:, 1:], torch.ones(1, TIMED - 1, dtype=torch.bool))
    packed = pack(batch, batch.rows, device)
    shapes = [(packed.ids.shape[1], number, dim) for number in (heads, kv_heads, kv_heads, heads)]
    own = torch.Generator(device).manual_seed(0)  # the run's draws stay what they are
    try:
        *leaves, upstream = (torch.randn(shape, device=device, dtype=dtype, generator=own) for shape in shapes)
        for leaf in leaves:
            leaf.requires_grad_()
        return _quicker(leaves, upstream, packed, dim**-0.5)
    except RuntimeError:  # no memory left for it, or SDPA has nothing for these heads
        return False


@torch.enable_grad()
def _quicker(leaves: list[Tensor], upstream: Tensor, packed: Packed, scale: float) -> bool:
    """`prefers_sdpa` of q, k and v, and the gradient of attention's output."""
    results, seconds = [], []
    for way in (_varlen, _single):
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = way(leaves[0], leaves[1], leaves[2], packed, scale)
            result = [out, *torch.autograd.grad(out, leaves, upstream)]
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        results.append(result)
        seconds.append(min(times[2:]))
    alike = all((a - b).float().norm() <= 0.03 * b.float().norm() for a, b in zip(*results, strict=True))
    return alike and seconds[1] <= QUICKER * seconds[0]
