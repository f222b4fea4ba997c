"""Everything that cannot be loaded is refused early, each with one clear message."""

import io
import json
import os
import sys
import traceback
import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from nbhelpers import host, presets
from nbhelpers.loader import hub

QWEN = {"model_type": "qwen2", "hidden_size": 64}
SECRET = "hf_secret"


@pytest.fixture
def folder(tmp_path):
    def make(config: dict | None = None, **files: str):
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)
        return tmp_path

    return make


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"no preset 'lama'.*Nor is it a folder here, nor a hub id"):
        hub.find("lama")


def test_a_folder_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"there is no folder \./nowhere"):
        hub.find("./nowhere")


def test_a_folder_without_config(folder):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        hub.find(folder())


def test_a_folder_without_weights(folder):
    with pytest.raises(FileNotFoundError, match=r"no weights: model\.safetensors is missing"):
        hub.find(folder(QWEN)).weights()


def test_pickles_are_refused(folder):
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\).*refused.*safetensors"):
        hub.find(folder(QWEN, pytorch_model__bin="")).weights()


def test_remote_code_is_refused(folder):
    with pytest.raises(ValueError, match=r"needs code from its own repository.*refused"):
        hub.find(folder({"model_type": "brand_new", "auto_map": {"AutoModelForCausalLM": "modeling.X"}}))
    hub.find(folder(QWEN | {"auto_map": {"AutoModelForCausalLM": "modeling.X"}}))  # known here: not needed, not run


def test_an_architecture_that_transformers_does_not_know(folder):
    with pytest.raises(ValueError, match="does not know model_type 'brand_new'"):
        hub.find(folder({"model_type": "brand_new"}))


@pytest.mark.parametrize(
    ("config", "said"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "8 bits")],
)
def test_other_quantisations_are_refused(folder, config, said):
    with pytest.raises(ValueError, match=f"quantised with .*{said}.*take the original model"):
        hub.find(folder(QWEN | {"quantization_config": config}))


@pytest.mark.parametrize(
    ("raised", "error", "said"),
    [
        (errors.GatedRepoError, PermissionError, r"https://huggingface.co/meta-llama/X.*token=\"hf_\.\.\.\".*HF_TOKEN"),
        (errors.RepositoryNotFoundError, ValueError, r"no model 'meta-llama/X', or it is private.*token="),
        (errors.LocalEntryNotFoundError, ConnectionError, r"out of reach.*Settings > Internet"),
        (errors.OfflineModeIsEnabled, ConnectionError, "out of reach"),
    ],
)
def test_what_the_hub_may_say(monkeypatch, raised, error, said):
    def refuse(*args, **kwargs):
        raise raised.__new__(raised)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(error, match=said):
        hub.find("meta-llama/X")


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_the_hub_refuses(monkeypatch, status):
    def refuse(*args, **kwargs):
        raise errors.HfHubHTTPError(
            "Invalid credentials", response=types.SimpleNamespace(status_code=status, headers={}, request=None)
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(PermissionError, match=rf"refuses your token \({status}\).*settings/tokens"):
        hub.find("meta-llama/X", token=SECRET)


@pytest.mark.parametrize("pasted", [f"{SECRET}\nx", f"{SECRET} x", f"{SECRET}é"])
def test_a_token_pasted_with_something_else_is_refused_and_not_shown(pasted):
    with pytest.raises(ValueError, match="copy it once more") as caught:
        hub.find("meta-llama/X", token=pasted)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_white_space_around_a_token_is_no_part_of_it(monkeypatch, folder):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, token, **__: asked.append(token) or folder(QWEN)
    )
    assert hub.find("meta-llama/X", token=f" {SECRET}\n").token == SECRET
    assert asked == [SECRET]


def test_the_config_comes_before_the_weights(monkeypatch, folder):
    asked = []

    def download(name, allow_patterns, token):
        asked.append((name, tuple(allow_patterns), token))
        return str(folder(QWEN))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    source = hub.find(presets.get("qwen2.5-1.5b"), token="hf_x")
    assert "hf_x" not in repr(source)
    assert source.id == "Qwen/Qwen2.5-1.5B-Instruct" and source.config == QWEN
    assert len(asked) == 1 and not any("safetensors" in pattern for pattern in asked[0][1])
    with pytest.raises(FileNotFoundError, match="no weights"):
        source.weights()
    assert asked[1] == ("Qwen/Qwen2.5-1.5B-Instruct", ("model*.safetensors",), "hf_x")


def test_the_hash_is_of_the_shapes(folder):
    first = hub.find(folder(QWEN)).config_hash()
    assert hub.find(folder(QWEN | {"transformers_version": "9", "use_cache": False})).config_hash() == first
    assert hub.find(folder(QWEN | {"hidden_size": 65})).config_hash() != first


# ---- gated models ----


def fail(*_):
    raise RuntimeError(f"no access to {SECRET}")


@pytest.fixture
def places(monkeypatch):
    """Sets where a token can be found; asked[...] counts who was asked."""
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "")
    asked = []

    def make(where="local", colab=fail, kaggle=fail, saved=None, typed=None):
        def says(name, value):
            def answer(*_):
                asked.append(name)
                return value(name) if callable(value) else value

            return answer

        client = types.SimpleNamespace(get_secret=says("kaggle", kaggle))
        modules = {
            "google.colab": types.ModuleType("google.colab"),
            "google.colab.userdata": types.SimpleNamespace(get=says("colab", colab)),
            "kaggle_secrets": types.SimpleNamespace(UserSecretsClient=lambda: client),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(host, "where", lambda: where)
        monkeypatch.setattr(huggingface_hub, "get_token", says("environment", saved))
        monkeypatch.setattr(hub.getpass, "getpass", says("prompt", typed))
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
        return asked

    return make


@pytest.mark.parametrize(
    ("given", "order", "said"),
    [
        ({"where": "Colab", "colab": SECRET, "saved": "no"}, ["colab"], "Colab's secrets"),
        ({"where": "Kaggle", "kaggle": SECRET, "saved": "no"}, ["kaggle"], "Kaggle's secrets"),
        (
            {"where": "Colab", "saved": f" {SECRET}\n", "typed": "no"},
            ["colab", "environment"],
            "HF_TOKEN or an earlier",
        ),
        ({"where": "local", "colab": "no", "kaggle": "no", "typed": SECRET}, ["environment", "prompt"], "the prompt"),
    ],
)
def test_the_first_place_with_a_token_gives_it(places, capsys, given, order, said):
    asked = places(**given)
    assert hub.login(presets.get("llama-3.1-8b")) is None
    assert asked == order and os.environ["HF_TOKEN"] == SECRET
    out = "".join(capsys.readouterr())
    assert said in out and "hf_" not in out


@pytest.mark.parametrize("typed", ["", fail])  # Enter, or a kernel that cannot ask
def test_without_a_token_it_says_where_to_get_access(places, capsys, typed):
    places("Kaggle", typed=typed)
    hub.login(presets.get("llama-3.1-8b"))
    out = "".join(capsys.readouterr())
    assert "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct" in out and "settings/tokens" in out
    assert SECRET not in out and not os.environ["HF_TOKEN"]


def test_a_script_that_nobody_watches_is_not_asked(places, monkeypatch):
    asked = places()
    monkeypatch.delitem(sys.modules, "ipykernel")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    hub.login(presets.get("llama-3.1-8b"))
    assert asked == ["environment"]


def test_an_open_model_asks_for_nothing(places, capsys, monkeypatch):
    asked = places("Colab", colab=SECRET, typed=SECRET)
    hub.login(presets.get("qwen2.5-1.5b"))
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    hub.login(presets.get("llama-3.1-8b"))
    assert asked == [] and not capsys.readouterr().out


def test_to_push_an_open_model_asks_too(places, capsys):
    asked = places("Kaggle", kaggle=SECRET, saved="no")
    hub.login(presets.get("qwen2.5-1.5b"), to_push=True)
    assert asked == ["kaggle"] and os.environ["HF_TOKEN"] == SECRET
    assert capsys.readouterr().out == "to push: your token comes from Kaggle's secrets\n"
    places("Kaggle", typed="")
    hub.login(presets.get("qwen2.5-1.5b"), to_push=True)
    assert capsys.readouterr().out == "no token found: export.push says where to make one\n"
