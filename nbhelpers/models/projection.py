"""What a linear layer is, plain, 4-bit, with LoRA, disabled or merged: as tensors for the kernels.

Where the kernels cannot serve it as it stands (LoRA dropout while training, DoRA, several adapters at once, hooks, ...)
its own forward runs.
"""

import sys
from functools import cache

import torch
from torch import Tensor, nn

from nbhelpers import kernels
from nbhelpers.kernels import Projection

HOOKED = "has hooks or a forward of its own"
DROPOUT = "LoRA dropout while training"


def projection(module: nn.Module) -> Projection | str:
    """The tensors of a linear module as the kernels want them, or the reason why its own forward has to run."""
    if not known().get(type(module)):
        return _base(module)
    if watched(module):
        return HOOKED
    if module.merged:
        return "its adapter is merged" if module.disable_adapters else _base(module.base_layer)
    inside = module._modules  # nn.Module's attribute look-up is slow, and this runs for every layer in every forward
    lora_a = inside["lora_A"]._modules
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in lora_a]
    base = _base(inside["base_layer"])
    if isinstance(base, str) or not active:
        return base
    (name, *others) = active
    if others:
        return "several active adapters"
    if name in module.lora_variant:
        return "DoRA or another variant of LoRA"
    if module.lora_bias.get(name):
        return "LoRA with a bias"
    if module.training and not isinstance(inside["lora_dropout"]._modules[name], nn.Identity):
        return DROPOUT
    a, b = lora_a[name], inside["lora_B"]._modules[name]
    if watched(a) or watched(b):
        return HOOKED
    return base._replace(lora_a=a._parameters["weight"], lora_b=b._parameters["weight"], scale=module.scaling[name])


def _base(module: nn.Module) -> Projection | str:
    """The same for a layer without LoRA."""
    if type(module) not in known():
        return f"{type(module).__name__} is not a linear layer the kernels know"
    if watched(module):
        return HOOKED
    weight, bias, state = module._parameters["weight"], module._parameters["bias"], None
    if type(module) is not nn.Linear:
        state = weight.quant_state
        if state is None or state.quant_type != "nf4":
            return "4-bit, but not NF4"
        if vars(state).get("packing_format_for_cpu"):  # set by bitsandbytes the first time it packs
            return "packed for inference on a CPU"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "its own weight is being trained"
    return Projection(weight, state, bias)


def watched(module: nn.Module) -> bool:
    """Whether somebody hooked into the module or replaced its forward (as offloading does): then it must be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def known() -> dict[type, bool]:
    """The linear classes the kernels know -> whether a LoRA. bitsandbytes' are known once something has imported it."""
    return _classes("bitsandbytes" in sys.modules)


@cache
def _classes(four_bit: bool) -> dict[type, bool]:
    from peft.tuners import lora

    known = {nn.Linear: False, lora.Linear: True}
    if four_bit:
        import bitsandbytes as bnb
        from peft.tuners.lora.bnb import Linear4bit

        known |= {bnb.nn.Linear4bit: False, bnb.nn.LinearNF4: False, Linear4bit: True}
    return known


def compute_dtype(x: Tensor, modules) -> torch.dtype:
    """The dtype that the modules' own forward would compute in (under autocast the kernels see to it)."""
    base = modules[0].base_layer if "base_layer" in modules[0]._modules else modules[0]
    plain = type(base) is nn.Linear or not base.compute_type_is_set
    return x.dtype if plain else base.compute_dtype or x.dtype


def linears(x: Tensor, *modules: nn.Module, norm: nn.Module | None = None, packed: bool = False) -> list[Tensor]:
    """The outputs of linear modules that read the same x [..., in], or norm(x): by the kernels, or each by its own
    forward. packed: the kernels' come as one tensor [..., sum of out]."""
    parts = tuple(projection(module) for module in modules)
    fused = not any(isinstance(part, str) for part in parts)
    if norm is not None and not (fused and foldable(norm, x, modules)):
        x, norm = norm(x), None
    if not fused:
        return [module(x) for module in modules]
    if norm is not None:
        outputs = kernels.lora_linear_group(x, parts, (norm.weight, norm.variance_epsilon), packed)
        return [outputs] if packed else list(outputs)
    outputs = kernels.lora_linear_group(x.to(compute_dtype(x, modules)), parts, None, packed)
    outputs = [outputs] if packed else outputs
    return [y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype) for y in outputs]


def foldable(norm: nn.Module, x: Tensor, modules) -> bool:
    """Whether a norm in front of linear modules can be computed with them, so that its output need not be kept."""
    if watched(norm) or norm.weight.requires_grad:
        return False
    autocast = torch.is_autocast_enabled(x.device.type)
    return autocast or norm.weight.dtype == x.dtype == compute_dtype(x, modules)
