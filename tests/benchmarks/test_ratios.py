"""`python -m benchmarks.ratios`: one case in this tree, on tiny shapes, and what is made of the rows of two trees."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import common, harness
from benchmarks.ratios import __main__ as ratios
from benchmarks.ratios import cases

FEW = ("llama-decode", "qwen-train")


def planned(tmp_path: Path, **options) -> list[harness.Job]:
    chosen = {"only": None, "smoke": True, "base": tmp_path, "minutes": 9.0}
    return ratios.jobs(argparse.Namespace(**chosen | options), tmp_path)


def test_every_case_runs_with_both_trees_which_take_turns_to_be_first(tmp_path):
    jobs = [job for job in planned(tmp_path) if job["kind"] != "checkpoint"]
    assert [job["case"] for job in jobs] == [name for name in ratios.CASES for _ in range(2)]
    for number, pair in enumerate(zip(jobs[::2], jobs[1::2], strict=True)):
        assert [job["who"] for job in pair] == (["before", "ours"] if number % 2 == 0 else ["ours", "before"])
        assert {job["tree"] for job in pair} == {str(tmp_path), str(common.ROOT)}
        own = dict.fromkeys(("who", "tree", "ready"))
        assert pair[0] | own == pair[1] | own


def test_the_checkpoint_is_made_once_before_the_loads_that_read_it(tmp_path):
    jobs = planned(tmp_path, only=["llama-load"])
    assert [job["kind"] for job in jobs] == ["checkpoint", "load", "load"]
    assert len({job["folder"] for job in jobs}) == 1


def test_a_row_has_its_value_over_that_of_before():
    rows = [common.row("m/decode", "ours", 30.0, "tokens/s"), common.row("m/decode", "before", 20.0, "tokens/s"),
            common.row("m/alone", "ours", 1.0, "s"), common.row("m/zero", "before", 0.0, "GB")]  # fmt: skip
    assert [row.get("ratio") for row in ratios.with_ratios(rows)] == [1.5, 1.0, None, None]
    assert "1.500 x" in ratios.table(ratios.with_ratios(rows)).splitlines()[0]


@pytest.mark.parametrize("case", FEW)
def test_a_case_writes_the_rows_that_the_table_names(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    (job,) = [job for job in planned(tmp_path, only=[case]) if job["who"] == "ours"]
    cases.main({**job, "cells": job.get("cells", [])[:2], "launches": 0})
    assert "FAILED" not in capsys.readouterr().out
    rows = {row["what"].partition("/")[2]: row for row in harness.read_rows(Path(job["out"]))}
    wanted = {"qwen-train": {"4K-3GB/train_time", "4K-4GB/train_time"},
              "llama-decode": {"batch-2/decode", "batch-4/decode", "batch-2/memory_above", "prefill-13K/seconds",
                               "batch-2-dynamic/decode", "batch-2-dynamic/step_against_nf4"}}  # fmt: skip
    assert wanted[case] <= set(rows)
    assert all(row["who"] == "ours" and row["value"] > 0 for what, row in rows.items() if "memory" not in what)


def test_a_case_refuses_a_tree_that_is_not_the_one_imported(tmp_path):
    (job, _) = planned(tmp_path, only=["qwen-train"])
    with pytest.raises(SystemExit, match="nbhelpers is imported from"):
        cases.main(job)


def test_a_base_without_the_package_is_refused_by_name(tmp_path):
    command = [sys.executable, "-m", "benchmarks.ratios", "--smoke", "--base", str(tmp_path)]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "git worktree add" in done.stderr


def test_every_job_is_json(tmp_path):
    for job in planned(tmp_path):
        assert json.loads(json.dumps(job))["kind"] in cases.KINDS
