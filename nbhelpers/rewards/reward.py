"""The signature of a reward function, TRL's: what trainer, `rewards.check` and every reward in this room agree on."""

from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from datasets import Dataset

Scores = Sequence[float | None]  # a list, in practice; as a Sequence a list[float] without None is one too


class Reward(Protocol):
    """A reward function: called with keyword arguments only, it returns one number for each completion.

    Any function with a parameter for each argument that it needs and `**_` for the rest will do; it may be `async`.
    TRL logs it under its `__name__` (a `functools.partial` under that of its function, an object with `__call__` under
    that of its class).

    Args:
        prompts (`list[str]` or `list[list[dict[str, str]]]`): The prompt of each completion, as the dataset has it.
        completions (`list[str]` or `list[list[dict[str, str]]]`): What the model wrote: texts, or for prompts that are
            chat messages a list of one message each. `rewards.text_of` reads both.
        columns (`list`): `completion_ids` (`list[list[int]]`, token ids), every other column of the dataset under its
            name, one entry for each completion, and TRL's helpers `trainer_state`, `log_extra` and `log_metric`.

    Returns:
        `list[float | None]`: In the order of the completions. None where the function does not apply, which TRL leaves
        out of the sum over all functions.

    Example:
    >>> from nbhelpers.rewards import text_of
    >>> def short(completions, limit, **_):
    ...     return [None if most is None else float(len(text_of(c)) <= most) for c, most in zip(completions, limit)]
    >>> short(prompts=["?", "?", "?"], completions=["9.9", "It is 9.9", "9.9"], limit=[5, 5, None])
    [1.0, 0.0, None]
    """

    __name__: str

    # To a type checker (*args: Any, **kwargs: Any) means any parameters at all: each reward names those that it needs.
    def __call__(self, *args: Any, **columns: Any) -> Scores | Awaitable[Scores]: ...


class Questions(Protocol):
    """What a reward is tried on: a `tasks.Task`, or anything else that has training rows."""

    train: "Dataset"
