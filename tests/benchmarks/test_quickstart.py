"""What the quickstart's benchmark counts, and what its results must show."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from step_cases import make_model
from tiny_model import tokenizer

from benchmarks import common, quickstart
from nbhelpers import LeanGRPOConfig, LeanGRPOTrainer

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart.json"
WITH_8_QUESTIONS_A_STEP = 214_700  # tokens generated in 80 steps of 64 answers, the recipe until 2026-11-26


@pytest.mark.parametrize("rounds", [0, 2])
def test_it_counts_what_was_generated_replaced_groups_too(tmp_path, monkeypatch, rounds):
    monkeypatch.setattr(LeanGRPOTrainer, "_generate", LeanGRPOTrainer._generate)  # is put back
    lengths: list[int] = []

    def silent(completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [1.0] * len(completions)

    args = LeanGRPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, dynamic_sampling=rounds,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [letter * 3 for letter in "abcdefgh"]})
    counts = quickstart.count_generated()
    LeanGRPOTrainer(make_model(), [silent], args, data, processing_class=tokenizer(), engine="graph").train()
    assert len(counts) == 2 * (1 + rounds) and sum(counts) == sum(lengths) > 0


def test_the_quickstart_is_right_and_spends_little():
    rows = {row["what"]: row["value"] for row in json.loads(RESULTS.read_text())["rows"]}
    for seed in (0, 1, 2):
        assert rows[f"workshop/seed-{seed}/accuracy_after"] >= 0.98
        assert rows[f"workshop/seed-{seed}/generated"] <= 0.6 * WITH_8_QUESTIONS_A_STEP


def test_whole_in_16_bits_stands_beside_the_same_seeds_in_fp32(monkeypatch):
    asked = {}

    def rows_of(name, parameters):
        asked[name] = parameters
        return [common.row(f"workshop/{name}/accuracy_after", "ours", 0.9, "share")]

    monkeypatch.setattr(quickstart, "rows_of", rows_of)
    *seeds, last = quickstart.whole()
    assert len(seeds) == len(asked) == 3 and all("torch.bfloat16" in text for text in asked.values())
    assert (last["what"], last["value"]) == ("workshop/whole/accuracy_after", 0.9) and last["fp32"] >= 0.98


def test_stopping_when_solved_leaves_it_as_right_as_before():
    file = RESULTS.with_name("quickstart_before.json")
    runs = {(row["what"], row["who"]): row for row in json.loads(file.read_text())["rows"]}
    before, ours = (runs["quickstart/grpo_seconds", who]["accuracy"] for who in ("before", "ours"))
    assert len(ours) == len(before) == 3 and min(ours) >= min(before)
