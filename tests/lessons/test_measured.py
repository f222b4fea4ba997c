"""Lessons show measured figures wherever the package is installed, and they are those of benchmarks/results."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import lessons
from nbhelpers.lessons import measured

ROOT = Path(__file__).parents[2]
NAMES = ("kernels", "step", "engines")


def test_the_files_of_the_lessons_are_those_of_the_results():
    for path, text in lessons.files().items():
        assert path.read_text() == text, "run `python -m benchmarks.lessons` and commit"


def test_a_changed_result_is_noticed(monkeypatch):
    class Other(lessons.Results):
        def __init__(self, name):
            super().__init__(name)
            self.values = {key: value + 1 for key, value in self.values.items()}

    monkeypatch.setattr(lessons, "Results", Other)
    monkeypatch.setattr(sys, "argv", ["lessons", "--check"])
    assert lessons.main() == 1


@pytest.mark.parametrize("name", NAMES)
def test_each_figure_is_a_row_of_the_results(name):
    document = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    rows = {(row["what"], row["who"]): row["value"] for row in document["rows"]}
    found = measured.load(name)
    assert found.values and found.values.items() <= rows.items()
    assert (found.gpu, found.date) == (document["host"]["gpu"], document["date"])


def test_it_is_part_of_a_wheel_and_read_in_any_folder(tmp_path):
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["nbhelpers"]
    assert "lessons/*.json" in packaged
    code = "from nbhelpers.lessons import measured; print(len(measured.load('kernels').values))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert int(done.stdout) > 60, done.stderr


@pytest.mark.parametrize("lesson", ["03_kernels", "04_one_set_of_weights"])
def test_no_lesson_reads_the_repositorys_results_or_shows_nan(lesson):
    cells = json.loads((ROOT / f"notebooks/{lesson}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any("benchmarks/results" in "".join(cell["source"]) for cell in code)
    printed = "".join("".join(output.get("text", "")) for cell in code for output in cell["outputs"])
    assert "nan" not in printed.split() and "measured on NVIDIA" in printed
