"""What is asked of `loader.load`, with every default filled in and checked before anything is downloaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from nbhelpers import gpu
from nbhelpers.models.adapter import read_base, read_choice, read_config, refuse_damaged
from nbhelpers.models.quantize import Choice
from nbhelpers.presets import QUANTIZATIONS, Preset

from . import hub

Prompt = str | list[dict[str, str]]  # a text, or a conversation as messages


@dataclass(frozen=True)
class Defaults:
    """What holds for a model without a preset; the fields are `Preset`'s. lora_alpha 0: as large as the rank."""

    quantization: str = "nf4"
    lora_rank: int = 16
    lora_alpha: int = 0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A model to load: nothing in it is left to be decided."""

    model: Preset | str  # a preset, a folder, or a hub id
    adapter: Path | None  # the folder of a saved adapter to put on it
    quantization: str  # "nf4", "dynamic" or "none"
    choice: Choice | None  # for "dynamic": the layers to keep in 16 bits; None: to be measured
    prompts: list[Prompt] | None  # to measure them with; None: those of `calibration`
    budget: float  # for "dynamic": extra bytes, as a share of the model's size in NF4
    lora_rank: int  # of a new adapter; 0: none, every weight is trained
    lora_alpha: int
    lora_dropout: float | None  # None: a saved adapter's own
    lora_targets: tuple[str, ...]  # names of linear layers; empty: all
    device: torch.device
    weight_dtype: torch.dtype  # of what is not quantised
    dtype: torch.dtype  # to compute in
    budget_gb: float | None = None  # of the card, for the whole run; None: all that it has


def resolve(
    preset_or_id: Preset | str | Path,
    *,
    train: str | None = None,
    quantization: str | None = None,
    lora_rank: int | None = None,
    lora_alpha: int | None = None,
    lora_dropout: float | None = None,
    lora_targets: Iterable[str] | str | None = None,
    calibration: list[Prompt] | Choice | Path | None = None,
    budget: float = 0.10,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    budget_gb: float | None = None,
) -> Request:
    """The arguments of `load`, each None replaced by what the adapter's folder, the preset or `Defaults` says.

    Raises ValueError for a name that is no model, an argument out of its range, or one that a saved adapter has its own
    of; FileNotFoundError for an adapter's folder or a choice's file that is not complete.
    """
    adapter = _adapter_folder(preset_or_id)
    if train is not None:
        lora_rank, quantization = _whole(train, lora_rank, quantization, adapter)
    if adapter is not None:
        own = vars(read_config(adapter))  # what cannot be built is refused before anything is downloaded
        given = {"r": lora_rank, "lora_alpha": lora_alpha, "target_modules": lora_targets and set(_names(lora_targets))}
        other = [name for name, value in given.items() if value is not None and value != own.get(name)]
        if other:
            raise ValueError(f"the adapter in {adapter} has {other[0]}={own.get(other[0])} of its own, and here it is "
                             f"{given[other[0]]}: leave that out, or load the base for a new adapter")  # fmt: skip
        lora_rank = own.get("r") or 1  # whatever it is: not every weight is trained
        base = read_base(adapter)
        refuse_damaged(adapter)
        preset_or_id, quantization = base.id, quantization or base.quantization
        calibration = calibration or read_choice(adapter)
    try:
        model = hub.identify(preset_or_id)
    except ValueError as error:
        raise error if adapter is None else ValueError(f"the base of the adapter in {adapter}: {error}") from None
    default = model if isinstance(model, Preset) else Defaults()
    quantization = default.quantization if quantization is None else quantization
    rank = default.lora_rank if lora_rank is None else lora_rank
    dropout = default.lora_dropout if lora_dropout is None and adapter is None else lora_dropout
    _check(quantization, rank, dropout or 0.0)
    choice, prompts = _choice_or_prompts(calibration, quantization)
    device = torch.device(device) if device else gpu.device()
    compute = dtype or (gpu.compute_dtype() if device.type == "cuda" else torch.float32)
    return Request(
        model=model,
        adapter=adapter,
        quantization=quantization,
        choice=choice,
        prompts=prompts,
        budget=budget,
        lora_rank=rank,
        lora_alpha=(default.lora_alpha if lora_alpha is None else lora_alpha) or rank,
        lora_dropout=dropout,
        lora_targets=default.lora_targets if lora_targets is None else _names(lora_targets),
        device=device,
        # fp16 has no gradient scaling for weights in 16 bits
        weight_dtype=dtype or (torch.float32 if rank == 0 and (train is None or compute == torch.float16) else compute),
        dtype=compute,
        budget_gb=budget_gb,
    )


def _whole(train: str, rank: int | None, quantization: str | None, adapter: Path | None) -> tuple[int, str]:
    """(lora_rank, quantization) of a model whose every weight is trained. ValueError for what contradicts it."""
    if train != "all":
        raise ValueError(f'train={train!r}: it is "all", for every weight; leave it out for an adapter')
    if adapter is not None:
        raise ValueError(f'train="all" and the adapter in {adapter} exclude each other: export.merged makes a model of '
                         "both, whose every weight can be trained")  # fmt: skip
    if rank or quantization not in (None, "none"):
        raise ValueError('train="all" has no adapter and no weights in 4 bits: leave lora_rank and quantization out')
    return 0, "none"


def _names(targets: Iterable[str] | str) -> tuple[str, ...]:
    """Names of layers; a text is one name, or peft's "all-linear": all."""
    if isinstance(targets, str):
        return () if targets == "all-linear" else (targets,)
    return tuple(targets)


def _adapter_folder(preset_or_id: Preset | str | Path) -> Path | None:
    """The folder, if `save_adapter` wrote it."""
    if isinstance(preset_or_id, Preset) or not (Path(preset_or_id) / "base.json").exists():
        return None
    return Path(preset_or_id)


def _check(quantization: str, lora_rank: int, lora_dropout: float) -> None:
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization={quantization!r}: it is one of {', '.join(QUANTIZATIONS)}")
    if lora_rank < 0 or not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_rank={lora_rank}, lora_dropout={lora_dropout}: a rank is 0 or more, a dropout below 1")
    if lora_rank == 0 and quantization != "none":
        raise ValueError(
            f"lora_rank=0 trains every weight, and weights in 4 bits ({quantization}) cannot be trained: pass "
            'quantization="none" too, or a rank'
        )


def _choice_or_prompts(
    calibration: list[Prompt] | Choice | Path | None, quantization: str
) -> tuple[Choice | None, list[Prompt] | None]:
    """What `calibration` is, for "dynamic": a choice to repeat, or prompts to measure with. Others need neither."""
    if quantization != "dynamic" or calibration is None:
        return None, None
    if isinstance(calibration, str):
        raise ValueError("calibration is a list of prompts, a Choice, or the Path of its file; this is one string")
    if isinstance(calibration, Choice):
        return calibration, None
    return (Choice.load(calibration), None) if isinstance(calibration, Path) else (None, calibration)
