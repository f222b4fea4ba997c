"""What was learned, to take away: the adapter, a merged 16-bit model, a GGUF file, a repository on the hub.

    export.save(model, tokenizer, "my-reasoner")               # megabytes; loader.load("my-reasoner") brings it back
    export.merged(model, tokenizer, "my-reasoner-16bit")       # for transformers, vLLM
    export.gguf(model, tokenizer, "my-reasoner.gguf")          # for llama.cpp, Ollama, LM Studio
    export.push("my-reasoner", "me/my-reasoner")

Each of them is written beside its place and renamed into it, so it is complete or not there. Of several processes that
train together (torchrun) the first one writes, and the others go on at once.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbhelpers import files, host
from nbhelpers.architecture import GB
from nbhelpers.models import adapter

from .merge import Folder, Merged

SHARD = 2e9  # bytes of a file of merged weights; the host holds one
CARD = """---
library_name: {library}
tags:
- grpo
- reasoning
---

# {name}

{what} {base}, trained with GRPO (Group Relative Policy Optimization, Shao et al. 2024, arXiv:2402.03300) by nbhelpers,
TRL and PEFT.

```python
{use}
```
"""


def save(model, tokenizer, folder: str | Path) -> Path:
    """Write the adapter, or all weights of a model without one, with the tokenizer and a short README; the folder.

    `loader.load(folder)` loads it onto its base. FileExistsError if `folder` holds something beside a model, the
    checkpoints of a run for instance; ValueError if an adapter would take the place of its own base.
    """
    if not host.is_first_process():
        return Path(folder)
    if adapter.loras(model):
        _not_the_base(model, folder)
    with _whole(folder) as new:
        if adapter.loras(model):
            adapter.save_adapter(model, new)
            use = f'from nbhelpers import loader\n\nmodel, tokenizer = loader.load("{Path(folder).name}")'
            _card(new, model, Path(folder).name, "A LoRA adapter for", "peft", use)
        else:
            model.save_pretrained(new)
            _card(new, model, Path(folder).name, "All weights of", "transformers", _load_line(folder))
        tokenizer.save_pretrained(new)
    return Path(folder)


def merged(model, tokenizer, folder: str | Path, dtype: str = "bfloat16") -> Path:
    """Write the model with its adapter merged in, in 16 bits, as transformers and vLLM load it; the folder.

    dtype: "bfloat16" or "float16". The base's numbers are those of its original checkpoint if that is at hand, else
        what its 4 bits stand for, and a line says which. Host memory: 2 GB and the largest tensor. The model in memory
        stays as it is.

    Raises ValueError for another dtype, an adapter that is not plain LoRA or is merged already, or the base's own
    folder; FileExistsError as `save`.
    """
    import torch
    from safetensors.torch import save_file

    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f'dtype={dtype!r}: it is "bfloat16" or "float16"')
    if not host.is_first_process():
        return Path(folder)
    _not_the_base(model, folder)
    tensors, kind = Merged(model), getattr(torch, dtype)
    print(f"merged into {tensors.source}")
    files, sizes = [[]], [0]
    for name, shape in tensors.shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if files[-1] and sizes[-1] + nbytes > SHARD:
            files.append([])
            sizes.append(0)
        files[-1].append(name)
        sizes[-1] += nbytes
    with _whole(folder) as new:
        index = {}
        for i, names in enumerate(files, start=1):
            file = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
            part = {}
            for name in names:
                part[name] = tensors.read(name).to(kind)
                if not torch.isfinite(part[name]).all():
                    raise ValueError(f'{name} does not fit into {dtype}: dtype="bfloat16"')
            save_file(part, new / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        config = copy.deepcopy(tensors.config)
        config.dtype, config.architectures = kind, [tensors.architecture]
        config.save_pretrained(new)
        tensors.generation_config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        _card(new, model, Path(folder).name, "The merged 16-bit weights of", "transformers", _load_line(folder))
    print(f"{folder}: {sum(sizes) / GB:.3f} GB in {dtype}")
    return Path(folder)


def gguf(model_or_folder, tokenizer, file: str | Path, quantization: str = "q8_0") -> Path:
    """Write the model with its adapter merged in as one GGUF file, for llama.cpp and what is built on it; the file.

    model_or_folder: a model as for `merged`, or the folder that `merged` wrote.
    quantization: "q8_0" (8.5 bits a weight), "bf16" or "f16", of the matrices; vectors stay in fp32. Smaller ones:
        llama-quantize, from bf16. Tensors are written one at a time.

    Raises host.CannotRun without the gguf package; ValueError for an architecture, a rope or a tokenizer that could not
    be written faithfully.
    """
    from . import gguf_file

    is_folder, file = isinstance(model_or_folder, (str, Path)), Path(file)
    if not host.is_first_process():
        return file
    tensors = Folder(model_or_folder) if is_folder else Merged(model_or_folder)
    print(f"from {tensors.source}" if is_folder else f"merged into {tensors.source}")
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}-new")
    try:
        gguf_file.write(tensors, tokenizer, new, quantization, file.stem)
        files.sync(new)
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
    print(f"{file}: {file.stat().st_size / GB:.3f} GB in {quantization}")
    return file


def push(folder: str | Path, repo_id: str, private: bool = True, token: str | None = None) -> str:
    """Upload a folder that `save` or `merged` wrote to the hub; the repository's address.

    repo_id: "name" or "owner/name", made if it is not there, private unless told. token: with write access; None is the
        one that huggingface_hub knows (HF_TOKEN or an earlier login). It is never printed.

    Raises FileNotFoundError for a folder without a model, PermissionError without a usable token.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if not host.is_first_process():
        return f"{huggingface_hub.constants.ENDPOINT}/{repo_id}"
    folder = Path(folder)
    if not any((folder / name).exists() for name in _MODELS):
        raise FileNotFoundError(f"{folder} is no folder that export.save or export.merged wrote")
    api = huggingface_hub.HfApi(token=token)
    try:
        where = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=where.repo_id, folder_path=str(folder), commit_message="Upload by nbhelpers")
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 401
        if status not in (401, 403):
            raise
        raise PermissionError(
            f"the hub does not let this token write to {repo_id} ({status}). Make one with write access at "
            'https://huggingface.co/settings/tokens and pass export.push(..., token="hf_...") or set HF_TOKEN'
        ) from None
    return str(where)


_MODELS = ("config.json", "adapter_config.json")
_ENDINGS = (".json", ".safetensors", ".md", ".txt", ".jinja", ".model")  # of what stands in a model's folder


@contextmanager
def _whole(folder: str | Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when everything is in it. Only a model folder is replaced."""
    folder = Path(folder)
    inside = sorted(folder.iterdir()) if folder.exists() else []
    if inside and not any((folder / name).exists() for name in _MODELS):
        raise FileExistsError(f"{folder} is there and holds no model: it is left alone. Choose another folder")
    beside = [path.name for path in inside if path.is_dir() or path.suffix not in _ENDINGS]
    if beside:
        raise FileExistsError(f"{folder} would be replaced as a whole, and it holds {beside[0]} beside a model: it is "
                              "left alone. Choose another folder")  # fmt: skip
    new, old = (folder.with_name(f".{folder.name}-{which}") for which in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in new.rglob("*"):
            files.sync(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _base_id(model) -> str:
    base = adapter.base_of(model)
    return base.id if base is not None else str(model.config.name_or_path)


def _not_the_base(model, folder: str | Path) -> None:
    """ValueError if `folder` is the one that the model was loaded from: it would be gone."""
    base = Path(_base_id(model))
    if (base / "config.json").exists() and base.resolve() == Path(folder).resolve():
        raise ValueError(f"{folder} is the base model itself: write to another folder")


def _card(folder: Path, model, name: str, what: str, library: str, use: str) -> None:
    """The README; of a base that is a folder only its last name, for the card may be published."""
    base = _base_id(model)
    base = Path(base).name if Path(base).is_absolute() or Path(base).exists() else base
    (folder / "README.md").write_text(CARD.format(name=name, what=what, base=base, library=library, use=use))


def _load_line(folder: str | Path) -> str:
    return ("from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{Path(folder).name}")')  # fmt: skip
