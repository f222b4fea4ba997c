"""Rope and tokenizer of a GGUF file are those of the model that it was made from."""

from pathlib import Path

import numpy as np
import pytest
from engine_models import LLAMA3
from gguf_cases import TEXTS, rewritten, the_same
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nbhelpers.export import gguf_file
from nbhelpers.loader import gguf_source, hub

# ------------------------------------------------------------------------------------------------------------- rope


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 4096)])
def test_llama_3s_rope_is_told_from_its_factors(head_dim, factor, original):
    rope = {**LLAMA3, "factor": factor, "original_max_position_embeddings": original}
    factors = gguf_file.llama3_factors(rope, head_dim).astype(np.float64)
    assert gguf_source.llama3(factors, rope["rope_theta"], head_dim, Path("a.gguf")) == rope
    for other in (factors * np.linspace(1, 1.01, len(factors)), factors[:-1], np.full_like(factors, 4.0)):
        with pytest.raises(ValueError, match=r"rope_freqs\.weight are not those of Llama 3's"):
            gguf_source.llama3(other, rope["rope_theta"], head_dim, Path("a.gguf"))


# -------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_and_template_come_from_the_file(file, tokenizer):
    decoy = tokenizer.backend_tokenizer.to_str().replace("\\\\p{N}", "\\\\p{N}{1,3}")
    (file.parent / "tokenizer.json").write_text(decoy)  # of another model, beside the file
    ours = hub.find(file).tokenizer()
    the_same(ours, tokenizer)
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == (tokenizer.eos_token, tokenizer.pad_token, None)
    assert ours.chat_template == tokenizer.chat_template and ours.padding_side == "left"
    messages = [{"role": "user", "content": TEXTS[0]}]
    assert ours.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)


def bytewise(rule, **settings) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges across digits, and a word that no merge leads to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("12", "3"), ("Ġ", "Ġ"), ("Ġ", "1"), ("i", "s")]
    words = ["<s>", "</s>", "<pad>", *alphabet, *("".join(pair) for pair in merges), "bigger"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, merges, **settings))
    backend.pre_tokenizer = rule
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def splitting(regex: str):
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + gguf_file.LETTERS + r"\p{N}" + gguf_file.REST
THREES = WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("qwen2", bytewise(splitting(WORDS))),
        ("dbrx", bytewise(splitting(THREES))),
        ("llama-bpe", bytewise(splitting(THREES), ignore_merges=True)),
        ("gpt-2", bytewise(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))),
        ("smollm", bytewise(DIGITS)),
    ],
)
def test_the_rule_that_cuts_words_is_llama_cpps(file, tmp_path, name, wanted):
    vocabulary = sorted(wanted.get_vocab(), key=wanted.get_vocab().get)
    state = wanted.backend_tokenizer.model
    merges = ["1 2", "12 3", "Ġ Ġ", "Ġ 1", "i s"]
    values = {
        "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": vocabulary, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(vocabulary) - 3), "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.unknown_token_id": None,
    }  # fmt: skip
    ours = hub.find(rewritten(file, tmp_path / "b.gguf", values)).tokenizer()
    the_same(ours, wanted)
    begins = ours("a")["input_ids"][0] == 0
    assert begins == (name == "llama-bpe") and state.ignore_merges == (name == "llama-bpe")
    assert ("bigger" in ours.tokenize("bigger")) == (name == "llama-bpe")


def test_a_sentencepiece_tokenizer(file, tmp_path):
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁ab", "ab"), ("b", "b")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["".join(pair) for pair in merges] + ["▁", "a", "b", "c"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>",
                                   fuse_unk=True, byte_fallback=True))  # fmt: skip
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    values = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3] * 3 + [6] * 256 + [1] * 10, "tokenizer.ggml.merges": None,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(pieces))], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.padding_token_id": None,
    }  # fmt: skip
    ours = hub.find(rewritten(file, tmp_path / "b.gguf", values)).tokenizer()
    for text in ("ab abab bb", "cab é b"):
        assert ours(text, add_special_tokens=False)["input_ids"] == backend.encode(text, add_special_tokens=False).ids
        assert (
            ours(text)["input_ids"][0] == 1 and ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text
        )
    rewritten(file, tmp_path / "c.gguf", {**values, "tokenizer.ggml.add_space_prefix": False})
    with pytest.raises(ValueError, match="puts no space before a text"):
        hub.find(tmp_path / "c.gguf").tokenizer()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokenizer.ggml.pre": "default"}, "by the rule 'default', which is not known"),
        ({"tokenizer.ggml.model": "bert"}, "a tokenizer of the kind 'bert'"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "has no tokenizer that transformers can read"),
    ],
)
def test_a_tokenizer_that_would_read_text_otherwise_is_refused(file, tmp_path, values, said):
    with pytest.raises(ValueError, match=said):
        hub.find(rewritten(file, tmp_path / "b.gguf", values)).tokenizer()
