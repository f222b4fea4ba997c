"""A packed base comes back from its folder bit for bit, and transformers reads the folder too."""

import re
import warnings

import pytest
import torch
from export_cases import logits
from gguf_cases import load, the_same
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbhelpers import loader
from nbhelpers.models import adapter, quantize


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
    monkeypatch.setattr("nbhelpers.models.model_folder.SHARD", 5_000)
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
