"""Small random models with a LoRA, and how a patched one is compared with stock."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64, "initializer_range": 0.1,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "llama": LlamaConfig(**SIZES, rope_parameters=LLAMA3, mlp_bias=True, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "phi3": Phi3Config(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
}
FOUR_BIT = pytest.mark.parametrize("four_bit", [False, True], ids=["16bit", "4bit"])
ARCHITECTURES = pytest.mark.parametrize("name", CONFIGS)


def quantise(model: nn.Module) -> None:
    """Every linear layer but the head becomes NF4, as loading in 4 bits makes it."""
    bnb = pytest.importorskip("bitsandbytes")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                new = bnb.nn.Linear4bit(child.in_features, child.out_features, child.bias is not None,
                                        compute_dtype=child.weight.dtype, quant_type="nf4")  # fmt: skip
                new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4", module=new)
                new.bias = child.bias
                new.support_avx512bf16_for_cpu = False  # else an eval-mode forward repacks the weights for good
                setattr(parent, name, new.to(child.weight.device))
    model.is_loaded_in_4bit = True


def make(
    name: str, *, config=None, four_bit=False, lora=True, dropout=0.0, dtype=torch.float32, device="cpu", seed=1,
    **options
):  # fmt: skip
    """A small random model, frozen, perhaps in 4 bits, with a LoRA whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or CONFIGS[name]).requires_grad_(False).to(device, dtype)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("norm.weight", "bias")):
            nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.2)
    if four_bit:
        quantise(model)
    if lora:
        settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", **options)
        model = get_peft_model(model, settings)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(device="cpu", padding=slice(6, None)):
    """Two rows of ten tokens, the second padded: on the right, where each position still attends to a real one.

    (torch's attention gives a row with nothing to attend to whatever lay in memory, on the CPU in fp64 even NaN.)
    """
    ids = torch.randint(3, 97, (2, 10)).to(device)
    mask = torch.ones_like(ids)
    ids[1, padding], mask[1, padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def step(model, inputs):
    """(logits, {parameter: gradient}) of one forward and backward."""
    model.zero_grad()
    logits = model(**inputs).logits
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(logits.shape, generator=generator).to(logits)
    (logits * direction * inputs["attention_mask"][..., None]).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.isfinite().all() and b.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def worst(ours, truth, mask) -> float:
    """The largest relative error among the logits of real tokens and every gradient."""
    assert ours[1].keys() == truth[1].keys() and truth[1], "not the same parameters got a gradient"
    gradients = [error(ours[1][name], grad) for name, grad in truth[1].items()]
    return max(error(ours[0][mask.bool()], truth[0][mask.bool()]), *gradients)


def eval_logits(model, inputs):
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits
