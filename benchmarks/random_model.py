"""A model of a preset's real shape with random weights, made on the device layer by layer: no download, no disk."""

import torch
from torch import nn

from nbhelpers import architecture
from nbhelpers.models import adapter, quantize


def make(architecture: architecture.Architecture, device, dtype, rank: int = 16, quantise: bool = True) -> nn.Module:
    """NF4 with double quantisation, and a LoRA of `rank` on all linear layers whose B is not zero; in eval mode.

    rank 0: no LoRA. quantise=False leaves the weights in `dtype`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.quantization_config import QuantizationMethod

    fields = architecture.config() | {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval()
    torch.manual_seed(0)
    four_bits = list(quantize.linears(model)) if quantise else []
    for name in four_bits:
        model.set_submodule(name, quantize.empty_linear4bit(model.get_submodule(name), dtype))
    for module in list(model.modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and not (module is model.get_output_embeddings() and config.tie_word_embeddings):
                fill(module, leaf, parameter, device, dtype)
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)
    model.tie_weights()
    if quantise:
        model.is_loaded_in_4bit, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
    if not rank:
        return model
    model = adapter.attach(model, rank, rank, 0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.eval()


def fill(module: nn.Module, leaf: str, parameter: nn.Parameter, device, dtype) -> None:
    if leaf == "weight" and quantize.is_nf4(module):
        weight = torch.randn(module.out_features, module.in_features, device=device, dtype=dtype)
        quantize.fill(module, quantize.pack(weight.mul_(module.in_features**-0.5), dtype))
        return
    std = 0.02 if parameter.dim() > 1 or leaf == "bias" else 0.1
    value = torch.randn(parameter.shape, device=device, dtype=dtype).mul_(std)
    setattr(module, leaf, nn.Parameter(value if parameter.dim() > 1 or leaf == "bias" else 1 + value, False))
