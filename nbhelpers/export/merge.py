"""The tensors of a trained model in full precision, one at a time: base + B A · scale, however the base was loaded.

The base's numbers come from its own 16-bit checkpoint where that can be had: merging into what NF4 stands for would
keep NF4's rounding error for good. A tensor is made when it is asked for, so the host holds one at a time.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nbhelpers.loader import hub
from nbhelpers.loader.shards import Shards
from nbhelpers.models import adapter, quantize


@dataclass(frozen=True)
class Loras:
    """What to add to one weight matrix: pairs (A [r, in], B [out, r]) with their scale."""

    parts: list[tuple[torch.Tensor, torch.Tensor, float]]

    def delta(self) -> torch.Tensor:
        return sum(b.float().cpu() @ a.float().cpu() * scale for a, b, scale in self.parts)


class Merged:
    """The tensors of a model, adapter merged in. `shapes` is {name in the checkpoint: shape}; tied ones stand once.

    `source` says where the base's numbers come from. ValueError for an adapter other than plain LoRA on linear layers,
    or one that is merged into the model's weights already.
    """

    def __init__(self, model: nn.Module):
        from peft import LoraConfig

        adapted = adapter.loras(model)
        base = model.get_base_model() if adapted else model
        for name, config in adapted.items():
            plain = isinstance(config, LoraConfig) and config.bias == "none"
            if not plain or config.use_dora or config.modules_to_save or config.trainable_token_indices:
                raise ValueError(f"adapter {name!r} is not plain LoRA (DoRA, biases, whole modules) and cannot be "
                                 "merged here: model.merge_and_unload()")  # fmt: skip
        self.config, self.generation_config = base.config, base.generation_config
        self.architecture = next(c.__name__ for c in type(base).__mro__ if c.__module__.startswith("transformers."))
        self._parameters, self._loras, self.shapes = {}, {}, {}
        for full, parameter in base.named_parameters():
            if ".lora_" in full:
                continue
            name = full.replace(".base_layer.", ".")
            state = parameter.__dict__.get("quant_state")
            self._parameters[name] = parameter
            self.shapes[name] = tuple(parameter.shape if state is None else state.shape)
        served = set()
        for name, module in base.named_modules():
            if "lora_A" in module._modules:
                if module.merged:
                    raise ValueError("the adapter is merged into the weights already: model.unmerge_adapter() first")
                active = [one for one in model.active_adapters if one in module.lora_A]
                parts = [(module.lora_A[a].weight, module.lora_B[a].weight, module.scaling[a]) for a in active]
                self._loras[f"{name}.weight"] = Loras(parts)
                if f"{name}.weight" in self.shapes:
                    served |= {id(one.weight) for one in (*module.lora_A.values(), *module.lora_B.values())}
        for full, parameter in base.named_parameters():
            if ".lora_" in full and id(parameter) not in served:  # on an embedding, or on a head that is one; a bias
                raise ValueError(f"{full} is no LoRA on a linear layer of its own and cannot be merged here: "
                                 "model.merge_and_unload()")  # fmt: skip
        self._shards, self.source = self._originals(model)

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        """A tensor in fp32 on the CPU, of its own memory."""
        parameter = self._parameters[name].detach()
        if self._shards is not None:
            tensor = self._shards.read(name).float().clone()
        elif "quant_state" in self._parameters[name].__dict__:
            tensor = quantize.unpack(self._parameters[name]).float().cpu()
        else:
            tensor = parameter.float().cpu().clone()
        return tensor + self._loras[name].delta() if name in self._loras else tensor

    def _originals(self, model: nn.Module) -> tuple[Shards | None, str]:
        """The base's own checkpoint, if it is at hand and the model was made from it; and what to say."""
        packed = any("quant_state" in p.__dict__ for p in self._parameters.values())
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
        missing = [name for name in self.shapes if name not in shards.entries]
        if missing:
            return None, f"the 4-bit weights: the checkpoint of {base.id} lacks {missing[0]}"
        return shards, f"the original weights of {base.id}"


class Folder:
    """The same for a folder of safetensors, as `export.merged` writes it."""

    def __init__(self, folder: str | Path):
        from transformers import AutoConfig

        self._shards = Shards(folder)
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.shapes = {name: entry.shape for name, entry in self._shards.entries.items()}
        self.source = f"the weights in {folder}"

    def read(self, name: str) -> torch.Tensor:
        return self._shards.read(name).float().clone()
