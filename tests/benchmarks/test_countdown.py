"""The benchmark of Countdown: lesson 7 as a script with a model of a few thousand weights, stopped and called again."""

import json
import os
import shutil
import subprocess

from benchmarks import common, countdown
from nbhelpers import replay


def call(python, folder, *more: str) -> str:
    command = [*python, "-m", "benchmarks.countdown", "--steps", "3", "--every", "2", "--n", "8", *more]
    command += ["--out", str(folder / "out"), "--folder", str(folder / "run")]
    environment = os.environ | {"NBHELPERS_SMOKE": "1", "PYTHONPATH": str(common.ROOT), "OUT": str(folder / "back")}
    done = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_run_that_was_stopped_goes_on_and_leaves_rows_and_a_run_to_replay(tmp_path, warm):
    call(warm, tmp_path, "--minutes", "0")
    values = {row["what"]: row for row in json.loads((tmp_path / "out" / "countdown.json").read_text())["rows"]}
    assert "qwen2.5-coder-1.5b/countdown/solved_1" in values, "its time was over after the first step"
    before = values["qwen2.5-coder-1.5b/countdown/seconds"]["value"]

    call(warm, tmp_path)
    values = {row["what"]: row for row in json.loads((tmp_path / "out" / "countdown.json").read_text())["rows"]}
    label = "qwen2.5-coder-1.5b/countdown"
    for when in ("before", 1, 2, 3):
        of = [values[f"{label}/{name}_{when}"] for name in ("solved", "three", "four", "form")]
        assert [row["n"] for row in of] == [8, *(row["n"] for row in of[1:3]), 8] and of[1]["n"] + of[2]["n"] == 8
        assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in of)
    assert values[f"{label}/seconds"]["value"] > before and values[f"{label}/seconds"]["steps"] == 3
    assert [point[0] for point in values[f"{label}/curve"]["points"]] == [1, 2, 3]

    for folder in (tmp_path / "out", tmp_path / "back" / "out"):
        file = folder / "countdown-run.json"
        assert replay.Replay(file).model == "Qwen2.5-Coder-1.5B-Instruct (GGUF, Q4_K_M) on Countdown"
        assert [point["step"] for point in json.loads(file.read_text())["held_out"]] == [0, 1, 2, 3]

    # and the lesson shows that run where there is no GPU
    shutil.copy(file, tmp_path / "countdown.json")
    cells = [source for _, source in common.code_cells(countdown.NOTEBOOK)]
    first = f"from pathlib import Path\nfrom nbhelpers import replay\nreplay.RUNS = Path({str(tmp_path)!r})"
    code = "\n\n".join([first, cells[0], "HELD_OUT = 8", *cells[1:]])
    environment = os.environ | {"PYTHONPATH": str(common.ROOT), "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    said = subprocess.check_output([*warm, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert "REPLAY of a recorded run" in said and "held-out puzzles:\nstep   0: solved" in said
    assert said.count("\nstep ") >= 4 and "no run is recorded" not in said


def test_every_cell_that_it_exchanges_is_in_the_lesson():
    tags = set().union(*(tags for tags, _ in common.code_cells(countdown.NOTEBOOK)))
    assert countdown.BEHIND.keys() <= tags
