"""What the trainer puts around every reward function, so that neither one bad batch nor a silent mistake costs a run.

TRL takes what a reward function gives. A function that raises ends the run; one that gives NaN or None everywhere
lets it go on to the end, with exit code 0, having learned nothing.
"""

import asyncio
import functools
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .leaks import MemoryWatch
from .reward import Reward
from .time_limit import Late, limited

if TYPE_CHECKING:
    from torch import nn

LARGEST = 1e15  # of a reward: float32, in which groups are compared, must hold its square many times over
FAILURES = 3  # batches in a row without a single score before the run is stopped
SECONDS = 300.0  # for one call of a reward function
NOT_ITS_OWN = (KeyboardInterrupt, GeneratorExit, asyncio.CancelledError)  # nothing that a reward did wrong


class RewardError(ValueError):
    """A reward function that must be changed before training can go on; the message says which, and how."""


def guard(func: Reward, seconds: float = SECONDS) -> Reward:
    """The same reward function, for a run that is not lost to one bad batch. Async functions stay async.

    A batch in which it raises (SystemExit and its like too), takes too long, or gives no usable number at all, scores
    None (for TRL: "does not apply") with a warning; the third in a row stops the run. NaN, infinity, a number beyond
    `LARGEST` or something that is no number scores None in its row, with a warning for the first one. It gets copies of
    its arguments (`fresh`), so that what it writes into them reaches neither the next function nor the panel, and
    gradients are on again after it. One that keeps memory is named (leaks.py).

    Args:
        func (`Reward`): A reward function with TRL's signature.
        seconds (`float`): Time for one call; then it is cut off, as far as Python can (see time_limit.py).

    Returns:
        `Reward`: It has the `__name__` under which TRL logs `func`, and returns a `list[float | None]`.

    Raises:
        RewardError: From the guarded function: at once when the function wants a column that the data does not have,
            or does not return one score for each completion; after three failed batches in a row, from the last
            exception.
    """
    return _Guard(func, seconds).guarded()


def guard_all(
    funcs: "Sequence[Reward | str | nn.Module]", seconds: float = SECONDS
) -> "list[Reward | str | nn.Module]":
    """`guard` around every function of a list; reward models (modules and names of models) pass through untouched.

    A completion to which no function applies is left to TRL, which keeps it out of its group's baseline and gives it
    advantage 0. But where that is so for every completion, nothing is learned and nothing is said: three batches in a
    row without a single score stop the run.

    Args:
        funcs (`Sequence[Reward | str | nn.Module]`): What TRL's `reward_funcs` takes: reward functions, reward models
            and names of reward models.
        seconds (`float`): As in `guard`.

    Returns:
        `list[Reward | str | nn.Module]`: As long as `funcs`, in the same order.

    Raises:
        RewardError: At once for what is neither, with its place in the list, and for two functions of one name, whose
            curves TRL would mix into one.
    """
    from torch import nn

    for i, func in enumerate(funcs):
        if why := _why_no_reward(func):
            raise RewardError(f"reward_funcs[{i}] is {why}")
    guards = {i: _Guard(func, seconds) for i, func in enumerate(funcs) if not isinstance(func, (str, nn.Module))}
    names = [one.name for one in guards.values()]
    for name in names:
        if names.count(name) > 1:
            raise RewardError(f"two reward functions are called {name!r}, so their curves would be mixed: rename one")
    if len(guards) == len(funcs):  # a reward model always has a score
        for one in guards.values():
            one.team = list(guards.values())
    return [guards[i].guarded() if i in guards else func for i, func in enumerate(funcs)]


def unguarded(func: Any) -> Any:
    """The function that was given to `guard`; anything else as it is."""
    return vars(func).get(_INSIDE, func) if inspect.isfunction(func) else func


def _why_no_reward(func: Any) -> str | None:
    """What `func` is instead of a reward function, a reward model or the name of one; None if it is one of them."""
    from torch import nn

    if isinstance(func, str):
        if "/" in func or Path(func).is_dir():
            return None
        return (
            f"the text {func!r}, no function and no reward model (a folder, owner/model): write {func} without quotes"
        )
    if inspect.isclass(func):
        return f"the class {func.__name__}, whose instance is wanted: {func.__name__}(...)"
    if callable(func) or isinstance(func, nn.Module):
        return None
    inner = ": a list within the list, so take its brackets off" if isinstance(func, (list, tuple)) else ""
    return f"{func!r}, of type {type(func).__name__}, no function{inner}"


def fresh(value: Any) -> Any:
    """A copy of lists, tuples and dicts, however deep; what they hold in the end (texts, numbers, images) is shared."""
    if type(value) is dict:
        return {key: fresh(item) for key, item in value.items()}
    if type(value) not in (list, tuple):
        return value
    if all(isinstance(item, (str, int, float)) for item in value):  # token ids: many, and quickly copied
        return value[:]
    return type(value)(fresh(item) for item in value)


def named(func: Any) -> tuple[str, Any]:
    """The name under which TRL logs a reward function, and what is left of it without `functools.partial`.

    Args:
        func (`Callable`): A function, a method, a `functools.partial`, or an object with `__call__`, which is logged
            under the name of its class.
    """
    while isinstance(func, functools.partial):
        func = func.func
    return func.__name__ if inspect.isroutine(func) else type(func).__name__, func


_INSIDE = "unguarded"  # the attribute of a guarded function that holds what it guards


@contextmanager
def _as_it_was() -> Iterator[None]:
    """After the block gradients are on or off as before it: a reward that switches them off would end the run."""
    import torch

    enabled = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)


def is_async(inner: Any) -> bool:
    """Whether a call of what `named` finds gives a coroutine."""
    return inspect.iscoroutinefunction(inner if inspect.isroutine(inner) else inner.__call__)


class _Guard:
    """What one guarded function did so far."""

    def __init__(self, func: Callable[..., Any], seconds: float):
        if not seconds > 0:
            raise ValueError(f"reward_seconds={seconds}: a number of seconds above 0")
        self.func, self.seconds = func, seconds
        self.spent = 0.0  # seconds in this function so far
        self.memory = MemoryWatch()
        self.name, self.inner = named(func)
        self.is_async = is_async(self.inner)
        self.failures = 0  # failed batches in a row
        self.warned = False  # about a value that is no number
        self.scored = False  # whether the newest batch had any score
        self.silent = 0  # batches in a row in which no function of the team had any score
        self.team: list[_Guard] = []  # all functions of the run, this one too

    def guarded(self) -> Reward:
        """The function with its guard, async if it is."""

        async def guarded_async(completions: list, **columns: Any) -> list[float | None]:
            self.check_columns(completions, columns)
            begun = time.monotonic()
            try:
                with _as_it_was(), self.memory.watched(self.name):
                    scores = await asyncio.wait_for(
                        self.func(completions=fresh(completions), **fresh(columns)), self.seconds
                    )
            except NOT_ITS_OWN:
                raise
            except BaseException as error:
                late = isinstance(error, TimeoutError) and time.monotonic() - begun >= self.seconds
                return self.failed(len(completions), Late() if late else error)
            finally:
                self.count_time(time.monotonic() - begun, columns)
            return self.checked(scores, len(completions))

        def guarded_sync(completions: list, **columns: Any) -> list[float | None]:
            self.check_columns(completions, columns)
            begun = time.monotonic()
            try:
                with (
                    _as_it_was(),
                    self.memory.watched(self.name),
                    limited(self.seconds, f"reward function {self.name!r}"),
                ):
                    scores = self.func(completions=fresh(completions), **fresh(columns))
            except NOT_ITS_OWN:
                raise
            except BaseException as error:
                return self.failed(len(completions), error)
            finally:
                self.count_time(time.monotonic() - begun, columns)
            return self.checked(scores, len(completions))

        guarded: Any = guarded_async if self.is_async else guarded_sync
        guarded.__name__ = guarded.__qualname__ = self.name
        guarded.__doc__ = self.inner.__doc__
        vars(guarded)[_INSIDE] = self.func
        return guarded

    def count_time(self, seconds: float, columns: dict[str, Any]) -> None:
        """Add up what the function costs, and log it where the trainer offers to."""
        self.spent += seconds
        if (log_metric := columns.get("log_metric")) is not None:
            log_metric(f"reward_seconds/{self.name}", seconds)

    def check_columns(self, completions: list, columns: dict) -> None:
        """A misspelt column or a missing `**_` would fail in every batch: say so in the first."""
        try:
            inspect.signature(self.func).bind(completions=completions, **columns)
        except TypeError as error:
            raise RewardError(
                f"reward function {self.name!r} cannot be called: {error}. It is given completions, "
                f"{', '.join(columns)}. Name those that it needs and take the rest with **_, for example "
                f"`def {self.name}(completions, answer, **_):`"
            ) from None

    def checked(self, scores: Any, n: int) -> list[float | None]:
        """The scores as floats and None, one for each of n completions."""
        from numpy import ndarray
        from torch import Tensor

        kind = type(scores).__name__
        if isinstance(scores, (ndarray, Tensor)):
            kind += f" of shape {tuple(scores.shape)}"
            scores = scores.tolist() if scores.ndim == 1 else None
        if not isinstance(scores, (list, tuple)):
            raise RewardError(
                f"reward function {self.name!r} returned a {kind}, not a list of {n} numbers. {self.line_to_change()}"
            )
        if len(scores) != n:
            raise RewardError(
                f"reward function {self.name!r} returned {len(scores)} rewards for {n} completions: one is wanted for "
                f"each, in their order. {self.line_to_change()}"
            )
        numbers = [_number(score) for score in scores]
        bad = [row for row in range(n) if numbers[row] is None and scores[row] is not None]
        if len(bad) == n > 0:
            return self.failed(n, ValueError(f"{scores[0]!r} in row 0, and no usable number in any other"))
        if bad and not self.warned:
            self.warned = True
            warnings.warn(
                f"reward function {self.name!r} gave {scores[bad[0]]!r} to row {bad[0]} of {n}, which is no finite "
                f"number within {LARGEST:g}; such rows count as None (not scored). This is said once.",
                RuntimeWarning,
                stacklevel=3,
            )
        self.failures = 0
        self.count_silence(numbers)
        return numbers

    def failed(self, n: int, error: BaseException) -> list[float | None]:
        """None for each of n completions, with a warning; RewardError for the third failure in a row."""
        self.failures += 1
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, Late):
            what = (
                f"no answer within {self.seconds:g} s (reward_seconds; it has cost {self.spent + self.seconds:.0f} s "
                "of this run so far)"
            )
        if self.failures >= FAILURES:
            raise RewardError(
                f"reward function {self.name!r} failed in {FAILURES} batches in a row, last with {what}"
            ) from error
        warnings.warn(
            f"reward function {self.name!r} failed with {what}; its {n} rewards of this batch count as None (not "
            f"scored). Failure {self.failures} in a row; the run stops at {FAILURES}.",
            RuntimeWarning,
            stacklevel=3,
        )
        self.count_silence([])
        return [None for _ in range(n)]

    def count_silence(self, numbers: list[float | None]) -> None:
        """Counts the batches in which no function of the team had a score; RewardError after three in a row."""
        self.scored = any(number is not None for number in numbers)
        self.silent = 0 if any(one.scored for one in self.team) else self.silent + 1
        if self.team and self.silent >= FAILURES:
            names = ", ".join(one.name for one in self.team)
            raise RewardError(
                f"in {FAILURES} batches in a row no reward function ({names}) scored any completion, so there is "
                "nothing to learn from: return a number, not None, for the rows that count"
            )

    def line_to_change(self) -> str:
        """The function's last `return` (or its first line, if it has none) and what belongs there."""
        try:
            lines = [line.strip() for line in inspect.getsource(self.inner).splitlines()]
        except (OSError, TypeError):  # no source at hand: typed into a plain interpreter, or a callable object
            lines = [f"def {self.name}"]
        line = next((line for line in reversed(lines) if line.startswith("return")), lines[0])
        return f"The line to change: `{line}`; it should end in something like `return [score(c) for c in completions]`"


def _number(score: Any) -> float | None:
    """A finite float that float32 can reckon with, or None for everything that is none."""
    try:
        number = math.nan if isinstance(score, (str, bytes)) else float(score)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several values
        return None
    return number if abs(number) <= LARGEST else None
