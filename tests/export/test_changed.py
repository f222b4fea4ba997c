"""What was changed in memory is what is written: norms trained along, new words, merged matrices; or it is refused."""

import pytest
import torch
from export_cases import load, logits, rounded, trained

from nbhelpers import export, loader
from nbhelpers.export import merge
from nbhelpers.models import quantize


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_norms_trained_along_and_new_words_are_written(base, tmp_path, quantization):
    model, tokenizer = trained(base("llama"), quantization=quantization)
    inner = model.get_base_model()
    inner.resize_token_embeddings(inner.config.vocab_size + 8, mean_resizing=False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data *= 1.7
    export.merged(model, tokenizer, tmp_path / "merged")
    found = dict(load(tmp_path / "merged").named_parameters())
    for name, parameter in inner.named_parameters():
        if name.endswith("norm.weight") or name in ("model.embed_tokens.weight", "lm_head.weight"):
            torch.testing.assert_close(found[name], parameter.bfloat16().float(), atol=0, rtol=0)
    export.gguf(model, tokenizer, tmp_path / "a.gguf", "f16")
    assert torch.isfinite(logits(load(tmp_path, gguf_file="a.gguf"))).all()
    if quantization == "none":
        wanted = logits(rounded(model, torch.bfloat16))
        torch.testing.assert_close(logits(load(tmp_path / "merged")), wanted, atol=1e-5, rtol=1e-5)


def test_an_adapter_merged_into_4_bits_by_peft_is_not_lost(base, tmp_path, capsys):
    model, tokenizer = trained(base("llama"), quantization="nf4")
    whole = model.merge_and_unload()
    with pytest.raises(ValueError, match="in 4 bits and has no adapter"):
        export.save(whole, tokenizer, tmp_path / "out")
    export.merged(whole, tokenizer, tmp_path / "merged")
    assert "are the model's own, changed in memory" in capsys.readouterr().out
    found = dict(load(tmp_path / "merged").named_parameters())
    packed = {name: p for name, p in whole.named_parameters() if "quant_state" in vars(p)}
    assert len(packed) == 14
    for name, parameter in packed.items():
        assert torch.equal(found[name], quantize.unpack(parameter).bfloat16().float())


def test_an_unchanged_base_is_still_its_original(base, tmp_path):
    model, _ = trained(base("qwen2"), quantization="nf4")
    tensors = merge.Merged(model)
    for name in tensors.shapes:
        tensors.read(name)
    assert tensors.changed == [] and "original weights" in tensors.source


def test_a_disabled_adapter_is_not_merged(base):
    model, _ = trained(base("llama"))
    with model.disable_adapter(), pytest.raises(ValueError, match=r"disabled: model\.base_model\.enable_adapter"):
        merge.Merged(model)


def test_shapes_that_the_config_does_not_know_are_refused(base):
    model, _ = trained(base("llama"))
    model.config.vocab_size += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight has the shape .* its config asks for"):
        merge.Merged(model)


def test_a_temperature_without_do_sample_can_be_written(base, tmp_path):
    folder = base("llama")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    model, tokenizer = loader.load(folder, quantization="none", lora_rank=0, progress=False)
    export.save(model, tokenizer, tmp_path / "whole")
    export.merged(model, tokenizer, tmp_path / "merged")


@pytest.mark.parametrize("name, changes, why", [
    ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "rotates whole heads"),
])  # fmt: skip
def test_what_llama_cpp_computes_in_another_way_is_no_gguf(base, tmp_path, tokenizer, name, changes, why):
    model, _ = trained(base(name))
    model.config.update(changes)
    with pytest.raises(ValueError, match=why):
        export.gguf(model, tokenizer, tmp_path / "a.gguf")


def test_words_that_the_model_does_not_have_are_no_gguf(base, tmp_path, tokenizer):
    import copy

    model, _ = trained(base("qwen2"))
    more = copy.deepcopy(tokenizer)
    more.add_tokens([f"<word{i}>" for i in range(60)])
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        export.gguf(model, more, tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="give the file another name"):
        export.gguf(model, tokenizer, tmp_path / "my-phi-3.gguf")
