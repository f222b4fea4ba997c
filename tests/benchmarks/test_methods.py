"""The benchmark of the methods: the notebooks' names are exchanged, and what its results must show."""

import json
import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset

import nbhelpers
from benchmarks import common, methods
from benchmarks.real import __main__ as real
from benchmarks.real import cells
from benchmarks.real.__main__ import worst
from nbhelpers import presets, rewards, tasks


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


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_real_notebooks_own_settings_become_the_methods(method, names, tmp_path, monkeypatch):
    """Its cell as it stands: beta=0.0, groups of 8 and dynamic sampling are not for every method."""
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    wanted = getattr(nbhelpers, methods.METHODS[method].config)
    methods.take(method, str(tmp_path))
    cell = next(s for _, s in common.code_cells(cells.NOTEBOOK) if s.startswith("from nbhelpers import LeanGRPOConfig"))
    task = SimpleNamespace(per_step=lambda wanted: wanted)
    known = {"preset": presets.get("qwen2.5-1.5b"), "task": task, "OUT": str(tmp_path), "STEPS": 60, "SEED": 3}
    exec(cell, known)
    args = known["args"]
    assert type(args) is wanted and (args.max_steps, args.seed) == (60, 3)
    for name, value in methods.METHODS[method].real_changes.items():
        assert getattr(args, name) == value


def test_a_real_run_takes_eight_questions_a_step_and_its_rows_go_to_a_file_of_their_own(tmp_path, monkeypatch):
    asked = []

    def run(job):
        asked.append(job)
        found = {"shares": {}, "steps": job.steps, "settings": {}, "probes": [], "curve": [[1, 0.5, 0.1, 0.2]]}
        return worst(real.rows_of(found, f"{job.model}/{job.label}/seed-{job.seed}"))

    monkeypatch.setattr(methods.real, "run", run)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for method in ("rloo", "ppo"):
        call = f"methods --method {method} --real w.gguf --questions q --steps 9 --after-only --out {tmp_path}/{method}"
        monkeypatch.setattr(sys, "argv", call.split())
        methods.main()
    assert json.loads(asked[0].preset) == {"questions_per_step": 8} and asked[0].steps == 9 and asked[0].after_only
    files = [f"{tmp_path}/{method}/methods_gpu.json" for method in ("rloo", "ppo")]
    monkeypatch.setattr(sys, "argv", ["methods", "--join", *files])
    methods.main()
    rows = {row["what"]: row for row in json.loads((tmp_path / "methods_gpu.json").read_text())["rows"]}
    for method in ("rloo", "ppo"):
        assert rows[f"qwen2.5-coder-1.5b/{method}/curve"]["points"] == [[1, 0.5, 0.1, 0.2]]


def test_texts_are_worked_answers_or_the_models_own_that_are_right_and_in_form(monkeypatch):
    rows = Dataset.from_list([{"prompt": tasks.messages("Which is bigger? 9.11 or 9.9?"), "answer": "9.9"}] * 3)
    (text,) = {row["completion"][0]["content"] for row in methods.with_texts(rows)}
    assert rewards.formatted(text) and "tenths 1 < 9. So 9.9 is bigger." in text

    def answered(*tokens):
        return [SimpleNamespace(completion=str(n), correct=n > 0, formatted=n < 9, tokens=n) for n in tokens]

    sampled = SimpleNamespace(rows=[answered(0, 9, 0), answered(9, 7, 5), answered(3, 0, 9)])
    monkeypatch.setattr(methods.evaluate, "pass_at_k", lambda *_, **__: sampled)
    own = methods.own_answers(None, 8, SimpleNamespace(seed=0), rows, None, None)
    assert [row["completion"][0]["content"] for row in own] == ["5", "3"]
    code = cells.notebook({"method": "sft", "questions": "q"})
    assert code.index("methods.take(") < code.index("LeanGRPOConfig")


def test_rows_of_earlier_runs_keep_their_call_and_the_worst_peak_counts(tmp_path, monkeypatch):
    def row(seed, value):
        return {"what": f"workshop/ppo/seed-{seed}/peak", "who": "ours", "value": value, "unit": "GB"}

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    document = {"host": {"gpu": "T4"}, "date": "2026-11-26 17:06 UTC", "command": "python -m benchmarks.methods"}
    document["rows"] = [row(0, 2.0)]
    (tmp_path / "methods.json").write_text(json.dumps(document))
    rows = {row["what"]: row for row in common.merged("methods", [row(1, 1.0)], worst)}
    assert rows["workshop/ppo/seed-0/peak"]["run"] == "2026-11-26 17:06 UTC, python -m benchmarks.methods"
    assert rows["workshop/ppo/seed-0/peak"]["gpu"] == "T4"
    assert not {"run", "gpu"} & rows["workshop/ppo/seed-1/peak"].keys(), "the file's own date, command and card"
    assert rows["workshop/ppo/peak"]["value"] == 2.0 and rows["workshop/ppo/peak"]["of_seeds"] == 2


@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_each_method_learns_the_quickstarts_task(method):
    rows = {row["what"]: row for row in json.loads((common.RESULTS / "methods.json").read_text())["rows"]}
    worst = rows[f"workshop/{method}/accuracy_after"]
    assert worst["of_seeds"] == 3 and worst["value"] >= 0.9
    for seed in (0, 1, 2):
        row = rows[f"workshop/{method}/seed-{seed}/accuracy_after"]
        assert row["value"] >= worst["value"] and row["seed"] == seed and row["seconds"] > 0 and row["peak"] > 0
