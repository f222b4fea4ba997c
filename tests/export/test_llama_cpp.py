"""GGUF in 4 bits through llama.cpp's tool: a stand-in of it, which checks what it is given; and where there is none."""

import sys

import pytest
from export_cases import trained

from nbhelpers import export, host, presets

TOOL = """#!{python}
import sys
from gguf import GGUFReader

source, target, kind = sys.argv[1:]
types = {{tensor.tensor_type.name for tensor in GGUFReader(source).tensors}}
assert "BF16" in types and kind == "Q4_K_M", (types, kind)
{behaves}
open(target, "wb").write(b"GGUF in four bits")
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Makes a llama-quantize that `behaves`."""

    def make(behaves: str = "") -> None:
        file = tmp_path / "bin" / "llama-quantize"
        file.parent.mkdir(exist_ok=True)
        file.write_text(TOOL.format(python=sys.executable, behaves=behaves))
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(file.parent))

    if sys.platform == "win32":
        pytest.skip("Windows runs no script by its first line")
    return make


def test_four_bits_are_made_from_bf16_by_the_tool_and_nothing_else_stays(base, tmp_path, tokenizer, tool, capsys):
    tool()
    model, _ = trained(base("qwen2"))
    out = tmp_path / "out"
    assert export.why_not("q4_k_m") is None
    assert export.gguf(model, tokenizer, out / "r.gguf", "q4_k_m") == out / "r.gguf"
    assert (out / "r.gguf").read_bytes() == b"GGUF in four bits" and [p.name for p in out.iterdir()] == ["r.gguf"]
    assert "in q4_k_m" in capsys.readouterr().out


def test_a_tool_that_fails_is_quoted_and_leaves_what_was_there(base, tmp_path, tokenizer, tool):
    tool("sys.exit('the disk is full')")
    model, _ = trained(base("qwen2"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "r.gguf").write_bytes(b"old")
    with pytest.raises(host.CannotRun, match=r"status 1 .*It said: the disk is full\. .*q8_0 needs no tool"):
        export.gguf(model, tokenizer, out / "r.gguf", "q4_k_m")
    assert (out / "r.gguf").read_bytes() == b"old" and [p.name for p in out.iterdir()] == ["r.gguf"]


def test_without_the_tool_it_is_a_sentence_before_anything_is_written(base, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    why = export.why_not("q4_k_m")
    assert "llama-quantize, which is not on this machine's PATH" in why and "q8_0, which needs no tool" in why
    assert export.why_not("q8_0") is None and export.why_not("bf16") is None
    model, _ = trained(base("qwen2"))
    with pytest.raises(host.CannotRun, match="llama-quantize"):
        export.gguf(model, tokenizer, tmp_path / "out" / "r.gguf", "q4_k_m")
    assert not (tmp_path / "out").exists()


def test_without_the_gguf_package_too(monkeypatch):
    def missing(package: str) -> None:
        raise host.CannotRun(f"{package} is not installed")

    monkeypatch.setattr(host, "require", missing)
    assert export.why_not("q8_0") == "gguf is not installed"


def test_sizes_are_those_of_the_files(tmp_path, monkeypatch):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    said = export.sizes(presets.get("qwen2.5-1.5b"), tmp_path / "not" / "yet")
    assert said.startswith("adapter 0.15 GB · merged 3.09 GB · q8_0 1.64 GB · q4_k_m 0.96 GB · ")
    assert said.endswith("GB of disk free")
