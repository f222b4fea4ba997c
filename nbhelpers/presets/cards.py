"""What changes from card to card, as data: for each size of model, the numbers that suit a card of so many GB."""

from typing import Any, TypedDict


class Changes(TypedDict, total=False):
    """The fields of a preset that depend on the card."""

    quantization: str
    lora_rank: int
    lora_alpha: int
    num_generations: int
    max_completion_length: int


def cards(**by_size: Changes) -> tuple[tuple[int, tuple[tuple[str, Any], ...]], ...]:
    """cards(gb8={...}) -> ((8, (...)),): tuples, so that a preset stays hashable."""
    return tuple((int(size[2:]), tuple(changes.items())) for size, changes in by_size.items())


CARDS_SMALL = cards(
    gb8={"quantization": "nf4", "max_completion_length": 512},
    gb12={},
    gb15={},
    gb24={"max_completion_length": 1536},
    gb40={"max_completion_length": 2048, "num_generations": 16},
)
# a 7B or 8B in NF4 with an adapter of rank 16 leaves a T4 enough for 768 tokens; the 16-bit layers of "dynamic" wait
# for 24 GB
CARDS_7B = cards(
    gb8={"quantization": "nf4", "num_generations": 4, "max_completion_length": 256, "lora_rank": 8, "lora_alpha": 8},
    gb12={"quantization": "nf4", "max_completion_length": 512},
    gb15={"quantization": "nf4"},
    gb24={"max_completion_length": 1024, "lora_rank": 32, "lora_alpha": 32},
    gb40={"max_completion_length": 2048, "lora_rank": 32, "lora_alpha": 32},
)
# A model that thinks by itself takes hundreds of tokens for what another says in one line, and at temperature 0 it may
# go in circles: 0.6 is what the makers of both families advise.
CARDS_THINKING = cards(
    gb8={"quantization": "nf4", "max_completion_length": 1024},
    gb12={},
    gb24={"max_completion_length": 3072},
    gb40={"max_completion_length": 4096},
)
CARDS_THINKING_7B = cards(
    gb8={"quantization": "nf4", "num_generations": 4, "max_completion_length": 1024, "lora_rank": 8, "lora_alpha": 8},
    gb12={"quantization": "nf4", "max_completion_length": 1024},
    gb15={"quantization": "nf4"},
    gb24={"max_completion_length": 3072},
    gb40={"max_completion_length": 4096, "lora_rank": 32, "lora_alpha": 32},
)
# from 14B on no card of 12 GB or less is left room for more than a short completion
CARDS_14B = cards(
    gb12={"quantization": "nf4", "num_generations": 4, "max_completion_length": 256, "lora_rank": 8, "lora_alpha": 8},
    gb15={"quantization": "nf4", "max_completion_length": 512},
    gb24={},
    gb40={"max_completion_length": 2048, "lora_rank": 32, "lora_alpha": 32},
)
CARDS_32B = cards(
    gb24={"quantization": "nf4", "lora_rank": 8, "lora_alpha": 8},
    gb40={"quantization": "nf4", "max_completion_length": 2048},
    gb80={"max_completion_length": 4096, "lora_rank": 32, "lora_alpha": 32},
)
CARDS_THINKING_32B = cards(
    gb24={"quantization": "nf4", "num_generations": 4, "max_completion_length": 1024, "lora_rank": 8, "lora_alpha": 8},
    gb40={"quantization": "nf4", "max_completion_length": 3072},
    gb80={"max_completion_length": 4096, "lora_rank": 32, "lora_alpha": 32},
)
CARDS_70B = cards(
    gb48={"quantization": "nf4"},
    gb80={"quantization": "nf4", "max_completion_length": 2048, "lora_rank": 32, "lora_alpha": 32},
    gb140={"max_completion_length": 4096, "lora_rank": 32, "lora_alpha": 32},
)
CARDS_PHI4 = cards(
    gb12={"quantization": "nf4", "num_generations": 4, "max_completion_length": 256},
    gb15={"quantization": "nf4", "max_completion_length": 512},
    gb24={},
    gb40={"max_completion_length": 2048, "lora_rank": 32, "lora_alpha": 32},
)
