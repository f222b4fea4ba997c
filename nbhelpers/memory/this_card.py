"""The card of this machine as a plan sees it, and what is likely of one that is not here."""

import sys

from nbhelpers import gpu
from nbhelpers.architecture import GB


def card_here() -> tuple[float | None, bool | None]:
    """(GB of this machine's card, whether it is Ampere or newer), (None, None) if torch was not loaded or has none."""
    if "torch" not in sys.modules:
        return None, None
    card = gpu.card()
    return (None, None) if card is None else (card.total / GB, card.capability >= (8, 0))


def name_here(card_gb: float) -> str:
    """The name of this machine's card, if it is one of `card_gb` GB; else nothing."""
    here = card_here()[0]
    card = gpu.card() if here and abs(here - card_gb) < 0.5 else None
    return card.name if card else ""


def backend(card_gb: float, modern: bool | None = None) -> str:
    """Attention's backend on a card; modern: Ampere or newer, None: as the card here, if there is one, or by size."""
    modern = card_here()[1] if modern is None else modern
    return "flash" if modern or (modern is None and card_gb > 16) else "efficient"
