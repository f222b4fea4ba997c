"""The README says what the results files say."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_its_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `python benchmarks/readme.py` and commit README.md"


def test_the_check_can_fail(tmp_path):
    for folder in ("benchmarks", "docs", "notebooks", "pyproject.toml"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text().replace("| 9.11 → 9.9 |", "| 9.11 → 9.8 |"))
    script = (ROOT / "benchmarks/readme.py").read_text().replace(
        "Path(__file__).parents[2]", f"__import__('pathlib').Path({str(tmp_path)!r})"
    )  # fmt: skip
    assert subprocess.run([sys.executable, "-c", f"__file__ = 'x'\n{script}", "--check"]).returncode == 1


def test_joined_rows_say_which_call_they_came_from(tmp_path):
    old = json.loads((ROOT / "benchmarks/results/engines.json").read_text())
    (one, two), own = [(row["what"], row["who"]) for row in old["rows"][:2]], f"{old['date']}, {old['command']}"
    calls = {"a": [(one, 1.0), (two, 1.0)], "b": [(two, 2.0), (("new", "ours"), 2.0)]}
    for name, values in calls.items():
        rows = [{"what": what, "who": who, "value": value, "unit": "s"} for (what, who), value in values]
        document = {"host": {"gpu": name}, "date": f"day {name}", "command": f"call {name}", "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    files = [str(tmp_path / f"{name}.json") for name in calls]
    command = [sys.executable, "benchmarks/engines.py", "--out", str(tmp_path / "joined"), "--join", *files]
    subprocess.run(command, cwd=ROOT, check=True)
    joined = json.loads((tmp_path / "joined/engines.json").read_text())
    assert {**joined, "rows": 0} == {"host": {"gpu": "b"}, "date": "day b", "command": "call b", "rows": 0}
    wanted = {(row["what"], row["who"]): (row["value"], row.get("run", own)) for row in old["rows"]}
    wanted |= {one: (1.0, "day a, call a"), two: (2.0, "day b, call b"), ("new", "ours"): (2.0, "day b, call b")}
    assert {(row["what"], row["who"]): (row["value"], row["run"]) for row in joined["rows"]} == wanted
