"""A model folder that is damaged, of two models, or hostile: refused by the file's or the tensor's name."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from nbhelpers import loader
from nbhelpers.loader.shards import Shards
from nbhelpers.models import chat, smoke, template_check


def load(what, quantization="none", **more):
    return loader.load(what, **{"quantization": quantization, "lora_rank": 4, "progress": False} | more)


def change(folder, name, **fields):
    file = folder / name
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | fields))


def retensored(folder, function):
    tensors = load_file(folder / "model.safetensors")
    save_file(function(tensors), folder / "model.safetensors")


# ---- files ----


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{broken", "", "[]", "5", b"\xff\xfe{}", "[" * 100_000])
def test_broken_json_is_named_with_its_file(folder, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        ValueError, match=rf"{name} (is damaged|holds a \w+, and a JSON object is wanted)|no tokenizer that"
    ):
        load(folder)


@pytest.mark.parametrize(
    "text", ["{broken", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../b"}}',
             '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": ""}}'],
)  # fmt: skip
def test_an_index_is_named_and_reaches_no_file_elsewhere(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json (is damaged|holds a list)"):
        load(folder)


@pytest.mark.parametrize("header", [b"5", b"[]", b'{"a": 5}', b'{"a": {"dtype": "F32"}}', b'{"a":' * 50_000,
                                    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'])  # fmt: skip
def test_a_header_that_is_none_is_named(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        Shards(folder)


@pytest.mark.parametrize(
    "fields", [{"num_attention_heads": 0}, {"hidden_size": "many"}, {"num_hidden_layers": None}, {"vocab_size": -1},
               {"intermediate_size": [1]}],
)  # fmt: skip
def test_a_config_without_sense_is_named(folder, fields):
    change(folder, "config.json", **fields)
    with pytest.raises(ValueError, match=r"config\.json makes no model: "):
        load(folder)


# ---- a config and weights that do not belong together ----


def test_layers_that_the_config_does_not_count(folder):
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    change(folder, "config.json", num_hidden_layers=layers - 1, layer_types=None)
    with pytest.raises(
        ValueError, match=rf"has model\.layers\.{layers - 1}\..*config\.json says num_hidden_layers={layers - 1}"
    ):
        load(folder)


def test_a_bias_that_the_config_has_no_place_for(folder):
    retensored(folder, lambda tensors: tensors | {"model.layers.0.mlp.up_proj.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"has model\.layers\.0\.mlp\.up_proj\.bias, .*without a bias"):
        load(folder)


def test_what_is_no_part_of_a_layer_is_left_out_as_ever(folder):
    retensored(folder, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    load(folder)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.gate_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_number_that_is_none_is_named_with_its_tensor(folder, quantization, number, name):
    def spoilt(tensors):
        tensors[name].view(-1)[-1] = number
        return tensors

    retensored(folder, spoilt)
    with pytest.raises(ValueError, match=rf"{name} in model\.safetensors holds NaN or infinity"):
        load(folder, quantization)


def test_a_kept_base_with_a_scale_that_is_none(folder, tmp_path):
    model, tokenizer = load(folder, "nf4", lora_rank=4)
    loader.keep(model, tokenizer, tmp_path / "kept")

    def spoilt(tensors):
        next(t for name, t in tensors.items() if name.endswith("nested_absmax"))[0] = float("nan")
        return tensors

    retensored(tmp_path / "kept", spoilt)
    with pytest.raises(ValueError, match="nested_absmax holds NaN or infinity"):
        load(tmp_path / "kept", None)


def test_codes_that_are_stored_as_another_type_are_no_numbers(folder, tmp_path):
    """bitsandbytes' quant_storage: for FSDP all of a layer is of one type. As bfloat16 some codes look like NaN."""
    model, tokenizer = load(folder, "nf4", lora_rank=4)
    loader.keep(model, tokenizer, tmp_path / "kept")

    def stored(tensors):
        packed = {
            name: t.flatten().view(torch.bfloat16)[:, None]
            for name, t in tensors.items()
            if f"{name}.absmax" in tensors
        }
        assert not all(t.isfinite().all() for t in packed.values())
        return tensors | packed

    retensored(tmp_path / "kept", stored)
    again, _ = load(tmp_path / "kept", None)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert a.requires_grad or (a.dtype == b.dtype and torch.equal(a, b))


# ---- tokenizers ----


def test_no_vocabulary(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer that transformers can read.*tokenizer\.json"):
        load(folder)


def test_a_token_that_the_embedding_has_no_row_for(folder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    change(folder, "config.json", vocab_size=len(tokenizer) - 1)
    retensored(folder, lambda tensors: {
        name: t[: len(tokenizer) - 1].clone() if t.shape[0] == rows else t for name, t in tensors.items()})  # fmt: skip
    load(folder)
    assert "the embedding has no row for '<image>'" in capsys.readouterr().out
    tokenizer.add_tokens(["hello"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"2 tokens more than its embedding has rows .*'<image>', 'hello'"):
        load(folder)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages[0].content.nothing.more }}", "UndefinedError"),
        ("{{ raise_exception('no talk with me') }}", "no talk with me"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", r"not rendered .* in 1 s"),
    ],
)
def test_a_chat_template_that_fails_or_never_ends(folder, monkeypatch, template, why):
    monkeypatch.setattr(template_check.check, "__defaults__", (1.0,))
    (folder / "chat_template.jinja").write_text(template)
    begun = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"the chat template of .*model cannot be used \(.*{why}.*chat_template\.jinja"
    ):
        load(folder)
    assert time.monotonic() - begun < 60


def test_a_template_that_knows_no_system_message_is_fine():
    tokenizer = smoke.make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + smoke.CHATML
    )
    chat.prepare(tokenizer)


def test_a_missing_template_is_said(capsys):
    tokenizer = smoke.make_tokenizer()
    tokenizer.chat_template = None
    chat.prepare(tokenizer)
    assert "no chat template" in capsys.readouterr().out
