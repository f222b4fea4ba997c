"""A model that cannot be trained is refused before anything is computed: it would fail late, or learn nothing."""

from typing import TYPE_CHECKING

import torch

from nbhelpers.models import families

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel, TrainingArguments


def check_model(model: "PreTrainedModel | PeftModel", args: "TrainingArguments") -> None:
    """Raises ValueError without a trainable parameter, and for 16-bit master weights under fp16."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model is trainable: load it with lora_rank > 0, or with lora_rank=0 and "
                         "quantization='none' to train all of it, or pass peft_config")  # fmt: skip
    halves = [(name, p.dtype) for name, p in trained if p.dtype in (torch.float16, torch.bfloat16)]
    if args.fp16 and halves:  # the gradients have its dtype, and cannot be scaled
        name, dtype = halves[0]
        raise ValueError(
            f"fp16 training needs fp32 master weights, but {len(halves)} trainable parameters are {dtype}, the first "
            f"is {name}: load the model with nbhelpers.loader.load, or cast them with .float()"
        )


def restore_masters(model: "PreTrainedModel | PeftModel", masters: dict["Parameter", "Tensor"]) -> None:
    """Undo what TRL's trainer did: it casts a 4-bit model's adapter to bf16, even on a T4 or a CPU, where a step of
    1e-5 is rounded away.

    `model` is the trainer's, `masters` has what was trained of it before, each with its data then.
    """
    for parameter, data in masters.items():
        parameter.data = data.to(parameter.device)
    if {"is_loaded_in_4bit", "is_loaded_in_8bit"} & vars(families.unwrap(model)).keys():
        for parameter in model.parameters():  # the adapter that TRL made from peft_config, too
            if parameter.requires_grad and parameter not in masters:
                parameter.data = parameter.data.float()
