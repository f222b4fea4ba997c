"""What tests of several rooms share."""

import gc
import sys

import pytest
import warm_python

from nbhelpers import gpu


@pytest.fixture(scope="session")
def warm():
    """The command that stands for `python`, with the slow imports done already where that is possible: warm_python."""
    if sys.platform == "win32" or gpu.cards():  # Windows does not fork, and after a fork CUDA cannot be used
        yield [sys.executable]
    else:
        with warm_python.server() as command:
            yield command


def pytest_collection_modifyitems(items):
    """mypy first: it takes longest, and whoever starts it last has everybody wait."""
    items.sort(key=lambda item: item.path.name != "test_typing.py")


def pytest_collection_finish():
    """Accelerate collects garbage at each training's start and end: not among all that imports have made, a million
    objects that stay."""
    gc.freeze()
