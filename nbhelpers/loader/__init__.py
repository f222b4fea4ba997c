"""One call from a preset, a hub id or a folder to a model that can be trained on this card.

    model, tokenizer = loader.load(presets.get("qwen2.5-1.5b"))

`resolve` fills in what the arguments leave open, `build` makes the base model, `dress` puts the adapter and the kernels
on it. The model is built without memory, then its checkpoint is read tensor by tensor; each goes to the card and is
quantised there. The host holds one tensor at a time, the card what is loaded so far and one tensor. Weights are
safetensors or GGUF, and no code from a repository is ever run.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nbhelpers.models.adapter import load_adapter, save_adapter
from nbhelpers.models.quantize import Choice
from nbhelpers.presets import Preset
from nbhelpers.progress import interruptible

from .base_model import build
from .packed import keep
from .request import Prompt, resolve
from .trainable import dress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["keep", "load", "load_adapter", "save_adapter"]


@interruptible("the model was loaded", "what was downloaded is kept, and nothing else is left of it; run this again")
def load(
    preset_or_id: Preset | str | Path,
    *,
    train: str | None = None,
    quantization: str | None = None,
    lora_rank: int | None = None,
    lora_alpha: int | None = None,
    lora_dropout: float | None = None,
    lora_targets: Iterable[str] | str | None = None,
    kernels: bool = True,
    calibration: list[Prompt] | Choice | Path | None = None,
    budget: float = 0.10,
    budget_gb: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    token: str | None = None,
    progress: bool = True,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model in eval mode, with an adapter to train unless lora_rank is 0, and its tokenizer.

    Args:
        preset_or_id (`Preset`, `str` or `Path`): A preset or its name, a hub id ("owner/model"), a folder, a GGUF file
            or any part of a split one, or a folder that `save_adapter` or `keep` wrote.
        train (`str`, *optional*): "all": every weight, in bf16 and without a copy in fp32 (training/rounded_adam.py);
            with optim="adamw_8bit" that is 6 bytes a weight in all. On a card without bf16, and on a CPU, in fp32.
            None: an adapter, or what lora_rank says.
        quantization (`str`, *optional*): "nf4", "dynamic" (NF4 with the worst layers in 16 bits, see `quantize`) or
            "none"; None is the preset's, "nf4" without a preset. A checkpoint that bitsandbytes quantised loads as it
            is.
        lora_rank, lora_alpha (`int`, *optional*), lora_dropout (`float`, *optional*), lora_targets (names of linear
            layers, one name or "all-linear", *optional*): A new adapter; None is the preset's (rank 16, alpha 16, no
            dropout, all linear layers without a preset). A saved one is built as it was, with its own tokenizer, and
            takes lora_dropout alone. Its numbers are fp32. lora_rank=0 with quantization="none" trains every weight
            instead, in fp32 unless `dtype` says otherwise.
        kernels (`bool`): Whether to use the fused kernels of `patch`.
        calibration (`list[str | list[dict]]`, `Choice` or `Path`, *optional*): For "dynamic": prompts (texts or lists
            of messages) to measure with, or a Choice or the Path of its file to repeat. None: a dozen built-in word
            problems.
        budget (`float`): For "dynamic": extra bytes as a share of the model's size in NF4.
        budget_gb (`float`, *optional*): GB of the card that the run may take in all, by the plan of the preset's own
            lengths for such a card. Layers that do not fit wait in pinned host memory (models/swap.py), which a line
            says; `memory.plan(preset, budget_gb, swap=True)` says what that costs. Give the trainer its budget_gb too.
        device (`torch.device` or `str`, *optional*): None is the GPU if there is one, else the CPU.
        dtype (`torch.dtype`, *optional*): To compute in; None is bfloat16 where the card has it, float16 below, float32
            on a CPU.
        token (`str`, *optional*): Of the hub, for a model whose licence has to be accepted.
        progress (`bool`): Whether a large checkpoint shows a progress bar.

    Host memory above the start stays under 1.5 times the largest shard (it is the largest tensor), the card's peak
    under the final size and the largest tensor.

    Raises ValueError, FileNotFoundError, PermissionError or ConnectionError for a model that cannot be had (see
    `hub.find`) and host.CannotRun for a card that is too small, before any weight is downloaded.
    """
    started = time.perf_counter()
    request = resolve(
        preset_or_id, train=train, quantization=quantization, lora_rank=lora_rank, lora_alpha=lora_alpha,
        lora_dropout=lora_dropout, lora_targets=lora_targets, calibration=calibration, budget=budget, device=device,
        dtype=dtype, budget_gb=budget_gb,
    )  # fmt: skip
    model, tokenizer = build(request, token=token, progress=progress)
    return dress(model, request, kernels=kernels, started=started), tokenizer
