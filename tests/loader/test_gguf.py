"""A GGUF file loads as the model that it was made from; what could not is refused by name before anything is built."""

import re
import shutil
import struct
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from engine_models import LLAMA3, PARTIAL
from export_cases import SMALL, logits, rounded, trained
from gguf import GGMLQuantizationType as Kind
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nbhelpers import export, loader
from nbhelpers.export import gguf_file
from nbhelpers.export.merge import Merged
from nbhelpers.loader import gguf as gguf_reader
from nbhelpers.loader import gguf_source, hub, stream
from nbhelpers.models import adapter, quantize
from nbhelpers.presets import WORKSHOP


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


def write_base(folder: Path, name: str, tokenizer, **changes) -> Path:
    """A random model wide enough that an error shows."""
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(name, **{**SMALL, "rms_norm_eps": 1e-5, **special, **changes})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in parameter_name else 0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
    """A Qwen2 with tied embeddings: its folder, its file in f16, and the model that the file holds."""
    folder = tmp_path_factory.mktemp("written")
    model, _ = trained(write_base(folder / "base", "qwen2", tokenizer, tie_word_embeddings=True, intermediate_size=128))
    export.gguf(model, tokenizer, folder / "files" / "a.gguf", "f16")
    rounded(model, torch.float16).save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    return folder


@pytest.fixture
def file(written, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copy(written / "files" / "a.gguf", tmp_path / "a.gguf"))


def load(what, quantization="none", **more):
    model, _ = loader.load(what, **{"quantization": quantization, "progress": False, "lora_rank": 2, **more})
    return model


def rewritten(file: Path, out: Path, values=None, drop=(), add=None, rename=None, **writer) -> Path:
    """The file again, with other values, without some tensors, with others, or in parts (`split_max_tensors`)."""
    reader = gguf.GGUFReader(file)
    fields = {name: (field.types, field.contents()) for name, field in reader.fields.items() if name[:5] != "GGUF."}
    arch = (values or {}).get("general.architecture", fields.pop("general.architecture")[1])
    new = gguf.GGUFWriter(str(out), arch, **writer)
    for name, (types, content) in fields.items():
        if (values or {}).get(name, content) is not None:
            new.add_key_value(name, (values or {}).get(name, content), types[0], *(types[1:] or [None]))
    for name in (values or {}).keys() - fields.keys() - {"general.architecture"}:
        kind = gguf.GGUFValueType.get_type(values[name])
        new.add_key_value(name, values[name], kind)
    tensors = {(rename or {}).get(t.name, t.name): t.data for t in reader.tensors if t.name not in drop} | (add or {})
    for name, data in tensors.items():
        new.add_tensor(name, np.array(data))
    new.write_header_to_file()
    new.write_kv_data_to_file()
    new.write_tensors_to_file()
    new.close()
    return out


# ---------------------------------------------------------------------------------------------------------- tensors


def blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Rows in a type: quantised by gguf where it can, else random blocks whose scales are finite."""
    rng = np.random.default_rng(0)
    block, width = gguf.GGML_QUANT_SIZES[kind]
    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(rng.normal(size=(rows, columns)).astype(np.float32), kind)
    raw = rng.integers(0, 256, (rows, columns // block, width), dtype=np.uint8)
    scales = rng.normal(size=(*raw.shape[:2], 2)).astype(np.float16).view(np.uint8)
    raw[..., -2:] = scales[..., :2]  # Q6_K's d is its last two bytes; of the others d and dmin are the first four
    if kind != Kind.Q6_K:
        raw[..., :4] = scales
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", gguf_reader.TYPES)
def test_every_type_is_dequantised_as_gguf_does(name, tmp_path):
    kind, (rows, columns) = Kind[name], (451, 512)  # more than one piece, and the last one short
    data = blocks(kind, rows, columns)
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_tensor("first", np.ones(5, np.float32))
    writer.add_tensor("second", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf_reader.read_header((tmp_path / "a.gguf",))
    tensors = gguf_reader.Tensors(header.tensors)
    wanted = torch.from_numpy(gguf.quants.dequantize(data, kind))
    found = tensors.read("second")
    assert found.dtype == torch.float32 and found.shape == (rows, columns) and torch.equal(found, wanted)
    assert wanted.std() > 0.1 and torch.isfinite(wanted).all() and rows * columns > 2 * gguf_reader.PIECE
    assert torch.equal(tensors.read("second", torch.bfloat16), wanted.to(torch.bfloat16))
    assert tensors.nbytes == data.nbytes + 20 and tensors.entries["second"].kind == name


def test_one_buffer_of_the_largest_tensor_serves_all(written):
    tensors = hub.find(written / "files" / "a.gguf").weights()
    largest = max(torch.Size(entry.shape).numel() for entry in tensors.entries.values())
    for name in tensors.entries:
        tensors.read(name, torch.float16)
    assert tensors._buffer.nbytes == 2 * largest
    tensors.release()
    assert tensors._buffer.nbytes == 0


def test_pairs_of_rows_go_back_into_halves():
    rows = torch.arange(16.0)[:, None]
    pairs = gguf_file.interleave(rows, 2)
    assert not torch.equal(pairs, rows) and torch.equal(gguf_reader.in_halves(pairs, 2), rows)


# --------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None, "head_dim": 32}),
        ("phi3", {"rope_parameters": PARTIAL, "sliding_window": 8}),
    ],
)
def test_what_export_writes_loads_with_the_same_logits(name, changes, tmp_path, tokenizer):
    changes = {"tie_word_embeddings": False, **changes}
    model, _ = trained(write_base(tmp_path / "base", name, tokenizer, **changes))
    file = export.gguf(model, tokenizer, tmp_path / "a.gguf", "f16")
    wanted = rounded(model, torch.float16)
    again = load(file, lora_rank=0)
    assert dict(again.named_parameters()).keys() == dict(wanted.named_parameters()).keys()  # tied ones once
    for parameter_name, p in wanted.named_parameters():
        assert torch.equal(p, again.get_parameter(parameter_name)), parameter_name
    assert torch.allclose(logits(again), logits(wanted), atol=1e-4)
    expected = {key: wanted.config.to_dict().get(key) for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
        "eos_token_id", "pad_token_id", "attention_bias", "mlp_bias", "sliding_window", "hidden_act",
    )}  # fmt: skip
    found = again.config.to_dict()
    same_math = {"sliding_window", "attention_bias", "mlp_bias"} if name == "mistral" else set()  # a Llama
    differing = {key for key, value in expected.items() if found.get(key) != value} - same_math
    assert not differing, {key: (expected[key], found.get(key)) for key in differing}
    assert again.config.model_type == ("llama" if name == "mistral" else name)


def test_in_4_bits_it_is_the_same_model_and_knows_its_base(written, tmp_path):
    model = load(written / "files" / "a.gguf", "nf4")
    same = load(written / "merged", "nf4")
    assert sum(map(quantize.is_nf4, model.modules())) == 14
    assert torch.equal(logits(model), logits(same))
    assert sorted(Merged(model).shapes) == sorted(Merged(same).shapes)
    merged = Merged(model)
    assert "original weights" in merged.source
    for name in merged.shapes:
        assert torch.equal(merged.read(name), Merged(same).read(name))
    loader.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load(tmp_path / "adapter", None)), logits(model))


def test_the_worst_layers_stay_as_the_file_has_them(written):
    model = load(written / "files" / "a.gguf", "dynamic", budget=0.3)
    kept = model.nbhelpers_choice.kept
    dense = AutoModelForCausalLM.from_pretrained(written / "merged", dtype=torch.float32)
    assert kept and all(
        torch.equal(model.get_base_model().get_submodule(name).base_layer.weight, dense.get_submodule(name).weight)
        for name in kept
    )


def test_a_model_in_parts_by_any_part_or_its_folder(file, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    rewritten(file, folder / "a.gguf", split_max_tensors=9)
    parts = sorted(folder.iterdir())
    assert len(parts) == 3 and parts[2].name == "a-00003-of-00003.gguf"
    wanted = logits(load(file))
    for what in (parts[0], str(parts[2]), folder):
        assert torch.equal(logits(load(what)), wanted)
    (folder / "b.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"several models: a-00001-of-00003\.gguf, .*b\.gguf"):
        hub.find(folder)
    renamed = parts[0].rename(folder / "c.gguf")
    with pytest.raises(ValueError, match="one of 3 parts by its metadata, and of 1 by its name"):
        hub.find(renamed)
    with pytest.raises(FileNotFoundError, match=r"lacks a-00001-of-00003\.gguf, a part of a-00002"):
        hub.find(parts[1])
    shutil.copy(parts[1], parts[0])
    with pytest.raises(ValueError, match="a-00001"):
        hub.find(parts[1])


def test_a_folder_with_safetensors_is_a_folder(written):
    assert not isinstance(hub.find(written / "merged"), gguf_source.GgufSource)
    shutil.copy(written / "files" / "a.gguf", written / "merged" / "a.gguf")
    assert not isinstance(hub.find(written / "merged"), gguf_source.GgufSource)
    (written / "merged" / "a.gguf").unlink()
    assert isinstance(hub.find(written / "files"), gguf_source.GgufSource)


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

TEXTS = ("Which is bigger, 9.11 or 9.9?", "<answer>3.41</answer>  two  spaces\n\n x", "Grüße 你好", "a  1234567 b")


def the_same(ours, wanted):
    for text in TEXTS:
        assert ours(text, add_special_tokens=False)["input_ids"] == wanted(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True).strip() == text.strip()


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


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + gguf_file._LETTERS + r"\p{N}" + gguf_file._REST
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


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refuses(monkeypatch):
    """Asserts that loading fails in these words and that no model was built."""
    monkeypatch.setattr(stream, "empty_model", lambda *arguments: pytest.fail("a model was built"))
    monkeypatch.setattr(gguf_reader.Tensors, "read", lambda *arguments: pytest.fail("a tensor was read"))

    def check(file, said, kind=ValueError):
        with pytest.raises(kind, match=said) as caught:
            loader.load(file, quantization="nf4", progress=False)
        assert Path(file).name in str(caught.value)

    return check


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b[:-100], r"is cut short: its tensors end at byte [\d,]+ and the file at [\d,]+"),
        (lambda b: b[:3000], "cut short .*ends inside its header"),
        (lambda b: b[:11], "cut short .*ends inside its header"),
        (lambda b: b[:6], "cut short .*ends inside its header"),
        (lambda b: b"", "is no GGUF file"),
        (lambda b: b"PK\3\4" + b[4:], "is no GGUF file .it begins with b'PK"),
        (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "is GGUF version 1; versions 2 and 3"),
        (lambda b: b[:4] + struct.pack("<I", 4) + b[8:], "is GGUF version 4"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "is a big-endian GGUF"),
        (lambda b: b[:8] + b"\xff" * 8 + b[16:], "damaged or cut short"),  # as many tensors as there are numbers
        (lambda b: b[:24] + b"\xff" * 8 + b[32:], "damaged or cut short"),  # a key of 2^64 bytes
        (lambda b: b.replace(b"block_count\4\0\0\0", b"block_count\x63\0\0\0"), "damaged .*a value of type 99"),
        (lambda b: b.replace(b"tokens\x09\0\0\0\x08", b"tokens\x09\0\0\0\x09"), "damaged .*an array of type 9"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(file, refuses, damage, said):
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    refuses(file, said)


def rows(n):
    return np.ones((n, 64), np.float32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drop": ["blk.1.ffn_up.weight"]}, r"lacks 1 tensors, the first is blk\.1\.ffn_up\.weight"),
        ({"drop": ["token_embd.weight"]}, r"lacks the tensor token_embd\.weight"),
        ({"add": {"blk.0.attn_q_norm.weight": rows(1)}}, r"blk\.0\.attn_q_norm\.weight, for which .* no place"),
        ({"add": {"output.weight": rows(9)}}, r"output\.weight is \(9, 64\), its metadata says \(400, 64\)"),
        (
            {"values": {"general.architecture": "gpt9"}},
            "architecture 'gpt9'; these are known here: llama, phi3, qwen2, qwen3",
        ),
        ({"values": {"qwen2.feed_forward_length": None}}, r"does not state qwen2\.feed_forward_length"),
        ({"values": {"qwen2.attention.value_length": 8}}, "of different lengths"),
        ({"values": {"qwen2.rope.dimension_count": 8}}, "8 of 16 dimensions rotate"),
        ({"values": {"qwen2.rope.scaling.type": "yarn"}}, r"rope\.scaling\.type 'yarn' is not read here"),
    ],
)
def test_what_the_model_could_not_compute_is_refused(file, tmp_path, refuses, changes, said):
    refuses(rewritten(file, tmp_path / "b.gguf", **changes), said)


def test_a_type_that_is_not_read_is_named(file, tmp_path, refuses):
    name = b"blk.0.ffn_up.weight"
    content = file.read_bytes()
    at = content.index(name) + len(name) + 4 + 2 * 8
    for number, said in ((11, "Q3_K"), (39, "MXFP4"), (999, "type 999")):
        (tmp_path / "b.gguf").write_bytes(content[:at] + struct.pack("<I", number) + content[at + 4 :])
        refuses(tmp_path / "b.gguf", rf"blk\.0\.ffn_up\.weight is in {said}, which is not read here")


def test_a_path_that_is_not_there(file, refuses, monkeypatch):
    refuses(file.with_name("none.gguf"), "there is no file .*none", FileNotFoundError)
    monkeypatch.chdir(file.parent)
    refuses("models/none.gguf", "there is no file models/none", FileNotFoundError)
    refuses(file.with_name("a-00001-of-00002.gguf"), "lacks a-00001.*, a-00002", FileNotFoundError)
    assert hub.find("a.gguf").id == "a.gguf"
    file.with_name("notes.txt").write_text("no model")
    refuses(file.with_name("notes.txt"), "is no GGUF file .*pass one, or a model's folder")


# ------------------------------------------------------------------------------------------------------------- keep


@pytest.fixture(scope="module", params=["nf4", "dynamic"])
def packed(request, written):
    return loader.load(
        written / "files" / "a.gguf", quantization=request.param, budget=0.3, lora_rank=2, progress=False
    )


def test_a_kept_model_comes_back_bit_for_bit(packed, tmp_path, monkeypatch, capsys):
    model, tokenizer = packed
    assert loader.keep(model, tokenizer, tmp_path / "kept") == tmp_path / "kept"
    assert "the base as packed; the adapter is not in it: loader.save_adapter" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    monkeypatch.setattr(quantize, "pack", lambda *arguments: pytest.fail("quantised again"))
    again, its = loader.load(tmp_path / "kept", lora_rank=2, progress=False)
    ours, theirs = model.get_base_model(), again.get_base_model()
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and ("lora_" in name or torch.equal(a, b))
        for key, value in (a.quant_state.as_dict(packed=True) if "quant_state" in vars(a) else {}).items():
            assert torch.equal(value, b.quant_state.as_dict(packed=True)[key]), (name, key)
    assert torch.equal(logits(model), logits(again))  # a fresh LoRA adds nothing
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert adapter.base_of(again).id == str(tmp_path / "kept")
    the_same(its, tokenizer)
    assert its.chat_template == tokenizer.chat_template and its.pad_token == tokenizer.pad_token


def test_transformers_reads_a_kept_model(packed, tmp_path):
    model, tokenizer = packed
    loader.keep(model, tokenizer, tmp_path / "kept")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32)
    four = {name for name, module in theirs.named_modules() if quantize.is_nf4(module)}
    kept = model.nbhelpers_choice.kept if model.nbhelpers_choice else ()
    assert len(four) == 14 - len(kept) and not four & {*kept, "lm_head"}
    for module in theirs.modules():
        if quantize.is_nf4(module):
            module.support_avx512bf16_for_cpu = False
    assert torch.equal(logits(theirs), logits(model))


def test_a_kept_model_may_be_in_several_files(packed, tmp_path, monkeypatch):
    model, tokenizer = packed
    monkeypatch.setattr("nbhelpers.loader.packed.SHARD", 5_000)
    loader.keep(model, tokenizer, tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "kept", None)), logits(model))
    loader.keep(model, tokenizer, tmp_path / "kept")  # a model's folder may be replaced


def test_a_checkpoint_of_dynamic_4_bit_as_the_hub_has_it(written, tmp_path):
    """In bf16, with whole modules left out by their names, saved by transformers; nothing is quantised on the way."""
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head", "embed_tokens", "model.layers.0.mlp", "model.layers.1.self_attn.o_proj"]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skipped,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(written / "merged", quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "a")
    AutoTokenizer.from_pretrained(written / "merged").save_pretrained(tmp_path / "a")
    model, tokenizer = loader.load(tmp_path / "a", lora_rank=2, progress=False)
    four = {
        name.removesuffix(".base_layer") for name, m in model.get_base_model().named_modules() if quantize.is_nf4(m)
    }
    assert len(four) == 14 - 4 and not any("layers.0.mlp" in name for name in four)
    for name in four:
        ours, wanted = model.get_base_model().get_submodule(name).base_layer.weight, theirs.get_submodule(name).weight
        assert torch.equal(ours, wanted) and torch.equal(quantize.unpack(ours).bfloat16(), quantize.unpack(wanted))
    loader.keep(model, tokenizer, tmp_path / "kept")
    assert torch.equal(logits(load(tmp_path / "kept", None)), logits(model))


def test_what_cannot_be_kept_is_refused(packed, written, tmp_path):
    model, tokenizer = packed
    with pytest.raises(ValueError, match="no layer in 4 bits"):
        loader.keep(load(written / "merged"), tokenizer, tmp_path / "kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.pdf").touch()
    with pytest.raises(FileExistsError, match="is left alone"):
        loader.keep(model, tokenizer, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.pdf").exists()
    with pytest.raises(ValueError, match="is the base model itself"):
        loader.keep(load(written / "merged", "nf4"), tokenizer, written / "merged")
    other = load(written / "merged", "nf4")
    with warnings.catch_warnings():  # that merging into 4 bits rounds
        warnings.simplefilter("ignore", UserWarning)
        other.merge_adapter()
    with pytest.raises(ValueError, match=re.escape("unmerge_adapter() first")):
        loader.keep(other, tokenizer, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
