"""A packed base kept as a folder: the 4-bit tensors as bitsandbytes and transformers store them.

`loader.load(folder)` and transformers' `from_pretrained(folder)` read it as it is: nothing is quantised again.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nbhelpers import host
from nbhelpers.architecture import GB
from nbhelpers.models import adapter, families, model_folder, quantize, swap

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@adapter.writing
def keep(model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> Path:
    """Write the base of a model in 4 bits with config and tokenizer; `load(folder)` brings it back bit for bit.

    An adapter on the model is left out: `save_adapter` writes it. The folder is complete or not there.

    Args:
        model (`PreTrainedModel` or `PeftModel`): In NF4 or dynamic 4-bit, as `load` makes it.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        folder (`str` or `Path`): A new one, or that of a model, which it replaces.

    Raises ValueError for a model without 4-bit layers, one with an adapter that is merged in or that changes more than
    linear layers, or the folder that it was loaded from; FileExistsError for a folder that holds something else.
    """
    folder, inner = Path(folder), families.unwrap(model)
    if not host.is_first_process():
        return folder
    tensors = _parameters(inner)
    states = {name: vars(p)["quant_state"] for name, p in tensors.items() if "quant_state" in vars(p)}
    if not states:
        raise ValueError("the model has no layer in 4 bits, so there is nothing packed to keep: export.save writes it")
    model_folder.not_the_base(inner, folder)

    def stored(name: str) -> dict[str, torch.Tensor]:
        swap.bring(tensors[name])
        part = {name: tensors[name].detach()}
        if name in states:
            part |= {f"{name}.{key}": value for key, value in states[name].as_dict(packed=True).items()}
        return {key: value.cpu().contiguous() for key, value in part.items()}

    with model_folder.replaced(folder, ("config.json",)) as new:
        total = model_folder.write_shards(new, {name: p.nbytes for name, p in tensors.items()}, stored)
        _config(inner, states).save_pretrained(new)
        inner.generation_config.save_pretrained(new)
        tokenizer.save_pretrained(new)
    left_out = "; the adapter is not in it: loader.save_adapter writes it" if adapter.loras(model) else ""
    print(f"{folder}: {total / GB:.3f} GB, the base as packed{left_out}")
    return folder


def _parameters(inner: "PreTrainedModel") -> dict[str, torch.nn.Parameter]:
    """The base's parameters under a checkpoint's names, tied ones once."""
    found: dict[str, torch.nn.Parameter] = {}
    for full, parameter in inner.named_parameters():
        if ".lora_" in full:
            continue
        if ".modules_to_save." in full or ".original_module." in full:
            raise ValueError(f"the adapter trains a copy of a whole module ({full}): what is the base cannot be told")
        found[full.replace(".base_layer.", ".")] = parameter
    for name, module in inner.named_modules():
        if "lora_A" in module._modules and module.merged:
            raise ValueError(
                f"the adapter is merged into {name}: model.unmerge_adapter() first, the base is kept alone"
            )
    return found


def _config(inner: "PreTrainedModel", states: "dict[str, QuantState]") -> "PreTrainedConfig":
    """The model's config with what bitsandbytes has to know: which layers it does not replace, and how it packed."""
    from transformers import BitsAndBytesConfig

    state = next(iter(states.values()))
    head = next(name for name, module in inner.named_modules() if module is inner.get_output_embeddings())
    in_16_bits = [name.replace(".base_layer", "") for name in quantize.linears(inner) if ".lora_" not in name]
    in_16_bits = [name for name in in_16_bits if f"{name}.weight" not in states]
    config = copy.deepcopy(inner.config)
    config.architectures = [next(c.__name__ for c in type(inner).__mro__ if c.__module__.startswith("transformers."))]
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=state.quant_type, bnb_4bit_use_double_quant=state.nested,
        bnb_4bit_compute_dtype=state.dtype, llm_int8_skip_modules=[head, *in_16_bits],
    ).to_dict()  # fmt: skip
    return config
