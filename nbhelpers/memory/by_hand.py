"""The plan of a run, moved by hand: the card, and how many answers of what length, as sliders."""

from collections.abc import Callable
from math import ceil

from nbhelpers.hands_on import HandsOn, Slider
from nbhelpers.presets import Preset

from .report import Plan


def sliders_of(plan: Callable[..., Plan], preset: Preset, card_gb: float) -> HandsOn:
    """See `memory.sliders`. `plan` is the room's own, `preset` that of the card."""
    prompt, answer, group = preset.max_prompt_length, preset.max_completion_length, preset.num_generations
    most = max(answer, min(8192, preset.architecture.max_position_embeddings))
    controls = {
        "card_gb": Slider("card, GB", 4, max(96, ceil(card_gb)), 0.5, card_gb),
        "num_generations": Slider("answers to a question", 2, max(32, group), 1, group),
        "max_prompt_length": Slider("tokens of a question", 32, max(2048, prompt), 32, prompt),
        "max_completion_length": Slider("tokens of an answer", 64, most, 64, answer),
    }
    longer, smaller = min(most, 4 * answer), max(4.0, card_gb / 2)
    return HandsOn(
        lambda **values: plan(preset, **values), controls, [{"max_completion_length": longer}, {"card_gb": smaller}]
    )
