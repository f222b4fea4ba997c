"""One frozen dataclass per model, and what changes from card to card as data: a planner needs no download.

    preset = presets.get("qwen2.5-1.5b").on_card(15)

`NBHELPERS_SMOKE=1` is read in this file alone: every preset then becomes a small random model of the SAME architecture
with two steps of training (the workshop model, small already, stays itself). A smoke run tests that the parts fit
together, not that anything is learned.
"""

import difflib
import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from nbhelpers.architecture import Architecture
from nbhelpers.models import families
from nbhelpers.models.chat import InUserTurn
from nbhelpers.models.tags import REASONING, THINK, Tags

QUANTIZATIONS = ("dynamic", "nf4", "none")
WORKSHOP = Path(__file__).parent / "workshop"
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


class _Changes(TypedDict, total=False):
    """The fields of a preset that depend on the card."""

    quantization: str
    lora_rank: int
    lora_alpha: int
    num_generations: int
    max_completion_length: int


def _cards(**by_size: _Changes) -> tuple[tuple[int, tuple[tuple[str, Any], ...]], ...]:
    """_cards(gb8={...}) -> ((8, (...)),): tuples, so that a preset stays hashable."""
    return tuple((int(size[2:]), tuple(changes.items())) for size, changes in by_size.items())


# what the models of one release have in common
_llama3 = partial(
    Architecture, families.LLAMA, vocab_size=128256, rope_theta=500000.0, rms_norm_eps=1e-5,
    max_position_embeddings=131072,
)  # fmt: skip
_qwen25 = partial(Architecture, families.QWEN2, attention_bias=True, rope_theta=1000000.0)
_qwen3 = partial(
    Architecture, families.QWEN3, rope_theta=1000000.0, num_key_value_heads=8, head_dim=128, vocab_size=151936,
    max_position_embeddings=40960,
)  # fmt: skip
_QWEN25_7B = _qwen25(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, head_dim=128, vocab_size=152064, tie_word_embeddings=False,
)  # fmt: skip
_QWEN25_32B = _qwen25(
    hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
    num_key_value_heads=8, head_dim=128, vocab_size=152064, tie_word_embeddings=False,
)  # fmt: skip
# a 7B or 8B in NF4 with an adapter of rank 16 leaves a T4 enough for 768 tokens; the 16-bit layers of "dynamic" wait
# for 24 GB
_CARDS_SMALL = _cards(
    gb8={"quantization": "nf4", "max_completion_length": 512},
    gb12={},
    gb15={},
    gb24={"max_completion_length": 1536},
    gb40={"max_completion_length": 2048, "num_generations": 16},
)
_CARDS_7B = _cards(
    gb8={"quantization": "nf4", "num_generations": 4, "max_completion_length": 256, "lora_rank": 8, "lora_alpha": 8},
    gb12={"quantization": "nf4", "max_completion_length": 512},
    gb15={"quantization": "nf4"},
    gb24={"max_completion_length": 1024, "lora_rank": 32, "lora_alpha": 32},
    gb40={"max_completion_length": 2048, "lora_rank": 32, "lora_alpha": 32},
)
# A model that thinks by itself takes hundreds of tokens for what another says in one line, and at temperature 0 it may
# go in circles: 0.6 is what the makers of both families advise.
_CARDS_THINKING = _cards(
    gb8={"quantization": "nf4", "max_completion_length": 1024},
    gb12={},
    gb24={"max_completion_length": 3072},
    gb40={"max_completion_length": 4096},
)
_CARDS_THINKING_7B = _cards(
    gb8={"quantization": "nf4", "num_generations": 4, "max_completion_length": 1024, "lora_rank": 8, "lora_alpha": 8},
    gb12={"quantization": "nf4", "max_completion_length": 1024},
    gb15={"quantization": "nf4"},
    gb24={"max_completion_length": 3072},
    gb40={"max_completion_length": 4096, "lora_rank": 32, "lora_alpha": 32},
)
# from 14B on no card of 12 GB or less is left room for more than a short completion
_CARDS_14B = _cards(
    gb12={"quantization": "nf4", "num_generations": 4, "max_completion_length": 256, "lora_rank": 8, "lora_alpha": 8},
    gb15={"quantization": "nf4", "max_completion_length": 512},
    gb24={},
    gb40={"max_completion_length": 2048, "lora_rank": 32, "lora_alpha": 32},
)
_CARDS_32B = _cards(
    gb24={"quantization": "nf4", "lora_rank": 8, "lora_alpha": 8},
    gb40={"quantization": "nf4", "max_completion_length": 2048},
    gb80={"max_completion_length": 4096, "lora_rank": 32, "lora_alpha": 32},
)
_CARDS_THINKING_32B = _cards(
    gb24={"quantization": "nf4", "num_generations": 4, "max_completion_length": 1024, "lora_rank": 8, "lora_alpha": 8},
    gb40={"quantization": "nf4", "max_completion_length": 3072},
    gb80={"max_completion_length": 4096, "lora_rank": 32, "lora_alpha": 32},
)
_CARDS_70B = _cards(
    gb48={"quantization": "nf4"},
    gb80={"quantization": "nf4", "max_completion_length": 2048, "lora_rank": 32, "lora_alpha": 32},
    gb140={"max_completion_length": 4096, "lora_rank": 32, "lora_alpha": 32},
)
_thinking = partial(Preset, system_prompt=BOXED_PROMPT, tags=THINK, temperature=0.6, max_completion_length=2048)
_TABLE = {
    preset.name: preset
    for preset in (
        Preset(
            "qwen2.5-0.5b", "Qwen2.5 0.5B Instruct", "Qwen/Qwen2.5-0.5B-Instruct",
            _qwen25(
                hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                num_key_value_heads=2, head_dim=64, vocab_size=151936, tie_word_embeddings=True,
            ),
            # planned, not measured: 64 answers of about 200 tokens a step, which should take a T4 some 8 s, so that all
            # of the notebook takes it 20 to 30 minutes; the learning rate is the 1.5B's
            questions_per_step=8, max_completion_length=512, learning_rate=5e-5, max_steps=150,
        ),
        Preset(
            "qwen2.5-1.5b", "Qwen2.5 1.5B Instruct", "Qwen/Qwen2.5-1.5B-Instruct",
            _qwen25(
                hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                num_key_value_heads=2, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
            ),
            # measured (benchmarks/results/real.json); with 4 questions a step and 3e-5 it learned about half as much in
            # the same time, and with 16 and 1e-4 it began to lose the form after 60 steps
            questions_per_step=16, learning_rate=5e-5, max_steps=110, cards=_CARDS_SMALL,
        ),
        Preset(
            "qwen2.5-3b", "Qwen2.5 3B Instruct", "Qwen/Qwen2.5-3B-Instruct",
            _qwen25(
                hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                num_key_value_heads=2, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
            ),
            cards=_CARDS_SMALL,
        ),
        Preset(
            "qwen2.5-7b", "Qwen2.5 7B Instruct", "Qwen/Qwen2.5-7B-Instruct", _QWEN25_7B,
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=_CARDS_7B,
        ),
        Preset(
            "qwen2.5-14b", "Qwen2.5 14B Instruct", "Qwen/Qwen2.5-14B-Instruct",
            replace(_QWEN25_32B, intermediate_size=13824, num_hidden_layers=48),
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=_CARDS_14B,
        ),
        Preset(
            "qwen2.5-32b", "Qwen2.5 32B Instruct", "Qwen/Qwen2.5-32B-Instruct", _QWEN25_32B,
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=_CARDS_32B,
        ),
        _thinking(
            "qwen3-0.6b", "Qwen3 0.6B", "Qwen/Qwen3-0.6B",
            _qwen3(
                hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                tie_word_embeddings=True,
            ),
            notebook=False, cards=_CARDS_THINKING,
        ),
        _thinking(
            "qwen3-1.7b", "Qwen3 1.7B", "Qwen/Qwen3-1.7B",
            _qwen3(
                hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                tie_word_embeddings=True,
            ),
            cards=_CARDS_THINKING,
        ),
        _thinking(
            "qwen3-4b", "Qwen3 4B", "Qwen/Qwen3-4B",
            _qwen3(
                hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                tie_word_embeddings=True,
            ),
            cards=_CARDS_THINKING,
        ),
        _thinking(
            "qwen3-8b", "Qwen3 8B", "Qwen/Qwen3-8B",
            _qwen3(
                hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                tie_word_embeddings=False,
            ),
            notebook=False, lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=_CARDS_THINKING_7B,
        ),
        Preset(
            "llama-3.2-1b", "Llama 3.2 1B Instruct", "meta-llama/Llama-3.2-1B-Instruct",
            _llama3(
                hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
            ),
            gated=True, notebook=False, cards=_CARDS_SMALL,
        ),
        Preset(
            "llama-3.2-3b", "Llama 3.2 3B Instruct", "meta-llama/Llama-3.2-3B-Instruct",
            _llama3(
                hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
            ),
            gated=True, cards=_CARDS_SMALL,
        ),
        Preset(
            "llama-3.1-8b", "Llama 3.1 8B Instruct", "meta-llama/Llama-3.1-8B-Instruct",
            _llama3(
                hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
            ),
            gated=True, lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=_CARDS_7B,
        ),
        Preset(
            "llama-3.3-70b", "Llama 3.3 70B Instruct", "meta-llama/Llama-3.3-70B-Instruct",
            _llama3(
                hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
            ),
            gated=True, lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=_CARDS_70B,
        ),
        Preset(
            "mistral-7b", "Mistral 7B Instruct v0.3", "mistralai/Mistral-7B-Instruct-v0.3",
            Architecture(
                families.MISTRAL, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=32768,
                tie_word_embeddings=False, rope_theta=1000000.0, rms_norm_eps=1e-5,
            ),
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=_CARDS_7B,
        ),
        Preset(
            "phi-4", "Phi-4 14B", "microsoft/phi-4",
            Architecture(
                families.PHI3, hidden_size=5120, intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40,
                num_key_value_heads=10, head_dim=128, vocab_size=100352, tie_word_embeddings=False,
                max_position_embeddings=16384, rope_theta=250000.0, rms_norm_eps=1e-5,
            ),
            lora_rank=16, lora_alpha=16, learning_rate=5e-6,
            cards=_cards(
                gb12={"quantization": "nf4", "num_generations": 4, "max_completion_length": 256},
                gb15={"quantization": "nf4", "max_completion_length": 512},
                gb24={},
                gb40={"max_completion_length": 2048, "lora_rank": 32, "lora_alpha": 32},
            ),
        ),
        _thinking(
            "r1-distill-qwen-7b", "DeepSeek R1 Distill Qwen 7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
            replace(_QWEN25_7B, rope_theta=10000.0, max_position_embeddings=131072),
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=_CARDS_THINKING_7B,
        ),
        _thinking(
            "r1-distill-qwen-32b", "DeepSeek R1 Distill Qwen 32B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
            replace(_QWEN25_32B, max_position_embeddings=131072, rms_norm_eps=1e-5),
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=_CARDS_THINKING_32B,
        ),
    )
}  # fmt: skip


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
    return (_workshop(), *_TABLE.values())


def names() -> tuple[str, ...]:
    """What `get` takes."""
    return ("workshop", *_TABLE)


def get(name: str) -> Preset:
    """The preset of that name; with NBHELPERS_SMOKE=1 its small random stand-in.

    Raises ValueError for an unknown name, with the closest one and all that there are.
    """
    if name not in names():
        close = difflib.get_close_matches(str(name).lower(), names(), n=1, cutoff=0.5)
        hint = f' Did you mean presets.get("{close[0]}")?' if close else ""
        raise ValueError(f"there is no preset {name!r}.{hint} There are: {', '.join(names())}")
    preset = _workshop() if name == "workshop" else _TABLE[name]
    return _smoke(preset) if os.environ.get("NBHELPERS_SMOKE") == "1" else preset
