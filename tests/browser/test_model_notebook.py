"""A model notebook in JupyterLab in smoke mode, from top to bottom: every cell ends, and the panel says so."""

import pytest
from browser import LOOK, ROOT, Notebook, fresh_copy, jupyterlab

NAME = "qwen2.5-1.5b"


@pytest.fixture(scope="module")
def tab(browser, tmp_path_factory):
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed (pip install -e '.[browser]')")
    folder = tmp_path_factory.mktemp("model")
    fresh_copy(ROOT / f"notebooks/models/{NAME}.ipynb", folder / "notebooks/model.ipynb", {"OUT": str(folder / "out")})
    with jupyterlab(folder) as address:
        tab = Notebook(browser, address, "model.ipynb")
        tab.command("notebook:run-all-cells")
        tab.wait(240)
        yield tab
        tab.page.close()


def test_every_cell_has_run_and_none_complains(tab):
    assert tab.not_run() == [] and tab.errors() == []


def test_the_panel_shows_a_finished_run_and_its_curves(tab):
    look = tab.output("trainer.train(").evaluate(LOOK)
    assert any(text["words"].startswith("done: step 2/2") for text in look["texts"])
    assert len(look["pictures"]) == 1 and look["wider"] <= 0


def test_before_and_after_stand_side_by_side(tab):
    look = tab.output("before_after(before, after").evaluate(LOOK)
    first = {text["words"]: text["box"] for text in reversed(look["texts"])}
    before, after = first["before"], first["after"]
    assert before["right"] <= after["left"] and abs(before["top"] - after["top"]) < 2
