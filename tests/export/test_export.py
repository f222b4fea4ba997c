"""What is taken away is what was trained: the merged model's logits and the GGUF file's, as transformers reads them."""

import json
from types import SimpleNamespace

import pytest
import torch
from engine_models import ARCHITECTURES
from export_cases import IDS, load, logits, rounded, trained
from safetensors import safe_open

from nbhelpers import export, loader
from nbhelpers.export import merge
from nbhelpers.models import lineage, model_folder, quantize

# ---- adapter ----


def test_a_saved_adapter_comes_back_with_its_tokenizer_and_names_no_folder(base, tmp_path, monkeypatch):
    folder = base("qwen2")
    model, tokenizer = trained(folder, quantization="nf4")
    out = tmp_path / "out" / "my-reasoner"
    assert export.save(model, tokenizer, out) == out
    assert export.save(model, tokenizer, out) == out  # the cell that is run again
    again, its = loader.load(out, dtype=torch.float32, progress=False)
    assert torch.equal(logits(model), logits(again)) and its.get_vocab() == tokenizer.get_vocab()
    card = (out / "README.md").read_text()
    assert "base-qwen2" in card and str(tmp_path) not in card and 'loader.load("my-reasoner")' in card
    assert [path.name for path in out.parent.iterdir()] == ["my-reasoner"]

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(export.adapter, "save_adapter", full)  # and what was there stays
    with pytest.raises(OSError, match="disk is full"):
        export.save(model, tokenizer, out)
    assert (out / "base.json").exists() and [path.name for path in out.parent.iterdir()] == ["my-reasoner"]


def test_the_card_names_the_methods_that_trained_it(base, tmp_path):
    model, tokenizer = trained(base("qwen2"))
    assert "trained by nbhelpers" in (export.save(model, tokenizer, tmp_path / "new") / "README.md").read_text()
    for method in ("SFT", "RLOO", "RLOO"):
        lineage.note(model, method)  # as a trainer does after each update
    saved = export.save(model, tokenizer, tmp_path / "adapter")
    again, _ = loader.load(saved, dtype=torch.float32, progress=False)  # another session
    for folder in (saved, export.merged(again, tokenizer, tmp_path / "merged")):
        card = (folder / "README.md").read_text()
        assert "trained with SFT (supervised fine-tuning), then RLOO (" in card and "GRPO" not in card
        assert "- sft\n- rloo\n" in card
    known = json.loads((saved / "base.json").read_text())
    del known["methods"]  # of an earlier version
    (saved / "base.json").write_text(json.dumps(known))
    assert lineage.methods(loader.load(saved, dtype=torch.float32, progress=False)[0]) == []


def test_a_checkpoint_of_all_weights_names_its_method(base, tmp_path):
    folder = base("qwen2")
    (folder / "manifest.json").write_text(json.dumps({"run": {"fixed": {"method": "Online DPO"}}}))
    model, tokenizer = loader.load(folder, quantization="none", lora_rank=0, dtype=torch.float32, progress=False)
    assert "with Online DPO (" in (export.save(model, tokenizer, tmp_path / "out") / "README.md").read_text()


def test_of_several_processes_the_first_one_writes(base, tmp_path, monkeypatch):
    model, tokenizer = trained(base("llama"))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "1")
    for write in (export.save, export.merged, export.gguf):
        assert write(model, tokenizer, tmp_path / "out") == tmp_path / "out"
    assert export.push(tmp_path / "out", "me/mine").endswith("/me/mine")
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setenv("RANK", "0")
    assert (export.save(model, tokenizer, tmp_path / "out") / "adapter_config.json").exists()


def test_somebody_elses_folder_is_left_alone(base, tmp_path):
    model, tokenizer = trained(base("llama"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    for write in (export.save, export.merged):
        with pytest.raises(FileExistsError, match="holds no model"):
            write(model, tokenizer, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.png").exists()


def test_a_runs_folder_and_the_base_itself_are_left_alone(base, tmp_path):
    """Both hold a model, so they look like an earlier export."""
    folder = base("llama")
    model, tokenizer = trained(folder)
    before = sorted(path.name for path in folder.iterdir())
    for write in (export.save, export.merged):
        with pytest.raises(ValueError, match="is the base model itself"):
            write(model, tokenizer, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    run = export.save(model, tokenizer, tmp_path / "run")  # as the trainer does after an interrupt
    (run / "checkpoint-20").mkdir()
    for write in (export.save, export.merged):
        with pytest.raises(FileExistsError, match="it holds checkpoint-20 beside a model"):
            write(model, tokenizer, run)
    (run / "checkpoint-20").rename(run / "notes.csv")
    with pytest.raises(FileExistsError, match=r"it holds notes\.csv beside"):
        export.save(model, tokenizer, run)


def test_a_model_without_an_adapter_is_saved_whole(tokenizer, tmp_path):
    model, _ = loader.load("workshop", progress=False)
    export.save(model, tokenizer, tmp_path / "whole")
    export.merged(model, tokenizer, tmp_path / "half", dtype="float16")
    ids = IDS % model.config.vocab_size
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        assert torch.equal(load(tmp_path / "whole")(input_ids=ids).logits, wanted)
        torch.testing.assert_close(load(tmp_path / "half")(input_ids=ids).logits, wanted, atol=0.1, rtol=0.02)
    with pytest.raises(ValueError, match="'int8'"):
        export.merged(model, tokenizer, tmp_path / "half", dtype="int8")


# ---- merged ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merged_model_is_pefts(base, tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr(model_folder, "SHARD", 60_000)  # several files
    model, tokenizer = trained(base(name))
    before = logits(model)
    export.merged(model, tokenizer, tmp_path / "merged")
    found = load(tmp_path / "merged")
    torch.testing.assert_close(logits(found), logits(rounded(model, torch.bfloat16)), atol=1e-5, rtol=1e-5)
    assert (logits(found) - before).abs().max() < 0.2 * before.abs().max()
    assert torch.equal(before, logits(model))  # the model in memory is as it was
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == [type(found).__name__]
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    with safe_open(files[0], "pt") as shard:
        assert all(shard.get_tensor(key).dtype == torch.bfloat16 for key in shard.keys())  # noqa: SIM118
    assert "merged into the model's own weights" in capsys.readouterr().out


def test_a_4_bit_model_is_merged_into_its_original_weights(base, tmp_path, capsys):
    folder = base("llama")
    model, tokenizer = trained(folder, quantization="nf4")
    exact, _ = trained(folder)  # the same LoRA (seeded) on the 16-bit base
    for (_, one), (_, two) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        if one.requires_grad:
            two.data.copy_(one.data)
    export.merged(model, tokenizer, tmp_path / "merged")
    assert "merged into the original weights of" in capsys.readouterr().out
    wanted = logits(rounded(exact, torch.bfloat16))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="is the base model itself"):
        export.merged(model, tokenizer, folder)

    weight = folder / "model.safetensors"  # another model has taken its place
    weight.write_bytes(weight.read_bytes()[:-4000] + bytes(4000))
    assert "has changed since it was loaded" in merge.Merged(model).source
    folder.rename(tmp_path / "moved")
    export.merged(model, tokenizer, tmp_path / "merged")
    assert "the 4-bit weights, with their rounding, for" in capsys.readouterr().out
    module = model.get_base_model().model.layers[0].mlp.up_proj
    delta = module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
    found = load(tmp_path / "merged").model.layers[0].mlp.up_proj.weight
    assert torch.equal(found, (quantize.unpack(module.base_layer.weight).float() + delta).bfloat16().float())


def test_what_is_more_than_lora_is_refused(base):
    model, _ = trained(base("qwen2"))
    model.peft_config["default"].use_dora = True
    with pytest.raises(ValueError, match="not plain LoRA"):
        merge.Merged(model)


@pytest.mark.parametrize("name, targets, lost", [
    ("llama", ["q_proj", "embed_tokens"], "embed_tokens.lora_embedding"), ("qwen2", ["q_proj", "lm_head"], "lm_head."),
])  # fmt: skip
def test_what_would_be_lost_is_refused(base, name, targets, lost):
    """A LoRA on the embedding, or on a head whose weight is the embedding: no matrix here takes it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(base(name)), LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ValueError, match=f"{lost}.* cannot be merged here"):
        merge.Merged(model)


def test_an_adapter_that_is_merged_already_is_not_added_twice(base):
    model, _ = trained(base("llama"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"model\.unmerge_adapter\(\) first"):
        merge.Merged(model)
    model.unmerge_adapter()
    assert merge.Merged(model).shapes


def test_a_number_too_large_for_fp16_is_refused_and_nothing_is_written(base, tmp_path):
    model, tokenizer = trained(base("llama"))
    model.get_base_model().model.norm.weight.data[0] = 1e6
    with pytest.raises(ValueError, match=r"model\.norm\.weight does not fit into float16"):
        export.merged(model, tokenizer, tmp_path / "half", dtype="float16")
    assert not list(tmp_path.glob("*half*"))


# ---- the hub ----


def test_push_makes_a_private_repository_and_says_no_token(tmp_path, monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    calls, status = [], None

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            if status:
                response = SimpleNamespace(status_code=status, headers={}, request=None)
                raise HfHubHTTPError("no", response=response, server_message="bad name\nof hf_secret")
            calls.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(FileNotFoundError, match=r"not a folder that export\.save"):
        export.push(tmp_path, "x")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "me/mine" in export.push(tmp_path, "mine", token="hf_secret")
    assert calls == ["hf_secret", ("mine", True, True), ("me/mine", str(tmp_path))]
    for status in (401, 403):  # noqa: B007
        with pytest.raises(PermissionError, match="write access") as caught:
            export.push(tmp_path, "mine", token="hf_secret")
        assert "hf_secret" not in str(caught.value)
    for status, kind, words in (  # noqa: B007
        (404, ValueError, "no place 'mine' for this token \\(404\\)"),
        (400, ValueError, r"does not take this upload to mine \(400\): bad name of \.\.\.$"),
        (500, ConnectionError, "the hub answered 500 instead of mine"),
        (429, ConnectionError, "try again in some minutes, or push later"),
    ):
        with pytest.raises(kind, match=words) as caught:
            export.push(tmp_path, "mine", token="hf_secret")
        assert "hf_secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert "hf_secret" not in capsys.readouterr().out
