import asyncio
import functools
import inspect
import math
import warnings
from decimal import Decimal

import numpy as np
import pytest
import torch

from nbhelpers.rewards.guard import RewardError, guard, guard_all

FOUR = {"prompts": ["q"] * 4, "completions": ["a"] * 4, "completion_ids": [[1]] * 4, "answer": ["1"] * 4}


def constant(completions, **_):
    return [1.0] * len(completions)


def test_a_good_function_is_left_alone():
    def mixed(completions, answer, **_):
        """Its docstring."""
        return [1, None, True, Decimal("0.5")]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded = guard(mixed)
        assert guarded(**FOUR) == [1.0, None, 1.0, 0.5]
    assert guarded.__name__ == "mixed" and guarded.__doc__ == "Its docstring."


@pytest.mark.parametrize(
    "scores", [(1, 2, 3, 4), np.arange(1.0, 5), torch.arange(1, 5), [torch.tensor(float(i)) for i in range(1, 5)]]
)
def test_tuples_arrays_and_tensors_count_as_lists(scores):
    assert guard(lambda completions, **_: scores)(**FOUR) == [1.0, 2.0, 3.0, 4.0]


def test_wrong_length_names_function_counts_and_line():
    def short(completions, **_):
        return [1.0] * 3

    with pytest.raises(RewardError, match=r"'short' returned 3 rewards for 4 completions.*`return \[1.0\] \* 3`"):
        guard(short)(**FOUR)


@pytest.mark.parametrize(
    ("scores", "kind"),
    [(None, "NoneType"), (1.0, "float"), ("abcd", "str"), (torch.zeros(4, 1), r"Tensor of shape \(4, 1\)")],
)
def test_what_is_no_list(scores, kind):
    def odd(completions, **_):
        return scores

    with pytest.raises(RewardError, match=f"'odd' returned a {kind}, not a list of 4 numbers.*`return scores`"):
        guard(odd)(**FOUR)


def test_a_forgotten_return_shows_the_first_line():
    def forgot(completions, **_):
        [1.0 for _ in completions]

    with pytest.raises(RewardError, match="`def forgot"):
        guard(forgot)(**FOUR)


def test_one_exception_does_not_cost_the_run():
    def shaky(completions, fail, **_):
        if fail:
            raise KeyError("units")
        return [1.0] * len(completions)

    guarded = guard(shaky)
    for _ in range(4):  # twice in a row is forgiven, as often as it happens
        for _ in range(2):
            with pytest.warns(RuntimeWarning, match="'shaky' failed with KeyError: 'units'; its 4 rewards"):
                assert guarded(**FOUR, fail=True) == [None] * 4
        assert guarded(**FOUR, fail=False) == [1.0] * 4
    with pytest.warns(RuntimeWarning):
        guarded(**FOUR, fail=True)
        guarded(**FOUR, fail=True)
    with pytest.raises(RewardError, match="'shaky' failed in 3 batches in a row") as caught:
        guarded(**FOUR, fail=True)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_interrupt_is_not_swallowed():
    def stopped(completions, **_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard(stopped)(**FOUR)


def test_bad_rows_are_not_scored_and_said_once():
    def odd(completions, **_):
        return [1.0, math.nan, math.inf, "2"]

    guarded = guard(odd)
    with pytest.warns(RuntimeWarning, match="'odd' gave nan to row 1 of 4"):
        assert guarded(**FOUR) == [1.0, None, None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guarded(**FOUR) == [1.0, None, None, None]


def test_a_batch_of_nothing_but_nan_is_a_failed_batch():
    guarded = guard(lambda completions, **_: [math.nan] * 4)
    with pytest.warns(RuntimeWarning):
        assert guarded(**FOUR) == guarded(**FOUR) == [None] * 4
    with pytest.raises(RewardError, match="nan in row 0"):
        guarded(**FOUR)


def test_a_missing_column_is_said_in_the_first_batch():
    def misspelt(completions, anwser, **_):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'anwser'.*prompts, completion_ids, answer"):
        guard(misspelt)(**FOUR)


def test_missing_star_star_is_said_in_the_first_batch():
    def closed(completions):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"def closed\(completions, answer, \*\*_\)"):
        guard(closed)(**FOUR)


def test_a_type_error_inside_the_function_is_its_own():
    def inside(completions, **_):
        return [None + 1 for _ in completions]

    with pytest.warns(RuntimeWarning, match="failed with TypeError"):
        guard(inside)(**FOUR)


class Judge:
    def __call__(self, completions, **_):
        return [0.5] * len(completions)


class AsyncJudge:
    async def __call__(self, completions, **_):
        return [0.5] * len(completions)


def test_names_are_those_that_trl_logs():
    from trl.trainer.utils import get_callable_name, is_async_callable

    async def remote(completions, **_):
        return [1.0] * len(completions)

    for func in (constant, functools.partial(constant), Judge(), AsyncJudge(), remote):
        guarded = guard(func)
        assert get_callable_name(guarded) == get_callable_name(func)
        assert is_async_callable(guarded) == is_async_callable(func)


def test_async_functions_stay_async_and_are_guarded():
    async def remote(completions, fail, **_):
        if fail:
            raise TimeoutError("no answer")
        return [1.0] * len(completions)

    guarded = guard(remote)
    assert inspect.iscoroutinefunction(guarded)
    assert asyncio.run(guarded(**FOUR, fail=False)) == [1.0] * 4
    with pytest.warns(RuntimeWarning, match="TimeoutError"):
        assert asyncio.run(guarded(**FOUR, fail=True)) == [None] * 4
    assert asyncio.run(guard(AsyncJudge())(**FOUR)) == [0.5] * 4


def test_reward_models_pass_through():
    model = torch.nn.Linear(1, 1)
    guarded = guard_all([constant, model, "org/reward-model"])
    assert guarded[1] is model and guarded[2] == "org/reward-model"
    assert guarded[0] is not constant and guarded[0].__name__ == "constant"


def test_two_functions_of_one_name_are_refused():
    with pytest.raises(RewardError, match="called '<lambda>'"):
        guard_all([lambda completions, **_: [], lambda completions, **_: []])


def nothing(completions, **_):
    return [None] * len(completions)


def also_nothing(completions, **_):
    return [None] * len(completions)


def test_a_run_that_scores_nothing_is_stopped():
    first, second = guard_all([nothing, also_nothing])
    for _ in range(2):
        assert first(**FOUR) == second(**FOUR) == [None] * 4
    with pytest.raises(RewardError, match=r"no reward function \(nothing, also_nothing\) scored any completion"):
        first(**FOUR)
        second(**FOUR)


def test_a_function_may_never_apply_while_another_does():
    for funcs in ([nothing, constant], [constant, nothing]):
        guarded = guard_all(funcs)
        for _ in range(10):
            for func in guarded:
                func(**FOUR)


def test_a_function_alone_under_guard_may_give_none():
    guarded = guard(nothing)
    for _ in range(10):
        assert guarded(**FOUR) == [None] * 4


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (5, r"reward_funcs\[1\] is 5, of type int, no function"),
        (None, r"reward_funcs\[1\] is None, of type NoneType, no function"),
        ([constant], r"reward_funcs\[1\] is .*a list within the list, so take its brackets off"),
        ("correctness", r"reward_funcs\[1\] is the text 'correctness', .*write correctness without quotes"),
        (Decimal, r"reward_funcs\[1\] is the class Decimal, .*Decimal\(\.\.\.\)"),
    ],
)
def test_what_is_no_reward_at_all_is_named_with_its_place(bad, match):
    with pytest.raises(RewardError, match=match):
        guard_all([constant, bad])
    assert len(guard_all([constant, "owner/model"])) == 2


def test_what_a_function_writes_into_its_arguments_stays_there():
    chat = {
        "prompts": [[{"role": "user", "content": "q"}]] * 2,
        "completions": [[{"role": "assistant", "content": "a"}] for _ in range(2)],
        "completion_ids": [[1, 2], [3]],
        "facts": [{"numbers": [1, 2]}, {"numbers": []}],
    }

    def writes(prompts, completions, completion_ids, facts, **_):
        for prompt, completion, ids, fact in zip(prompts, completions, completion_ids, facts, strict=True):
            prompt[0]["content"] = completion[0]["content"] = "other"
            ids.clear()
            fact["numbers"].append(9)
        completions.pop()
        return [1.0, 2.0]

    async def writes_later(**columns):
        return writes(**columns)

    assert guard(writes)(**chat) == [1.0, 2.0] == asyncio.run(guard(writes_later)(**chat))
    assert chat["prompts"][0][0]["content"] == "q" and chat["completion_ids"] == [[1, 2], [3]]
    assert [completion[0]["content"] for completion in chat["completions"]] == ["a", "a"]
    assert chat["facts"][0] == {"numbers": [1, 2]}


def test_what_no_container_holds_is_handed_on_itself():
    image, state = object(), object()
    seen = []

    def sees(images, trainer_state, **_):
        seen.append((images[0][0], trainer_state))
        return [1.0] * 4

    guard(sees)(**FOUR, images=[[image]] * 4, trainer_state=state)
    assert seen == [(image, state)]


@pytest.mark.parametrize("score", [3e38, -3e38, 2e15, 10**400])
def test_a_number_that_float32_cannot_square_is_not_scored(score):
    with pytest.warns(RuntimeWarning, match=r"to row 2 of 4, which is no finite number within 1e\+15"):
        assert guard(lambda completions, **_: [0.0, 1.0, score, -1e15])(**FOUR) == [0.0, 1.0, None, -1e15]
    with pytest.warns(RuntimeWarning, match="no usable number in any other"):
        assert guard(lambda completions, **_: [score] * 4)(**FOUR) == [None] * 4


def test_gradients_are_on_again_after_a_function_that_switched_them_off():
    def careless(completions, **_):
        torch.set_grad_enabled(False)
        if completions[0] == "raise":
            raise OSError("gone")
        return [1.0] * 4

    guarded = guard(careless)
    try:
        guarded(**FOUR)
        assert torch.is_grad_enabled()
        with pytest.warns(RuntimeWarning, match="gone"):
            guarded(**FOUR | {"completions": ["raise"] * 4})
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
