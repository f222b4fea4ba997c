"""A small random model of a preset's architecture, a tokenizer and word problems, made on the spot for CI.

The same preset gives the same weights every time, so an adapter trained on one can be loaded onto the next.
"""

import functools
import getpass
import json
import os
import random
import stat
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from nbhelpers.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATASET = "smoke/gsm8k"  # the `dataset` of a smoke preset: `make_dataset`'s folder
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(name: str, architecture: Architecture) -> Path:
    """The folder of a preset's stand-in, in a temporary folder of this user; made if it is not there yet."""
    key = sha256(json.dumps(asdict(architecture), sort_keys=True).encode()).hexdigest()[:8]
    return _once(f"{name}-{key}", "model.safetensors", lambda new: write(architecture, new))


def make_dataset() -> Path:
    """A folder with train.jsonl (48 rows) and test.jsonl (16) in GSM8K's schema; made if it is not there yet."""
    return _once("gsm8k", "test.jsonl", _write_problems)


def _once(name: str, last: str, write_into: Callable[[Path], object]) -> Path:
    """The folder `name` below `_own_folder`, written unless its file `last` is there."""
    folder = _own_folder() / name
    if not (folder / last).exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as new:  # another process may be writing it as well
            write_into(Path(new))
            try:
                Path(new).rename(folder)
                Path(new).mkdir()  # for the context manager to remove
            except OSError:  # the other one was first
                pass
    return folder


def _own_folder() -> Path:
    """A folder in the system's temporary directory that this user alone can write to.

    Anybody may make a folder of any name there, and put a model of theirs into it. One that is another's, or that
    others may write to, is not used: then this process has one of its own.
    """
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()  # Windows has a temporary directory a user
    folder = Path(tempfile.gettempdir()) / f"nbhelpers-smoke-{user}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if os.name != "nt" and (not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022):
        return _instead()
    return folder


@functools.cache
def _instead() -> Path:
    return Path(tempfile.mkdtemp(prefix="nbhelpers-smoke-"))


def _write_problems(folder: Path) -> None:
    rng = random.Random(0)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < 64:
        boxes, each, gone = rng.randint(3, 40), rng.randint(6, 60), rng.randint(1, 17)
        what = rng.choice(("pears", "bolts", "postcards", "seeds"))
        question = f"A shop gets {boxes} boxes of {each} {what} and sells {gone} {what}. How many {what} are left?"
        total = boxes * each
        steps = f"It gets {boxes} x {each} = <<{boxes}*{each}={total}>>{total} {what}.\n"
        steps += f"{total} - {gone} = <<{total}-{gone}={total - gone}>>{total - gone} are left."
        rows[question] = {"question": question, "answer": f"{steps}\n#### {total - gone:,}"}
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    (folder / "train.jsonl").write_text("".join(lines[:48]))
    (folder / "test.jsonl").write_text("".join(lines[48:]))


def write(architecture: Architecture, folder: str | Path, *, seed: int = 0, shard_bytes: int | None = None) -> Path:
    """Write random weights in fp32, config and tokenizer of an architecture; the folder.

    Args:
        architecture (`Architecture`): The shapes.
        folder (`str` or `Path`): Made if it is not there.
        seed (`int`): Of the weights.
        shard_bytes (`int`, *optional*): Largest file of weights, bytes; None leaves it to transformers.
    """
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


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A token for each byte, 259 with the special ones: nothing to train, and any text can be encoded."""
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
