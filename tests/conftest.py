"""What tests of several rooms share."""

import gc
import json
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


@pytest.fixture
def kernel(monkeypatch, warm, tmp_path):
    """Makes Jupyter's kernel of a name a fork of `warm`."""

    def named(name: str) -> None:
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
        argv = [*warm, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = tmp_path / "jupyter" / "kernels" / name / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": argv, "display_name": name, "language": "python"}))

    return named


def pytest_collection_modifyitems(items):
    """mypy first: it takes longest, and whoever starts it last has everybody wait."""
    items.sort(key=lambda item: item.path.name != "test_typing.py")


def pytest_collection_finish():
    """Accelerate collects garbage at each training's start and end: not among all that imports have made, a million
    objects that stay."""
    gc.freeze()
