"""README.md, docs/benchmarks.md and docs/recipes.md say what the results files and the planner say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import method_tables, readme, recipe_tables, tables
from benchmarks.real import __main__ as real

ROOT = Path(__file__).parents[2]


def test_its_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, "-m", "benchmarks.readme", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `python -m benchmarks.readme` and commit README.md and docs"


def test_the_check_can_fail_on_each_page(tmp_path):
    for name in ("benchmarks", "nbhelpers", "notebooks", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").mkdir()
    names = ("README.md", "docs/benchmarks.md", "docs/recipes.md", "docs/performance.md", "docs/outgrow.md")
    pages = {name: (ROOT / name).read_text() for name in names}
    check = [sys.executable, "-m", "benchmarks.readme", "--check"]
    for page, right, wrong, status in (
        ("README.md", "", "", 0),
        ("README.md", "→ 100.0 % |", "→ 100.1 % |", 1),
        ("docs/benchmarks.md", "| 9.11 → 9.9 |", "| 9.11 → 9.8 |", 1),
        ("docs/recipes.md", "| 22,419 |", "| 22,420 |", 1),
    ):
        for name, text in pages.items():
            (tmp_path / name).write_text(text.replace(right, wrong) if name == page else text)
        done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, "")  # an error would exit with 1 as well


def test_the_table_of_methods_shows_the_worst_of_the_seeds_and_a_dash_for_what_was_not_run(tmp_path, monkeypatch):
    seeds = {0: (0.99, 20.0, 1.1), 1: (0.97, 30.0, 1.3)}  # right after, seconds, GB
    rows = []
    for seed, values in seeds.items():
        for what, value in zip(("accuracy_after", "seconds", "peak"), values, strict=True):
            rows.append({"what": f"workshop/rloo/seed-{seed}/{what}", "who": "ours", "value": value, "unit": ""})
        rows.append({**rows[-1], "what": f"workshop/rloo/seed-{seed}/accuracy_before", "value": 0.324})
    host = {"cores": 2, "cpu": "any"}
    document = {"host": host, "date": "day", "command": "call", "rows": real.worst(rows)}
    (tmp_path / "methods.json").write_text(json.dumps(document))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in readme.methods().splitlines()}
    assert lines["RLOO"][1:5] == ["32.4% → 97.0%", "2", "30", "1.30"]
    assert lines["PPO"][1:5] == ["–"] * 4
    assert float(lines["PPO"][5]) > float(lines["RLOO"][5]) > 4  # planned: the value head, and groups of two


def test_the_table_of_countdown_has_a_row_for_each_step_seen_here_or_published(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert recipe_tables.countdown() == "Nobody has run it on a GPU yet."
    label, rows = "qwen2.5-coder-1.5b/countdown/seed-0", []
    for when, value in (("before", 0.04), (50, 0.125), (130, 0.25)):
        for name in ("solved", "three", "four", "form"):
            rows.append({"what": f"{label}/{name}_{when}", "who": "ours", "value": value, "unit": "share"})
    rows.append({"what": f"{label}/seconds", "who": "ours", "value": 480.0, "unit": "s"})
    rows.append({"what": f"{label}/peak_driver", "who": "ours", "value": 6.9, "unit": "GB"})
    document = {"host": {"gpu": "any"}, "date": "day", "command": "call", "rows": real.worst(rows)}
    (tmp_path / "countdown.json").write_text(json.dumps(document))
    table, _, told = recipe_tables.countdown().partition("\n\n")
    lines = {line.strip("| ").split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in table.splitlines()[2:]}
    assert list(lines) == ["0", "50", "100", "130", "200", "450"]
    assert lines["50"] == ["12.5%"] * 4 + ["in form"] and lines["100"] == ["–"] * 4 + ["25 %"]
    assert lines["130"] == ["25.0%"] * 4 + ["–"] and told.startswith(
        "8.0 minutes of training, 6.90 GB. Measured on any"
    )


def test_the_tables_of_real_runs_and_peaks_have_a_dash_for_what_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for made in (method_tables.real(), method_tables.peaks()):
        body = [line.strip("| ").split(" | ") for line in made.splitlines()[2:-2]]
        assert body and all(set(cells[1:]) == {"–"} for cells in body) and made.endswith("\n\nNot measured yet.")
    head, who = "qwen2.5-coder-1.5b", {"who": "ours", "unit": ""}
    rows = [{"what": f"{head}/{what}", "value": value, **who} for what, value in (
        ("rloo/numbers_after", 0.6), ("rloo/steps", 60), ("rloo/seconds", 99.6),
        ("rloo/peak_driver", 6.5),
    )]  # fmt: skip
    points = [[i, i / 8, 0.1, None] for i in range(1, 9)]
    rows += [{"what": f"{head}/{name}/curve", "value": 8, "points": points, **who} for name in ("rloo", "sft")]
    peaks = [{"what": f"llama-3.2-1b/ppo/{what}", "who": one, "value": value, "unit": "GB"} for what, one, value in (
        ("step_peak", "ours", 4.0), ("step_peak", "planner", 4.2), ("step_peak_driver", "ours", 4.9),
        ("step_time", "ours", 3.0),
    )]  # fmt: skip
    untrained = [{"what": f"{head}/7GB/numbers_before", "value": 0.4, **who}]
    for name, found in (("methods_gpu", rows), ("step", peaks), ("real", untrained)):
        document = {"host": {"gpu": "a card"}, "date": "day", "command": "call", "rows": found}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    lines = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in method_tables.real().splitlines()
    }
    assert lines["RLOO"][1:] == ["40.0% → 60.0%", "–", "–", "0.19 0.44 0.69 0.94", "60", "100", "6.50"]
    assert lines["SFT"][4] == "0.10 0.10 0.10 0.10" and lines["PPO"][1:] == ["–"] * 7
    assert "| PPO | 4.90 | 4.00 | 4.20 | 1.05 | 3.00 |" in method_tables.peaks()
    assert "Measured on a card" in method_tables.peaks()


@pytest.mark.parametrize("file", sorted(tables.RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_row_of_an_earlier_run_says_when_and_by_which_call(file):
    runs = {row["run"] for row in json.loads(file.read_text())["rows"] if "run" in row}
    assert [run for run in runs if not re.match(r"\d{4}-\d\d-\d\d [^,]*, ", run)] == []


def test_no_comparison_quotes_what_is_to_be_measured_again(monkeypatch):
    """TRL's columns in the step's results were measured without its gradient checkpointing."""
    read = []

    class Spy(readme.Results):
        def __init__(self, name):
            read.append(name)
            super().__init__(name)

    monkeypatch.setattr(readme, "Results", Spy)
    readme.peers()
    assert read and "step" not in read
    shown = [ROOT / "docs/benchmarks.md"]
    shown += [path for path in (ROOT / "notebooks").glob("*.ipynb") if "trl-1" in path.read_text()]
    assert len(shown) > 1
    for page in shown:
        assert "to be measured again" in page.read_text(), page


def test_joined_rows_say_which_call_they_came_from(tmp_path):
    old = json.loads((ROOT / "benchmarks/results/engines.json").read_text())
    (one, two), own = [(row["what"], row["who"]) for row in old["rows"][:2]], f"{old['date']}, {old['command']}"
    calls = {"a": [(one, 1.0), (two, 1.0)], "b": [(two, 2.0), (("new", "ours"), 2.0)]}
    for name, values in calls.items():
        rows = [{"what": what, "who": who, "value": value, "unit": "s"} for (what, who), value in values]
        document = {"host": {"gpu": name}, "date": f"day {name}", "command": f"call {name}", "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    files = [str(tmp_path / f"{name}.json") for name in calls]
    command = [sys.executable, "-m", "benchmarks.engines", "--out", str(tmp_path / "joined"), "--join", *files]
    subprocess.run(command, cwd=ROOT, check=True)
    joined = json.loads((tmp_path / "joined/engines.json").read_text())
    assert {**joined, "rows": 0} == {"host": {"gpu": "b"}, "date": "day b", "command": "call b", "rows": 0}
    wanted = {(row["what"], row["who"]): (row["value"], row.get("run", own)) for row in old["rows"]}
    wanted |= {one: (1.0, "day a, call a"), two: (2.0, "day b, call b"), ("new", "ours"): (2.0, "day b, call b")}
    assert {(row["what"], row["who"]): (row["value"], row["run"]) for row in joined["rows"]} == wanted
    cards = {(row["what"], row["who"]): row["gpu"] for row in joined["rows"]}
    assert [cards[key] for key in (one, two, ("new", "ours"))] == ["a", "b", "b"]
    assert set(cards.values()) == {"a", "b", *(row.get("gpu", old["host"]["gpu"]) for row in old["rows"])}


def test_rows_of_several_cards_are_measured_on_each(tmp_path, monkeypatch):
    """A file's host is its last call's: the other rows would be said to come from a card that they have not seen."""
    rows = [{"what": what, "who": "ours", "value": 1.0, "unit": "s"} for what in ("old", "older", "own")]
    rows[0] |= {"gpu": "T4", "run": "2026-01-02 10:00 UTC, a"}
    rows[1] |= {"gpu": "T4", "run": "2026-01-01 10:00 UTC, b"}
    document = {"host": {"gpu": "L4"}, "date": "2026-01-03 10:00 UTC", "command": "c", "rows": rows}
    (tmp_path / "seen.json").write_text(json.dumps(document))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    results, (old, older, own) = tables.Results("seen"), [(row["what"], row["who"]) for row in rows]
    assert results.where(own) == results.where() == "L4, 2026-01-03" and results.where(old) == "T4, 2026-01-02"
    assert results.source(old, older, own) == "Measured on L4, 2026-01-03; T4, 2026-01-01; ; `b`, `a`, `c`."
