"""Runs that others published, as data: the model, the settings, and a card that they fit.

    recipe = recipes.get("long-run")
    memory.plan(**recipe.takes)                    # GB, seconds a step and hours on an RTX 4090
    python notebooks/recipes.py long-run --plan    # the same from a terminal; without --plan it trains

docs/recipes.md says of each what was published, what was run here, and what was not. Recipes that are a lesson or an
argument of the trainer, as DeepSeek-R1's stages and DeepScaleR's lengths, stand there too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from nbhelpers import presets

from .preset import Preset

__all__ = ["NAMES", "Recipe", "get"]

GSM8K, LIMO = 7473, 817  # rows of the data sets that are trained on


@dataclass(frozen=True)
class Recipe:
    """A run that can be repeated.

    Args:
        name (`str`): As the command has it.
        about (`str`): What it is, in a line.
        preset (`Preset`): The model, with the recipe's numbers. Of texts that are learned, the two lengths together are
            the most tokens that one may have.
        method (`str`): "grpo" or "sft".
        card (`str`): One that it fits: the one that it was published for, where that is one.
        rows (`int`): Answers, or texts, of a step.
        epochs (`int`): Times that all rows are seen.
        settings (`dict`): Of the trainer's config, beside what the preset says.
    """

    name: str
    about: str
    preset: Preset
    method: str
    card: str
    rows: int
    epochs: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def takes(self) -> dict[str, Any]:
        """The arguments of `memory.plan`, with answers or texts that are all as long as they may be; for another card
        `recipe.takes | {"card": "T4"}`."""
        return {"preset": self.preset, "card": self.card, "rows": self.rows, "method": self.method}


def _long_run() -> Recipe:
    """The settings are those of the script with these probes; where it leaves one to TRL, so does this."""
    return Recipe(
        "long-run", "GSM8K three times over, one question a step, on one RTX 4090 (GRPO)",
        _with(
            "qwen2.5-3b", title="Qwen2.5 3B", hub_id="Qwen/Qwen2.5-3B", quantization="nf4", lora_rank=32,
            lora_alpha=32, num_generations=6, questions_per_step=1, max_prompt_length=256, max_completion_length=200,
            learning_rate=5e-6, max_steps=3 * GSM8K,
        ),
        "grpo", "RTX 4090", 6, 3,
        {"adam_beta2": 0.99, "weight_decay": 0.1, "warmup_steps": 0.1, "lr_scheduler_type": "cosine",
         "max_grad_norm": 0.1, "save_steps": 250},
    )  # fmt: skip


def _limo() -> Recipe:
    return _texts("limo", "LIMO's 817 worked answers (SFT)", "qwen2.5-1.5b", 32, 16_384, epochs=15)


def _lora_32b() -> Recipe:
    return _texts("32b-lora", "a LoRA of a 32B on the same rows in 24 GB (SFT)", "qwen2.5-32b", 8, 8192, epochs=3)


def _texts(name: str, about: str, preset: str, rank: int, tokens: int, epochs: int, rows: int = 16) -> Recipe:
    steps = ceil(LIMO / rows) * epochs
    model = _with(
        preset, quantization="nf4", lora_rank=rank, lora_alpha=rank, max_prompt_length=1024,
        max_completion_length=tokens - 1024, learning_rate=1e-4, max_steps=steps,
    )  # fmt: skip
    settings = {"warmup_steps": 0.1, "lr_scheduler_type": "cosine"}
    return Recipe(name, about, model, "sft", "RTX 4090", rows, epochs, settings)


def _with(name: str, **changes: Any) -> Preset:
    """A preset with other numbers, the same on every card; a smoke run's keeps its own small ones."""
    preset = presets.get(name)
    return preset if preset.smoke else replace(preset, cards=(), **changes)


_MADE: dict[str, Callable[[], Recipe]] = {"long-run": _long_run, "limo": _limo, "32b-lora": _lora_32b}
NAMES = tuple(_MADE)


def get(name: str) -> Recipe:
    """The recipe of that name; with NBHELPERS_SMOKE=1 on a small random model. Raises ValueError if there is none."""
    if name not in _MADE:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(NAMES)}")
    return _MADE[name]()
