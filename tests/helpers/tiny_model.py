"""A random Qwen2 of a few thousand weights and a tokenizer of single characters: seconds of work need no download."""

import string

CHARS = [*string.printable, "é"]
SPECIAL = ["<|pad|>", "<|end|>", "<|turn|>"]


def tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=["<|turn|>"]
    )
    made.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '<|turn|>' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return made


def model(cls=None, seed: int = 0, **config):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = {
        "vocab_size": len(CHARS) + len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.5,  # wide enough that greedy answers differ between questions
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return (cls or Qwen2ForCausalLM)(Qwen2Config(**{**settings, **config})).eval()
