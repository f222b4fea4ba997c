"""The quickstart in JupyterLab, as a reader goes through it: run all, close the tab while it trains, open it again,
stop, ask for the panel, go on, then in the dark and in a small window. Compared is what is where, and what it says."""

import re

import pytest
from browser import LOOK, ROOT, Notebook, fresh_copy, jupyterlab

from nbhelpers.panel import curves

TRAIN = "result = trainer.train()"
LIVE = re.compile(r"^\s*live\s*$")
AA = 4.5  # contrast of a text, https://www.w3.org/TR/WCAG22/#contrast-minimum
LEGIBLE = 9.0  # CSS pixels
FOLD = 700  # CSS pixels: of a laptop's window what is left to a notebook


@pytest.fixture(scope="module")
def seen(browser, tmp_path_factory):
    """{moment: what was there then}: how the panel looked (see LOOK), or what cells said."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed (pip install -e '.[browser]')")
    folder, seen = tmp_path_factory.mktemp("quickstart"), {}
    values = {"OUT": str(folder / "out"), "STEPS": 300}  # more than it comes to before it is stopped
    copy = folder / "notebooks/quickstart.ipynb"
    fresh_copy(ROOT / "notebooks/00_quickstart.ipynb", copy, values)
    text = copy.read_text()
    assert text.count("solved_steps=10") == 1
    copy.write_text(text.replace("solved_steps=10", "solved_steps=300"))  # solved after 50, it would end by itself
    with jupyterlab(folder) as address:
        tab = Notebook(browser, address, "quickstart.ipynb")
        tab.command("notebook:run-all-cells")
        third = re.compile(r"step ([3-9]|\d\d+)/300")  # or a later one: a busy page does not show each
        tab.output(TRAIN).get_by_text(third).first.wait_for(timeout=180_000)
        tab.output(TRAIN).locator("img").wait_for()
        seen["during"] = tab.output(TRAIN).evaluate(LOOK)
        tab.page.close()

        tab = Notebook(browser, address, "quickstart.ipynb")
        tab.press_stop()
        tab.wait(180)
        tab.new_cell("live")
        tab.output(LIVE).locator("img").wait_for()
        seen["reopened"] = tab.output(LIVE).evaluate(LOOK)
        tab.run_below(TRAIN)
        tab.wait(180)
        seen["errors"], seen["after"] = tab.errors(), tab.output("comparison = ").inner_text()

        tab.command("apputils:change-theme", theme="JupyterLab Dark")
        tab.page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
        tab.page.set_viewport_size({"width": 800, "height": 900})
        tab.page.wait_for_timeout(500)  # the theme's colours and the new width
        seen["dark and narrow"] = tab.output(LIVE).evaluate(LOOK)
        seen["window"] = tab.page.evaluate("getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor")
        tab.output(LIVE).scroll_into_view_if_needed()
        tab.page.screenshot(path=folder / "dark_and_narrow.png")  # for whoever looks into a failure
        tab.page.close()
    return seen


def place(look, start: str) -> dict:
    """Where the first text is that begins with `start`."""
    return next(text["box"] for text in look["texts"] if text["words"].startswith(start))


@pytest.mark.parametrize("moment, head", [("during", "step "), ("reopened", "stopped: step ")])
def test_the_curve_is_above_the_fold_then_numbers_then_answers(seen, moment, head):
    look = seen[moment]
    (picture,) = look["pictures"]
    top = place(look, head)["top"]
    assert picture["natural"] > 0 and picture["box"]["width"] > 600
    # the reward is in the picture's first row of plots
    first_row = picture["box"]["top"] + picture["box"]["height"] / 2
    assert top < picture["box"]["top"] < first_row < top + FOLD
    assert picture["box"]["bottom"] <= place(look, "reward function")["top"] < place(look, "always the same")["top"]


@pytest.mark.parametrize("moment", ["during", "reopened", "dark and narrow"])
def test_a_picture_is_whole_and_told_in_words(seen, moment):
    look = seen[moment]
    (picture,) = look["pictures"]
    assert look["box"]["left"] <= picture["box"]["left"] and picture["box"]["right"] <= look["box"]["right"]
    assert place(look, "The curves in words")["top"] >= picture["box"]["bottom"] - 1


def test_a_closed_tab_loses_nothing_and_stop_keeps_what_was_learned(seen):
    texts = [text["words"] for text in seen["reopened"]["texts"]]
    step = next(int(found[1]) for text in texts if (found := re.match(r"stopped: step (\d+)/300", text)))
    assert 3 <= step < 300
    assert any(re.fullmatch(r"[\d.]+ → [\d.]+", text) for text in texts)  # the reward, from start to end
    assert any(text.endswith("best answer of a group") for text in texts)


def test_after_the_stop_the_cells_below_run(seen):
    assert seen["errors"] == []
    assert "before" in seen["after"] and "after" in seen["after"] and "<answer>" in seen["after"]


@pytest.mark.parametrize("moment", ["reopened", "dark and narrow"])
def test_every_text_can_be_read_in_both_themes(seen, moment):
    assert [text for text in seen[moment]["texts"] if text["contrast"] < AA or text["size"] < LEGIBLE] == []


def test_the_second_look_was_in_the_dark(seen):
    assert sum(map(int, re.findall(r"\d+", seen["window"])[:3])) < 3 * 64


def test_at_800_pixels_nothing_is_cut_and_the_letters_of_the_picture_are_legible(seen):
    look = seen["dark and narrow"]
    assert look["wider"] <= 0 and look["box"]["right"] <= 800
    assert all(text["box"]["right"] <= look["box"]["right"] + 1 for text in look["texts"])
    (picture,) = look["pictures"]
    letters = curves.LETTER / 72 / curves.WIDTH * picture["box"]["width"]  # the picture is WIDTH inches wide
    assert letters >= LEGIBLE
