"""Small random models of every family, in NF4 or not, with a live LoRA or not; also for the GPU checks."""

import torch
from torch import nn

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 256, "initializer_range": 0.2,
         "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
SPECIAL = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},  # not hidden_size / num_attention_heads, as in Qwen3-0.6B
    "llama": {"rope_parameters": LLAMA3, "mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 12},
    "phi3": {"rope_parameters": PARTIAL},
}
ARCHITECTURES = tuple(SPECIAL)


def make(name: str, *, four_bit=False, lora=True, dtype=torch.float32, device="cpu", layers=2, **sizes):
    """A frozen model in eval mode; with a LoRA of rank 4 whose B is not zero, in fp32 as the loader makes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**SIZES, "num_hidden_layers": layers, **SPECIAL[name], **sizes})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("norm.weight", "bias")):
            nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.2)
    model.to(device, dtype)
    if four_bit:
        quantise(model)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = parameter.data.float()
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def quantise(model: nn.Module) -> None:
    """Every linear layer but the head becomes NF4 with double quantisation, as the loader makes it."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                new = bnb.nn.Linear4bit(child.in_features, child.out_features, child.bias is not None,
                                        compute_dtype=child.weight.dtype, quant_type="nf4")  # fmt: skip
                new.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
                )
                new.bias = child.bias
                new.support_avx512bf16_for_cpu = False  # else an eval-mode forward repacks the weights for good
                setattr(parent, name, new.to(child.weight.device))
    model.is_loaded_in_4bit = True


def prompts(n: int = 6, longest: int = 20, vocabulary: int = 97, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def by_generate(model, prompt: list[int], max_tokens: int, stops=()) -> list[int]:
    """What transformers' own generate writes greedily after one prompt."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
        eos_token_id=list(stops) or None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def by_forward(model, prompt: list[int], token_ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The training forward's log-probability of each token of a completion."""
    logits = model(input_ids=torch.tensor([prompt + token_ids], device=model.device)).logits[0].float()
    logps = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1).cpu()
    return logps.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
