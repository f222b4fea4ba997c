"""A random model of an architecture, trained a little, and what comes back of it: for what is exported."""

import copy

import torch
from transformers import AutoModelForCausalLM

from nbhelpers import loader

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 12, 100, 45, 3]])
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 400, "max_position_embeddings": 512}  # fmt: skip


def trained(folder, **settings):
    """Loaded as for training, with a LoRA that has learned something."""
    settings = {"quantization": "none", "lora_rank": 4, "dtype": torch.float32, "progress": False, **settings}
    model, tokenizer = loader.load(folder, **settings)
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model, tokenizer


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def rounded(model, dtype):
    """The adapter merged in by peft, matrices rounded to `dtype`; buffers such as rope's frequencies are not."""
    model = copy.deepcopy(model).merge_and_unload().eval()
    for p in model.parameters():
        p.data = p.data.to(dtype if p.dim() > 1 or dtype == torch.bfloat16 else p.dtype).float()
    return model
