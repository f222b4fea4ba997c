"""A GGUF file loads as the model that it was made from, every type as the gguf package has it."""

import shutil

import gguf
import numpy as np
import pytest
import torch
from engine_models import LLAMA3, PARTIAL
from export_cases import logits, rounded, trained
from gguf import GGMLQuantizationType as Kind
from gguf_cases import blocks, load, rewritten, write_base
from transformers import AutoModelForCausalLM

from nbhelpers import export, loader
from nbhelpers.export import gguf_file
from nbhelpers.export.merge import Merged
from nbhelpers.loader import gguf as gguf_reader
from nbhelpers.loader import gguf_blocks, gguf_source, hub
from nbhelpers.models import quantize


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


@pytest.mark.parametrize("name", gguf_reader.TYPES)
def test_a_cards_arithmetic_is_the_same(name):
    kind = Kind[name]
    data = blocks(kind, 40, 512)
    _, width = gguf.GGML_QUANT_SIZES[kind]
    found = gguf_blocks.dequantise(torch.from_numpy(data.reshape(-1, width)), name)
    assert torch.equal(found.flatten(), torch.from_numpy(gguf.quants.dequantize(data, kind)).flatten())


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


def test_an_export_does_not_replace_the_file_that_the_model_came_from(file, tokenizer):
    before = file.read_bytes()
    for base in (file, file.parent):
        with pytest.raises(ValueError, match=r"a\.gguf is what the model was loaded from"):
            export.gguf(load(base, "nf4"), tokenizer, file.parent / "sub" / ".." / "a.gguf")
    assert file.read_bytes() == before
    model = load(file, "nf4")
    export.gguf(model, tokenizer, file.with_name("b.gguf"))
    export.gguf(model, tokenizer, file.with_name("b.gguf"))  # its own work may be replaced
    assert file.read_bytes() == before


def test_a_folder_with_safetensors_is_a_folder(written):
    assert not isinstance(hub.find(written / "merged"), gguf_source.GgufSource)
    shutil.copy(written / "files" / "a.gguf", written / "merged" / "a.gguf")
    assert not isinstance(hub.find(written / "merged"), gguf_source.GgufSource)
    (written / "merged" / "a.gguf").unlink()
    assert isinstance(hub.find(written / "files"), gguf_source.GgufSource)
