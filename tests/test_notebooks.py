"""What is true of every committed notebook, without running it (make test runs them too, through nbmake)."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").rglob("*.ipynb"))
MACHINE_PATH = re.compile(r"/(?:home|root|work|tmp|opt|Users)/\w+")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def text(request):
    return request.param.read_text()


def test_it_is_small_and_carries_no_widgets(text):
    assert len(text.encode()) <= 200_000
    assert "application/vnd.jupyter.widget" not in text and '"widgets"' not in text


def test_it_names_no_path_of_the_machine_it_ran_on(text):
    assert not MACHINE_PATH.findall(text)


def test_its_cells_are_short_and_its_outputs_without_errors(text):
    for number, cell in enumerate(json.loads(text)["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert len("".join(cell["source"]).splitlines()) <= 25, f"cell {number} is too long to read aloud"
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", f"cell {number}: {output}"


def test_a_lesson_keeps_its_outputs(text):
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells) and any(cell["outputs"] for cell in cells)
