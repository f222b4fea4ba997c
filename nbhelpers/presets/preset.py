"""What a preset holds: a model, and how it is trained on which card."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbhelpers.architecture import Architecture
from nbhelpers.models.chat import InUserTurn
from nbhelpers.models.tags import REASONING, Tags

QUANTIZATIONS = ("dynamic", "nf4", "none")
WORKSHOP = Path(__file__).parents[1] / "workshop"
# Chosen by measurement (benchmarks/results/real.json): a 1.5B keeps this form in 12 to 16 % of its answers before any
# training, so that it is paid for it from the first step on, and is right as often as with the others.
REASONING_PROMPT = "Write your reply in this form:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"

# For models that think by themselves, in tags of their own: of the form only where to put the result is left to say.
BOXED_PROMPT = InUserTurn(r"Think step by step, and put the result into \boxed{}.")


@dataclass(frozen=True)
class Preset:
    """A model and how to train it. `on_card` gives the same preset with one card's numbers."""

    name: str
    title: str
    hub_id: str  # a hub id, or a local folder
    architecture: Architecture
    gated: bool = False  # the hub asks for an accepted licence and a token
    quantization: str = "dynamic"
    lora_rank: int = 32  # 0: no adapter, every weight is trained
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()  # names of linear layers; all of the family's if none is given
    num_generations: int = 8
    questions_per_step: int = 4  # each answered num_generations times
    max_prompt_length: int = 256
    max_completion_length: int = 768
    kv_bits: int = 16  # of keys and values while completions are written: LeanGRPOConfig's
    learning_rate: float = 1e-5
    max_steps: int = 250
    dataset: str = "openai/gsm8k"  # what the notebooks hand to tasks.gsm8k
    system_prompt: str | None = REASONING_PROMPT  # or chat.InUserTurn
    tags: Tags = REASONING  # the form that is asked for, paid and counted
    temperature: float = 0.0  # of the questions before and after; the training's own is 1
    notebook: bool = True  # whether notebooks/models/ has one
    smoke: bool = False
    cards: tuple[tuple[int, tuple[tuple[str, Any], ...]], ...] = ()  # (GB from which it holds, what changes)

    def __post_init__(self) -> None:
        if not self.lora_targets:
            object.__setattr__(self, "lora_targets", self.architecture.family.linears)

    def on_card(self, gb: float | None) -> "Preset":
        """This preset for a card of `gb` GB: the changes of the largest size that does not exceed it.

        A card smaller than every entry gets the smallest entry's; None (no GPU) changes nothing.
        """
        if gb is None or not self.cards or self.smoke:
            return self
        sizes = sorted(self.cards)
        changes = next((changes for size, changes in reversed(sizes) if size <= gb), sizes[0][1])
        return replace(self, **dict(changes))

    @property
    def asking(self) -> dict[str, Any]:
        """How this model is asked something, as the arguments of `evaluate.ask`."""
        return {
            "system_prompt": self.system_prompt, "tags": self.tags, "temperature": self.temperature,
            "max_new_tokens": self.max_completion_length,
        }  # fmt: skip

    def weight_bytes(self, width: int = 2) -> int:
        """Bytes of the frozen weights, with `width` bytes per unquantised number."""
        return self.architecture.weight_bytes(self.quantization, width)

    def lora_bytes(self, width: int = 4) -> int:
        """Bytes of the adapter alone; it is kept in fp32 (`width` 4), as bf16 would round away a step of 1e-5."""
        return width * self.architecture.lora_parameters(self.lora_rank, self.lora_targets)
