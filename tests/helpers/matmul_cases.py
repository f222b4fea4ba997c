"""Layers in NF4 with a LoRA, and how two backends are compared on them."""

import pytest
import torch

from nbhelpers import kernels
from nbhelpers.kernels import Projection

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}


def nf4(weight, nested=True):
    """(packed, quant_state) of a weight, by bitsandbytes."""
    functional = pytest.importorskip("bitsandbytes").functional
    return functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=nested)


def layer(inputs, outputs, dtype=torch.float32, r=3, quantised=False, bias=True, lora=True, master=None):
    """A random frozen layer with a LoRA whose B is not zero."""
    weight = torch.randn(outputs, inputs, dtype=torch.float64).mul_(inputs**-0.5).to(dtype)
    weight, state = nf4(weight) if quantised else (weight, None)
    a = torch.randn(r, inputs).mul_(inputs**-0.5).to(master or dtype).requires_grad_() if lora else None
    b = torch.randn(outputs, r).mul_(0.3).to(master or dtype).requires_grad_() if lora else None
    return Projection(weight, state, torch.randn(outputs).to(dtype) if bias else None, a, b, 0.7)


def run(backend, function, x, parts, *rest):
    """Outputs, and gradients of x and of every A and B, of one backend."""
    leaf = x.detach().clone().requires_grad_()
    with kernels.use(backend):
        out = function(leaf * 1.0, *rest)
    outs = out if isinstance(out, tuple) else (out,)
    loss = sum((y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum() for y in outs)
    loras = [t for p in parts for t in (p.lora_a, p.lora_b) if t is not None]
    return [*outs, *torch.autograd.grad(loss, [leaf, *loras])]


def same(got, wanted, tolerance):
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-6)
        assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}"


def keeping(kept):
    """What autograd keeps for the backward is also put into the list `kept`."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
