"""The tensors of a trained model in full precision, one at a time: base + B A · scale, however the base was loaded.

The base's numbers come from its own 16-bit checkpoint where that can be had: merging into dequantised NF4 would make
NF4's rounding error part of the result. What is in memory and is not what the checkpoint gives, norms that were trained
along, new words, a matrix that an adapter was merged into, is taken from memory. A tensor is made when it is asked for,
so the host holds one at a time.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from nbhelpers.loader import hub
from nbhelpers.loader.shards import Shards
from nbhelpers.models import adapter, quantize, swap

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Loras:
    """What to add to one weight matrix: (A [rank, in], B [out, rank], scale) of each active adapter."""

    factors: list[tuple[torch.Tensor, torch.Tensor, float]]

    def delta(self) -> torch.Tensor:
        """The sum of B A · scale: [out, in], fp32, on the CPU."""
        first, *others = (b.float().cpu() @ a.float().cpu() * scale for a, b, scale in self.factors)
        return sum(others, start=first)


def why_not(model: "PreTrainedModel | PeftModel") -> str | None:
    """Why this model's adapter cannot be merged here, and what to do instead; None if it can be, or there is none."""
    for name, config in adapter.loras(model).items():
        if not _is_plain(config):
            return (
                f"adapter {name!r} is not plain LoRA (DoRA, biases, whole modules) and cannot be merged here: "
                "model.merge_and_unload()"
            )
    base = _base(model)
    layers = _lora_layers(base)
    if any(layer.disable_adapters for layer in layers.values()):
        return "the adapter is disabled: model.base_model.enable_adapter_layers() first, or model.unload() for the base"
    variants = {name for layer in layers.values() for name in layer.active_adapters if name in layer.lora_variant}
    if variants:
        return f"adapter {min(variants)!r} is a variant of LoRA and cannot be merged here: model.merge_and_unload()"
    if any(layer.merged for layer in layers.values()):
        return "the adapter is merged into the weights already: model.unmerge_adapter() first"
    weights = _weights(base)
    mergeable = {
        id(factor.weight)
        for name, layer in layers.items()
        if f"{name}.weight" in weights
        for factor in (*layer.lora_A.values(), *layer.lora_B.values())
    }
    for name, parameter in base.named_parameters():
        if ".lora_" in name and id(parameter) not in mergeable:  # on an embedding, or on a head that is one; a bias
            return f"{name} is no LoRA on a linear layer of its own and cannot be merged here: model.merge_and_unload()"
    return None


class Merged:
    """The tensors of a model, adapter merged in.

    `shapes` is {name in the checkpoint: shape}, tied tensors once; `config` and `generation_config` are the base's,
    `architecture` its class in transformers; `source` says where the base's numbers come from, and `changed` names the
    tensors read so far that are the model's own, because they are not what that source gives.

    Raises ValueError, with the reason that `why_not` gives, or for shapes that are not those of the config.
    """

    def __init__(self, model: "PreTrainedModel | PeftModel"):
        reason = why_not(model)
        if reason is not None:
            raise ValueError(reason)
        base = _base(model)
        self.config, self.generation_config = base.config, base.generation_config
        self.architecture = next(c.__name__ for c in type(base).__mro__ if c.__module__.startswith("transformers."))
        self._parameters = _weights(base)
        self.shapes = {name: _shape(parameter) for name, parameter in self._parameters.items()}
        self._loras = {}
        for name, layer in _lora_layers(base).items():
            active = [one for one in cast("PeftModel", model).active_adapters if one in layer.lora_A]
            if active:
                self._loras[f"{name}.weight"] = Loras([_factors(layer, one) for one in active])
        if (reason := _unlike_config(self.config, self.shapes)) is not None:
            raise ValueError(reason)
        self._shards, self.source = self._originals(model)
        self.changed: list[str] = []

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        """A tensor in fp32 on the CPU, of its own memory."""
        swap.bring(self._parameters[name])
        tensor = self._original(name)
        if tensor is None:
            parameter = self._parameters[name]
            tensor = quantize.unpack(parameter) if "quant_state" in parameter.__dict__ else parameter.detach()
        tensor = tensor.float().cpu().clone()
        return tensor + self._loras[name].delta() if name in self._loras else tensor

    def _original(self, name: str) -> torch.Tensor | None:
        """The checkpoint's tensor; None where it cannot be had, or where the model's own is another by now."""
        if self._shards is None:
            return None
        parameter, found = self._parameters[name], self._shards.entries.get(name)
        if found is not None and tuple(found.shape) == self.shapes[name]:
            original = self._shards.read(name)
            if "quant_state" in parameter.__dict__:
                there = original.to(parameter.device)
                loaded = quantize.unpack(quantize.pack(there, parameter.__dict__["quant_state"].dtype))
                same = torch.equal(loaded, quantize.unpack(parameter))
            else:
                same = torch.equal(original.to(parameter.dtype), parameter.detach().cpu())
            if same:
                return original
        self.changed.append(name)
        return None

    def _originals(self, model: "PreTrainedModel | PeftModel") -> tuple[Shards | None, str]:
        """The base's own checkpoint, if it can be had and the model was made from it; and what to say."""
        packed = [name for name, parameter in self._parameters.items() if "quant_state" in parameter.__dict__]
        if not packed:
            return None, "the model's own weights"
        base = adapter.base_of(model)
        if base is None:
            return None, "the 4-bit weights: which model they were made from is not known (loader.load knows)"
        try:
            source = hub.find(base.id)
            if source.prequantized():
                return None, f"the 4-bit weights: {base.id} has no others"
            shards = source.weights()
            if shards.fingerprint() != base.weights_hash:
                return None, f"the 4-bit weights: {base.id} has changed since it was loaded"
        except (OSError, ValueError) as error:  # ConnectionError, PermissionError, FileNotFoundError
            return None, f"the 4-bit weights, with their rounding, for {base.id} is out of reach: {error}"
        missing = [name for name in packed if name not in shards.entries]
        if missing:
            return None, f"the 4-bit weights: the checkpoint of {base.id} lacks {missing[0]}"
        return shards, f"the original weights of {base.id}"


class Folder:
    """The same for a folder of safetensors, as `export.merged` writes it. Raises as `Shards`."""

    def __init__(self, folder: str | Path):
        from transformers import AutoConfig

        self._shards = Shards(folder)
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.shapes = {name: entry.shape for name, entry in self._shards.entries.items()}
        self.source = f"the weights in {folder}"

    def read(self, name: str) -> torch.Tensor:
        """A tensor in fp32 on the CPU, of its own memory."""
        return self._shards.read(name).float().clone()


def _base(model: "PreTrainedModel | PeftModel") -> "PreTrainedModel":
    return cast("PreTrainedModel", cast("PeftModel", model).get_base_model() if adapter.loras(model) else model)


def _unlike_config(config: "PreTrainedConfig", shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Which tensor a model built from this config would not have, or would have in another shape; None if all fit."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    empty.tie_weights()
    wanted = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            return (
                f"{name} has the shape {shapes.get(name)}, and its config asks for {wanted.get(name)} (None: no such "
                "tensor), so nobody could load it: set model.config to what the model is"
            )
    return None


def _is_plain(config: "PeftConfig") -> bool:
    from peft import LoraConfig

    if not isinstance(config, LoraConfig) or config.bias != "none":
        return False
    return not (config.use_dora or config.modules_to_save or config.trainable_token_indices)


def _lora_layers(base: nn.Module) -> "dict[str, LoraLayer]":
    return {name: cast("LoraLayer", m) for name, m in base.named_modules() if "lora_A" in m._modules}


def _factors(layer: "LoraLayer", name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and the scale of the adapter `name`."""
    return cast(nn.Linear, layer.lora_A[name]).weight, cast(nn.Linear, layer.lora_B[name]).weight, layer.scaling[name]


def _weights(base: nn.Module) -> dict[str, nn.Parameter]:
    """{name in the checkpoint: parameter} of the base, without peft's."""
    return {n.replace(".base_layer.", "."): p for n, p in base.named_parameters() if ".lora_" not in n}


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Its shape; of one in 4 bits, that of the matrix [out, in] before it was packed."""
    state = parameter.__dict__.get("quant_state")
    return tuple(parameter.shape if state is None else state.shape)
