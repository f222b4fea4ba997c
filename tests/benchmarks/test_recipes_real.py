"""The recipes on real weights: every stage leaves its row, with a small random model in the place of the 1.5B."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, recipes
from benchmarks.real import recipe, worked
from nbhelpers import rewards
from nbhelpers.rewards.guard import RewardError

HEAD = "qwen2.5-coder-1.5b"


def call(python, folder, *more: str) -> dict[str, common.Row]:
    command = [*python, "-m", "benchmarks.recipes", "--real", "any", "--n", "8", "--sampled", "4", *more]
    environment = os.environ | {"NBHELPERS_SMOKE": "1", "PYTHONPATH": str(common.ROOT), "OUT": str(folder / "back")}
    done = subprocess.run(
        [*command, "--out", str(folder / "out")], cwd=common.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    there, back = ((folder / name / "recipes_gpu.json").read_text() for name in ("out", "back/out"))
    assert there == back
    return {row["what"]: row for row in json.loads(there)["rows"]}


def test_every_stage_of_r1_has_its_row_and_when_time_is_over_a_stage_makes_one_update(tmp_path, warm):
    rows = call(warm, tmp_path, "--minutes", "0")
    steps = {"base": 0, "cold_start": 2, "rl": 1, "sft": 2, "after": 1, "zero": 1}
    for name, made in steps.items():
        row = rows[f"{HEAD}/r1_recipe/accuracy_{name}"]
        assert row["steps"] == made and row["n"] == 8 and row["tokens"] > 0 and row["gb"] == 7.0 and "seconds" in row
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
        assert 0 <= row["in_form_low"] <= row["in_form"] <= row["in_form_high"] <= 1
    assert (
        rows[f"{HEAD}/r1_recipe/accuracy_sft"]["asked"],
        rows[f"{HEAD}/r1_recipe/accuracy_cold_start"]["texts"],
    ) == (4, 32)
    for name in ("rl", "after", "zero"):
        curve = rows[f"{HEAD}/r1_recipe/curve_{name}"]
        assert curve["value"] == 1 and [point[0] for point in curve["points"]] == [1]
    assert rows[f"{HEAD}/r1_recipe/seconds"]["value"] > 0


def test_stages_say_how_long_each_was_what_ended_it_and_which_was_not_reached(tmp_path, warm):
    rows = call(warm, tmp_path, "--stages", "--lengths", "4", "8", "16")
    said = {length: rows[f"{HEAD}/stages/steps_{length}"] for length in (4, 8, 16)}
    assert [(row["value"], row["ended"]) for row in said.values()] == [
        (1, "after 1 steps"), (1, "the run ended"), (0, "not reached"),
    ]  # fmt: skip
    assert [point[:2] for point in rows[f"{HEAD}/stages/curve"]["points"]] == [[1, 4.0], [2, 8.0]]
    assert rows[f"{HEAD}/stages/right_before"]["n"] == 8 and rows[f"{HEAD}/stages/right_after"]["steps"] == 2


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    monkeypatch.setattr(sys, "argv", ["recipes", "--real", "any", "--n", "2", "--sampled", "2", "--out", str(tmp_path)])
    taken = []
    monkeypatch.setattr(recipe, "r1", lambda args: taken.append(args) or [common.row("a", "ours", 1, "share")])
    recipes.main()
    return taken[0]


def test_the_base_comes_back_and_a_run_that_breaks_leaves_its_rows(args, tmp_path):
    run = recipe.Run(args, "r1_recipe")
    run.measure("accuracy_base", steps=0)
    few = worked.rows(run.preset.system_prompt)
    run.learn_texts(few)
    changed = [not torch.equal(p, run.first[name].to(p.device)) for name, p in run.trained().items()]
    assert any(changed)
    run.back_to_the_base()
    assert all(torch.equal(p, run.first[name].to(p.device)) for name, p in run.trained().items())
    with pytest.raises(RewardError):
        run.learn_rewards("curve_rl", [None], 1, 1)
    rows = {row["what"]: row for row in json.loads((tmp_path / "recipes_gpu.json").read_text())["rows"]}
    assert rows[f"{HEAD}/r1_recipe/accuracy_base"]["n"] == 2, "this run's, not the one in benchmarks/results"


def test_brief_pays_for_a_right_answer_alone_and_more_for_a_short_one(args):
    *_, brief = recipe.Run.functions(SimpleNamespace(preset=recipe.presets.get("qwen2.5-1.5b"), longest=100))
    text = "<reasoning>\n1 + 1 = {0}\n</reasoning>\n<answer>\n{0}\n</answer>"
    texts = [[{"role": "assistant", "content": text.format(n)}] for n in (2, 2, 3)]
    assert brief(texts, ["2"] * 3, [[0] * 25, [0] * 50, [0]]) == [0.75, 0.5, 0.0]


def test_the_shortest_answer_that_is_right_and_in_form_is_kept():
    def answer(text, correct, formatted, tokens):
        return SimpleNamespace(completion=text, correct=correct, formatted=formatted, tokens=tokens)

    answered = [
        [answer("long", True, True, 9), answer("short", True, True, 5), answer("formless", True, False, 2)],
        [answer("wrong", False, True, 3)],
    ]
    kept = recipe.good_ones([{"prompt": "a"}, {"prompt": "b"}], answered)
    assert kept == [{"prompt": "a", "completion": [{"role": "assistant", "content": "short"}]}]


def test_every_worked_answer_is_right():
    rows = worked.rows("Answer.")
    assert [row["template"] for row in rows] == list(worked.TEXTS)
    for row in rows:
        text = row["completion"][0]["content"]
        assert rewards.formatted(text) and rewards.is_correct(text, row["answer"])
        thought = worked.TEXTS[row["template"]]
        for sum_, value in re.findall(r"((?:[\d.]+ [-+*/] )+[\d.]+) = \$?([\d.]*\d)", thought):
            assert eval(sum_) == pytest.approx(float(value)), thought
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", thought)]
        assert float(row["answer"]) in numbers[-2:], thought
