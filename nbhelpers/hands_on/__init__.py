"""Something to set by hand, and what follows from it at once: sliders and texts that an open notebook moves.

    HandsOn(show, {"clip": Slider("clip", 0.0, 0.5, 0.01, 0.2)}, examples=[{"clip": 0.0}])     # the last line of a cell
    hands_on.group()                                                                           # lesson 1's

Where nobody can move anything (GitHub, a run without a person, a notebook without ipywidgets) the same object is a
static page: what `show` returns for the values given and for each example. That page is always in the output, beside
the widget, whose state is not saved. `listen` is for who computes for an hour and would hear of a button meanwhile.
"""

from .controls import HandsOn as HandsOn
from .controls import Page as Page
from .controls import Slider as Slider
from .controls import Text as Text
from .controls import attended as attended
from .controls import view as view
from .kernel import listen as listen


def group() -> HandsOn:
    """The rewards of four answers, the ratio, clip and beta: they move advantages, losses and pushes."""
    from . import group_of_four  # it needs torch

    return group_of_four.sliders()
