"""A GGUF file that is damaged, foreign or of a kind not read here is refused by name before anything is built."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_cases import rewritten

from nbhelpers import loader
from nbhelpers.loader import gguf as gguf_reader
from nbhelpers.loader import hub, stream


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
