"""What tests of notebooks share."""

import importlib.util
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
def smoke(monkeypatch, kernel):
    """Smoke mode, and a kernel of the name "warm" for Jupyter."""
    if sys.platform == "win32":
        pytest.skip("Windows has no SIGINT to send")
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kernel("warm")
