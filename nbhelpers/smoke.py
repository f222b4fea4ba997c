"""A small random model of a preset's architecture, with a tokenizer, made on the spot: for CI, where wiring counts.

The same preset gives the same weights every time, so an adapter trained on one can be loaded onto the next.
"""

import json
import tempfile
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from nbhelpers.presets import Architecture, Preset

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(preset: Preset) -> Path:
    """The folder of the preset's stand-in, in the system's temporary directory; made if it is not there yet."""
    key = sha256(json.dumps(asdict(preset.architecture), sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(tempfile.gettempdir()) / "nbhelpers-smoke" / f"{preset.name}-{key}"
    if not (folder / "model.safetensors").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as new:  # another process may be making it as well
            write(preset.architecture, new)
            try:
                Path(new).rename(folder)
                Path(new).mkdir()  # for the context manager to remove
            except OSError:  # the other one was first
                pass
    return folder


def write(architecture: Architecture, folder: str | Path, *, seed: int = 0, shard_bytes: int | None = None) -> Path:
    """Random weights, config and tokenizer of `architecture` into `folder`, in shards of `shard_bytes` if given."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    fields = architecture.config() | special
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    size = {"max_shard_size": shard_bytes} if shard_bytes else {}
    model.save_pretrained(folder, **size)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_tokenizer():
    """One byte, one token: nothing to train, any text can be encoded, 259 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.add_special_tokens(special)
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML,
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
