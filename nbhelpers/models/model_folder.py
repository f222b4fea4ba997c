"""A model's folder on the disk: what may be replaced by one, and its weights in files that a host can hold."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from nbhelpers import files

from . import adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

SHARD = 2e9  # bytes of a file of weights; the host holds one
_ENDINGS = (".json", ".safetensors", ".md", ".txt", ".jinja", ".model")  # of the files in a model's folder


def base_id(model: "PreTrainedModel | PeftModel") -> str:
    """The folder or the hub's name of what `model` was loaded from."""
    base = adapter.base_of(model)
    return base.id if base is not None else str(model.config.name_or_path)


def not_the_base(model: "PreTrainedModel | PeftModel", folder: str | Path) -> None:
    """ValueError if `folder` is the one that the model was loaded from: it would be lost."""
    base = Path(base_id(model))
    if (base / "config.json").exists() and base.resolve() == Path(folder).resolve():
        raise ValueError(f"{folder} is the base model itself: write to another folder")


def replaced(folder: str | Path, configs: tuple[str, ...]) -> AbstractContextManager[Path]:
    """`files.whole_folder`, after a look at what it would replace: only a model's folder is.

    Args:
        folder (`str` or `Path`): Where the model shall be.
        configs (`tuple[str, ...]`): What tells that a folder holds a model: one of these files.

    Raises FileExistsError for a folder that holds anything else.
    """
    folder = Path(folder)
    inside = sorted(folder.iterdir()) if folder.exists() else []
    if inside and not any((folder / name).exists() for name in configs):
        raise FileExistsError(f"{folder} is there and holds no model: it is left alone. Choose another folder")
    foreign = [path.name for path in inside if path.is_dir() or path.suffix not in _ENDINGS]
    if foreign:
        raise FileExistsError(
            f"{folder} would be replaced as a whole, and it holds {foreign[0]} beside a model: it is left alone. "
            "Choose another folder"
        )
    return files.whole_folder(folder)


def write_shards(folder: Path, nbytes: Mapping[str, int], read: Callable[[str], "dict[str, Tensor]"]) -> int:
    """Write safetensors files of about `SHARD` bytes or one parameter, and an index of several; the bytes in all.

    Args:
        folder (`Path`): Where to.
        nbytes (`Mapping[str, int]`): The parameters in their order, and the bytes of each.
        read (`Callable`): From a parameter's name to what is stored of it: contiguous tensors on the CPU, by name.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    size = 0
    for name, count in nbytes.items():
        if shards[-1] and size + count > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    total = 0
    file_of: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        shard: dict[str, Tensor] = {}
        for name in names:
            shard |= read(name)
        save_file(shard, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total
