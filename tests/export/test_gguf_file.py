"""A GGUF file, read back by transformers: the same logits and tokens; what cannot be written faithfully is refused."""

import copy

import numpy
import pytest
import torch
import transformers
from engine_models import ARCHITECTURES, LLAMA3
from export_cases import load, logits, rounded, trained
from gguf import GGUFReader, TokenType
from packaging.version import Version
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nbhelpers import export, host
from nbhelpers.export import gguf_file


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gguf_file_read_back_has_the_same_logits(base, tmp_path, tokenizer, name):
    model, _ = trained(base(name))
    wanted = {"f16": logits(rounded(model, torch.float16)), "q8_0": logits(model), "bf16": logits(model)}
    for quantization, close in (("f16", 1e-4), ("bf16", 0.02), ("q8_0", 0.06)):
        file = tmp_path / f"{quantization}.gguf"
        assert export.gguf(model, tokenizer, file, quantization) == file
        # of a Qwen3 transformers does not read the heads' size, which is 128 in all that were published
        size = {"head_dim": model.config.head_dim} if name == "qwen3" else {}
        error = logits(load(tmp_path, gguf_file=file.name, **size)) - wanted[quantization]
        assert error.std() < close * wanted["f16"].std(), quantization
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.gguf")}
    assert sizes["q8_0"] < 0.7 * sizes["bf16"]
    assert not list(tmp_path.glob(".*"))


def test_the_tokenizer_in_a_gguf_file_reads_text_alike(base, tmp_path, tokenizer):
    model, _ = trained(base("qwen2"))
    export.merged(model, tokenizer, tmp_path / "merged")
    export.gguf(tmp_path / "merged", tokenizer, tmp_path / "a.gguf", "f16")  # from the folder
    its = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    # before 5.18 transformers' reader puts its own added tokens and end in place of the file's
    reads_all = Version(transformers.__version__) >= Version("5.18")
    added = ["<answer>3.41</answer>  two  spaces\n"] if reads_all else []
    for text in ("Which is bigger, 9.11 or 9.9?", "two  spaces\n", "Grüße 你好", *added):
        assert its(text)["input_ids"] == tokenizer(text)["input_ids"]
    fields = GGUFReader(tmp_path / "a.gguf").fields
    answer = tokenizer.convert_tokens_to_ids("<answer>")
    assert fields["tokenizer.ggml.token_type"].contents()[answer] == TokenType.USER_DEFINED
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert its.eos_token == tokenizer.eos_token or not reads_all
    assert its.chat_template == tokenizer.chat_template


def test_a_sentencepiece_tokenizer_too(base, tmp_path):
    """Mistral's kind: pieces with a score, spaces as a sign of their own, bytes for what has no piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁ab", "ab"), ("b", "b")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["".join(pair) for pair in merges] + ["▁", "a", "b", "c"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    wanted = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    model, _ = trained(base("mistral"))
    export.gguf(model, wanted, tmp_path / "a.gguf", "f16")
    its = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in ("ab abab bb", "cab é b"):
        ids = its(text, add_special_tokens=False)["input_ids"]
        assert ids == wanted(text, add_special_tokens=False)["input_ids"]
    fields = GGUFReader(tmp_path / "a.gguf").fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:3] == [3, 3, 3] and set(kinds[3:259]) == {6} and set(kinds[259:269]) == {1} and kinds[-1] == 5


def test_llama_3s_frequency_factors_are_transformers(base, tmp_path, tokenizer):
    rope = {**LLAMA3, "original_max_position_embeddings": 64}
    model, _ = trained(base("llama", rope_parameters=rope))
    assert model.config.rope_parameters["rope_type"] == "llama3"
    export.gguf(model, tokenizer, tmp_path / "a.gguf", "f16")
    found = next(tensor for tensor in GGUFReader(tmp_path / "a.gguf").tensors if tensor.name == "rope_freqs.weight")
    plain = copy.deepcopy(model.config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    wanted = LlamaRotaryEmbedding(plain).inv_freq / LlamaRotaryEmbedding(model.config).inv_freq
    assert wanted.max() > 7 and wanted.min() == 1
    numpy.testing.assert_allclose(found.data, wanted.numpy(), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_number_too_large_for_the_files_own_type_is_refused(base, tmp_path, tokenizer):
    """Vectors are written in fp32 whatever the matrices are, and odd rows in fp16 where q8_0 was asked for."""
    model, _ = trained(base("llama"), lora_rank=0, quantization="none")
    model.model.norm.weight.data[0] = 1e6
    export.gguf(model, tokenizer, tmp_path / "a.gguf", "f16")
    found = next(tensor for tensor in GGUFReader(tmp_path / "a.gguf").tensors if tensor.name == "output_norm.weight")
    assert found.data[0] == 1e6
    model.config.intermediate_size = 90  # which no whole number of blocks fills
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight.data[:90].contiguous())
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.data[:, :90].contiguous())
    down = model.model.layers[0].mlp.down_proj
    export.gguf(model, tokenizer, tmp_path / "b.gguf", "q8_0")
    down.weight.data[0, 0] = 1e6
    for quantization in ("f16", "q8_0"):
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight does not fit into 16-bit"):
            export.gguf(model, tokenizer, tmp_path / "c.gguf", quantization)
    assert not list(tmp_path.glob("*c.gguf*"))


def test_rows_go_into_pairs():
    rows = torch.arange(8.0)[:, None]
    assert gguf_file.interleave(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf_file.interleave(rows, None) is rows


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def splitting(regex: str) -> dict:
    steps = [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel", "use_regex": False}]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def test_the_rule_that_cuts_words_must_be_known():
    assert gguf_file.pre_type(splitting(QWEN), "qwen2") == "qwen2"
    threes = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    assert gguf_file.pre_type(splitting(threes), "llama") == "llama-bpe"
    assert gguf_file.pre_type(splitting(threes), "phi3") == "dbrx"
    assert gguf_file.pre_type({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}, "qwen2") == "gpt-2"
    for unknown in (splitting(r"\w+"), {"pre_tokenizer": {"type": "Whitespace"}}, {"pre_tokenizer": None}):
        with pytest.raises(ValueError, match="not known to be one of llama"):
            gguf_file.pre_type(unknown, "qwen2")


def test_what_cannot_be_written_faithfully_is_refused(base, tmp_path, tokenizer, monkeypatch):
    model, _ = trained(base("mistral"))
    out = tmp_path / "a.gguf"
    with pytest.raises(ValueError, match="q8_0, f16, bf16"):
        export.gguf(model, tokenizer, out, "q2_k")
    model.config.sliding_window = 64  # of 512
    with pytest.raises(ValueError, match="no sliding window"):
        export.gguf(model, tokenizer, out)
    model.config.sliding_window = None
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(ValueError, match="'yarn' cannot be written"):
        export.gguf(model, tokenizer, out)
    model.config.model_type = "gemma"
    with pytest.raises(ValueError, match="model_type 'gemma'"):
        export.gguf(model, tokenizer, out)
    monkeypatch.setattr(host, "version", lambda name: (_ for _ in ()).throw(host.PackageNotFoundError(name)))
    with pytest.raises(host.CannotRun, match='pip install "gguf'):
        export.gguf(model, tokenizer, out)
    assert not list(tmp_path.glob("*.gguf*"))
