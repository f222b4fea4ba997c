"""A small model's folder and its GGUF file."""

import shutil
from pathlib import Path

import pytest
import torch
from export_cases import rounded, trained
from gguf_cases import write_base
from transformers import AutoTokenizer

from nbhelpers import export, presets
from nbhelpers.models import smoke
from nbhelpers.presets import WORKSHOP


@pytest.fixture
def small(monkeypatch):
    """Presets are small random models."""
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    torch.set_num_threads(1)


@pytest.fixture
def folder(small, tmp_path):
    """A Qwen2 of its own on disk, which a test may damage."""
    return smoke.write(presets.get("qwen2.5-1.5b").architecture, tmp_path / "model", seed=1)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


@pytest.fixture(scope="session")
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
