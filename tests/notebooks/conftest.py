"""What tests of notebooks share."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def build():
    """notebooks/build.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("build", Path(__file__).parents[2] / "notebooks/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.fixture
def smoke(monkeypatch, kernel):
    """Smoke mode, and a kernel of the name "warm" for Jupyter."""
    if sys.platform == "win32":
        pytest.skip("Windows has no SIGINT to send")
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kernel("warm")
