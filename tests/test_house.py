"""The house keeps its storeys: no import climbs to a room above its own, none goes in a circle, and doors open fast."""

import re
import subprocess
import sys

import house
import pytest

FILES = sorted(house.PACKAGE.rglob("*.py"))


def test_no_import_climbs():
    assert house.climbs() == []


@pytest.mark.parametrize("folder", ["nbhelpers", "benchmarks"])
def test_no_circles(folder):
    assert house.circles(house.files_graph(house.ROOT / folder)) == []


def test_no_room_needs_a_room_that_needs_it():
    assert house.circles(house.rooms_graph()) == []


def test_the_floors_are_the_folders():
    """Each room of the package has one floor, and no floor names a room that is not there."""
    named = [room for floor in house.floors() for room in floor]
    assert sorted(named) == sorted(house.rooms())


def test_the_page_has_the_tree():
    """docs/ARCHITECTURE.md has a line for each file of the package and of the benchmarks: its docstring's first."""
    assert house.page() == house.PAGE.read_text(), "python tests/helpers/house.py --write"


def test_the_journeys_name_files_that_are_there():
    journeys = house.PAGE.read_text().partition("## Four journeys")[2].partition("## Every file")[0]
    named = set(re.findall(r"`([\w/]+\.py)`", journeys))
    assert len(named) > 30 and [name for name in named if not (house.PACKAGE / name).is_file()] == []


def test_few_doors_at_the_top():
    assert len(list(house.PACKAGE.glob("*.py"))) <= 12
    assert len(house.rooms()) <= 25
    assert sum(map(len, house.rooms_graph().values())) <= 96  # eleven of them are `progress`: what takes long says so


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(house.PACKAGE)))
def test_a_file_is_one_thing(file):
    assert len(file.read_text().splitlines()) <= 350


@pytest.mark.parametrize(
    "line",
    [
        "import nbhelpers.training",
        "from nbhelpers import training",
        "from nbhelpers.training import trainer",
        "from nbhelpers.training.trainer import X",
        "from ..training import trainer",
        "from ..training.trainer import X",
        "from nbhelpers import LeanGRPOTrainer, grpo, training",
        "def f():\n    from nbhelpers.training.trainer import X",
        "import importlib\nimportlib.import_module('nbhelpers.training.trainer')",
    ],
)
def test_a_planted_climb_is_found(tmp_path, monkeypatch, line):
    """The tests above can fail: a climb is found in every form an import can take."""
    package = tmp_path / "nbhelpers"
    (package / "kernels").mkdir(parents=True)
    (package / "training").mkdir()
    (package / "training" / "trainer.py").touch()
    (package / "training" / "__init__.py").touch()
    (package / "grpo.py").touch()
    (package / "kernels" / "rope.py").write_text(line)
    monkeypatch.setattr(house, "PACKAGE", package)
    monkeypatch.setattr(house, "floors", lambda: [["training"], ["kernels"], ["grpo"]])
    assert house.climbs() == ["kernels/rope.py imports training, a room above its own"]


def test_a_planted_circle_is_found():
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert house.circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("module", ["nbhelpers", "nbhelpers.presets", "nbhelpers.host", "nbhelpers.tasks",
                                    "nbhelpers.rewards", "nbhelpers.evaluate"])  # fmt: skip
def test_import_is_light(module):
    heavy = "('torch', 'transformers', 'trl', 'datasets', 'matplotlib')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
