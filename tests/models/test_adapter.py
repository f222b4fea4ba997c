"""An adapter knows its base and is refused by every other one."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from nbhelpers import loader, presets
from nbhelpers.models import adapter, smoke


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    torch.set_num_threads(1)


def load(what, **more):
    model, _ = loader.load(what, **{"quantization": "nf4", "progress": False} | more)
    return model


@pytest.fixture
def saved(tmp_path):
    loader.save_adapter(load(presets.get("qwen2.5-1.5b")), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_stands_beside_it(saved):
    base = json.loads((saved / "base.json").read_text())
    assert base["id"] == "qwen2.5-1.5b" and base["quantization"] == "nf4"
    assert len(base["config_hash"]) == len(base["weights_hash"]) == 16
    assert not (saved / "dynamic.json").exists()
    dynamic = load(presets.get("phi-4"), quantization="dynamic")
    loader.save_adapter(dynamic, saved.parent / "other")
    assert json.loads((saved.parent / "other" / "dynamic.json").read_text())["tokens"] == 512


def test_another_architecture_is_refused(saved):
    with pytest.raises(
        ValueError, match=r"trained on qwen2\.5-1\.5b and this model is phi-4, with other shapes.*load\("
    ):
        loader.load_adapter(load(presets.get("phi-4")), saved)


def test_the_same_shapes_with_other_weights_are_refused(saved, tmp_path):
    other = smoke.write(presets.get("qwen2.5-1.5b").architecture, tmp_path / "tuned", seed=7)
    with pytest.raises(ValueError, match=r"this model is .*tuned, with other weights"):
        loader.load_adapter(load(other, lora_rank=4), saved)


def test_a_base_that_changed_its_shapes_is_refused_before_its_weights_are_read(saved, monkeypatch):
    base = json.loads((saved / "base.json").read_text())
    (saved / "base.json").write_text(json.dumps(base | {"config_hash": "0" * 16}))
    monkeypatch.setattr("nbhelpers.loader.hub.Source.weights", lambda self: pytest.fail("read the weights"))
    with pytest.raises(ValueError, match="with other shapes"):
        load(saved)


def test_another_rank_is_refused(saved):
    with pytest.raises(ValueError, match="has r=4, this model 8"):
        loader.load_adapter(load(presets.get("qwen2.5-1.5b"), lora_rank=8), saved)


def test_a_folder_that_is_no_adapter_of_ours(saved):
    model = load(presets.get("qwen2.5-1.5b"))
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        loader.load_adapter(model, saved.parent)
    (saved / "base.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no base\.json"):
        loader.load_adapter(model, saved)


def test_a_model_that_the_loader_did_not_make(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(presets.WORKSHOP)
    model = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"loader\.load did not make this model.*save_pretrained"):
        loader.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_model_without_adapter(saved, tmp_path):
    whole = load(presets.get("qwen2.5-1.5b"), quantization="none", lora_rank=0)
    with pytest.raises(ValueError, match=r"no adapter \(lora_rank=0\).*save_pretrained"):
        loader.save_adapter(whole, tmp_path / "x")
    model = loader.load_adapter(whole, saved)  # the same base in 16 bits: the adapter fits
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 28 and all(p.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_adapter_with_a_number_that_is_none_is_refused_before_its_base_is_read(saved, monkeypatch, number):
    file = saved / adapter.WEIGHTS
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = number
    save_file(tensors, file)
    wanted = rf"{re.escape(name)} in .*{adapter.WEIGHTS} holds NaN or infinity"
    with pytest.raises(ValueError, match=wanted):
        loader.load_adapter(load(presets.get("qwen2.5-1.5b")), saved)
    monkeypatch.setattr("nbhelpers.loader.hub.Source.weights", lambda self: pytest.fail("read the weights"))
    with pytest.raises(ValueError, match=wanted):
        load(saved)


def test_an_adapter_that_is_cut_short_is_named(saved):
    file = saved / adapter.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{adapter.WEIGHTS} is damaged .*copy the adapter once more"):
        load(saved)
