"""The spread of the rewards against numpy, groups, and what the machine says of itself."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nbhelpers import gpu
from nbhelpers.panel import history
from nbhelpers.rewards import Sample


def made(values, name="r"):
    return [Sample(f"q{i // 4}", "", {name: float(v)}) for i, v in enumerate(values)]


def test_spreads_equal_numpy():
    values = np.random.default_rng(0).normal(size=(5, 4))
    within, between = history.spreads(history.groups_of(made(values.ravel()), 4))
    assert within["r"] == pytest.approx(math.sqrt(values.var(axis=1, ddof=1).mean()))
    assert between["r"] == pytest.approx(values.mean(axis=1).std(ddof=1))
    assert within["total"] == within["r"] and between["total"] == between["r"]


def test_what_did_not_apply_does_not_count_and_weights_do():
    group = [Sample("q", "", {"a": 1.0, "b": None}), Sample("q", "", {"a": 3.0, "b": math.nan})]
    within, between = history.spreads([group], weights=[2.0, 5.0])
    assert within == {"total": pytest.approx(math.sqrt(8)), "a": pytest.approx(math.sqrt(2)), "b": None}
    assert between == {"total": None, "a": None, "b": None}
    assert history.total(Sample("q", "", {"a": 1.0, "b": 2.0}), [0.5, 10.0]) == 20.5


def test_groups():
    samples = made(range(8))
    assert history.groups_of(samples, 4) == [samples[:4], samples[4:]]
    assert history.groups_of(samples, 3) == [samples]


def test_best_and_worst_are_of_one_group():
    groups = history.groups_of(made([9, 9, 9, 9, 0, 1, 2, 1]), 4)
    assert history.best_and_worst(groups) == [groups[1][2], groups[1][0]]
    assert len(history.best_and_worst(groups[:1])) == 1 and history.best_and_worst([]) == []
    traded = [Sample("q", "a", {"x": 1.0, "y": 0.0}), Sample("q", "b", {"x": 0.0, "y": 1.0})]
    assert [s.completion for s in history.best_and_worst([traded], [1.0, 2.0])] == ["b", "a"]


def test_the_machine(monkeypatch):
    assert str(history.os.cpu_count()) in history.hardware()
    monkeypatch.setattr(gpu, "card", lambda: gpu.Card("Tesla T4", 15_800_000_000, (7, 5)))
    assert history.hardware() == "Tesla T4, 15.8 GB"


def test_memory_of_a_card_is_that_of_this_process_and_of_all(monkeypatch):
    """With torch's answers made up: what is read, and in which unit. No GPU is needed."""
    monkeypatch.setattr(gpu, "device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(gpu, "free_bytes", lambda index: {1: 9_000_000_000}[index])
    answers = {"get_device_properties": SimpleNamespace(total_memory=16_000_000_000)}
    answers |= {"max_memory_allocated": 4_000_000_000, "memory_reserved": 5_500_000_000}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert history.memory_now() == {"peak": 4.0, "reserved": 5.5, "used": 7.0, "total": 16.0}
