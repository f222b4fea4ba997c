"""From a checkpoint on disk to a model on the device, one tensor at a time.

The model is built on the meta device, which takes no memory; its linear layers are swapped for empty 4-bit ones, and
then every tensor is read, sent to the device and, where its layer is in 4 bits, quantised there.
"""

import torch
from torch import nn

from nbhelpers.models import quantize
from nbhelpers.models.quantize import Choice

from .shards import Shards
from .source import Source


def build(source: Source, dtype: torch.dtype) -> nn.Module:
    """The model of a checkpoint without its weights: parameters on meta, buffers (rotary frequencies) real, on the CPU.

    ValueError if transformers has no causal language model for it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = source.model_config()
    if source.prequantized():
        del config.quantization_config  # else transformers would want to do the loading
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{source.id} is not a causal language model: {str(error).splitlines()[0]}") from None
    model.config._name_or_path = model.name_or_path = source.id
    return model.requires_grad_(False).eval()


def swap_linears(model: nn.Module, shards: Shards, dtype: torch.dtype, choice: Choice | None = None) -> None:
    """Put empty 4-bit layers where the checkpoint is in 4 bits already, else for all that `choice` does not keep.

    ValueError if the choice names a layer that the model does not have.
    """
    packed = {name.removesuffix(".weight.absmax") for name in shards.entries if name.endswith(".weight.absmax")}
    if not packed:
        names = set(quantize.linears(model))
        unknown = {layer.name for layer in choice.layers} - names if choice else set()
        if unknown:
            raise ValueError(f"the dynamic 4-bit choice is another model's: this one has no {min(unknown)}")
        packed = names - set(choice.kept if choice else ())
    for name in packed:
        model.set_submodule(name, quantize.empty_linear4bit(model.get_submodule(name), dtype))


def fill(
    model: nn.Module, shards: Shards, device: torch.device, weight_dtype: torch.dtype, dtype: torch.dtype, bar
) -> None:
    """Read every tensor of `shards` into `model`.

    weight_dtype: of what is not quantised. dtype: what quantised layers compute in. bar(bytes) is told of progress.

    Raises ValueError for a tensor of the wrong shape or one that is missing.
    """
    tied = _tied_head(model)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    filled, unused = set(), []
    for name, entry in shards.entries.items():
        bar(entry.nbytes)
        owner, _, leaf = name.rpartition(".")
        if name not in wanted or name == tied:
            unused.append(name)
            continue
        filled.add(name)
        module = model.get_submodule(owner)
        four_bits = leaf == "weight" and quantize.is_nf4(module)
        if four_bits and f"{name}.absmax" in shards.entries:
            quantize.fill(module, _packed(shards, name, device, dtype))
            continue
        if tuple(wanted[name].shape) != entry.shape:
            raise ValueError(f"{entry.file.name}: {name} is {entry.shape}, the config says {tuple(wanted[name].shape)}")
        if four_bits:
            quantize.fill(module, quantize.pack(shards.read(name).to(device), dtype))
        else:
            tensor = shards.read(name, weight_dtype).to(device, copy=True)  # converts on the host
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta and name not in filled]
    if missing:
        known = [name for name in unused if not name.endswith("rotary_emb.inv_freq")]
        instead = f" It has {known[0]} instead." if known else ""
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors, the first is {missing[0]}.{instead} Only architectures "
            "whose tensors are stored under their own names can be read one by one (Qwen2, Llama, Mistral, Phi3, ...)"
        )
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)


def keep_in_16_bits(model: nn.Module, choice: Choice, shards: Shards, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the layers that `choice` keeps, now in 4 bits, by linear layers with the checkpoint's own numbers."""
    for name in choice.kept:
        old = model.get_submodule(name)
        with torch.device("meta"):
            new = nn.Linear(old.in_features, old.out_features, bias=False)
        weight = shards.read(f"{name}.weight").to(dtype).to(device, copy=True)
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.bias = old.bias
        model.set_submodule(name, new.eval())


def _packed(shards: Shards, name: str, device: torch.device, dtype: torch.dtype):
    """The Params4bit that a checkpoint stores as `name` and its statistics."""
    from bitsandbytes.nn import Params4bit

    def read(key: str) -> torch.Tensor:
        return shards.read(key).to(device, copy=True)

    stats = {key.removeprefix(f"{name}."): read(key) for key in shards.entries if key.startswith(f"{name}.")}
    weight = Params4bit.from_prequantized(read(name), stats, device=device)
    weight.quant_state.dtype = dtype  # it may have been written for bf16, and this card has none
    return weight


def _tied_head(model: nn.Module) -> str | None:
    """The name of the output head's matrix if it is the embedding's: some checkpoints store it a second time."""
    if not model.config.tie_word_embeddings:
        return None
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)
