"""A GGUF file as a checkpoint: config, tokenizer and tensor names as transformers has them, from the file's metadata.

transformers' own readers are not used. That of the config takes half a minute for a vocabulary of 150,000, and passes
over Phi3's window and partial rotation and Llama 3's frequency factors. That of the tokenizer splits the file's own
added tokens before transformers 5.18, and knows only some of llama.cpp's rules.
"""

import math
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbhelpers.architecture import Family
from nbhelpers.models import chat, families

from .gguf import Header, Tensors, files_of, read_header
from .source import Source

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

FACTORS = "rope_freqs.weight"  # what Llama 3's rope divides each frequency by
# llama.cpp's names for rules by which byte-level text is cut into words. Those of the first line give a word that is a
# token whole, whatever the merges say, and begin a text with the begin token unless the file says otherwise.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = (*_WHOLE_WORDS, "dbrx", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "gpt-2", "smollm")


@dataclass(frozen=True, kw_only=True)
class GgufSource(Source):
    """A checkpoint in one GGUF file or in the parts of one; `folder` is where they are."""

    header: Header

    def model_config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        return AutoConfig.for_model(**self.config)

    def generation_config(self) -> "GenerationConfig | None":
        """None: a GGUF says no more about generation than its config does."""
        return None

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Ready for GRPO. ValueError if there is none, or one whose rule for cutting text is not known here."""
        return chat.prepare(_tokenizer(self.header))

    def weights(self) -> Tensors:
        """The tensors under transformers' names.

        Raises ValueError for a tensor that is missing, of another shape, or has no place in the model.
        """
        import gguf
        from transformers import AutoModelForCausalLM

        config, family = self.model_config(), families.FAMILIES[self.config["model_type"]]
        with torch.device("meta"):  # takes no memory
            model = AutoModelForCausalLM.from_config(config)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.gguf], config.num_hidden_layers)
        ours = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias")) or name  # no name: it will be missing
            if not (theirs == "output.weight" and config.tie_word_embeddings):
                ours[theirs] = (name, tuple(parameter.shape))
        heads = {}
        if family.gguf_pairs:
            heads = dict(zip(family.qkv, (config.num_attention_heads, config.num_key_value_heads), strict=False))
        stored = {name: entry for name, entry in self.header.tensors.items() if name != FACTORS}
        _same_names(self.id, ours.keys(), stored.keys())
        entries = {}
        for theirs, entry in stored.items():
            name, shape = ours[theirs]
            if entry.shape != shape:
                raise ValueError(f"{entry.file.name}: {theirs} is {entry.shape}, its metadata says {shape}")
            entries[name] = replace(entry, heads=heads.get(name.split(".")[-2], 0))
        return Tensors(entries)


def find(path: Path, name: str) -> GgufSource:
    """The checkpoint in a GGUF file, or in the folder of one; `name` is what its user calls it.

    Raises FileNotFoundError for a missing file or part, and ValueError as `gguf.read_header` and for an architecture or
    a setting that transformers' model of it would not compute.
    """
    header = read_header(files_of(path))
    return GgufSource(name, header.files[0].parent, config(header), header=header)


def _same_names(what: str, wanted: Set[str], found: Set[str]) -> None:
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    if missing:
        raise ValueError(f"{what} lacks {len(missing)} tensors, the first is {missing[0]}: download it again")
    if unknown:
        raise ValueError(
            f"{what} has a tensor {unknown[0]}, for which transformers' model has no place: it would compute otherwise"
        )


# ----------------------------------------------------------------------------------------------------------- config


def config(header: Header) -> dict[str, Any]:
    """The dictionary of a config.json, from the metadata and the tensors' names and shapes. Raises as `find`."""
    import gguf

    file, metadata, tensors = header.files[0], header.metadata, header.tensors
    arch = metadata.get("general.architecture")
    known = {gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[f.gguf]]: f for f in reversed(families.FAMILIES.values())}
    if arch not in known:
        raise ValueError(f"{file} is of the architecture {arch!r}; these are known here: {', '.join(sorted(known))}")
    family = known[arch]  # Mistral's files are Llama's, and compute the same: GGUF has no window there

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise ValueError(f"{file} does not state {arch}.{key}")
        if not isinstance(value, (int, float, str)):
            raise ValueError(f"{file}: {arch}.{key} differs from layer to layer, which {family.prefix} here cannot")
        return value

    if "token_embd.weight" not in tensors:
        raise ValueError(f"{file} lacks the tensor token_embd.weight: download it again")
    heads = get("attention.head_count")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    if get("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{file}: keys and values of different lengths are not read here")
    fields = {
        "model_type": family.model_type,
        "architectures": [f"{family.prefix}ForCausalLM"],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        **{ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id")
           for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))},
    }  # fmt: skip
    if family.qkv_bias is None:
        biases = (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias"))
        fields |= {setting: True for setting, tensor in biases if tensor in tensors}
    if family.gguf_window:
        fields["sliding_window"] = get("attention.sliding_window", 0) or None
    return fields | {"rope_parameters": _rope(header, family, head_dim, get)}


def _decimal(value: float) -> float:
    """The shortest number that fp32 stores as `value`: 1e-6, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _rope(header: Header, family: Family, head_dim: int, get: Callable[..., Any]) -> dict[str, Any]:
    file = header.files[0]
    theta = _decimal(get("rope.freq_base", 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    scaling = get("rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{file}: rope.scaling.type {scaling!r} is not read here")
    rotated = get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        if family.model_type != "phi3":
            raise ValueError(f"{file}: {rotated} of {head_dim} dimensions rotate, which {family.prefix} here cannot")
        rope["partial_rotary_factor"] = rotated / head_dim
    if FACTORS in header.tensors:
        factors = Tensors(header.tensors).read(FACTORS).double().numpy()
        if factors.max() > 1:
            rope = llama3(factors, theta, head_dim, file)
    return rope


def llama3(factors: np.ndarray, theta: float, head_dim: int, file: Path) -> dict[str, Any]:
    """The rope_parameters of Llama 3.1's scaling whose frequencies are divided by `factors` [head_dim / 2].

    With the low and high factors that every Llama 3 has, 1 and 4, the one between is told by any frequency that is
    scaled in part. Raises ValueError if transformers would not divide by just these.
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    low, high, factor = 1.0, 4.0, float(factors.max())
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    between = (factors > 1.001) & (factors < 0.999 * factor)
    if factors.shape == frequencies.shape and between.any():
        kept = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        turns = low + kept * (high - low)  # of a frequency within the original context
        original = round(float(np.median(2 * math.pi * turns / frequencies[between])))
        rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
                "high_freq_factor": high, "original_max_position_embeddings": original}  # fmt: skip
        config = AutoConfig.for_model("llama", head_dim=head_dim, rope_parameters=rope, max_position_embeddings=2**30)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if np.allclose(frequencies / scaled.double().numpy(), factors, rtol=1e-4):
            return rope
    raise ValueError(
        f"{file}: the frequency factors in {FACTORS} are not those of Llama 3's scaling, so which rope the model has "
        "cannot be told"
    )


# -------------------------------------------------------------------------------------------------------- tokenizer


def _tokenizer(header: Header) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    file, metadata = header.files[0], header.metadata
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{file} has a tokenizer of the kind {kind!r}; known are gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    if kind == "gpt2" and rule not in _RULES:
        raise ValueError(
            f"{file}: its tokenizer cuts text into words by the rule {rule!r}, which is not known here, so it would "
            f"read text wrongly. Known are {', '.join(_RULES)}"
        )
    if kind == "llama" and not metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise ValueError(f"{file}: a SentencePiece tokenizer that puts no space before a text is not read here")
    try:
        backend = _backend(metadata, kind, rule)
        tokens = metadata["tokenizer.ggml.tokens"]
        special = {name: tokens[metadata[key]] for name, key in (
            ("bos_token", "tokenizer.ggml.bos_token_id"), ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"), ("pad_token", "tokenizer.ggml.padding_token_id"),
        ) if key in metadata}  # fmt: skip
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} has no tokenizer that transformers can read ({error!r})") from None
    begins = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or rule in _WHOLE_WORDS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=metadata.get("tokenizer.chat_template"),
        add_bos_token=begins and "bos_token" in special, clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip


def _backend(metadata: dict[str, Any], kind: str, rule: str) -> "Tokenizer":
    """The tokenizer as llama.cpp reads it, without special tokens' roles."""
    import gguf
    from tokenizers import AddedToken
    from transformers import GPT2Tokenizer, LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    tokens, added = metadata["tokenizer.ggml.tokens"], []
    kinds = metadata.get("tokenizer.ggml.token_type", [gguf.TokenType.NORMAL] * len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges: Any  # pairs, though transformers' annotation says lines of a file
    if "tokenizer.ggml.merges" in metadata:
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    else:
        merges = generate_merges(vocabulary, dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True)))
    made = (GPT2Tokenizer if kind == "gpt2" else LlamaTokenizer)(vocab=vocabulary, merges=merges)
    backend: Tokenizer = made.backend_tokenizer
    _cut_into_words(backend, kind, rule, metadata["general.architecture"] == "phi3")
    for token, its_kind in zip(tokens, kinds, strict=True):
        if its_kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = its_kind == gguf.TokenType.CONTROL
            added.append(AddedToken(token, normalized=False, special=special))
    backend.add_tokens(added)
    return backend


def _cut_into_words(backend: "Tokenizer", kind: str, rule: str, phi3: bool) -> None:
    """How text is cut into words, which the file gives by a name only."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if kind == "llama":
        if phi3:  # its published tokenizer has a space before each part of a text, Llama's before the text alone
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            backend.pre_tokenizer = None
        return
    if rule in _WHOLE_WORDS:
        model = backend.model
        model.ignore_merges = True
        backend.model = model
    first: pre_tokenizers.PreTokenizer | None = None
    if rule == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
    elif rule == "tekken":
        first = pre_tokenizers.Split(Regex(_TEKKEN), "isolated")
    elif rule != "gpt-2":
        digits = r"\p{N}" if "qwen" in rule else r"\p{N}{1,3}"
        first = pre_tokenizers.Split(Regex(_CONTRACTIONS + LETTERS + digits + REST), "isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in ("gpt-2", "smollm"))
    backend.pre_tokenizer = words if first is None else pre_tokenizers.Sequence([first, words])
