"""The tables of docs/recipes.md: planned where it says so, and a dash for what nobody measured."""

import json

import pytest

from benchmarks import recipe_tables, tables
from benchmarks.step import sizes
from nbhelpers import memory, recipes


@pytest.fixture(autouse=True)
def real(monkeypatch):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)


def lines(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def test_what_is_planned_is_what_the_planner_says():
    header, _, *rows = lines(recipe_tables.planned())
    assert [row[0] for row in rows] == [f"`{name}`" for name in recipes.NAMES]
    assert [name for name in header if "planned" in name] == header[-3:]
    long_run = rows[0]
    plan = memory.plan(**recipes.get("long-run").takes)
    assert long_run[2:4] == ["6 answers of 456 tokens", "22,419"]
    assert [float(cell) for cell in long_run[-2:]] == [round(plan.step_seconds, 1), round(plan.hours, 1)]
    header, _, *rows = lines(recipe_tables.stages())
    assert [row[0] for row in rows] == ["8,192", "16,384", "24,576"] and all(float(row[2]) <= 24 for row in rows)
    assert [float(row[-1]) for row in rows] == sorted(float(row[-1]) for row in rows)


def test_every_measured_row_is_one_that_a_case_writes():
    names = {f"{case.preset}/{case.label}" for case in sizes.CASES.values()}
    assert {what.rpartition("/")[0] for what in recipe_tables.MEASURED} <= names


def test_without_results_there_are_dashes_and_with_them_figures_and_where_they_are_from(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for text in (recipe_tables.measured(), recipe_tables.r1(), recipe_tables.r1_real(), recipe_tables.stages_real()):
        assert {row[-1] for row in lines(text)[2:]} == {"–"} and text.endswith("a dash is no figure.")
    what = "qwen2.5-3b/long-run/step_time"
    document = {"host": {"gpu": "Some card", "torch": "2"}, "date": "2026-01-02", "command": "call"}
    rows = [{"what": what, "who": "ours", "value": 1.2345, "unit": "s", "planned": 1.5},
            {"what": "qwen2.5-32b/1K/step_time", "who": "ours", "value": 9.0, "unit": "s"}]  # fmt: skip
    (tmp_path / "sizes.json").write_text(json.dumps(document | {"rows": rows}))
    after = [{"what": "workshop/r1_recipe/accuracy_after", "who": "ours", "value": 0.98, "unit": "share"}]
    (tmp_path / "recipes.json").write_text(json.dumps(document | {"rows": after}))
    text = recipe_tables.measured()
    assert lines(text)[2][-2:] == ["1.23", "1.50"] and lines(text)[3][-2:] == ["–", "–"] and "Some card" in text
    text = recipe_tables.r1()
    assert [row[-1] for row in lines(text)[2:]] == ["–", "–", "–", "–", "98.0%"] and "Some card" in text


def test_what_was_measured_of_a_real_model_stands_in_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    head, about = "qwen2.5-coder-1.5b", {"low": 0.7, "high": 0.81, "in_form": 0.9, "tokens": 130.4, "steps": 60}
    values = {
        "r1_recipe/accuracy_zero": (0.755, about | {"seconds": 181.2}), "r1_recipe/seconds": (480.0, {}),
        "r1_recipe/peak_driver": (6.9, {}), "stages/steps_256": (10, {"ended": "31% of the completions were cut off"}),
        "stages/steps_1024": (0, {"ended": "not reached"}), "stages/right_before": (0.4, {}),
        "stages/right_after": (0.5, {}),
    }  # fmt: skip
    rows = [{"what": f"{head}/{what}", "who": "ours", "value": v, **more} for what, (v, more) in values.items()]
    document = {"host": {"gpu": "Some card"}, "date": "2026-01-02", "command": "call", "rows": rows}
    (tmp_path / "recipes_gpu.json").write_text(json.dumps(document))
    text = recipe_tables.r1_real()
    base, zero, *_ = lines(text)[2:]
    assert base[1:] == ["–"] * 5 and zero[1:] == ["75.5% (70.0% to 81.0%)", "90.0%", "130", "60", "181"]
    assert "8.0 minutes from the loading on, 6.90 GB by the driver. Measured on Some card" in text
    text = recipe_tables.stages_real()
    assert lines(text)[2:] == [
        ["256", "31% of the completions were cut off", "10"], ["512", "–", "–"], ["1,024", "not reached", "0"],
    ]  # fmt: skip
    assert "Right, of held-out stories: 40.0% → 50.0%. Measured on Some card" in text
