"""`load(budget_gb=)`: layers that do not fit wait on the host, and the model is the one that it would have been."""

from types import SimpleNamespace

import pytest
import torch
from loader_cases import load

from nbhelpers import host, loader, presets
from nbhelpers.loader import base_model
from nbhelpers.models import swap


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_loaded_model_is_the_same_and_is_kept_as_it_is(quantization, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    preset, planned = presets.get("llama-3.1-8b"), base_model.layers_to_swap
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = load(preset, quantization)(ids).logits
        monkeypatch.setattr(base_model, "layers_to_swap", lambda request, source: 2)
        model, tokenizer = loader.load(preset, quantization=quantization, budget_gb=6, progress=False)
        assert "2 of 2 layers wait in host memory" in capsys.readouterr().out
        assert swap.of(model).count == 2 and torch.equal(model(ids).logits, wanted)
        if quantization == "nf4":
            loader.keep(model, tokenizer, tmp_path / "kept")
            monkeypatch.setattr(base_model, "layers_to_swap", planned)
            assert torch.equal(load(tmp_path / "kept")(ids).logits, wanted)


def test_as_many_layers_wait_as_the_plan_says(monkeypatch):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)

    def asked(budget_gb, preset="llama-3.1-8b", **changes):
        request = {"budget_gb": budget_gb, "model": presets.get(preset), "quantization": "nf4", "lora_rank": 16}
        return base_model.layers_to_swap(SimpleNamespace(**request | {"choice": None} | changes), source)

    source = SimpleNamespace(id="some/model", config=presets.get("llama-3.1-8b").architecture.config())
    assert asked(None) == asked(24) == 0
    assert 2 < asked(6) < asked(5) <= 32
    assert asked(5, model="some/model") > 2  # not a preset: by its config
    # every weight in bf16 takes half of what it takes in fp32, and cannot wait
    whole = {"preset": "qwen2.5-1.5b", "quantization": "none", "lora_rank": 0}
    assert asked(12, **whole, weight_dtype=torch.bfloat16) == 0
    with pytest.raises(host.CannotRun, match="budget_gb=12 is too little"):
        asked(12, **whole, weight_dtype=torch.float32)
    with pytest.raises(host.CannotRun, match=r"budget_gb=2 is too little for some/model, even with its layers in host"):
        asked(2)
    with pytest.raises(ValueError, match='take quantization="nf4"'):
        asked(5, quantization="dynamic")
    assert asked(5, quantization="dynamic", choice=object()) > 2
