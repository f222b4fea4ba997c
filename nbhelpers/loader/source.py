"""A checkpoint on this disk: its config, its tokenizer and its tensors, read when they are asked for."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbhelpers.files import read_json
from nbhelpers.models import chat

from .shards import Shards

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

# what decides the shapes; the rest of a config.json changes with the version that wrote it
_SHAPE_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A checkpoint in a folder. The rest of the loader reads it through these methods, whatever it is stored as.

    `id` is what a person calls it, `folder` where it is on this disk, `config` its config.json.
    """

    id: str
    folder: Path
    config: dict[str, Any]

    def config_hash(self) -> str:
        """16 hexadecimal digits that differ where shapes differ."""
        shape = {key: self.config.get(key) for key in _SHAPE_KEYS}
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

    def prequantized(self) -> bool:
        """Whether bitsandbytes wrote this checkpoint in 4 bits. ValueError for any other quantisation."""
        settings = self.config.get("quantization_config")
        if not settings:
            return False
        method = settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else "unknown")
        if method != "bitsandbytes" or not settings.get("load_in_4bit", settings.get("_load_in_4bit")):
            raise ValueError(
                f"{self.id} is quantised with {method if method != 'bitsandbytes' else 'bitsandbytes in 8 bits'}; "
                "only 16-bit checkpoints and bitsandbytes' 4 bits can be trained here: take the original model"
            )
        return True

    def model_config(self) -> "PreTrainedConfig":
        """The config as transformers builds a model from it. Raises ValueError for one that it cannot use."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # of many kinds: it checks the types and the sense of many fields
            raise ValueError(f"{self.folder / 'config.json'} makes no model: {_line(error)}") from None

    def generation_config(self) -> "GenerationConfig | None":
        """How its makers generate, if they say so. Raises ValueError for a damaged file."""
        from transformers import GenerationConfig

        file = self.folder / "generation_config.json"
        if not file.exists():
            return None
        read_json(file)  # names it if it is damaged
        return GenerationConfig.from_pretrained(self.folder)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Ready for GRPO, see `models.chat`. ValueError if there is none."""
        return chat.load_tokenizer(self.folder)

    def weights(self) -> Shards:
        """The tensors. Raises as `Shards`."""
        return Shards(self.folder)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
