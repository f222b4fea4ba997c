"""A model of a preset's real shape with random weights: on the device layer by layer, or as a checkpoint on a disk."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbhelpers.architecture import Architecture
from nbhelpers.models import adapter, quantize, smoke, swap

BLOCK = 2**20  # numbers
Model = Any  # a transformers model, or peft's wrapper around one: what their attributes are is not written down


def make(
    shape: Architecture, device: torch.device, dtype: torch.dtype, rank: int = 16, quantise: bool = True,
    swapped: int = 0,
) -> Model:  # fmt: skip
    """A model in eval mode: NF4 with double quantisation, and a LoRA on all linear layers whose B is not zero.

    Args:
        shape (`Architecture`): The model's.
        device (`torch.device`): Where the weights are made; nothing is downloaded or read from a disk.
        dtype (`torch.dtype`): Of what is not quantised.
        rank (`int`): Of the LoRA; 0: none, and no peft around the model.
        quantise (`bool`): `False` leaves all weights in `dtype`.
        swapped (`int`): So many layers wait on the host, see models/swap.py.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.quantization_config import QuantizationMethod

    fields = shape.config() | {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval()
    torch.manual_seed(0)
    four_bits = list(quantize.linears(model)) if quantise else []
    for name in four_bits:
        model.set_submodule(name, quantize.empty_linear4bit(model.get_submodule(name), dtype))
    # drawn in one block, which is given back before the adapter is made. Torch allocates in 2 MiB: all of it, as what
    # is left of the last would go to a tensor that stays, and keep the whole block
    largest = max((module.weight.numel() for module in model.modules() if _packed(module, "weight")), default=0)
    drawn = torch.empty(-(-largest // BLOCK) * BLOCK, device=device, dtype=dtype)
    waiting = {id(module) for layer in model.model.layers[:swapped] for module in layer.modules()}
    for module in list(model.modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and not (module is model.get_output_embeddings() and config.tie_word_embeddings):
                _fill(module, leaf, parameter, device, dtype, drawn)
                if id(module) in waiting and isinstance(module, nn.Linear) and leaf == "weight":
                    module.weight.data = module.weight.data.cpu()  # so that they are never all on the card
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)
    del drawn
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model.tie_weights()
    if swapped:
        swap.attach(model, swapped, device)
    if quantise:
        model.is_loaded_in_4bit, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
    if not rank:
        return model
    model = adapter.attach(model, rank, rank, 0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.eval()


def _packed(module: nn.Module, leaf: str) -> bool:
    """Whether this is a weight in 4 bits."""
    return isinstance(module, nn.Linear) and leaf == "weight" and quantize.is_nf4(module)


def _fill(
    module: nn.Module, leaf: str, parameter: nn.Parameter, device: torch.device, dtype: torch.dtype, drawn: torch.Tensor
) -> None:
    """Numbers for one parameter that has none yet; drawn: room for a weight before it is packed."""
    if _packed(module, leaf):
        size = (module.out_features, module.in_features)
        weight = drawn[: size[0] * size[1]].view(size).normal_()
        quantize.fill(module, quantize.pack(weight.mul_(module.in_features**-0.5), dtype))
        return
    std = 0.02 if parameter.dim() > 1 or leaf == "bias" else 0.1
    value = torch.randn(parameter.shape, device=device, dtype=dtype).mul_(std)
    setattr(module, leaf, nn.Parameter(value if parameter.dim() > 1 or leaf == "bias" else 1 + value, False))


# ---- as a checkpoint ----


def tensors(shape: Architecture) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a checkpoint."""
    every: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size)}
    for layer in range(shape.num_hidden_layers):
        for linear in shape.linears():
            part = "self_attn" if linear.name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj") else "mlp"
            name = f"model.layers.{layer}.{part}.{linear.name}"
            every[f"{name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                every[f"{name}.bias"] = (linear.out_features,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            every[f"model.layers.{layer}.{norm}.weight"] = (shape.hidden_size,)
    every["model.norm.weight"] = (shape.hidden_size,)
    if not shape.tie_word_embeddings:
        every["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    return every


def write_checkpoint(shape: Architecture, folder: Path, shard_bytes: float) -> int:
    """Random bf16 weights straight to disk, made on the GPU if there is one; returns the bytes of the largest shard."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True)
    tokenizer = smoke.make_tokenizer()
    tokenizer.save_pretrained(folder)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(shape.config() | special | {"torch_dtype": "bfloat16"}))
    shards: list[dict] = [{}]
    end = 0
    for name, size in tensors(shape).items():
        nbytes = 2 * torch.Size(size).numel()
        if end + nbytes > shard_bytes and shards[-1]:
            shards.append({})
            end = 0
        shards[-1][name] = (size, end, end + nbytes)
        end += nbytes
    index: dict[str, str] = {}
    largest = 0
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        fields = {n: {"dtype": "BF16", "shape": s, "data_offsets": (a, b)} for n, (s, a, b) in shard.items()}
        header = json.dumps({"__metadata__": {"format": "pt"}} | fields).encode()
        header += b" " * (-len(header) % 8)
        with open(file, "wb", buffering=0) as f:
            f.write(len(header).to_bytes(8, "little") + header)
            for name, (size, _, _) in shard.items():
                data = torch.randn(size, device=device, dtype=torch.bfloat16) * 0.02
                if name.endswith("norm.weight"):
                    data += 1
                if ".layers.0." in name:  # something for dynamic 4-bit to find
                    plant(name, data)
                view = data.cpu().view(torch.uint8).numpy().data.cast("B")
                while view:  # one write takes 2 GB at most
                    view = view[f.write(view) :]
        index |= dict.fromkeys(shard, file.name)
        largest = max(largest, file.stat().st_size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if device == "cuda":
        torch.cuda.empty_cache()
    return largest


def plant(name: str, data: torch.Tensor, scale: float = 30.0) -> None:
    """Outlier channels in a layer's attention inputs, in place, made up for in the norm before: the function stays the
    same, but in NF4 the blocks of 64 weights around each outlier lose their precision."""
    channels = torch.arange(5, data.shape[-1], 32, device=data.device)
    if name.endswith("input_layernorm.weight"):
        data[channels] /= scale
    elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "qkv_proj.weight")):
        data[:, channels] *= scale
