"""NF4, and dynamic 4-bit: NF4 with the layers that suffer most from it kept in 16 bits.

For a linear layer with weight W [out, in], its NF4 version V and calibration activations X [tokens, in], the error is
that of the layer's output, relative to it:

    error = |X (W - V)^T|^2 / |X W^T|^2

The layers kept are those that save the most error per byte, within a budget of extra bytes. Hooks measure each layer
in the forward pass, so no activation is stored. A model too large for the card in 16 bits can be measured too: it is
loaded in NF4, its 16-bit matrices come one at a time from `weights` (from disk, in `loader`), and each layer returns
its 16-bit output, so the pass is the 16-bit model's. Two more passes, in NF4 and as chosen, give the divergence of both
from it; a choice that does not lower it is dropped.

NF4 with double quantisation: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from nbhelpers.architecture import GB, nf4_bytes
from nbhelpers.progress import Clock, interruptible

if TYPE_CHECKING:
    from bitsandbytes.nn import Params4bit
    from transformers import PreTrainedModel

Product = Callable[[str, torch.Tensor], torch.Tensor]  # (layer name, x [..., in]) -> x W^T [..., out]


@dataclass(frozen=True)
class Layer:
    """One linear layer as measured: its relative squared error in NF4, and the bytes of its matrix."""

    name: str
    error: float
    nf4_bytes: int
    full_bytes: int
    kept: bool = False

    @property
    def extra(self) -> int:
        """Bytes that keeping it in 16 bits costs."""
        return self.full_bytes - self.nf4_bytes


@dataclass(frozen=True)
class Choice:
    """Which layers stay in 16 bits, and what was measured to decide it. A small JSON with `save` and `load`."""

    layers: tuple[Layer, ...]
    budget: float  # extra bytes allowed, as a share of `model_bytes`
    model_bytes: int  # the whole model in NF4: matrices in NF4, everything else in 16 bits
    tokens: int  # calibration tokens
    kl_nf4: float  # KL(16 bits || NF4) of the next token on the calibration tokens, nats per token
    kl_chosen: float  # the same for the model as chosen

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the layers in 16 bits."""
        return tuple(layer.name for layer in self.layers if layer.kept)

    @property
    def extra_bytes(self) -> int:
        """Bytes more than in NF4 throughout."""
        return sum(layer.extra for layer in self.layers if layer.kept)

    def save(self, file: str | Path) -> None:
        """Write it as JSON."""
        Path(file).write_text(json.dumps({"format": 1, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> "Choice":
        """What `save` wrote. Raises FileNotFoundError without the file, ValueError for any other content."""
        try:
            fields = json.loads(Path(file).read_text())
            if fields.pop("format") != 1:
                raise ValueError("written by a newer version")
            return cls(**{**fields, "layers": tuple(Layer(**layer) for layer in fields["layers"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a dynamic 4-bit choice ({error}): make it with quantize.choose") from None

    def report(self) -> str:
        """A table, worst layer first: error in NF4, error as chosen, MB in NF4, MB as chosen."""
        wide = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':{wide}}   error nf4   chosen     MB nf4    chosen"]
        for layer in sorted(self.layers, key=lambda layer: -layer.error):
            error, size = (0.0, layer.full_bytes) if layer.kept else (layer.error, layer.nf4_bytes)
            lines.append(
                f"{layer.name:{wide}}   {layer.error:9.2e}  {error:7.1e}  "
                f"{layer.nf4_bytes / 1e6:9.3f} {size / 1e6:9.3f}"
            )
        lines.append(
            f"{len(self.kept)} of {len(self.layers)} layers in 16 bits: {self.extra_bytes / GB:.3f} GB more than "
            f"{self.model_bytes / GB:.3f} (+{100 * self.extra_bytes / self.model_bytes:.1f} %, "
            f"{100 * self.budget:.0f} allowed); on {self.tokens} tokens KL to 16 bits {self.kl_nf4:.2e} in NF4, "
            f"{self.kl_chosen:.2e} as chosen"
        )
        return "\n".join(lines)


def linears(model: "PreTrainedModel") -> dict[str, nn.Linear]:
    """{name: module} of the linear layers that are quantised, or can be: all but the output head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def is_nf4(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether it is bitsandbytes' Linear4bit."""
    from bitsandbytes.nn import Linear4bit

    return isinstance(module, Linear4bit)


def pack(weight: torch.Tensor, dtype: torch.dtype) -> "Params4bit":
    """`weight` in NF4, on its device.

    Args:
        weight (`Tensor`): [out, in], fp16, bf16 or fp32.
        dtype (`torch.dtype`): Of the matrix when it is dequantised.
    """
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    return bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=64, quant_type="nf4", bnb_quantized=True
    )


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """A Params4bit dequantised: [out, in] in its quantisation state's dtype."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.__dict__["quant_state"])


def empty_linear4bit(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A Linear4bit of the same shape on the meta device, computing in `dtype`; `fill` gives it its weight."""
    from bitsandbytes.nn import Linear4bit

    new = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, dtype,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    # On a CPU with AVX512-BF16 the first forward in eval mode would repack the weight, after which gradients are
    # silently wrong (bitsandbytes 0.50).
    new.support_avx512bf16_for_cpu = False
    return new.requires_grad_(False)


def fill(linear4bit: nn.Linear, weight: "Params4bit") -> None:
    """Give a Linear4bit its weight; the layer holds the quantisation state too, as bitsandbytes expects."""
    weight.module = linear4bit
    linear4bit.weight = weight
    linear4bit.quant_state = weight.quant_state


def nbytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, quantisation states included, shared tensors counted once."""
    seen: dict[int, int] = {}  # bytes by address
    for tensor in (*model.parameters(), *model.buffers()):
        parts = [tensor]
        state = tensor.__dict__.get("quant_state") if isinstance(tensor, nn.Parameter) else None
        if state is not None:
            parts += [state.absmax, state.code]
            if state.nested:
                parts += [state.offset, state.state2.absmax, state.state2.code]
        seen |= {part.data_ptr(): part.nbytes for part in parts}
    return sum(seen.values())


def parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) numbers of a model; a 4-bit matrix counts as the matrix it is dequantised to."""
    every, trainable = 0, 0
    for parameter in model.parameters():
        state = parameter.__dict__.get("quant_state")
        count = parameter.numel() if state is None else torch.Size(state.shape).numel()
        every += count
        trainable += count if parameter.requires_grad else 0
    return every, trainable


@interruptible("the layers were measured", "the model is as it was")
@torch.no_grad()
def choose(
    model: "PreTrainedModel",
    token_batches: Iterable[torch.Tensor],
    budget: float = 0.10,
    *,
    weights: Callable[[str], torch.Tensor] | None = None,
) -> Choice:
    """Measure every linear layer and choose those to keep in 16 bits; the model is left as it was.

    Args:
        model (`PreTrainedModel`): Without an adapter, in NF4, 16 or 32 bits.
        token_batches (`Iterable[LongTensor]`): [rows, tokens] each, without padding: a few hundred tokens of the task's
            own prompts.
        budget (`float`): Extra bytes allowed, as a share of the whole model's size in NF4.
        weights (`Callable[[str], Tensor]`, *optional*): Layer name to its 16-bit matrix [out, in] on the model's
            device, called once per layer and batch. Needed when the model is in NF4; without it the model's own
            matrices are used.

    Raises ValueError for a negative budget, no tokens, or a model that has no linear layer.
    """
    modules, batches = linears(model), list(token_batches)
    if budget < 0:
        raise ValueError(f"budget={budget} is negative: 0.10 allows 10 % more bytes than NF4")
    if not modules:
        raise ValueError("the model has no linear layer to quantise")
    if sum(batch.numel() for batch in batches) == 0:
        raise ValueError("no calibration tokens: pass a few hundred tokens of the task's own prompts")
    packed = any(is_nf4(module) for module in modules.values())
    if packed and weights is None:
        raise ValueError("the model is already in NF4: pass weights=, the function that brings its 16-bit matrices")

    # exact: the 16-bit matrix W; coarse: its NF4 version V, dequantised
    def exact(name: str) -> torch.Tensor:
        return weights(name) if weights else modules[name].weight.detach()

    def coarse(name: str) -> torch.Tensor:
        return unpack(modules[name].weight) if packed else unpack(pack(exact(name), exact(name).dtype))

    lost, total = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0.0)
    clock = Clock("calibration: measured matrices", len(modules) * len(batches))

    def measured(name: str, x: torch.Tensor) -> torch.Tensor:
        matrix = exact(name).to(x.dtype)
        y = x @ matrix.T
        total[name] += y.float().square().sum().item()
        lost[name] += (x @ coarse(name).to(x.dtype).sub_(matrix).T).float().square().sum().item()
        clock.step()
        return y

    with clock:
        reference = _pass(model, batches, dict.fromkeys(modules, measured))
    layers = [
        Layer(name, lost[name] / max(total[name], 1e-30), nf4_bytes(*_shape(module)), 2 * _count(module))
        for name, module in modules.items()
    ]
    model_bytes = _model_bytes(model, modules)
    kept = _pick(layers, budget * model_bytes)

    def as_exact(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ exact(name).to(x.dtype).T

    def as_nf4(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ coarse(name).to(x.dtype).T

    plain: dict[str, Product] = {}
    if packed:
        chosen = dict.fromkeys(kept, as_exact)
    else:
        plain = dict.fromkeys(modules, as_nf4)
        chosen = dict.fromkeys(set(modules) - kept, as_nf4)
    head = model.get_output_embeddings()
    kl_nf4 = _kl(head, reference, _pass(model, batches, plain))
    kl_chosen = _kl(head, reference, _pass(model, batches, chosen))
    if kl_chosen > kl_nf4:  # NF4's errors happened to cancel: plain NF4 is smaller and better
        kept, kl_chosen = set(), kl_nf4
    marked = tuple(replace(layer, kept=layer.name in kept) for layer in layers)
    return Choice(marked, budget, model_bytes, sum(batch.numel() for batch in batches), kl_nf4, kl_chosen)


def _pass(model: "PreTrainedModel", batches: list[torch.Tensor], products: Mapping[str, Product]) -> list[torch.Tensor]:
    """Final hidden states [rows, tokens, hidden] of each batch, with `products[name](name, x)` in place of x W^T."""

    def hook_for(name: str) -> Callable:
        def instead(module: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            y = products[name](name, args[0])
            return y if module.bias is None else y + module.bias.to(y.dtype)

        return instead

    hooks = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in products]
    was_training = model.training
    model.eval()
    try:
        device = next(model.get_input_embeddings().parameters()).device
        return [model.base_model(input_ids=batch.to(device), use_cache=False).last_hidden_state for batch in batches]
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)


def _kl(head: nn.Module, reference: list[torch.Tensor], hidden: list[torch.Tensor]) -> float:
    """KL of the next-token distributions, nats per token; logits of 64 tokens at a time, to save memory."""
    total, count = 0.0, 0
    for a, b in zip(reference, hidden, strict=True):
        count += a.shape[0] * a.shape[1]
        for x, y in zip(a.flatten(0, 1).split(64), b.flatten(0, 1).split(64), strict=True):
            total += nn.functional.kl_div(
                head(y).float().log_softmax(-1), head(x).float().log_softmax(-1), reduction="sum", log_target=True
            ).item()
    return total / count


def _shape(module: nn.Linear) -> tuple[int, int]:
    return module.out_features, module.in_features


def _count(module: nn.Linear) -> int:
    return module.out_features * module.in_features


def _model_bytes(model: nn.Module, modules: dict[str, nn.Linear]) -> int:
    matrices = sum(nf4_bytes(*_shape(module)) for module in modules.values())
    others = parameters(model)[0] - sum(map(_count, modules.values()))
    return matrices + 2 * others


def _pick(layers: list[Layer], room: float) -> set[str]:
    """Names of the layers to keep within `room` extra bytes. Greedy: most error saved per byte first, skipping those
    that no longer fit."""
    kept: set[str] = set()
    for layer in sorted(layers, key=lambda layer: -layer.error / layer.extra):
        if layer.extra <= room:
            room -= layer.extra
            kept.add(layer.name)
    return kept


@torch.no_grad()
def divergence(reference: "PreTrainedModel", model: "PreTrainedModel", token_batches: Iterable[torch.Tensor]) -> float:
    """KL(reference || model) of the next-token distributions, in nats per token, averaged over all positions.

    Args:
        reference (`PreTrainedModel`), model (`PreTrainedModel`): Of a PeftModel, its get_base_model(). They share the
            output head, which is never quantised.
        token_batches (`Iterable[LongTensor]`): [rows, tokens] each, without padding.
    """
    batches = list(token_batches)
    return _kl(model.get_output_embeddings(), _pass(reference, batches, {}), _pass(model, batches, {}))
