"""What CI runs is what requirements.txt allows, and what will end in those packages is noticed before it has."""

import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def requirements(lines) -> dict[str, Requirement]:
    read = (Requirement(text) for line in lines if (text := line.partition("#")[0].strip()))
    return {requirement.name: requirement for requirement in read}


def lower(requirement: Requirement) -> str:
    return next(part.version for part in requirement.specifier if part.operator == ">=")


def test_the_oldest_are_the_lower_ends_of_the_ranges():
    allowed = requirements((ROOT / "requirements.txt").read_text().splitlines())
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    allowed["triton"] = requirements(dev)["triton"]  # on a user's machine torch brings the triton that it wants
    oldest = requirements((ROOT / "constraints-oldest.txt").read_text().splitlines())
    assert oldest.pop("numpy")  # an upper bound, for triton's sake: no range of ours names numpy
    assert oldest.keys() == allowed.keys()
    for name, requirement in oldest.items():
        padded = lower(allowed[name]) + ".0" * (2 - lower(allowed[name]).count("."))
        assert str(requirement.specifier) == f"=={padded}", name
        assert all(range_.contains(padded) for range_ in allowed[name].specifier), name


@pytest.mark.parametrize("kind", [FutureWarning, DeprecationWarning])
@pytest.mark.parametrize(
    "module", [__name__, "nbhelpers.training.trainer", "trl.trainer.utils", "transformers.trainer"]
)
def test_a_warning_of_our_own_calls_is_an_error(module, kind):
    with pytest.raises(kind, match="going"):
        exec("warnings.warn('it is going', kind)", {"__name__": module, "warnings": warnings, "kind": kind})


def test_what_others_warn_of_is_no_error():
    with pytest.warns(FutureWarning, match="going"):
        exec("warnings.warn('it is going', FutureWarning)", {"__name__": "torch.optim", "warnings": warnings})
