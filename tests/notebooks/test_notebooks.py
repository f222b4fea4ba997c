"""What is true of every committed notebook, without running it (make test runs them too, through nbmake)."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from nbhelpers import presets

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.rglob("*.ipynb"))
MODELS = [path for path in NOTEBOOKS if path.parent.name == "models"]
LESSONS = [path for path in NOTEBOOKS if path not in MODELS]
MACHINE_PATH = re.compile(r"/(?:home|root|work|tmp|opt|Users)/\w+")


def parametrize(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@parametrize(NOTEBOOKS)
def test_it_is_small_and_carries_no_widgets(path):
    text = path.read_text()
    assert len(text.encode()) <= 200_000
    assert "application/vnd.jupyter.widget" not in text and '"widgets"' not in text


@parametrize(NOTEBOOKS)
def test_it_names_no_path_of_the_machine_it_ran_on(path):
    assert not MACHINE_PATH.findall(path.read_text())


@parametrize(NOTEBOOKS)
def test_its_cells_are_short_and_its_outputs_without_errors(path):
    for number, cell in enumerate(cells(path)):
        assert len("".join(cell["source"]).splitlines()) <= 25, f"code cell {number} is too long to read aloud"
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", f"code cell {number}: {output}"


@parametrize(LESSONS)
def test_a_lesson_keeps_its_outputs(path):
    code = cells(path)
    assert all(cell["execution_count"] for cell in code) and any(cell["outputs"] for cell in code)


@parametrize(LESSONS)
def test_a_lesson_has_the_badges_and_the_install_cell(path, build):
    assert path.read_text() == build.lesson(path), "run `make notebooks`"


# ---- models/*.ipynb, built from one template ----


def test_every_preset_has_its_notebook():
    assert {path.stem for path in MODELS} == {name for name in presets.names() if presets.get(name).notebook}


@parametrize(MODELS)
def test_a_model_notebook_is_what_the_template_makes(path, build, monkeypatch):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    assert path.read_bytes() == build.model(path.stem).encode(), "run `make notebooks` and commit"


@parametrize(MODELS)
def test_a_model_notebook_has_no_outputs_and_asks_for_a_t4(path):
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(path))
    metadata = json.loads(path.read_text())["metadata"]
    assert metadata["accelerator"] == "GPU" and metadata["colab"] == {"gpuType": "T4", "provenance": []}
    assert metadata["kaggle"]["accelerator"] == "nvidiaTeslaT4" and metadata["kaggle"]["isInternetEnabled"]


@parametrize(MODELS)
def test_a_model_notebook_can_be_read_aloud(path):
    code = ["".join(cell["source"]) for cell in cells(path)]
    assert len(code) <= 15 and sum(len(source.splitlines()) for source in code) <= 120
    assert len(cells(path, "markdown")) >= 15


def test_only_the_title_the_badges_and_the_parameters_differ():
    """No conditionals: two models' notebooks differ in the first cell and in the cell of the parameters."""
    different = set()
    for path in MODELS[1:]:
        pairs = zip(json.loads(path.read_text())["cells"], json.loads(MODELS[0].read_text())["cells"], strict=True)
        different |= {number for number, (own, other) in enumerate(pairs) if own != other}
    tags = [cell["metadata"].get("tags") for cell in json.loads(MODELS[0].read_text())["cells"]]
    assert different == {0, tags.index(["parameters"])}


@parametrize(MODELS)
def test_a_gated_model_says_where_to_get_access(path):
    title = "".join(cells(path, "markdown")[0]["source"])
    preset = presets.get(path.stem)
    assert (f"https://huggingface.co/{preset.hub_id}" in title and "HF_TOKEN" in title) == preset.gated


@parametrize(NOTEBOOKS)
def test_the_badges_open_this_notebook(path):
    title = "".join(cells(path, "markdown")[0]["source"])
    links = re.findall(r"\[!\[Open in \w+\]\(\S+\)\]\((\S+)\)", title)
    assert len(links) == 2
    for link in links:
        assert link.endswith(f"/blob/main/notebooks/{path.relative_to(FOLDER)}"), link
