"""What loader.load refuses, and in which words."""

import json

import pytest
import torch
from loader_cases import load
from safetensors.torch import load_file, save_file

from nbhelpers import gpu, loader, presets
from nbhelpers.gpu import Card
from nbhelpers.host import CannotRun
from nbhelpers.loader import base_model, hub

pytestmark = pytest.mark.usefixtures("small")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"quantization": "int8"}, "quantization='int8': it is one of dynamic, nf4, none"),
        ({"lora_rank": 0}, r'weights in 4 bits \(nf4\) cannot be trained: pass quantization="none"'),
        ({"lora_rank": -1}, "lora_rank=-1"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_targets": ["q_proj", "wq"]}, "no linear layer wq; it has down_proj, gate_proj"),
        ({"quantization": "dynamic", "calibration": "one text"}, "calibration is a list of prompts"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        loader.load(presets.get("qwen2.5-1.5b"), **{"quantization": "nf4", "progress": False} | arguments)


def test_a_choice_of_another_model():
    choice = load(presets.get("phi-4"), "dynamic").nbhelpers_choice
    with pytest.raises(ValueError, match=r"another model's: this one has no model\.layers"):
        load(presets.get("qwen2.5-1.5b"), "dynamic", calibration=choice)


def test_a_tensor_that_is_missing_or_of_another_shape(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors | {"model.last_norm.weight": norm}, file)
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors, the first is model\.norm\.weight.*model\.last_norm\.weight"
    ):
        load(folder)
    save_file(tensors | {"model.norm.weight": norm[:8].clone()}, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \(8,\), the config says \(64,\)"):
        load(folder)


def test_not_a_language_model(tmp_path, folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="is not a causal language model"):
        load(folder)


def real_source(name: str) -> hub.Source:
    """A preset's real shapes without its weights."""
    config = presets.table.TABLE[name].architecture.config()
    return hub.Source(name, None, config)


def test_a_card_too_small_is_told_before_the_download(monkeypatch):
    monkeypatch.setattr(gpu, "cards", lambda: [Card("Tesla T4", 15_800_000_000, (7, 5))])
    monkeypatch.setattr(gpu, "free_bytes", lambda index: 4_000_000_000)
    cuda = torch.device("cuda")
    base_model.check_room(real_source("qwen2.5-1.5b"), "nf4", cuda, torch.float16)
    with pytest.raises(
        CannotRun, match=r"needs 6\.\d GB to load as nf4 .* 4\.0 GB free of 15\.8: 2\.\d GB too little"
    ) as e:
        base_model.check_room(real_source("llama-3.1-8b"), "nf4", cuda, torch.float16)
    assert "qwen2.5-1.5b" in str(e.value) and "phi-4" not in str(e.value)


def test_4_bit_on_a_cpu_says_that_it_is_slow():
    with pytest.warns(UserWarning, match="hopelessly slow"):
        base_model.check_room(real_source("llama-3.1-8b"), "nf4", torch.device("cpu"), torch.float32)
