"""Which methods have trained a model, or the adapter that it was loaded with: its card says so where it is shared."""

import json
from pathlib import Path

from torch import nn

from . import families


def methods(model: nn.Module) -> list[str]:
    """In TRL's words ("GRPO", "SFT"), one after the other; empty if not known."""
    return vars(families.unwrap(model)).get("nbhelpers_methods", [])


def note(model: nn.Module, method: str) -> None:
    """Keep on `model` that `method` has trained it."""
    known = methods(model)
    if known[-1:] != [method]:
        vars(families.unwrap(model))["nbhelpers_methods"] = [*known, method]


def read(model: nn.Module, base_json: Path) -> None:
    """Keep on `model` what has trained the saved adapter that it was given; files from before it was noted say none."""
    vars(families.unwrap(model))["nbhelpers_methods"] = json.loads(base_json.read_text()).get("methods", [])
