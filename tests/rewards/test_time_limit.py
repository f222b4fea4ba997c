"""A reward that hangs is named and cut off, whether it computes or waits, and whatever it catches itself."""

import asyncio
import re
import signal
import threading
import time

import pytest

from nbhelpers.rewards.guard import RewardError, guard
from nbhelpers.rewards.time_limit import Late, limited

FOUR = {"completions": ["a"] * 4}
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGVTALRM"), reason="no such signal on Windows")


def endless(completions, **_):
    while True:
        pass


def asleep(completions, **_):
    time.sleep(3600)


def catching(completions, **_):
    """What many rewards do: a row that fails scores 0."""
    scores = []
    for _ in range(10**9):
        try:
            time.sleep(3600)
        except Exception:
            scores.append(0.0)
    return scores


def backtracking(completions, **_):
    """No other thread runs meanwhile."""
    re.match(r"(a+)+$", "a" * 40 + "b")


@pytest.mark.parametrize("reward", [endless, asleep, catching, backtracking], ids=lambda f: f.__name__)
def test_it_is_cut_off_and_named(reward, capsys):
    before = signal.getsignal(signal.SIGVTALRM)
    logged = {}
    with pytest.warns(RuntimeWarning, match=rf"'{reward.__name__}' failed with no answer within 0\.3 s .*has cost"):
        assert guard(reward, 0.3)(**FOUR, log_metric=logged.__setitem__) == [None] * 4
    assert logged[f"reward_seconds/{reward.__name__}"] >= 0.3
    if reward is not backtracking:
        assert f"{reward.__name__!r} has been at work on one batch" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_an_async_one_too():
    async def slow(completions, **_):
        await asyncio.sleep(3600)

    with pytest.warns(RuntimeWarning, match=r"'slow' failed with no answer within 0\.1 s"):
        assert asyncio.run(guard(slow, 0.1)(**FOUR)) == [None] * 4


def test_the_third_in_a_row_ends_the_run():
    guarded = guard(asleep, 0.05)
    for _ in range(2):
        with pytest.warns(RuntimeWarning):
            guarded(**FOUR)
    with pytest.raises(RewardError, match="'asleep' failed in 3 batches in a row, last with no answer within"):
        guarded(**FOUR)


def test_in_another_thread_it_is_only_said(capsys):
    def work():
        with limited(0.2, "reward function 'slow'"):
            time.sleep(0.5)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "'slow' has been at work on one batch for 0.1 s; it cannot be cut off here" in capsys.readouterr().out


def test_what_is_in_time_is_left_alone():
    with limited(60.0, "nobody"):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "time limit"]
    with pytest.raises(KeyError), limited(60.0, "nobody"):
        raise KeyError
    with pytest.raises(Late), limited(0.1, "nobody"):
        time.sleep(5)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="reward_seconds"):
            guard(asleep, wrong)


class Timeout(BaseException):
    """As math-verify's."""


@pytest.mark.parametrize("what", [SystemExit, Timeout, MemoryError, RecursionError])
def test_any_exception_costs_a_batch_s_rows(what):
    def leaves(completions, **_):
        raise what("enough")

    with pytest.warns(RuntimeWarning, match=f"'leaves' failed with {what.__name__}: enough; its 4 rewards"):
        assert guard(leaves)(**FOUR) == [None] * 4
