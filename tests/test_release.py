"""What is published holds what it should: `make wheel` looks into it before, and can find something."""

import io
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import wheel

ROOT = Path(__file__).parents[1]


def files_of(folder: Path, extra: set[str] = frozenset(), missing: set[str] = frozenset()) -> tuple[Path, Path]:
    """A wheel and an sdist of empty files, with some more in the wheel and some fewer in both."""
    inside = wheel.wanted() - missing
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        for name in inside | extra | {"nbhelpers-1.0.dist-info/licenses/LICENSE"}:
            archive.writestr(name, "")
    with tarfile.open(folder / "a.tar.gz", "w:gz") as archive:
        for name in inside | {"requirements.txt", "LICENSE"}:
            archive.addfile(tarfile.TarInfo(f"nbhelpers-1.0/{name}"), io.BytesIO())
    return folder / "a.whl", folder / "a.tar.gz"


def test_the_package_has_its_model_and_its_marker_for_types():
    assert {"nbhelpers/py.typed", "nbhelpers/workshop/model.safetensors"} <= wheel.wanted()


def test_a_whole_wheel_is_not_complained_of(tmp_path):
    assert wheel.complaints(*files_of(tmp_path), "1.0") == []


@pytest.mark.parametrize("name", ["nbhelpers/py.typed", "nbhelpers/workshop/model.safetensors", "nbhelpers/grpo.py"])
def test_what_is_missing_is_named(tmp_path, name):
    said = wheel.complaints(*files_of(tmp_path, missing={name}), "1.0")
    assert said == [f"the wheel lacks {name}", f"the sdist lacks {name}"]


@pytest.mark.parametrize("name", ["tests/conftest.py", "nbhelpers/old_name.py", "benchmarks/common.py"])
def test_what_should_not_be_there_is_named(tmp_path, name):
    assert f"the wheel holds {name}" in " ".join(wheel.complaints(*files_of(tmp_path, extra={name}), "1.0"))


def test_another_version_is_noticed(tmp_path):
    assert "version 2.0" in " ".join(wheel.complaints(*files_of(tmp_path), "2.0"))


def test_the_version_stands_in_one_place():
    import nbhelpers

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "nbhelpers.__version__"}
    assert f"## {nbhelpers.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["release", "site"])
def test_only_the_job_that_publishes_may_write_and_it_runs_nothing_of_ours(name):
    text = (ROOT / f".github/workflows/{name}.yml").read_text()
    build, publish = text.split("\n  publish:\n")
    assert "write" not in build.partition("jobs:")[2] and "id-token: write" in publish
    assert "checkout" not in publish and "make " not in publish and "secrets." not in text
