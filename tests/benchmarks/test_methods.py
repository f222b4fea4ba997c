"""The benchmark of the methods: the notebooks' names are exchanged, and what its results must show."""

import json

import pytest
from datasets import Dataset

import nbhelpers
from benchmarks import common, methods
from benchmarks.real import cells
from benchmarks.real.__main__ import worst
from nbhelpers import rewards, tasks


@pytest.fixture
def names(monkeypatch):
    for name in ("LeanGRPOConfig", "LeanGRPOTrainer"):
        monkeypatch.setattr(nbhelpers, name, getattr(nbhelpers, name))  # is put back


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_notebooks_cells_get_the_methods_config(method, names, tmp_path):
    wanted = getattr(nbhelpers, methods.METHODS[method].config)
    methods.take(method)
    args = nbhelpers.LeanGRPOConfig(
        output_dir=str(tmp_path), max_steps=7, num_generations=4, per_device_train_batch_size=8, beta=0.0, seed=5,
        max_completion_length=32, dynamic_sampling=1, use_cpu=True, bf16=False,
    )  # fmt: skip
    assert type(args) is wanted and args.seed == 5
    for name, value in methods.METHODS[method].changes.items():
        assert getattr(args, name) == value


def test_texts_are_worked_answers_of_both_kinds(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "2 pens and 3 pens?", "answer": "2+3=5\n#### 5"}))
    prompts = [tasks.messages(question) for question in ("2 pens and 3 pens?", "Which is bigger? 9.11 or 9.9?")]
    rows = Dataset.from_list([{"prompt": p, "answer": a} for p, a in zip(prompts, ("5", "9.9"), strict=True)])
    texts = [row["completion"][0]["content"] for row in methods.with_texts(rows, str(tmp_path))]
    assert all(rewards.formatted(text) for text in texts)
    assert "\n2+3=5\n" in texts[0] and "tenths 1 < 9. So 9.9 is bigger." in texts[1]
    code = cells.notebook({"method": "sft", "questions": str(tmp_path)})
    assert code.index("methods.take(") < code.index("LeanGRPOConfig")


def test_rows_of_earlier_runs_keep_their_call_and_the_worst_peak_counts(tmp_path, monkeypatch):
    def row(seed, value):
        return {"what": f"workshop/ppo/seed-{seed}/peak", "who": "ours", "value": value, "unit": "GB"}

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    document = {"date": "2026-11-26 17:06 UTC", "command": "python -m benchmarks.methods", "rows": [row(0, 2.0)]}
    (tmp_path / "methods.json").write_text(json.dumps(document))
    rows = {row["what"]: row for row in common.merged("methods", [row(1, 1.0)], worst)}
    assert rows["workshop/ppo/seed-0/peak"]["run"] == "2026-11-26 17:06 UTC, python -m benchmarks.methods"
    assert "run" not in rows["workshop/ppo/seed-1/peak"], "it is the file's own date and command"
    assert rows["workshop/ppo/peak"]["value"] == 2.0 and rows["workshop/ppo/peak"]["of_seeds"] == 2


@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_each_method_learns_the_quickstarts_task(method):
    rows = {row["what"]: row for row in json.loads((common.RESULTS / "methods.json").read_text())["rows"]}
    worst = rows[f"workshop/{method}/accuracy_after"]
    assert worst["of_seeds"] == 3 and worst["value"] >= 0.9
    for seed in (0, 1, 2):
        row = rows[f"workshop/{method}/seed-{seed}/accuracy_after"]
        assert row["value"] >= worst["value"] and row["seed"] == seed and row["seconds"] > 0 and row["peak"] > 0
