"""A reward function that keeps memory is named, and no other for it."""

import asyncio
import gc

import numpy as np
import pytest

from nbhelpers.rewards import leaks
from nbhelpers.rewards.guard import guard

FOUR = {"prompts": ["q"] * 4, "completions": ["a"] * 4, "completion_ids": [[1]] * 4, "answer": ["1"] * 4}


@pytest.fixture(autouse=True)
def what_others_left_is_gone():
    """Else what tests before this one left is collected in the middle, and the process shrinks as a function grows."""
    gc.collect()


def constant(completions, **_):
    return [1.0] * len(completions)


def test_a_function_that_keeps_memory_is_named_once_and_others_are_not(monkeypatch, capsys):
    monkeypatch.setattr(leaks, "LEAK", 30e6)
    kept = []

    def keeps(completions, **_):
        kept.append(np.ones(1_000_000))  # 8 MB
        return [1.0] * len(completions)

    async def later(completions, **_):
        return keeps(completions)

    def large(completions, **_):
        return [np.ones(8_000_000)[0]] * len(completions)  # given back at its end

    guarded = guard(keeps), guard(later), guard(large)
    for _ in range(20):
        guarded[0](**FOUR)
    said = capsys.readouterr().out
    assert said.count("reward function 'keeps' keeps memory: ") == 1 and "MB more after" in said
    for _ in range(20):
        asyncio.run(guarded[1](**FOUR))
        guarded[2](**FOUR)
    said = capsys.readouterr().out
    assert said.count("'later' keeps memory") == 1 and "'large'" not in said


@pytest.mark.skipif(leaks._malloc_trim() is None, reason="glibc")
def test_what_one_keeps_where_anothers_memory_was_is_its_own(monkeypatch, capsys):
    """The allocator hands the room that `needs` has given back to `keeps`, and grows for `needs`."""
    monkeypatch.setattr(leaks, "LEAK", 100e6)
    kept = []

    def keeps(completions, **_):
        kept.append(bytearray(b"1" * 20_000_000))
        return [1.0] * len(completions)

    def needs(completions, **_):
        return [float(len(bytearray(b"1" * 20_000_000)))] * len(completions)

    guarded = guard(keeps), guard(needs)
    for _ in range(20):
        guarded[0](**FOUR)
        guarded[1](**FOUR)
    said = capsys.readouterr().out
    assert "'keeps' keeps memory" in said and "'needs'" not in said


def test_what_a_call_leaves_and_others_free_is_no_leak(monkeypatch, capsys):
    """A process that stays as large as it was: each call grows by 50 MB, and they are given back before the next."""
    sizes = iter([100e6, 150e6] * 10)
    monkeypatch.setattr(leaks, "resident", lambda: next(sizes))
    monkeypatch.setattr(leaks, "LEAK", 60e6)
    guarded = guard(constant)
    for _ in range(10):
        guarded(**FOUR)
    assert capsys.readouterr().out == ""
