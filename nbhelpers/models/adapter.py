"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) that know their base: attach, save, load, and refuse the wrong one.

A saved adapter is peft's own two files, base.json (what it was trained on) and, for dynamic 4-bit, dynamic.json (the
layers that were in 16 bits): an adapter learns to correct the errors of exactly that base. What it is, rsLoRA, DoRA,
patterns, biases, whole modules, stands in peft's file, and peft builds it again from there.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nbhelpers import files
from nbhelpers.progress import interruptible

from . import families, finite, lineage, quantize, tuners
from .quantize import Choice
from .tuners import adapters as loras

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

REFERENCE = "ref"  # TRL's name of the frozen copy that the KL term is measured against
VALUE_HEAD = "value_head"  # PPO's, on peft's wrapper: no part of the base, nor of what is saved of the adapter
# a decorator of what writes a model or an adapter
writing = interruptible("the model was written", "what was there before is as it was, and nothing is half-written")
WEIGHTS = "adapter_model.safetensors"
# Fields of an adapter's config that do not change what it computes
_WITHOUT_EFFECT = frozenset((
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
    "lora_dropout", "layers_pattern", "runtime_config",
))  # fmt: skip


@dataclass(frozen=True)
class Base:
    """What an adapter is trained on: a hash of the shapes in its config, and one of its tensors' first bytes."""

    id: str
    config_hash: str
    weights_hash: str
    quantization: str
    rows: int = 0  # of its embedding; of a saved adapter's base.json, those that the adapter was trained with


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
    with _without_warnings(), tuners.drawn_once():
        return _in_fp32(get_peft_model(model, config))


@writing
def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the active adapter of a model that `loader.load` made: peft's files, base.json and dynamic.json.

    Args:
        model (`nn.Module`): With an adapter.
        folder (`str` or `Path`): Made if it is not there.

    Raises ValueError if the model has no adapter, or `why_not_saved` finds a reason.
    """
    model = peft_model(model)
    why = why_not_saved(model)
    if why is not None:
        raise ValueError(why)
    with files.whole_files(Path(folder)) as new:
        write_adapter(model, new)


def write_adapter(model: "PeftModel", folder: str | Path) -> None:
    """`save_adapter` of a model for which `why_not_saved`, which gathers all of its tensors, was found to be None."""
    base, folder, (name,) = base_of(model), Path(folder), model.active_adapters
    assert base is not None  # for the type checker
    # save_embedding_layers="auto" would ask the hub whether the vocabulary grew
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    if name != "default":  # peft writes it into a folder of its own
        for file in (folder / name).iterdir():
            shutil.move(file, folder / file.name)
        (folder / name).rmdir()
    trained_with = asdict(base) | {"rows": rows_of(model), "methods": lineage.methods(model)}
    (folder / "base.json").write_text(json.dumps(trained_with, indent=1) + "\n")
    choice: Choice | None = vars(model.get_base_model())["nbhelpers_choice"]
    if choice is not None:
        choice.save(folder / "dynamic.json")


def why_not_saved(model: "PeftModel") -> str | None:
    """Why `save_adapter` would lose something that `load_adapter` could not bring back, and what to do; else None."""
    base, active = base_of(model), model.active_adapters
    instead = "model.save_pretrained(folder) keeps peft's own files"
    if base is None:
        return (
            "loader.load did not make this model, so what its adapter was trained on is not known: save it with "
            "model.save_pretrained(folder)"
        )
    if len(active) != 1:
        return f"{len(active)} adapters are active ({', '.join(active)}): model.set_adapter(the one to save)"
    config = model.peft_config[active[0]]
    if (why := tuners.why_not_rebuilt(config)) is not None:
        return f"{why}, so it could not be loaded again as it is: {instead}"
    lost = [name for name in beside(model) if f".{REFERENCE}." not in name and not name.startswith(f"{VALUE_HEAD}.")]
    if lost:
        return (
            f"{len(lost)} tensors are trained that are not part of the adapter, the first is {lost[0]}: export.merged "
            "writes them; to save them with the adapter, name them in LoraConfig(modules_to_save=[...])"
        )
    if base.rows and rows_of(model) != base.rows and not _brings_rows(model, config, base.rows):
        return (
            f"the vocabulary went from {base.rows} to {rows_of(model)} rows, and the new ones are not part of the "
            'adapter: LoraConfig(modules_to_save=["embed_tokens", "lm_head"]), or export.merged'
        )
    return None


def beside(model: "PeftModel") -> dict[str, Tensor]:
    """{name: parameter} of what a run needs and the saved adapter lacks: trained outside of it, or TRL's reference."""
    from peft import get_peft_model_state_dict

    kept: set[int] = set()
    for name in model.active_adapters:
        if model.peft_config[name].is_prompt_learning:  # peft saves what its encoder makes, not the encoder
            kept |= {parameter.data_ptr() for parameter in model.prompt_encoder[name].parameters()}
        else:
            saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            kept |= {tensor.data_ptr() for tensor in saved.values()}
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if f".{REFERENCE}." in name or (parameter.requires_grad and parameter.data_ptr() not in kept)
    }


def drop_reference(model: nn.Module) -> None:
    """Take off `model` the frozen copy and the value head that an earlier trainer left: the next one makes its own."""
    if VALUE_HEAD in model._modules:
        delattr(model, VALUE_HEAD)
    names = loras(model)
    if REFERENCE in names and peft_model(model).active_adapters != [REFERENCE]:
        peft_model(model).delete_adapter(REFERENCE)


def rows_of(model: nn.Module) -> int:
    """Rows of the embedding."""
    embedding: Any = families.unwrap(model).get_input_embeddings()
    return embedding.weight.shape[0]


def _brings_rows(model: "PeftModel", config: "PeftConfig", first: int) -> bool:
    """Whether the adapter holds all rows of embedding and head from `first` on."""
    inner = families.unwrap(model)
    new = set(range(first, rows_of(model)))
    tokens = vars(config).get("trainable_token_indices")
    if new and isinstance(tokens, list) and inner.config.tie_word_embeddings:
        return new <= set(tokens)
    whole = set(vars(config).get("modules_to_save") or ())
    return "embed_tokens" in whole and (inner.config.tie_word_embeddings or "lm_head" in whole)


def base_of(model: nn.Module) -> Base | None:
    """What `model`, with an adapter or without, was loaded from; None if `loader.load` did not make it."""
    return vars(families.unwrap(model)).get("nbhelpers_base")


@interruptible("the adapter was read", "load the model again before you go on")
def load_adapter(model: nn.Module, folder: str | Path, dropout: float | None = None) -> "PeftModel":
    """Put a saved adapter into a model that `loader.load` made; returns the model with it, in eval mode, trainable.

    Args:
        model (`nn.Module`): Without an adapter peft builds the saved one on it. If it has one, that gets the saved
            numbers, so both must be alike in all that decides what they compute.
        folder (`str` or `Path`): What `save_adapter` wrote.
        dropout (`float`, *optional*): lora_dropout from here on; None is the saved one's. For a model without adapter.

    Raises FileNotFoundError if no adapter is there, ValueError if it was trained on another base, has another shape,
    holds NaN or infinity or cannot be built again as it was, or if `loader.load` did not make the model.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(folder)
    base = base_of(model)
    if base is None:
        raise ValueError("loader.load did not make this model, so whether the adapter fits it is not known")
    refuse_other(folder, base.id, base.config_hash, base.weights_hash)
    refuse_damaged(folder)
    saved, config = read_base(folder), read_config(folder)
    lineage.read(model, folder / "base.json")
    if isinstance(model, PeftModel):
        (name,) = model.active_adapters
        _refuse_unlike(folder, config, model.peft_config[name])
        if saved.rows and saved.rows != rows_of(model):
            raise ValueError(f"the adapter in {folder} has {saved.rows} rows in its vocabulary, this model "
                             f"{rows_of(model)}: load({str(folder)!r})")  # fmt: skip
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter_name=name)
        return model
    inner = families.unwrap(model)
    if saved.rows and saved.rows != rows_of(inner):  # words were added; the adapter has what they mean
        inner.resize_token_embeddings(saved.rows, mean_resizing=False).requires_grad_(False)
    if dropout is not None and "lora_dropout" in vars(config):
        vars(config)["lora_dropout"] = dropout
    with _without_warnings():
        return _in_fp32(PeftModel.from_pretrained(inner, str(folder), config=config, is_trainable=True))


def refuse_damaged(folder: Path) -> None:
    """ValueError for an adapter in `folder` whose file is cut off, or that holds NaN or infinity, by the tensor."""
    from safetensors import SafetensorError

    file = folder / WEIGHTS
    try:
        for name, tensor in finite.stored(file):
            finite.refuse_non_finite(tensor, f"{name} in {file}")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): copy the adapter once more") from None


def _refuse_unlike(folder: Path, saved: "PeftConfig", own: "PeftConfig") -> None:
    """ValueError for the first field in which two adapters differ that decides what they compute."""
    theirs, ours = saved.to_dict(), own.to_dict()
    for field in sorted(theirs.keys() | ours.keys(), key=lambda name: (name not in ("peft_type", "r"), name)):
        if field not in _WITHOUT_EFFECT and _plain(theirs.get(field)) != _plain(ours.get(field)):
            raise ValueError(
                f"the adapter in {folder} has {field}={theirs.get(field)}, this model {ours.get(field)}: "
                f"load({str(folder)!r})"
            )


def _plain(value: Any) -> Any:
    """A field's value to compare: the order of names does not matter, and nothing is nothing."""
    if isinstance(value, (list, tuple, set)):
        value = sorted(map(str, value))
    return value or None


def read_config(folder: Path) -> "PeftConfig":
    """What the adapter in `folder` is. ValueError if this peft could not build it again as it was."""
    from peft import PeftConfig

    file = folder / "adapter_config.json"
    with warnings.catch_warnings():  # of fields that this version does not know: they are an error below
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(str(folder))
    unknown = [name for name, value in json.loads(file.read_text()).items() if value and name not in vars(config)]
    if unknown:
        raise ValueError(
            f"{file} was written by a newer peft, this one does not know {unknown[0]}: pip install -U peft"
        )
    if (why := tuners.why_not_rebuilt(config)) is not None:
        raise ValueError(f"{why}, so what is in {folder} cannot be loaded as it was")
    return config


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
    for name in ("adapter_config.json", WEIGHTS, "base.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} has no {name}: it is not a folder that loader.save_adapter wrote")
    known = json.loads((folder / "base.json").read_text())
    return Base(**{name: value for name, value in known.items() if name != "methods"})


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


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """peft reads an attribute that transformers 5.23 calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield
