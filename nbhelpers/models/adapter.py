"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) that know their base: attach, save, load, and refuse the wrong one.

A saved adapter is peft's own two files, base.json (what it was trained on) and, for dynamic 4-bit, dynamic.json (the
layers that were in 16 bits): an adapter learns to correct the errors of exactly that base.
"""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from . import families, quantize
from .quantize import Choice

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Base:
    """What an adapter is trained on: a hash of the shapes in its config, and one of its tensors' first bytes."""

    id: str
    config_hash: str
    weights_hash: str
    quantization: str


def keep_base(model: "PreTrainedModel", base: Base, choice: Choice | None) -> None:
    """Keep on `model` what it was loaded from, as `nbhelpers_base` and `nbhelpers_choice`, for adapters to be saved."""
    model.__dict__.update(nbhelpers_base=base, nbhelpers_choice=choice)  # not setattr, which expects tensors or modules


def attach(
    model: "PreTrainedModel", rank: int, alpha: int, dropout: float, targets: tuple[str, ...] = ()
) -> "PeftModel":
    """`model` with a new LoRA in fp32: W x + alpha/rank · B (A x), A [rank, in] random, B [out, rank] zero.

    Args:
        model (`PreTrainedModel`): The base, frozen.
        rank (`int`), alpha (`int`): As in the equation.
        dropout (`float`): Share of x that the adapter does not see in training.
        targets (`tuple[str, ...]`): Last names of the layers that get one ("q_proj"); empty: all linear layers.

    Raises ValueError for a target that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    names = sorted({name.rpartition(".")[2] for name in quantize.linears(model)})
    unknown = [target for target in targets if target not in names]
    if unknown:
        raise ValueError(f"lora_targets: the model has no linear layer {', '.join(unknown)}; it has {', '.join(names)}")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets or names), task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # peft reads an attribute that transformers 5.23 calls deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return _in_fp32(get_peft_model(model, config))


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter of a model that `loader.load` made: peft's files, base.json and dynamic.json.

    Args:
        model (`nn.Module`): With an adapter.
        folder (`str` or `Path`): Made if it is not there.

    Raises ValueError if the model has no adapter, or was not made by `loader.load`; both have
    model.save_pretrained(folder).
    """
    model = peft_model(model)
    base = base_of(model)
    if base is None:
        raise ValueError(
            "loader.load did not make this model, so what its adapter was trained on is not known: save it with "
            "model.save_pretrained(folder)"
        )
    folder = Path(folder)
    # save_embedding_layers="auto" would ask the hub whether the vocabulary grew
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "base.json").write_text(json.dumps(asdict(base), indent=1) + "\n")
    choice: Choice | None = vars(model.get_base_model())["nbhelpers_choice"]
    if choice is not None:
        choice.save(folder / "dynamic.json")


def base_of(model: nn.Module) -> Base | None:
    """What `model`, with an adapter or without, was loaded from; None if `loader.load` did not make it."""
    return vars(families.unwrap(model)).get("nbhelpers_base")


def loras(model: nn.Module) -> "dict[str, PeftConfig]":
    """{name: config} of the adapters on `model`; empty without one."""
    from peft import PeftModel

    return dict(model.peft_config) if isinstance(model, PeftModel) else {}


def load_adapter(model: nn.Module, folder: str | Path) -> "PeftModel":
    """Put a saved adapter into a model that `loader.load` made; returns the model with it, in eval mode, trainable.

    Args:
        model (`nn.Module`): If it has an adapter, that gets the saved numbers, so both must have the same rank and
            targets.
        folder (`str` or `Path`): What `save_adapter` wrote.

    Raises FileNotFoundError if no adapter is there, ValueError if it was trained on another base or has another shape,
    or if `loader.load` did not make the model.
    """
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(folder)
    base = base_of(model)
    if base is None:
        raise ValueError("loader.load did not make this model, so whether the adapter fits it is not known")
    refuse_other(folder, base.id, base.config_hash, base.weights_hash)
    if not isinstance(model, PeftModel):
        return _in_fp32(PeftModel.from_pretrained(model, str(folder), is_trainable=True))
    saved, own = vars(PeftConfig.from_pretrained(str(folder))), vars(model.peft_config["default"])
    for field in ("r", "lora_alpha", "target_modules"):
        if saved[field] != own[field]:
            raise ValueError(
                f"the adapter in {folder} has {field}={saved[field]}, this model {own[field]}: load({str(folder)!r})"
            )
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


def refuse_other(folder: Path, base_id: str, config_hash: str, weights_hash: str | None = None) -> None:
    """Compare the adapter in `folder` with a base.

    Args:
        folder (`Path`): What `save_adapter` wrote.
        base_id (`str`), config_hash (`str`), weights_hash (`str`, *optional*): The base's, as in `Base`; a hash of None
            is not known yet and not compared.

    Raises ValueError if the adapter was trained on another base, FileNotFoundError as `read_base`.
    """
    saved = read_base(folder)
    if saved.config_hash != config_hash:
        what = "shapes"
    elif weights_hash is not None and saved.weights_hash != weights_hash:
        what = "weights"
    else:
        return
    raise ValueError(
        f"the adapter in {folder} was trained on {saved.id} and this model is {base_id}, with other {what}: it would "
        f"be noise here. Load it with its own base: loader.load({str(folder)!r})"
    )


def read_base(folder: Path) -> Base:
    """What the adapter in `folder` was trained on. Raises FileNotFoundError without an adapter or its base.json."""
    for name in ("adapter_config.json", "base.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} has no {name}: it is not a folder that loader.save_adapter wrote")
    return Base(**json.loads((folder / "base.json").read_text()))


def read_choice(folder: Path) -> Choice | None:
    """The dynamic 4-bit choice of the adapter in `folder`, if there is one."""
    file = folder / "dynamic.json"
    return Choice.load(file) if file.exists() else None


def peft_model(model: nn.Module) -> "PeftModel":
    """The same model, known to carry an adapter. Raises ValueError if it does not."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError("the model has no adapter (lora_rank=0): save all of it with model.save_pretrained(folder)")
    return model


def _in_fp32(model: "PeftModel") -> "PeftModel":
    """Trained weights as fp32 master weights: bf16 rounds a step of 1e-5 on 0.02 away, and gradients in fp16 cannot be
    scaled."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.eval()
