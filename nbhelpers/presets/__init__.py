"""One frozen dataclass per model, and what changes from card to card as data: a planner needs no download.

    preset = presets.get("qwen2.5-1.5b").on_card(15)

`NBHELPERS_SMOKE=1` is read in this file alone: every preset then becomes a small random model of the SAME architecture
with two steps of training (the workshop model, small already, stays itself). A smoke run tests that the parts fit
together, not that anything is learned.
"""

import difflib
import json
import os
from dataclasses import replace

from nbhelpers.models import families

from .preset import BOXED_PROMPT, QUANTIZATIONS, REASONING_PROMPT, WORKSHOP, Preset
from .table import TABLE

__all__ = ["BOXED_PROMPT", "QUANTIZATIONS", "REASONING_PROMPT", "WORKSHOP", "Preset", "every", "get", "names"]


def _workshop() -> Preset:
    architecture = families.architecture(json.loads((WORKSHOP / "config.json").read_text()))
    return Preset(
        "workshop", "the workshop model", str(WORKSHOP), architecture,
        notebook=False, quantization="none", lora_rank=0, lora_alpha=0, num_generations=8, max_prompt_length=96,
        max_completion_length=64, learning_rate=5e-4, max_steps=90,
    )  # fmt: skip


def _smoke(preset: Preset) -> Preset:
    """The same architecture with small numbers. Its tokenizer has one token per byte, so prompts are long.

    The workshop model is small already: it stays itself and takes fewer steps, so that its smoke run still learns.
    """
    if preset.name == "workshop":
        return replace(preset, smoke=True, max_steps=30)
    small = replace(
        preset.architecture, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=320, max_position_embeddings=2048,
    )  # fmt: skip
    return replace(
        preset, architecture=small, smoke=True, gated=False, hub_id=f"smoke/{preset.name}", dataset="smoke/gsm8k",
        lora_rank=min(preset.lora_rank, 4), lora_alpha=min(preset.lora_alpha, 4), num_generations=4,
        questions_per_step=4, max_prompt_length=1536, max_completion_length=16, max_steps=2,
    )  # fmt: skip


def every() -> tuple[Preset, ...]:
    """All presets as they are, in smoke too."""
    return (_workshop(), *TABLE.values())


def names() -> tuple[str, ...]:
    """What `get` takes."""
    return ("workshop", *TABLE)


def get(name: str) -> Preset:
    """The preset of that name; with NBHELPERS_SMOKE=1 its small random stand-in.

    Raises ValueError for an unknown name, with the closest one and all that there are.
    """
    if name not in names():
        close = difflib.get_close_matches(str(name).lower(), names(), n=1, cutoff=0.5)
        hint = f' Did you mean presets.get("{close[0]}")?' if close else ""
        raise ValueError(f"there is no preset {name!r}.{hint} There are: {', '.join(names())}")
    preset = _workshop() if name == "workshop" else TABLE[name]
    return _smoke(preset) if os.environ.get("NBHELPERS_SMOKE") == "1" else preset
