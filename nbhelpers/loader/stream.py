"""From a checkpoint on disk to a model on the device, one tensor at a time.

The model is built on the meta device, which takes no memory; its linear layers are swapped for empty 4-bit ones, and
then every tensor is read, sent to the device and, where its layer is in 4 bits, quantised there.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from nbhelpers.models import quantize
from nbhelpers.models.finite import Extremes
from nbhelpers.models.quantize import Choice

from .read_ahead import ReadAhead
from .shards import Shards
from .source import Source

if TYPE_CHECKING:
    from bitsandbytes.nn import Params4bit
    from transformers import PreTrainedModel


def empty_model(source: Source, dtype: torch.dtype) -> "PreTrainedModel":
    """The model of a checkpoint without its weights: parameters on meta, buffers (rotary frequencies) real, on the CPU.

    Args:
        source (`Source`): The checkpoint; only its config is read.
        dtype (`torch.dtype`): Of the parameters.

    Raises ValueError if transformers has no causal language model for it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = source.model_config()
    if source.prequantized():
        del config.quantization_config  # else transformers would want to do the loading
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):  # nothing is drawn that is read later
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{source.id} is not a causal language model: {str(error).splitlines()[0]}") from None
    except (TypeError, ArithmeticError, AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{source.folder / 'config.json'} makes no model: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
    model.config._name_or_path = model.name_or_path = source.id
    return model.requires_grad_(False).eval()


def swap_linears(model: "PreTrainedModel", shards: Shards, dtype: torch.dtype, choice: Choice | None = None) -> None:
    """Put empty 4-bit layers where the checkpoint is in 4 bits already, else for all that `choice` does not keep.

    Args:
        model (`PreTrainedModel`): As `empty_model` returns it.
        shards (`Shards`): The checkpoint; only its names are read.
        dtype (`torch.dtype`): What the 4-bit layers compute in.
        choice (`Choice`, *optional*): Which layers stay in 16 bits.

    Raises ValueError if the choice names a layer that the model does not have.
    """
    packed = {name.removesuffix(".weight.absmax") for name in shards.entries if name.endswith(".weight.absmax")}
    if not packed:
        names = set(quantize.linears(model))
        unknown = {layer.name for layer in choice.layers} - names if choice else set()
        if unknown:
            raise ValueError(f"the dynamic 4-bit choice is another model's: this one has no {min(unknown)}")
        packed = names - set(choice.kept if choice else ())
    for name in packed:
        linear = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, quantize.empty_linear4bit(linear, dtype))


def fill(
    model: "PreTrainedModel",
    shards: Shards,
    device: torch.device,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
    progress: Callable[[int], object],
    swapped: int = 0,
) -> None:
    """Read every tensor of `shards` into `model`.

    Args:
        model (`PreTrainedModel`): On meta, its 4-bit layers empty.
        shards (`Shards`): The checkpoint.
        device (`torch.device`): Where each tensor goes.
        weight_dtype (`torch.dtype`): Of what is not quantised.
        dtype (`torch.dtype`): What quantised layers compute in.
        progress (`Callable[[int], object]`): Called before each tensor with its bytes in the checkpoint.
        swapped (`int`): The matrices of so many layers go back to the host, quantised, for models/swap.py to take.

    Raises ValueError for a tensor of the wrong shape, one that is missing, one that the config has no place for, and
    one that holds NaN or infinity.
    """
    tied = _tied_head(model)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    filled, unused, stored, extremes = set(), [], _stored(shards), Extremes()
    layers = model.model.layers[:swapped] if swapped else ()
    waiting = {module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)}
    with ReadAhead(shards, _in_order(model, shards, tied, weight_dtype, device), device) as ahead:

        def read(name: str, wanted: torch.dtype | None = None, where: torch.device = device) -> torch.Tensor:
            """On the device, or `where`; what is not read ahead is converted on the host."""
            if name in ahead.names:
                return ahead.take(name, where)
            return shards.read(name, wanted).to(where, copy=True)

        for name, entry in shards.entries.items():
            progress(entry.nbytes)
            owner, _, leaf = name.rpartition(".")
            if name not in wanted or name == tied:
                unused.append(name)
                continue
            filled.add(name)
            module = model.get_submodule(owner)
            linear4bit = module if leaf == "weight" and quantize.is_nf4(module) else None
            if linear4bit is not None and f"{name}.absmax" in shards.entries:
                quantize.fill(linear4bit, _packed(name, stored[name], read, extremes, device, dtype))
            elif tuple(wanted[name].shape) != entry.shape:
                raise ValueError(
                    f"{entry.file.name}: {name} is {entry.shape}, the config says {tuple(wanted[name].shape)}"
                )
            elif linear4bit is not None:
                tensor = read(name) if name in ahead.names else shards.read(name).to(device)
                extremes.add(tensor, f"{name} in {entry.file.name}")
                quantize.fill(linear4bit, quantize.pack(tensor, dtype))
            else:
                tensor = read(name, weight_dtype)
                extremes.add(tensor, f"{name} in {entry.file.name}")
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
            if leaf == "weight" and module in waiting:
                parameter = cast(nn.Linear, module).weight
                parameter.data = parameter.data.cpu()
    extremes.refuse()
    _refuse_without_place(model, unused)
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


def _refuse_without_place(model: "PreTrainedModel", unused: list[str]) -> None:
    """Raises ValueError if tensors of the checkpoint are no part of the model though they should be: layers beyond
    those that the config counts, or biases of linear layers that it makes without."""
    config = model.config.get_text_config()
    # layers that guess tokens ahead (DeepSeek's, GLM's) stand behind the others and are no part of a causal model
    layers = config.num_hidden_layers + getattr(config, "num_nextn_predict_layers", 0)
    modules = dict(model.named_modules())
    for name in unused:
        owner, _, leaf = name.rpartition(".")
        beyond = re.search(r"\blayers\.(\d+)\.", name)
        if beyond and int(beyond[1]) >= layers:
            raise ValueError(
                f"the checkpoint has {name}, and its config.json says num_hidden_layers={config.num_hidden_layers}: "
                "one of the two is another model's"
            )
        if leaf == "bias" and isinstance(modules.get(owner), nn.Linear):
            raise ValueError(f"the checkpoint has {name}, and its config.json makes this layer without a bias: one of "
                             "the two is another model's")  # fmt: skip


def keep_in_16_bits(
    model: "PreTrainedModel", choice: Choice, shards: Shards, device: torch.device, dtype: torch.dtype
) -> None:
    """Replace the layers that `choice` keeps, now in 4 bits, by linear layers with the checkpoint's own numbers.

    Args:
        model (`PreTrainedModel`): Filled, on `device`.
        choice (`Choice`): Which layers.
        shards (`Shards`): The checkpoint that the model was filled from.
        device (`torch.device`): Where the matrices go.
        dtype (`torch.dtype`): Of the matrices there.
    """
    for name in choice.kept:
        old = cast(nn.Linear, model.get_submodule(name))
        with torch.device("meta"):
            new = nn.Linear(old.in_features, old.out_features, bias=False)
        weight = shards.read(f"{name}.weight").to(dtype).to(device, copy=True)
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.bias = old.bias
        model.set_submodule(name, new.eval())


def _in_order(
    model: "PreTrainedModel", shards: Shards, tied: str | None, weight_dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Names of what `fill` reads, in its order, without what the host has to convert; none where nothing is copied to
    a card, or reading is more than that."""
    names, stored = list[str](), _stored(shards)
    if device.type != "cuda" or type(shards) is not Shards:
        return names
    wanted = dict(model.named_parameters(remove_duplicate=False))
    for name, entry in shards.entries.items():
        if name not in wanted or name == tied:
            continue
        owner, _, leaf = name.rpartition(".")
        four_bits = leaf == "weight" and quantize.is_nf4(model.get_submodule(owner))
        if four_bits and f"{name}.absmax" in shards.entries:
            names += stored[name]
        elif four_bits or entry.dtype == weight_dtype:
            names.append(name)
    return names


def _stored(shards: Shards) -> dict[str, list[str]]:
    """{weights that a checkpoint stores in 4 bits: their statistics, and themselves as the last}."""
    stored: dict[str, list[str]] = {}
    for key in shards.entries:
        name, mark, _ = key.partition(".weight.")
        if mark:
            stored.setdefault(f"{name}.weight", []).append(key)
    return {name: [*statistics, name] for name, statistics in stored.items()}


def _packed(
    name: str, keys: list[str], read: Callable[..., torch.Tensor], extremes: Extremes, device: torch.device,
    dtype: torch.dtype,
) -> "Params4bit":  # fmt: skip
    """The Params4bit that a checkpoint stores as `name` and its statistics, `keys` together."""
    from bitsandbytes.nn import Params4bit

    found = {}
    for key in keys:
        words = ".quant_state." in key  # JSON in bytes, which is read on the host: the card would be waited for
        found[key] = read(key, where=torch.device("cpu")) if words else read(key)
    packed = found.pop(name).view(torch.uint8).view(-1, 1)  # some store the codes as bfloat16, for FSDP
    for key, value in found.items():
        extremes.add(value, key)
    stats = {key.removeprefix(f"{name}."): value for key, value in found.items()}
    weight = Params4bit.from_prequantized(packed, stats, device=device)
    weight.quant_state.dtype = dtype  # the checkpoint may say bf16, which this card may not have
    return weight


def _tied_head(model: "PreTrainedModel") -> str | None:
    """The name of the output head's matrix if it is the embedding's: some checkpoints store it a second time."""
    if not model.config.tie_word_embeddings:
        return None
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)
