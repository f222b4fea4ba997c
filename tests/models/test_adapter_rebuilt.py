"""A saved adapter comes back as what it was, with its words and its template, or it is refused."""

import copy

import peft
import pytest
import torch
from export_cases import logits
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from nbhelpers import export, loader, presets
from nbhelpers.models import adapter, smoke

R = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "rslora": LoraConfig(**R, use_rslora=True),
    "dora": LoraConfig(**R, use_dora=True),
    "patterns": LoraConfig(**R, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 64}),
    "biases": LoraConfig(**R, lora_bias=True, bias="all"),
    "modules": LoraConfig(**R, modules_to_save=["norm", "embed_tokens"]),
    "regex": LoraConfig(**{**R, "target_modules": r".*\.(q_proj|up_proj)"}),
    "olora": LoraConfig(**R, init_lora_weights="olora"),
    "pissa": LoraConfig(**R, init_lora_weights="pissa"),
    "tokens": LoraConfig(**R, trainable_token_indices=[5, 9]),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
                          feedforward_modules=["down_proj"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_SMOKE", "1")  # the preset's shapes in small
        preset = presets.get("qwen2.5-1.5b")
    return smoke.write(preset.architecture, tmp_path_factory.mktemp("rebuilt") / "base", seed=7)


def learned(folder, config, adapter_name="default", grown=0):
    """A model with that adapter, whose every number has moved; its tokenizer."""
    torch.set_num_threads(1)
    model, tokenizer = loader.load(folder, quantization="none", lora_rank=0, progress=False)
    if grown:
        model.resize_token_embeddings(adapter.rows_of(model) + grown, mean_resizing=False)
    config = copy.deepcopy(config)  # peft writes into it
    model = get_peft_model(model.requires_grad_(False), config, adapter_name=adapter_name)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0
    return model.eval(), tokenizer


def trained(model):
    return sorted((name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_as_what_it_was(folder, tmp_path, kind):
    model, tokenizer = learned(folder, KINDS[kind])
    export.save(model, tokenizer, tmp_path / "out")
    back, _ = loader.load(tmp_path / "out", progress=False)
    torch.testing.assert_close(logits(back), logits(model), atol=1e-3, rtol=1e-4)
    assert trained(back) == trained(model)


def test_under_another_name_and_with_its_tokenizer_and_template(folder, tmp_path):
    model, tokenizer = learned(folder, KINDS["rslora"], adapter_name="mine")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "ASSISTANT")
    tokenizer.add_tokens(["<think>"])
    export.save(model, tokenizer, tmp_path / "out")
    back, its = loader.load(tmp_path / "out", progress=False, lora_dropout=0.25)
    torch.testing.assert_close(logits(back), logits(model))
    assert its.chat_template == tokenizer.chat_template and its.get_vocab() == tokenizer.get_vocab()
    assert back.peft_config["default"].lora_dropout == 0.25
    with pytest.raises(ValueError, match=r"has r=4 of its own, and here it is 8"):
        loader.load(tmp_path / "out", lora_rank=8)


def test_new_words_come_back_where_the_adapter_has_them(folder, tmp_path):
    whole = LoraConfig(**R, modules_to_save=["embed_tokens", "lm_head"])
    model, tokenizer = learned(folder, whole, grown=5)
    export.save(model, tokenizer, tmp_path / "out")
    back, _ = loader.load(tmp_path / "out", progress=False)
    assert adapter.rows_of(back) == adapter.rows_of(model)
    torch.testing.assert_close(logits(back), logits(model))
    model, tokenizer = learned(folder, LoraConfig(**R), grown=5)
    with pytest.raises(ValueError, match="the new ones are not part of the adapter"):
        export.save(model, tokenizer, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


@pytest.mark.parametrize("config, why", [
    (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "is PROMPT_TUNING"),
    (LoraConfig(**R, init_lora_weights="pissa_niter_2"), "init_lora_weights='pissa_niter_2'"),
])  # fmt: skip
def test_what_peft_could_not_build_again_is_refused_when_it_is_saved(folder, tmp_path, config, why):
    model, tokenizer = learned(folder, config)
    with pytest.raises(ValueError, match=why):
        export.save(model, tokenizer, tmp_path / "out")


def test_what_is_trained_beside_the_adapter_is_refused_and_merged(folder, tmp_path):
    model, tokenizer = learned(folder, LoraConfig(**R))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: export\.merged"):
        export.save(model, tokenizer, tmp_path / "out")
    assert adapter.beside(model).keys() == {"base_model.model.model.norm.weight"}


@pytest.mark.parametrize("kind, field", [("rslora", "use_rslora"), ("dora", "use_dora"), ("ia3", "peft_type"),
                                         ("patterns", "alpha_pattern"), ("modules", "modules_to_save")])  # fmt: skip
def test_numbers_go_only_into_an_adapter_of_the_same_kind(folder, tmp_path, kind, field):
    model, _ = learned(folder, KINDS[kind])
    loader.save_adapter(model, tmp_path / "out")
    plain, _ = learned(folder, LoraConfig(**R))
    with pytest.raises(ValueError, match=f"has {field}="):
        loader.load_adapter(plain, tmp_path / "out")
    same, _ = learned(folder, KINDS[kind])
    for parameter in same.parameters():
        parameter.data += 0.1 if parameter.requires_grad else 0.0
    torch.testing.assert_close(logits(loader.load_adapter(same, tmp_path / "out")), logits(model))


def test_one_name_or_all_linear_as_targets(folder):
    for targets, count in (("q_proj", 1), ("all-linear", 7)):
        model, _ = loader.load(folder, quantization="none", lora_rank=2, lora_targets=targets, progress=False)
        assert len(model.peft_config["default"].target_modules) == count


def test_no_reference_adapter_is_saved_and_the_cell_runs_again(folder, tmp_path):
    """TRL copies the trained adapter as "ref" for the KL term; a checkpoint keeps its numbers to resume exactly."""
    from step_cases import ROWS, length_reward

    from nbhelpers.training import trainer

    model, tokenizer = loader.load(folder, quantization="none", lora_rank=2, progress=False)
    args = trainer.LeanGRPOConfig(
        str(tmp_path / "run"), beta=0.1, max_steps=1, save_steps=1, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=4, disable_tqdm=True,
    )  # fmt: skip
    for _ in (1, 2):
        one = trainer.LeanGRPOTrainer(model, length_reward, args, train_dataset=ROWS, processing_class=tokenizer)
        one.train()
        one.save_model()
        export.save(model, tokenizer, tmp_path / "out")
    assert not list(tmp_path.rglob("ref"))
    kept = load_file(tmp_path / "run" / "checkpoint-1" / "beside.safetensors")
    assert kept and all(".ref." in name for name in kept)
    for name in kept:
        model.get_parameter(name).data.add_(1.0)
    one._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in kept.items())
