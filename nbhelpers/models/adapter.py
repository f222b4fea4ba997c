"""LoRA adapters (Hu et al. 2021) that know their base: attach, save, load, and refuse the wrong one.

Beside peft's own two files stand base.json (what the adapter was trained on) and, for dynamic 4-bit, dynamic.json (the
layers that were in 16 bits): an adapter learns to correct the errors of exactly that base.
"""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from . import families, quantize
from .quantize import Choice


@dataclass(frozen=True)
class Base:
    """What an adapter is trained on; `loader.load` keeps it on the model as `nbhelpers_base`.

    config_hash is of the shapes in its config, weights_hash of its tensors' first bytes.
    """

    id: str
    config_hash: str
    weights_hash: str
    quantization: str


def attach(model: nn.Module, rank: int, alpha: int, dropout: float, targets: tuple[str, ...] = ()) -> nn.Module:
    """`model` with a new LoRA in fp32 on the layers named in `targets`, all linear ones if empty.

    ValueError for a target that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    names = sorted({name.rpartition(".")[2] for name in quantize.linears(model)})
    unknown = [target for target in targets if target not in names]
    if unknown:
        raise ValueError(f"lora_targets: the model has no linear layer {', '.join(unknown)}; it has {', '.join(names)}")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets or names), task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # peft asks a name that transformers 5.23 calls deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return _in_fp32(get_peft_model(model, config))


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter of a model that `loader.load` made: peft's files, base.json and dynamic.json.

    ValueError if the model has no adapter, or was not made by `loader.load`; both have model.save_pretrained(folder).
    """
    peft_model(model)
    if base_of(model) is None:
        raise ValueError("loader.load did not make this model, so what its adapter was trained on is not known: save "
                         "it with model.save_pretrained(folder)")  # fmt: skip
    folder = Path(folder)
    # save_embedding_layers="auto" would ask the hub whether the vocabulary grew
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "base.json").write_text(json.dumps(asdict(model.nbhelpers_base), indent=1) + "\n")
    if model.nbhelpers_choice is not None:
        model.nbhelpers_choice.save(folder / "dynamic.json")


def base_of(model: nn.Module) -> Base | None:
    """What `model`, with an adapter or without, was loaded from; None if `loader.load` did not make it."""
    return vars(families.unwrap(model)).get("nbhelpers_base")


def loras(model: nn.Module) -> dict:
    """{name: peft's LoraConfig} of the adapters on `model`; empty without one."""
    from peft import PeftModel

    return dict(model.peft_config) if isinstance(model, PeftModel) else {}


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a saved adapter into a model that `loader.load` made; returns the model with it, ready to train on.

    A model with an adapter gets the saved numbers in its place, so both must have the same rank and targets.

    Raises FileNotFoundError if no adapter is there, ValueError if it was trained on another base or has another shape.
    """
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(folder)
    refuse_other(folder, model.nbhelpers_base.id, model.nbhelpers_base.config_hash, model.nbhelpers_base.weights_hash)
    if not isinstance(model, PeftModel):
        return _in_fp32(PeftModel.from_pretrained(model, folder, is_trainable=True))
    config, wanted = PeftConfig.from_pretrained(folder), model.peft_config["default"]
    for field in ("r", "lora_alpha", "target_modules"):
        there, here = getattr(config, field), getattr(wanted, field)
        if there != here:
            raise ValueError(f"the adapter in {folder} has {field}={there}, this model {here}: load({str(folder)!r})")
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


def refuse_other(folder: Path, base_id: str, config_hash: str, weights_hash: str | None = None) -> None:
    """ValueError if the adapter in `folder` was not trained on this base; weights_hash None: not known yet."""
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
    """What the adapter in `folder` was trained on. FileNotFoundError without an adapter, or without its base.json."""
    for name in ("adapter_config.json", "base.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} has no {name}: it is not a folder that loader.save_adapter wrote")
    return Base(**json.loads((folder / "base.json").read_text()))


def read_choice(folder: Path) -> Choice | None:
    """The dynamic 4-bit choice beside the adapter in `folder`, if there is one."""
    file = folder / "dynamic.json"
    return Choice.load(file) if file.exists() else None


def peft_model(model: nn.Module) -> nn.Module:
    """The same model, known to carry an adapter; else ValueError."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError("the model has no adapter (lora_rank=0): save all of it with model.save_pretrained(folder)")
    return model


def _in_fp32(model: nn.Module) -> nn.Module:
    """Master weights: in bf16 a step of 1e-5 on 0.02 is rounded away, in fp16 gradients cannot be scaled."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.eval()
