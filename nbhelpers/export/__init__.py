"""What was learned, to take away: the adapter, a merged 16-bit model, a GGUF file, a repository on the hub.

    export.save(model, tokenizer, "my-reasoner")               # megabytes; loader.load("my-reasoner") brings it back
    export.merged(model, tokenizer, "my-reasoner-16bit")       # for transformers, vLLM
    export.gguf(model, tokenizer, "my-reasoner.gguf")          # for llama.cpp, Ollama, LM Studio
    export.push("my-reasoner", "me/my-reasoner")

Each of them is written under a temporary name next to its own, then renamed, so it is complete or not there. Of several
processes that train together (torchrun) the first one writes, and the others return at once.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nbhelpers import files, host, hub_words
from nbhelpers.architecture import GB
from nbhelpers.loader.gguf import is_part_of
from nbhelpers.models import adapter, lineage, model_folder
from nbhelpers.presets import Preset
from nbhelpers.progress import interruptible

from . import llama_cpp
from .merge import Folder, Merged

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONFIGS = ("config.json", "adapter_config.json")  # one of them is in every folder written here
CARD = """---
library_name: {library}
tags:
{tags}- reasoning
---

# {name}

{what} {base}, trained {methods}by nbhelpers, TRL and PEFT.

```python
{use}
```
"""
METHODS = {  # by TRL's name
    "GRPO": "GRPO (Group Relative Policy Optimization, Shao et al. 2024, arXiv:2402.03300)",
    "Online DPO": "Online DPO (direct preference optimization from online pairs, Guo et al. 2024, arXiv:2402.04792)",
    "PPO": "PPO (Proximal Policy Optimization, Schulman et al. 2017, arXiv:1707.06347)",
    "RLOO": "RLOO (REINFORCE Leave-One-Out, Ahmadian et al. 2024, arXiv:2402.14740)",
    "SFT": "SFT (supervised fine-tuning)",
}


@adapter.writing
def save(model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> Path:
    """Write the adapter, or all weights of a model without one, with the tokenizer and a short README; the folder.

    Args:
        model (`PreTrainedModel` or `PeftModel`): As `loader.load` returns it.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        folder (`str` or `Path`): Replaced if it holds a model and nothing else. `loader.load(folder)` loads an adapter
            onto its base.

    Raises FileExistsError if `folder` holds something besides a model, the checkpoints of a run for instance;
    ValueError if an adapter would replace its own base, for what `adapter.why_not_saved` names, and for a model in 4
    bits that has no adapter.
    """
    if not host.is_first_process():
        return Path(folder)
    if adapter.loras(model):
        model_folder.not_the_base(model, folder)
    elif any("quant_state" in parameter.__dict__ for parameter in model.parameters()):
        raise ValueError("the model is in 4 bits and has no adapter: export.merged writes it in 16 bits")
    with model_folder.replaced(folder, _CONFIGS) as new:
        if adapter.loras(model):
            adapter.save_adapter(model, new)
            use = f'from nbhelpers import loader\n\nmodel, tokenizer = loader.load("{Path(folder).name}")'
            _card(new, model, Path(folder).name, "A LoRA adapter for", "peft", use)
        else:
            model.save_pretrained(str(new))
            _card(new, model, Path(folder).name, "All weights of", "transformers", _load_line(folder))
        tokenizer.save_pretrained(new)
    return Path(folder)


@adapter.writing
def merged(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | Path,
    dtype: str = "bfloat16",
) -> Path:
    """Write the model with its adapter merged in, in 16 bits, as transformers and vLLM load it; the folder.

    The base's numbers are those of its original checkpoint if that can be had, else its 4 bits dequantised, and a line
    says which; a tensor that was changed in memory is written as it is there. Host memory: 2 GB and the largest
    tensor. The model in memory stays as it is.

    Args:
        model (`PreTrainedModel` or `PeftModel`): As `loader.load` returns it.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        folder (`str` or `Path`): Replaced if it holds a model and nothing else.
        dtype (`str`): "bfloat16" or "float16".

    Raises ValueError for another dtype, an adapter that cannot be merged (`merge.why_not`), a number that float16 does
    not hold, or the base's own folder; FileExistsError as `save`.
    """
    import torch

    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f'dtype={dtype!r}: it is "bfloat16" or "float16"')
    if not host.is_first_process():
        return Path(folder)
    model_folder.not_the_base(model, folder)
    tensors, kind = Merged(model), {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    print(f"merged into {tensors.source}")
    with model_folder.replaced(folder, _CONFIGS) as new:
        nbytes = {name: 2 * torch.Size(shape).numel() for name, shape in tensors.shapes.items()}
        total = model_folder.write_shards(new, nbytes, lambda name: _in_16_bits(tensors, name, kind))
        config = copy.deepcopy(tensors.config)
        config.dtype, config.architectures = kind, [tensors.architecture]
        config.save_pretrained(new)
        if tensors.generation_config is not None:
            tensors.generation_config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        _card(new, model, Path(folder).name, "The merged 16-bit weights of", "transformers", _load_line(folder))
    print(f"{folder}: {total / GB:.3f} GB in {dtype}{_own(tensors)}")
    return Path(folder)


def _own(tensors: Merged | Folder) -> str:
    """What was not taken from the original weights, in words."""
    changed = tensors.changed if isinstance(tensors, Merged) else []
    return f"; {len(changed)} tensors ({changed[0]}, ...) are the model's own, changed in memory" if changed else ""


def _in_16_bits(tensors: Merged, name: str, dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
    """One merged tensor by its name; ValueError for a number that `dtype` does not hold."""
    import torch

    tensor = tensors.read(name).to(dtype)
    if not torch.isfinite(tensor).all():
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f'{name} does not fit into {kind}: dtype="bfloat16"')
    return {name: tensor}


@adapter.writing
def gguf(
    model_or_folder: "PreTrainedModel | PeftModel | str | Path",
    tokenizer: "PreTrainedTokenizerBase",
    file: str | Path,
    quantization: str = "q8_0",
) -> Path:
    """Write the model with its adapter merged in as one GGUF file, for llama.cpp and what is built on it; the file.

    Args:
        model_or_folder (`PreTrainedModel`, `PeftModel`, `str` or `Path`): A model as for `merged`, or the folder that
            `merged` wrote. Tensors are read and written one at a time.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        file (`str` or `Path`): Replaced if it is there, unless the model was loaded from it.
        quantization (`str`): Of the matrices: "q8_0" (8.5 bits per weight), "bf16" or "f16"; vectors stay in fp32. Or
            one of `llama_cpp.KINDS`, "q4_k_m" among them: llama.cpp's llama-quantize makes it from a file in bf16,
            which is deleted then.

    Raises host.CannotRun for what `why_not` names, and if llama-quantize fails; ValueError for an adapter that cannot
    be merged, for an architecture, a rope or a tokenizer that could not be written faithfully, and for a `file` that
    the model was loaded from.
    """
    from . import gguf_file

    file = Path(file)
    if not host.is_first_process():
        return file
    if isinstance(model_or_folder, (str, Path)):
        tensors: Folder | Merged = Folder(model_or_folder)
        print(f"from {tensors.source}")
    else:
        base = adapter.base_of(model_or_folder)
        if base is not None and is_part_of(file, Path(base.id).expanduser()):
            raise ValueError(f"{file} is what the model was loaded from, and would be lost: give another name")
        tensors = Merged(model_or_folder)
        print(f"merged into {tensors.source}")
    if (why := why_not(quantization)) is not None:
        raise host.CannotRun(why)
    with files.whole_file(file) as new:
        if quantization in llama_cpp.KINDS:
            whole = new.with_name(f"{new.name}-bf16")
            try:
                gguf_file.write(tensors, tokenizer, whole, "bf16", file.stem)
                llama_cpp.quantize(whole, new, quantization)
            finally:
                whole.unlink(missing_ok=True)
        else:
            gguf_file.write(tensors, tokenizer, new, quantization, file.stem)
    print(f"{file}: {file.stat().st_size / GB:.3f} GB in {quantization}{_own(tensors)}")
    return file


def why_not(quantization: str) -> str | None:
    """Why `gguf` cannot write a file of that kind on this machine, and what helps; else None."""
    try:
        host.require("gguf")
    except host.CannotRun as error:
        return str(error)
    return llama_cpp.why_not(quantization)


def sizes(preset: Preset, folder: str | Path) -> str:
    """What each file will take, GB, and what the disk of `folder` has: a line of text.

    Args:
        preset (`Preset`): Of the model that was trained.
        folder (`str` or `Path`): Where to write; it need not be there yet.
    """
    weights = preset.architecture.parameters() / GB
    each = {"adapter": preset.lora_bytes() / GB, "merged": 2 * weights, "q8_0": 34 / 32 * weights}
    each["q4_k_m"] = 0.62 * weights  # about 5 bits: its kinds of blocks differ from tensor to tensor
    told = " · ".join(f"{name} {gb:.2f} GB" for name, gb in each.items())
    return f"{told} · {shutil.disk_usage(host.there(Path(folder))).free / GB:.1f} GB of disk free"


@interruptible("the folder was uploaded", "the repository may have a part of it; push again")
def push(folder: str | Path, repo_id: str, private: bool = True, token: str | None = None) -> str:
    """Upload a folder that `save` or `merged` wrote to the hub; the repository's address.

    Args:
        folder (`str` or `Path`): With the model's files.
        repo_id (`str`): "name" or "owner/name", made if it is not there.
        private (`bool`): Whether a new repository is.
        token (`str`, *optional*): With write access; None is the one that huggingface_hub knows (HF_TOKEN or an earlier
            login). It is never printed.

    Raises FileNotFoundError for a folder without a model, PermissionError without a usable token, ValueError for a
    garbled one, which is not shown, and for what the hub has no place for or does not take, and ConnectionError if the
    hub is out of reach or at fault.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalTokenNotFoundError

    if not host.is_first_process():
        return f"{huggingface_hub.constants.ENDPOINT}/{repo_id}"
    token = hub_words.checked_token(token)
    known = hub_words.token_in_use(token)
    folder = Path(folder)
    if not any((folder / name).exists() for name in _CONFIGS):
        raise FileNotFoundError(f"{folder} is not a folder that export.save or export.merged wrote")
    api = huggingface_hub.HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=str(folder), commit_message="Upload by nbhelpers")
    except Exception as error:  # a broken connection is the HTTP library's own, which is not a dependency of ours
        answered = hub_words.status(error) is not None or isinstance(error, LocalTokenNotFoundError)
        if not answered and not hub_words.unanswered(error):
            raise
        raise hub_words.refused_push(repo_id, error, known) from None
    return str(address)


def _card(folder: Path, model: "PreTrainedModel | PeftModel", name: str, what: str, library: str, use: str) -> None:
    """Write the README. Of a base that is a folder it has the last name only, because it may be published.

    The methods are those of this session and of the adapter that was loaded, or of the checkpoint, where it is one.
    """
    base = model_folder.base_id(model)
    methods, manifest = lineage.methods(model), Path(base) / "manifest.json"
    if not methods and manifest.is_file():  # a checkpoint of a run that trained all weights
        methods = [json.loads(manifest.read_text())["run"]["fixed"]["method"]]
    base = Path(base).name if Path(base).is_absolute() or Path(base).exists() else base
    told = f"with {', then '.join(METHODS.get(one, one) for one in methods)} " if methods else ""
    tags = "".join(f"- {tag}\n" for tag in dict.fromkeys(one.lower().replace(" ", "-") for one in methods))
    (folder / "README.md").write_text(
        CARD.format(name=name, what=what, base=base, library=library, use=use, methods=told, tags=tags)
    )


def _load_line(folder: str | Path) -> str:
    return (
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{Path(folder).name}")'
    )
