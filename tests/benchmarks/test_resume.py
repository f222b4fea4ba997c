"""The comparison of a killed run with a whole one: what counts, and which difference is called the first."""

import json

import torch

from benchmarks import resume


def written(folder, weight, seconds=1.0):
    """A run's trace and log, of a step before the kill and one after it."""
    folder.mkdir()
    lines = [{"step": 1, "killed": folder.name == "killed", "seen": {"gradient a": resume.fingerprint(torch.ones(2))}},
             {"step": 2, "killed": False, "seen": {"weight a": resume.fingerprint(torch.tensor(weight))}}]  # fmt: skip
    (folder / "trace-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    log = {"step": 2, "loss": 0.5, "reward_seconds/nines": seconds, "train_runtime": seconds}
    (folder / "log-0.json").write_text(json.dumps([{name: resume.fingerprint(value) for name, value in log.items()}]))
    return folder


def test_times_may_differ_and_a_bit_may_not(tmp_path):
    whole = written(tmp_path / "whole", [1.0, 2.0])
    assert resume.differences(whole, written(tmp_path / "killed", [1.0, 2.0], seconds=9.0), 1) == []
    (one,) = resume.differences(whole, written(tmp_path / "other", [1.0, 2.5]), 1)
    assert str(one) == "step 2, after it was resumed, rank 0, weight a: 3.5 instead of 3.0"


def test_the_first_is_the_one_that_came_about_first_and_what_is_absent_counts(tmp_path):
    whole, other = written(tmp_path / "whole", [1.0, 2.0]), written(tmp_path / "killed", [0.0, 2.0])
    trace = other / "trace-0.jsonl"
    first, second = trace.read_text().splitlines()
    trace.write_text(json.dumps({"step": 1, "killed": True, "seen": {"gradient a": ["x", 7.0]}}) + "\n" + second)
    found = resume.differences(whole, other, 1)
    assert str(found[0]) == "step 1, before it was killed, rank 0, gradient a: 7.0 instead of 2.0"
    trace.write_text(first)
    assert [str(one) for one in resume.differences(whole, other, 1)] == [
        "step 2, after it was resumed, rank 0, weight a: nothing instead of 3.0"
    ]
