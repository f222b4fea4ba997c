"""The tensors of a linear layer as the kernels take them: plain or 4-bit, with LoRA, with LoRA disabled or merged.

Where the kernels cannot serve it as it stands (LoRA dropout while training, DoRA, several adapters at once, hooks, ...)
its own forward runs.

Everything here runs for every layer in every forward, hence `module._modules[name]` and `module._parameters[name]`:
nn.Module's attribute look-up is slow. What is looked up so is `Any`: nn.Module does not say what its children are.
"""

import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nbhelpers import kernels
from nbhelpers.kernels import Projection

HOOKED = "has hooks or a forward of its own"
DROPOUT = "LoRA dropout while training"


def projection(module: nn.Module) -> Projection | str:
    """The tensors of a linear module as the kernels take them, or the reason why its own forward has to run."""
    if not known().get(type(module)):
        return _base(module)
    if watched(module):
        return HOOKED
    layer: Any = module  # one of peft's
    if layer.merged:
        return "its adapter is merged" if layer.disable_adapters else _base(layer.base_layer)
    children: Any = module._modules
    lora_a = children["lora_A"]._modules
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in lora_a]
    base = _base(children["base_layer"])
    if isinstance(base, str) or not active:
        return base
    (name, *others) = active
    if others:
        return "several active adapters"
    if name in layer.lora_variant:
        return "DoRA or another variant of LoRA"
    if layer.lora_bias.get(name):
        return "LoRA with a bias"
    if module.training and not isinstance(children["lora_dropout"]._modules[name], nn.Identity):
        return DROPOUT
    a, b = lora_a[name], children["lora_B"]._modules[name]
    if watched(a) or watched(b):
        return HOOKED
    return base._replace(lora_a=a._parameters["weight"], lora_b=b._parameters["weight"], scale=layer.scaling[name])


def _base(module: nn.Module) -> Projection | str:
    """`projection` of a layer without LoRA."""
    if type(module) not in known():
        return f"{type(module).__name__} is not a linear layer the kernels know"
    if watched(module):
        return HOOKED
    parameters: Any = module._parameters
    weight, bias, state = parameters["weight"], parameters["bias"], None
    if type(module) is not nn.Linear:
        state = weight.quant_state
        if state is None or state.quant_type != "nf4":
            return "4-bit, but not NF4"
        if vars(state).get("packing_format_for_cpu"):  # set by bitsandbytes the first time it packs
            return "packed for inference on a CPU"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "its own weight is being trained"
    return Projection(weight, state, bias)


def projections(modules: Iterable[nn.Module]) -> tuple[Projection, ...] | None:
    """`projection` of modules that are computed together; None if one of them has to run its own forward."""
    parts = []
    for module in modules:
        part = projection(module)
        if isinstance(part, str):
            return None
        parts.append(part)
    return tuple(parts)


def watched(module: nn.Module) -> bool:
    """Whether the module has hooks or a replaced forward (offloading does that): then it must be called as a module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def known() -> dict[type, bool]:
    """The linear classes that the kernels know -> whether it is a LoRA layer.

    bitsandbytes' are among them once something has imported it.
    """
    return _classes("bitsandbytes" in sys.modules)


@cache
def _classes(four_bit: bool) -> dict[type, bool]:
    from peft.tuners import lora

    classes: dict[type, bool] = {nn.Linear: False, lora.Linear: True}
    if four_bit:
        import bitsandbytes as bnb
        from peft.tuners.lora.bnb import Linear4bit

        classes |= {bnb.nn.Linear4bit: False, bnb.nn.LinearNF4: False, Linear4bit: True}
    return classes


def compute_dtype(x: Tensor, modules: Sequence[nn.Module]) -> torch.dtype:
    """The dtype in which the modules' own forward would compute x's product; autocast, which comes on top, left out."""
    children = modules[0]._modules
    base: Any = children["base_layer"] if "base_layer" in children else modules[0]
    plain = type(base) is nn.Linear or not base.compute_type_is_set
    return x.dtype if plain else base.compute_dtype or x.dtype


def linears(x: Tensor, *modules: nn.Module, norm: nn.Module | None = None, packed: bool = False) -> list[Tensor]:
    """The outputs of linear modules that read the same x: by the kernels, or each by its own forward.

    Args:
        x (`Tensor`): [..., in].
        modules (`nn.Module`): Linear layers, each with the same `in`.
        norm (`nn.Module`, *optional*): An RMSNorm that x goes through first.
        packed (`bool`): The kernels' outputs come as one tensor [..., sum of out].

    Returns [..., out] of each module; with `packed` either those, if they ran their own forward, or the one tensor.
    """
    parts = projections(modules)
    folded = None
    if norm is not None:
        folded = foldable(norm, x, modules) if parts is not None else None
        if folded is None:
            x = norm(x)
    if parts is None:
        return [module(x) for module in modules]
    read = x if folded is not None else x.to(compute_dtype(x, modules))
    result = kernels.lora_linear_group(read, parts, folded, packed)
    outputs = result if isinstance(result, tuple) else (result,)
    if folded is not None:
        return list(outputs)
    return [y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype) for y in outputs]


def foldable(norm: nn.Module, x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, float] | None:
    """The norm as the kernels take it, (weight [in], eps), if they can compute it together with the linear modules.

    Then its output need not be kept for the backward. None if the norm has to be called.

    Args:
        norm (`nn.Module`): An RMSNorm of transformers.
        x (`Tensor`): [..., in], the norm's input.
        modules (`Sequence[nn.Module]`): Linear layers that read the norm's output.
    """
    layer: Any = norm
    if watched(norm) or "variance_epsilon" not in norm.__dict__:  # one that peft wraps has none of its own
        return None
    if (weight := layer.weight).requires_grad:
        return None
    if torch.is_autocast_enabled(x.device.type) or weight.dtype == x.dtype == compute_dtype(x, modules):
        return weight, layer.variance_epsilon
    return None
