"""A notebook's first cell wherever a notebook is opened: in a Python without packages, with a pip that is played."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "a" * 40
CHILD = """
import os, subprocess, sys, types

def run(command, **_):
    print("PIP", command[-1])
    if command[-1].startswith(reached):
        write("site")
        os.utime("site", (1, 1))  # a real pip takes longer than a file system's tick, and Python looks again
    return types.SimpleNamespace(stderr="WARNING: retrying\\n  fatal: out of reach\\nnote: x\\n")

def write(folder):
    os.makedirs(f"{folder}/nbhelpers")
    open(f"{folder}/nbhelpers/__init__.py", "w").close()
    open(f"{folder}/nbhelpers/install.py", "w").write("def run(): print('READY from', __file__)")

cell, reached, files = sys.argv[1], sys.argv[2] or "nothing", sys.argv[3:]
for file in files:
    write(os.path.dirname(file) or ".") if file.endswith("nbhelpers") else open(file, "w").close()
subprocess.run = run
os.makedirs("site")
sys.path.append(os.path.abspath("site"))
try:
    exec(cell)
except Exception as stop:
    print(*stop._render_traceback_(), sep="")
"""


@pytest.fixture
def opened(build, monkeypatch, tmp_path):
    """What the cell prints in a session with these files, where pip reaches what begins with `reached`."""

    def run(*files: str, hosted: str = "", reached: str = "", release: str = "", index: bool = False) -> list[str]:
        monkeypatch.setattr(build, "RELEASE", release)
        monkeypatch.setattr(build, "COMMIT", COMMIT if release else "")
        monkeypatch.setattr(build, "ON_INDEX", index)
        cells = json.loads(build.model(build.MODELS[0]))["cells"]
        cell = next("".join(cell["source"]) for cell in cells if cell["metadata"].get("tags") == ["install"])
        here = tmp_path / "repository/notebooks/models"
        for folder in (here, tmp_path / "input/mine/deeper"):
            folder.mkdir(parents=True)
        cell = cell.replace("/kaggle/input", str(tmp_path / "input"))
        env = {name: value for name, value in os.environ.items() if not name.startswith(("COLAB", "KAGGLE", "PYTHON"))}
        env |= {hosted: "x"} if hosted else {}
        # -S: without the packages of this Python, nbhelpers among them
        command = [sys.executable, "-S", "-c", CHILD, cell, reached, *files]
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.replace(str(tmp_path), "").splitlines()

    return run


HUB = "git+https://github.com/nbhelpers/nbhelpers@"
READY = "READY from /repository/notebooks/models/site/nbhelpers/install.py"


@pytest.mark.parametrize("hosted", ["COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"])
def test_from_a_badge(opened, hosted):
    said, pip, ready = opened(hosted=hosted, reached="git+")
    assert said == f"nbhelpers (nothing is released yet) from {HUB}main"
    assert pip == f"PIP {HUB}main" and ready == READY


def test_a_release_is_taken_by_its_commit(opened):
    assert opened(hosted="COLAB_RELEASE_TAG", reached="git+", release="v1.2.3")[1:] == [f"PIP {HUB}{COMMIT}", READY]


@pytest.mark.parametrize("reached", ["nbhelpers==", "git+"])
def test_once_it_is_on_the_index_that_is_the_first_way(opened, reached):
    pips = [
        line
        for line in opened(hosted="COLAB_RELEASE_TAG", reached=reached, release="v1.2.3", index=True)
        if "PIP" in line
    ]
    assert pips == ["PIP nbhelpers==1.2.3", f"PIP {HUB}{COMMIT}"][: 1 + (reached == "git+")]


def test_of_an_unreleased_version_the_index_is_never_asked(build):
    assert build.RELEASE or not build.ON_INDEX  # until then the name there may be anybody's


@pytest.mark.parametrize(
    "folder", ["nbhelpers", "../../nbhelpers", "/input/mine/nbhelpers", "/input/mine/deeper/nbhelpers"]
)
def test_from_a_folder_nothing_is_installed_or_written(opened, tmp_path, folder):
    """A clone that is not installed, an unpacked zip, a read-only dataset: pip would want to write beside it."""
    place = folder.replace("/input", str(tmp_path / "input"))
    (line,) = opened(place, hosted="KAGGLE_KERNEL_RUN_TYPE")
    assert line.startswith("READY from ") and line.endswith(f"{folder.removeprefix('../../')}/install.py")


@pytest.mark.parametrize("hosted", ["", "COLAB_RELEASE_TAG"])
@pytest.mark.parametrize("file", ["nbhelpers-0.2.0-py3-none-any.whl", "nbhelpers-main.zip"])
def test_a_wheel_or_a_zip_beside_the_notebook_comes_before_the_network(opened, hosted, file):
    said = opened(file, hosted=hosted, reached="/")
    assert [Path(line).name for line in said if line.startswith("PIP")] == [file] and said[-1] == READY


def test_a_damaged_wheel_is_passed_over(opened):
    said = opened("nbhelpers-0-py3-none-any.whl", hosted="COLAB_RELEASE_TAG", reached="git+")
    assert said[-2:] == [f"PIP {HUB}main", READY]


def test_on_a_classs_jupyterhub_it_is_a_sentence_with_the_ways_out(opened):
    (line,) = opened()
    assert line.startswith("No nbhelpers here: none near this notebook. ")


@pytest.mark.parametrize("hosted", ["COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"])
def test_out_of_reach_is_a_sentence_with_pips_reason_and_the_ways_out(opened, hosted):
    line = opened(hosted=hosted)[-1]
    ways = r"folder, wheel or zip beside .*, or write an address .* REPOSITORY .*, or %pip install it yourself"
    assert re.match(rf"No nbhelpers here: out of reach\. Put its {ways}", line)
