"""A model that cannot be trained is refused before anything is computed: it would fail late, or learn nothing."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from trl import GRPOConfig


def check_model(model: "PreTrainedModel | PeftModel", args: "GRPOConfig") -> None:
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
