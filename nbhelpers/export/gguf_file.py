"""A GGUF file, tensor by tensor: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, through the gguf package.

What differs from the checkpoint: names; Llama's and Mistral's q and k rows, which GGUF wants with the two halves of a
rotated pair next to each other; Llama 3's frequency factors, which are a tensor there. The tokenizer is written only
where the rule that cuts text into words is one that llama.cpp knows: a wrong one would give other tokens, silently.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from nbhelpers import host
from nbhelpers.loader.gguf_source import LETTERS, REST
from nbhelpers.models import families

from .llama_cpp import KINDS
from .merge import Folder, Merged

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

QUANTIZATIONS = ("q8_0", "f16", "bf16")
# What llama.cpp has of GGUF's architectures; it would not open a file that asks more of it
_BIASES = ("LLAMA", "QWEN2")
_PARTIAL_ROPE = ("PHI3",)
_PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def write(
    tensors: Merged | Folder, tokenizer: "PreTrainedTokenizerBase", file: Path, quantization: str, name: str
) -> None:
    """Write the file.

    Args:
        tensors (`Merged` or `Folder`): Read one at a time.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        file (`Path`): Where to; overwritten.
        quantization (`str`): One of `QUANTIZATIONS`.
        name (`str`): The model's name, as programs show it.

    Raises as `export.gguf`.
    """
    host.require("gguf")
    import gguf

    config = tensors.config
    if "phi3" in name.lower().replace("-", "") and not tokenizer.get_vocab().keys() >= _PHI3_TOKENS:
        raise ValueError(f"llama.cpp takes a model with the name {name!r} for a Phi-3 and would look for its tokens: "
                         "give the file another name")  # fmt: skip
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization={quantization!r}: it is one of {', '.join((*QUANTIZATIONS, *KINDS))}")
    if config.model_type not in families.FAMILIES:
        raise ValueError(f"no GGUF for model_type {config.model_type!r} here, only for {', '.join(families.FAMILIES)}")
    family = families.FAMILIES[config.model_type]
    arch = gguf.MODEL_ARCH[family.gguf]
    kind = gguf.GGMLQuantizationType[quantization.upper()]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[arch])
    factors = _settings(writer, config, name, gguf.LlamaFileType[f"MOSTLY_{quantization.upper()}"])
    _tokenizer(writer, tokenizer, config)

    def encode(weight: torch.Tensor) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        """A tensor's bytes and type: vectors are fp32, matrices whose rows no whole number of blocks fills are fp16."""
        chosen = kind if weight.dim() > 1 else gguf.GGMLQuantizationType.F32
        if chosen == gguf.GGMLQuantizationType.Q8_0 and weight.shape[-1] % 32:
            chosen = gguf.GGMLQuantizationType.F16
        return gguf.quants.quantize(np.ascontiguousarray(weight.numpy()), chosen), chosen

    plan = []
    for ours, shape in tensors.shapes.items():
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None or (ours.endswith(".bias") and family.gguf not in _BIASES):
            raise ValueError(f"GGUF's {family.gguf} has no place for the tensor {ours}")
        data, chosen = encode(torch.zeros(1, shape[-1]) if len(shape) > 1 else torch.zeros(shape))  # of one row
        nbytes = data.nbytes * (math.prod(shape[:-1]) if len(shape) > 1 else 1)
        writer.add_tensor_info(theirs, shape, np.dtype(np.float32), nbytes, raw_dtype=chosen)
        plan.append(ours)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours in plan:
            weight = tensors.read(ours)
            if family.gguf_pairs:
                q, k, _ = family.qkv
                heads = {q: config.num_attention_heads, k: config.num_key_value_heads}
                weight = interleave(weight, heads.get(ours.split(".")[-2]))
            data, chosen = encode(weight)
            if chosen == gguf.GGMLQuantizationType.F16 and weight.abs().max() > torch.finfo(torch.float16).max:
                raise ValueError(f'{ours} does not fit into 16-bit floats: quantization="bf16"')
            writer.write_tensor_data(data)
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()


def interleave(weight: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows of each head reordered from (first halves, second halves) to pairs.

    Args:
        weight (`Tensor`): [heads · head_dim, in] or [heads · head_dim].
        heads (`int`, *optional*): None: the tensor is no q or k, and is returned as it is.
    """
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """By what each of the head_dim / 2 frequencies is divided, fp32 (Llama 3.1's scaling, as in transformers'
    `_compute_llama3_parameters`).

    Args:
        rope (`dict`): The config's rope_parameters, of rope_type "llama3".
        head_dim (`int`): Numbers per head.
    """
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / (kept + (1.0 - kept) / rope["factor"])).astype(np.float32)


def _settings(writer: "GGUFWriter", config: "PreTrainedConfig", name: str, file_type: int) -> np.ndarray | None:
    """Write the hyperparameters; Llama 3's frequency factors if there are any."""
    rope = config.rope_parameters
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    if rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"rope_type {rope['rope_type']!r} cannot be written to GGUF here, only default and llama3")
    family = families.FAMILIES[config.model_type]
    if config.hidden_act not in families.SILU:
        raise ValueError(f"GGUF's {family.gguf} architecture computes silu, and this model's activation is "
                         f"{config.hidden_act}")  # fmt: skip
    window = families.config_window(family, config)
    if window and window < config.max_position_embeddings:
        if not family.gguf_window:
            raise ValueError(
                f"GGUF's {family.gguf} architecture has no sliding window, and this model has one of {window}"
            )
        print(f"the file says that attention has a window of {window} tokens; llama.cpp does not look at that, and "
              "writes another text once one is longer")  # fmt: skip
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and family.gguf not in _PARTIAL_ROPE:
        raise ValueError(f"GGUF's {family.gguf} architecture rotates whole heads, and this model a part of them "
                         f"(partial_rotary_factor={rope['partial_rotary_factor']})")  # fmt: skip
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if family.gguf_window:
        writer.add_sliding_window(window or 0)
    return llama3_factors(rope, head_dim) if rope["rope_type"] == "llama3" else None


# ------------------------------------------------------------------------------------------------------ tokenizer


def _tokenizer(writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> None:
    """Write vocabulary, merges or scores, special tokens and chat template."""
    content = _content(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}: "
                         "model.resize_token_embeddings(len(tokenizer)) before training")  # fmt: skip
    tokens, kinds = _vocabulary(tokenizer, content, config.vocab_size)
    if content["model"].get("byte_fallback", False):
        _sentencepiece(writer, kinds)
    else:
        _byte_level(writer, content, config.model_type)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _special_tokens(writer, tokenizer)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _content(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Its tokenizer.json. ValueError for a tokenizer without one, or one that is no BPE."""
    if not tokenizer.is_fast:
        raise ValueError("GGUF needs a fast tokenizer (tokenizer.json); this one is written in Python")
    content = json.loads(cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer.to_str())
    if content["model"]["type"] != "BPE":
        raise ValueError(f"a {content['model']['type']} tokenizer cannot be written to GGUF here, only BPE")
    return content


def _vocabulary(
    tokenizer: "PreTrainedTokenizerBase", content: dict[str, Any], size: int
) -> "tuple[list[str], list[TokenType]]":
    """Text and kind of each of `size` tokens; ids that the tokenizer does not use are there too, as padding."""
    from gguf import TokenType

    special = {token["id"]: token for token in content["added_tokens"]}
    by_id = {index: text for text, index in tokenizer.get_vocab().items()}
    has_bytes = content["model"].get("byte_fallback", False)
    tokens, kinds = [], []
    for index in range(size):
        text = by_id.get(index)
        if text is None:  # matrices are often larger than the vocabulary
            kind, text = TokenType.UNUSED, f"[PAD{index}]"
        elif index in special:
            kind = TokenType.CONTROL if special[index]["special"] else TokenType.USER_DEFINED
        elif has_bytes and len(text) == 6 and text.startswith("<0x"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(text)
        kinds.append(kind)
    return tokens, kinds


def _sentencepiece(writer: "GGUFWriter", kinds: "list[TokenType]") -> None:
    from gguf import TokenType

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    # SentencePiece numbers its BPE pieces in the order of their merges, so the id is the rank
    writer.add_token_scores([-float(i) if kind == TokenType.NORMAL else 0.0 for i, kind in enumerate(kinds)])


def _byte_level(writer: "GGUFWriter", content: dict[str, Any], model_type: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_type(content, model_type))
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    if merges:  # GGUF has no empty arrays
        writer.add_token_merges(merges)


def _special_tokens(writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase") -> None:
    """The ids of begin, end, unknown and padding, and whether a text starts with the first."""
    ids = (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    )
    for add, index in ids:
        if index is not None:
            add(index)
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    writer.add_add_bos_token(begins)


def pre_type(content: dict[str, Any], model_type: str) -> str:
    """llama.cpp's name for the rule by which a byte-level tokenizer cuts text into words.

    Args:
        content (`dict`): Its tokenizer.json.
        model_type (`str`): Of the model, as in its config: two names stand for the same rule.

    Raises ValueError for a rule that is not known.
    """
    rule = content["pre_tokenizer"] or {}
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex", "")
        if pattern.endswith(LETTERS + r"\p{N}" + REST):
            return "qwen2"
        if pattern.endswith(LETTERS + r"\p{N}{1,3}" + REST):
            return "llama-bpe" if model_type == families.LLAMA.model_type else "dbrx"
    raise ValueError(
        f"the tokenizer cuts text into words by a rule ({' + '.join(map(str, kinds))}) that is not known to be one of "
        "llama.cpp's, so the file would read text wrongly: nothing is written. export.merged works, and llama.cpp's "
        "convert_hf_to_gguf.py may know the model"
    )
