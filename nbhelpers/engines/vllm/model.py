"""vLLM's model, built on the training model's own tensors: no weight is copied, none exists twice.

vLLM asks its quantisation config how to make each linear layer, and its loader to fill them; both are ours, through
vLLM's public registrations. A layer of vLLM that stands for several of ours (qkv_proj, gate_up_proj) reads each matrix
in place, NF4 or 16 bits, and computes one product after the other, as vLLM's own bitsandbytes layer does with the parts
of its one matrix. So the training model stays as it was: nothing is fused, moved or repacked.

Imports vLLM: only VLLMEngine imports this, when one is made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from nbhelpers.models.quantize import is_nf4

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "nbhelpers"  # of the quantisation method and of the load format
_trained: list["PreTrainedModel"] = []  # the model that vLLM is being built on; empty outside `built_on`


@contextmanager
def built_on(model: "PreTrainedModel") -> Iterator[None]:
    """Inside the block vLLM builds its model on the tensors of `model`."""
    _trained.append(model)
    try:
        yield
    finally:
        _trained.pop()


@contextmanager
def divided(model: nn.Module, temperature: float) -> Iterator[None]:
    """Inside the block vLLM's logits are divided by the temperature as soon as they are computed.

    What vLLM reports of a token (`raw_logprobs`) is taken there, before penalty, minimum length and filters, so it is
    the model's own log-probability at this temperature. vLLM itself would divide later and report without it. Logits
    are computed outside the CUDA graphs, so none has to be captured again.

    Args:
        model (`nn.Module`): vLLM's model.
        temperature (`float`): Above 0.
    """
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    (layer,) = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    own = layer.scale
    layer.scale = own / temperature
    try:
        yield
    finally:
        layer.scale = own


def linear(module: nn.Module) -> nn.Linear:
    """The linear layer itself, without the LoRA around it."""
    base: Any = module.base_layer if "base_layer" in module._modules else module
    return base


def parts_of(prefix: str, packed: dict[str, list[str]]) -> list[str]:
    """Names of the training model's layers that one layer of vLLM stands for, in vLLM's order.

    Args:
        prefix (`str`): The name of vLLM's layer.
        packed (`dict[str, list[str]]`): vLLM's {"qkv_proj": ["q_proj", "k_proj", "v_proj"], ...}; without the names
            that are single layers in the training model too, as in Phi3.
    """
    owner, _, leaf = prefix.rpartition(".")
    return [f"{owner}.{name}" for name in packed.get(leaf, [leaf])]


def shared(parameter: Tensor) -> nn.Parameter:
    """A parameter on the same storage, without a gradient."""
    return nn.Parameter(parameter.data, requires_grad=False)


class SharedLinear(LinearMethodBase):
    """What vLLM asks of a linear layer, answered with the training model's layers."""

    def __init__(self, parts: list[nn.Linear]):
        self.parts = parts

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        """Registers each matrix as a parameter, so that vLLM sees its device and its size."""
        for i, part in enumerate(self.parts):
            layer.register_parameter(f"weight_{i}" if i else "weight", shared(part.weight))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out of all parts]. vLLM's own `bias` is None (`load_weights`): the parts add theirs."""
        outputs = [_product(x, part) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _product(x: Tensor, part: nn.Linear) -> Tensor:
    if not is_nf4(part):
        return F.linear(x, part.weight, part.bias)
    from bitsandbytes import matmul_4bit

    weight: Any = part.weight  # a Params4bit
    return matmul_4bit(x, weight.data.t(), weight.quant_state, bias=part.bias)


class SharedTable(UnquantizedEmbeddingMethod):
    """The embedding, or the output head: its rows without vLLM's padding to a multiple of 64, which nothing reads."""

    def __init__(self, table: nn.Module):
        self.weight: Any = table.weight  # [V, H]

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        """Registers it."""
        layer.register_parameter("weight", shared(self.weight))


@register_quantization_config(NAME)
class SharedWeights(QuantizationConfig):
    """Each layer is the training model's, in the precision that it has there."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SharedWeights":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> SharedLinear | SharedTable | None:
        """Of the layer that vLLM calls `prefix`; None for layers without weights of their own."""
        model = _trained[-1]
        if isinstance(layer, LinearBase):
            names = parts_of(prefix, self.packed_modules_mapping)
            return SharedLinear([linear(model.get_submodule(name)) for name in names])
        if isinstance(layer, ParallelLMHead):
            return SharedTable(model.get_output_embeddings())
        if isinstance(layer, VocabParallelEmbedding):
            return SharedTable(model.get_input_embeddings())
        return None


@register_model_loader(NAME)
class SharedLoader(BaseModelLoader):
    """Reads no file: linear layers and tables have their tensors already, the norms get theirs here."""

    def download_model(self, model_config: Any) -> None:
        """There is nothing to download."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Gives vLLM's `model` what is left. Raises ValueError for a parameter of another shape."""
        ours = _trained[-1]
        for name, module in model.named_modules():
            if isinstance(module, LinearBase):
                module.register_parameter("bias", None)  # the parts add theirs
            elif not isinstance(module, VocabParallelEmbedding):
                for leaf, parameter in list(module.named_parameters(recurse=False)):
                    trained = ours.get_parameter(f"{name}.{leaf}")
                    if trained.shape != parameter.shape:
                        raise ValueError(f"{name}.{leaf} is {tuple(trained.shape)}, vLLM's {tuple(parameter.shape)}")
                    module.register_parameter(leaf, shared(trained))
