"""`python -m benchmarks.kernels --check`: on this GPU, in bf16 and fp16, is any kernel less exact than stock?

Every output and every gradient of a kernel and of stock code is compared with the same computation in fp64; the error
is |x - x64| / |x64|. An operation passes if the largest of its errors is no larger than the largest of stock's; NF4 if
it is bit for bit bitsandbytes'. 1 % is allowed for ties: where both round once, in another order, either may be luckier
by some 0.1 %. Two are allowed 5 %. `linear_logprob`: the gradient of the hidden states is formed in the forward, before
the upstream gradient is known, and is rounded once more when that is multiplied in. Weights too large to be dequantised
whole (Phi-4's gate and up): the gradient of their input is rounded once for each piece.
"""

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nbhelpers import kernels
from nbhelpers.kernels import reference
from nbhelpers.kernels.triton.lora_linear import DENSE_BYTES
from nbhelpers.models import patch

from . import cases
from .cases import Shape

ALLOWED, ALLOWED_LOGPROB, ALLOWED_PIECES = 1.01, 1.05, 1.05


def relative(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|; infinite where x is not finite."""
    error = (x.double() - exact).norm() / exact.norm().clamp(min=1e-30)
    return error.item() if x.isfinite().all() else float("inf")


def outputs_and_grads(
    function: Callable, inputs: Sequence[Tensor], learn: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """What a function returns, and its gradients for upstream gradients that depend on the shapes alone."""
    outs = function(*inputs)
    outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(y.device, dtype or y.dtype).to(y.dtype) for y in outs]
    return outs + list(torch.autograd.grad(outs, learn, grads))


class Checker:
    """Writes a row and a line for each comparison, and appends to `failed` what is worse than `allowed` times stock."""

    def __init__(self, row: Callable[..., None], failed: list[str], allowed: float = ALLOWED):
        self.row, self.failed, self.allowed = row, failed, allowed

    def same(self, name: str, ok: bool, details: str = "") -> None:
        """A check that has already been decided."""
        print(f"{'pass' if ok else 'FAIL':5s}{name}{details}", flush=True)
        if not ok:
            self.failed.append(f"check {name}")

    def no_worse(
        self,
        name: str,
        results: Sequence[Sequence[Tensor]],
        allowed: float | None = None,
    ) -> None:
        """results: ours, stock's and the exact ones, as many tensors in each; the largest errors decide."""
        ours, stock, exact = results
        allowed = max(self.allowed, allowed or 0.0)
        mine, theirs = ([relative(x, e) for x, e in zip(xs, exact, strict=True)] for xs in (ours, stock))
        self.row(f"check/{name}/error", "ours", max(mine), "relative")
        self.row(f"check/{name}/error", "stock", max(theirs), "relative")
        text = f": errors {[f'{e:.2e}' for e in mine]}, stock {[f'{e:.2e}' for e in theirs]}"
        self.same(name, max(mine) <= max(1e-12, allowed * max(theirs)), text)


def elementwise(check: Checker, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Norms, SwiGLU and rotary embedding."""
    everything = cases.elementwise(shape, 2, 61, dtype, device, lambda f: f)
    exact: dict[str, Callable] = {
        "rms_norm": lambda x: reference.rms_norm(x, torch.ones(shape.hidden, dtype=torch.float64, device=device), 1e-6),
        "rms_norm_add": lambda x, r: reference.rms_norm(x, torch.ones_like(x[0, 0]), 1e-6, r),
        "swiglu": reference.swiglu_packed if shape.family == "phi3" else reference.swiglu,
    }
    for name, function in exact.items():
        case = everything[name]
        wide = [t.detach().double().requires_grad_() for t in case.inputs]
        results = [outputs_and_grads(case.contestants[who], case.inputs, case.inputs) for who in ("ours", "eager")]
        results.append(outputs_and_grads(function, wide, wide, dtype))
        check.no_worse(f"{shape.name}/{name}", results)
    rope(check, shape, dtype, device)


def rope(check: Checker, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """The rotary embedding of queries and keys."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (torch.randn(2, n, 61, shape.head_dim, dtype=dtype, device=device) for n in (shape.heads, shape.kv_heads))
    angle = torch.rand(1, 61, shape.head_dim // 2, device=device).repeat(1, 1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    results = []
    for function, width in ((kernels.rope, dtype), (apply_rotary_pos_emb, dtype), (reference.rope, torch.float64)):
        inputs = [t.to(width).clone().requires_grad_() for t in (q, k)]
        call = partial(_of_copies, function, cos.to(width), sin.to(width))
        results.append(outputs_and_grads(call, inputs, inputs, dtype))
    check.no_worse(f"{shape.name}/rope", results)


def _of_copies(function: Callable, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> Any:
    return function(q * 1, k * 1, cos, sin)  # ours writes over its inputs, and a leaf must not be written over


def nf4(check: Checker, dtype: torch.dtype, device: torch.device) -> None:
    """Dequantisation, with and without double quantisation."""
    import bitsandbytes.functional as functional

    odd = ((24, 140), (31, 96)) if device.type != "cpu" else ()
    for height, width in ((17, 64), (1536, 8960), (1031, 4096), *odd):
        for nested in (True, False):
            weight = torch.randn(height, width, dtype=dtype, device=device)
            packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
            theirs = functional.dequantize_4bit(packed, state)
            ok = torch.equal(kernels.dequantize_nf4(packed, state, dtype), theirs)
            check.same(f"nf4 {height}x{width} nested={nested} {dtype}: bit for bit bitsandbytes'", ok)


def lora(check: Checker, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """Against peft on bitsandbytes under autocast; exact: fp64 with the weights that stock multiplies by."""
    everything, parts = cases.lora(shape, tokens, dtype, device, torch.float32)
    names = {"lora_linear": ("gate",), "lora_qkv": ("q", "k", "v"), "lora_mlp": ("gate", "up", "down")}
    for name, case in everything.items():
        mine = [parts[n] for n in names[name]]
        loras = case.parameters

        def dense(part: kernels.Projection) -> kernels.Projection:
            weight = reference.dequantize_nf4(part.weight, part.quant_state, dtype).double()
            bias = None if part.bias is None else part.bias.double()
            return part._replace(weight=weight, quant_state=None, bias=bias)

        wide = [t.detach().double().requires_grad_() for t in loras]
        pairs = zip(mine, wide[::2], wide[1::2], strict=True)
        exact_parts = tuple(dense(part)._replace(lora_a=a, lora_b=b) for part, a, b in pairs)

        def exact(x: Tensor, name: str = name, exact_parts: tuple = exact_parts) -> Any:
            if name == "lora_mlp":
                return reference.lora_mlp(x, exact_parts[:2], exact_parts[2])
            return reference.lora_linear_group(x, exact_parts)

        x = case.inputs[0]
        # few rows are decoding, by other products: outputs alone (a gradient of few rows is at the mercy of one)
        for rows in {4, 32} & set(range(tokens)):
            few = x.detach()[:rows]
            outputs: list[Sequence[Tensor]] = []
            for who in ("ours", "eager", None):
                with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and bool(who)):
                    outs = case.contestants[who](few) if who else exact(few.double())
                outputs.append(outs if isinstance(outs, (tuple, list)) else [outs])
            check.no_worse(f"{shape.name}/{name}/{rows} rows", outputs)
        results = []
        for who in ("ours", "eager"):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                results.append(outputs_and_grads(case.contestants[who], [x], [x, *loras]))
        x64 = x.detach().double().requires_grad_()
        results.append(outputs_and_grads(exact, [x64], [x64, *wide], dtype))
        in_pieces = any(p.out_features * p.in_features * dtype.itemsize > DENSE_BYTES for p in mine)
        check.no_worse(f"{shape.name}/{name}/{tokens} rows", results, ALLOWED_PIECES if in_pieces else None)


def logprob(check: Checker, tokens: int, hidden: int, words: int, dtype: torch.dtype, device: torch.device) -> None:
    """Log-probabilities and entropies of a head, frozen and learning."""
    h = torch.randn(tokens, hidden, dtype=dtype, device=device)
    w = torch.randn(words, hidden, dtype=dtype, device=device) * 3 * hidden**-0.5
    target = torch.randint(0, words - 7, (tokens,), device=device)
    target[::2] = (h @ w.t())[::2, : words - 7].argmax(-1)  # half of them likely, as sampled tokens are

    def stock(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        z = (h @ w[: words - 7].t()).float() / 0.9
        logps = z.log_softmax(-1)
        return logps.gather(-1, target[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1).detach()

    def ours(h: Tensor, w: Tensor, **options: Any) -> Any:
        return kernels.linear_logprob(h, w, target, temperature=0.9, vocab_size=words - 7, entropy=True, **options)

    def exact(h: Tensor, w: Tensor) -> Any:
        return reference.linear_logprob(h, w, target, temperature=0.9, vocab_size=words - 7, entropy=True)

    def results(function: Callable, h: Tensor, w: Tensor, learns: bool) -> list[Tensor]:
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_(learns)
        logp, entropy = function(h, w)
        upstream = torch.linspace(-1, 1, tokens, device=device)
        grads = torch.autograd.grad(logp, [h, w] if learns else [h], upstream.to(logp.dtype))
        return [logp, entropy, *grads]

    for learns in (False, True):
        name = f"linear_logprob of a head that {'learns' if learns else 'is frozen'}"
        lists = [
            results(f, h.to(d), w.to(d), learns) for f, d in ((ours, dtype), (stock, dtype), (exact, torch.float64))
        ]
        check.no_worse(name, lists, ALLOWED_LOGPROB)
    if device.type == "cuda":
        small = results(partial(ours, scratch_bytes=32_000_000), h, w, False)
        check.no_worse("linear_logprob in small chunks", [small, lists[1][:3], lists[2][:3]], ALLOWED_LOGPROB)
    nf4_logprob(check, h, target, hidden, words, dtype)


def nf4_logprob(check: Checker, h: Tensor, target: Tensor, hidden: int, words: int, dtype: torch.dtype) -> None:
    """The same from a head in NF4."""
    import bitsandbytes.functional as functional

    weight = torch.randn(words, hidden, dtype=dtype, device=h.device) * 3 * hidden**-0.5
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    dense = reference.dequantize_nf4(packed, state, dtype)
    lists = []
    nested: dict[str, Any] = {"quant_state": state}
    for w, options, width in ((packed, nested, dtype), (dense, {}, dtype), (dense, {}, torch.float64)):
        leaf = h.to(width).requires_grad_()
        backend = "torch" if width == torch.float64 else "triton"
        with kernels.use(backend):
            logp = kernels.linear_logprob(leaf, w if options else w.to(width), target, **options)
        lists.append([logp.detach(), *torch.autograd.grad(logp.sum(), [leaf])])
    check.no_worse("linear_logprob of an NF4 head (stock: of the same head in 16 bits)", lists, ALLOWED_LOGPROB)


def planted(check: Checker, device: torch.device) -> None:
    """fp16 with activations of 1e3 to 1e4, where stock overflows."""
    h = torch.randn(64, 512, device=device).half() * 3000
    w = torch.randn(4096, 512, device=device).half()
    target = torch.randint(0, 4096, (64,), device=device)
    leaf = h.clone().requires_grad_()
    logp = kernels.linear_logprob(leaf, w, target)
    (dh,) = torch.autograd.grad(logp.sum(), [leaf])
    overflows = not bool((h @ w.t()).isfinite().all())
    check.same("linear_logprob fp16, activations of 1e4: stock overflows", overflows)
    check.same("linear_logprob fp16, activations of 1e4: finite", bool(logp.isfinite().all() and dh.isfinite().all()))


def whole_model(check: Checker, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Logits and LoRA gradients of a small patched model, of the stock one, and of a dense one in fp64."""
    words, small = 512, cases.Shape(shape.name, shape.family, 256, 704, 8, 2, 512, 32)
    stock = cases.one_layer_model(small, dtype, device, layers=3, words=words).train()
    exact = cases.one_layer_model(
        small, torch.float64, device, 3, words, quantise=False, lora_dtype=torch.float64
    ).train()
    theirs = dict(stock.named_modules())
    with torch.no_grad():
        for name, module in exact.named_modules():
            weight = theirs[name].weight if "weight" in module._parameters else None
            if weight is None:
                continue
            state = vars(weight).get("quant_state")
            module.weight.copy_(weight if state is None else reference.dequantize_nf4(weight, state, dtype))
            if module._parameters.get("bias") is not None:
                module.bias.copy_(theirs[name].bias)
    ids = torch.randint(3, words, (3, 37), device=device)

    def results(model: Any) -> list[Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and model is stock):
            logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).to(torch.float64), ids[:, 1:].flatten(), reduction="sum")
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        # all gradients as one vector: single small ones are at the mercy of one rounding
        return [logits.detach(), torch.cat([g.flatten().double() for g in grads])]

    before, right = results(stock), results(exact)
    report = patch.with_kernels(stock)
    after = results(stock)
    report.undo()
    check.same(
        f"{small.family} patched: {report.linears} linear layers, left alone: {dict(report.left)}", not report.left
    )
    check.no_worse(f"whole model {small.family}", [after, before, right])
    check.same(f"{small.family} after undo: bit for bit as before", torch.equal(results(stock)[0], before[0]))


def run(device: torch.device, quick: bool, row: Callable[..., None], failed: list[str]) -> None:
    """Everything; failures are appended to `failed`."""
    for dtype in (torch.float32,) if quick else (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        print(f"---- check {dtype}", flush=True)

        def named(what: str, *rest: Any, d: torch.dtype = dtype) -> None:
            row(f"{what} {str(d).removeprefix('torch.')}", *rest)

        # fp32, on the CPU, is to see whether the script runs: there either sum order may be the luckier one
        check = Checker(named, failed, allowed=10.0 if quick else ALLOWED)
        steps = [partial(nf4, check, dtype, device)] if not quick else []
        for shape in cases.QUICK if quick else cases.MODELS:
            steps.append(partial(elementwise, check, shape, dtype, device))
            steps.append(partial(lora, check, shape, 6 if quick else 515, dtype, device))
            steps.append(partial(whole_model, check, shape, dtype, device))
        steps.append(partial(logprob, check, *((9, 32, 320) if quick else (777, 1536, 32_064)), dtype, device))
        for step in steps:
            try:
                step()
            except Exception as error:
                traceback.print_exc()
                check.same(f"{step.func.__name__} {step.args[1:]}: {error!r}", False)
    if not quick:
        planted(Checker(row, failed), device)
