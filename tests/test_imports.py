"""Every module imports, on every system: what needs triton (Linux) or vllm is left out where they are missing."""

from importlib import import_module

import house
import pytest

MODULES = sorted(house.module_of(file, house.PACKAGE) for file in house.PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_it_imports(module):
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in ("triton", "vllm"):
            raise
        pytest.skip(f"{error.name} is not installed here")
