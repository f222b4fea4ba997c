"""From a preset, a hub id or a folder to a checkpoint on this disk; what cannot be loaded is refused early.

The config comes first (kilobytes), so a model that needs remote code, a licence or a larger card is refused before its
weights are downloaded.
"""

import getpass
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from nbhelpers import files, host, hub_words, presets
from nbhelpers.models import smoke
from nbhelpers.presets import Preset
from nbhelpers.progress import interruptible

from . import gguf_source
from .gguf import is_gguf
from .shards import Shards
from .source import Source

_SMALL = ["*.json", "*.jinja", "*.model", "*.txt"]  # config, index, tokenizer
_HUB_ID = r"[\w.-]+/[\w.-]+"  # owner/model
_WEIGHTS = ["model*.safetensors"]  # not Mistral's consolidated.safetensors, not Llama's original/*.pth


@dataclass(frozen=True)
class HubSource(Source):
    """A checkpoint whose config and tokenizer are on this disk, and its tensors on the hub until they are read."""

    token: str | None = field(default=None, repr=False)  # nothing that is shown holds it

    def weights(self) -> Shards:
        """The tensors, downloaded first. Raises as `Shards`, and ConnectionError."""
        _download(self.id, _WEIGHTS, self.token)
        return super().weights()


@interruptible("the model was looked for", "what was downloaded is kept; run this again")
def find(what: Preset | str | Path, token: str | None = None) -> Source:
    """The checkpoint that a preset, a preset's name, a hub id or a folder means; its weights are not fetched yet.

    Raises ValueError (unknown name, remote code, unsupported quantisation, a garbled token), FileNotFoundError (no such
    folder, no config), PermissionError (a licence to accept, a token to pass or one that is refused) and
    ConnectionError (the hub is out of reach).
    """
    return locate(identify(what), token)


def identify(what: Preset | str | Path) -> Preset | str:
    """The preset that `what` is or names, else the text of the folder or hub id that it is. Nothing is downloaded.

    A text that is a preset's name means the preset even where a folder has that name: a Path means the folder.

    Raises ValueError for a name that could be none of these.
    """
    if isinstance(what, Preset):
        return what
    name = str(what)
    if is_gguf(Path(what).expanduser()):
        return name
    if Path(what).expanduser().is_dir() and (isinstance(what, Path) or name not in presets.names()):
        return name
    if _names_a_folder(name) or re.fullmatch(_HUB_ID, name):
        return name
    try:
        return presets.get(name)
    except ValueError as error:
        raise ValueError(f"{error}. Nor is it a folder here, nor a hub id (owner/model)") from None


def locate(model: Preset | str, token: str | None = None) -> Source:
    """The checkpoint of what `identify` returned. Raises as `find`."""
    token = hub_words.checked_token(token)
    if isinstance(model, str):
        source = _folder_or_hub(model, token)
    elif Path(model.hub_id).is_dir():  # the workshop model, in smoke too
        source = _local(Path(model.hub_id), model.name)
    elif model.smoke:
        source = _local(smoke.make(model.name, model.architecture), model.name)
    else:
        source = _folder_or_hub(model.hub_id, token)
    _check_code(source)
    source.prequantized()
    return source


def _folder_or_hub(name: str, token: str | None) -> Source:
    folder = Path(name).expanduser()
    if is_gguf(folder):
        return gguf_source.find(folder, name)
    if folder.is_dir():
        return _local(folder, name)
    if _names_a_folder(name):
        raise FileNotFoundError(f"there is no folder {name}")
    folder = Path(_download(name, _SMALL, token))
    return HubSource(name, folder, _config(folder), token)


def _names_a_folder(name: str) -> bool:
    """Whether it is written as a path; a relative one without a dot looks like a hub id."""
    return Path(name).expanduser().is_absolute() or name.startswith((".", "~"))


def _local(folder: Path, name: str) -> Source:
    return Source(name, folder, _config(folder))


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a model folder: point at the one that has")
    return files.read_json(file)


def _check_code(source: Source) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = source.config.get("model_type")
    if kind in CONFIG_MAPPING_NAMES:  # an auto_map beside it (old Phi-3 files) is not needed and not run
        return
    if "auto_map" in source.config:
        raise ValueError(
            f"{source.id} needs code from its own repository (auto_map in its config): refused, nothing downloaded is "
            f"ever run here. Take a model whose code is in transformers, such as one of {', '.join(presets.names())}"
        )
    raise ValueError(f"the installed transformers does not know model_type {kind!r} of {source.id}: pip install -U it")


def _download(name: str, patterns: list[str], token: str | None) -> str:
    """The folder of the hub's snapshot with the files of these patterns in it."""
    import huggingface_hub
    from huggingface_hub import errors

    in_use = hub_words.token_in_use(token)
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns, token=token)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's: full, read-only
            raise
        raise hub_words.refusal(
            "model", name, error, has_token=in_use is not None,
            pass_token='pass loader.load(..., token="hf_..."), or set HF_TOKEN (on Colab and Kaggle: a secret of that '
            f"name). Presets: {', '.join(presets.names())}",
            copy='pass the folder of a copy: loader.load("path/to/model")',
        ) from None  # fmt: skip


# ---- gated models ----


@interruptible("a token was asked for", "none is known; run this cell again")
def login(preset: Preset, *, to_push: bool = False) -> None:
    """Make the reader's token known to this process (HF_TOKEN) if the preset's model is gated, or something is to be
    pushed; else nothing happens.

    The token comes from the first that has one: Colab's secrets, Kaggle's secrets (both under the name HF_TOKEN), the
    environment or an earlier `hf auth login`, a hidden prompt where somebody can type. It is neither returned nor
    printed. Without one, what to do is printed; a copy that was downloaded before still loads.
    """
    if not to_push and (not preset.gated or Path(preset.hub_id).is_dir()):
        return
    for place, token in _tokens():
        if token and token.strip():
            os.environ["HF_TOKEN"] = token.strip()  # where huggingface_hub looks
            print(f"{'to push' if to_push else f'{preset.hub_id} is gated'}: your token comes from {place}")
            return
    if to_push:
        print("no token found: export.push says where to make one")
        return
    pass_token = 'loader.load(preset, token="hf_..."), or set HF_TOKEN (on Colab and Kaggle: a secret of that name)'
    print(f"no token found. {hub_words.licence(preset.hub_id, pass_token)}")


def _tokens() -> Iterator[tuple[str, str | None]]:
    """(where, token or None), one place after the other; what a place says when it refuses is not shown."""
    place = host.where()
    if place == "Colab":
        yield "Colab's secrets", _quietly(lambda: import_module("google.colab.userdata").get("HF_TOKEN"))
    if place == "Kaggle":
        yield (
            "Kaggle's secrets",
            _quietly(lambda: import_module("kaggle_secrets").UserSecretsClient().get_secret("HF_TOKEN")),
        )
    import huggingface_hub

    yield "HF_TOKEN or an earlier login", _quietly(huggingface_hub.get_token)
    if "ipykernel" in sys.modules or sys.stdin.isatty():  # headless kernels refuse to ask: NotImplementedError
        yield "the prompt", _quietly(lambda: getpass.getpass("token of huggingface.co (hidden; Enter: none): "))


def _quietly(ask: Callable[[], str | None]) -> str | None:
    """None where asking fails: no such secret, no access, nobody to type. The traceback could show a token."""
    try:
        return ask()
    except Exception:
        return None
