"""Calling a reward function outside a run as TRL calls it in one: to try it on texts, or on a model's first answers."""

import asyncio
import inspect
import threading
from collections.abc import Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

from .guard import fresh, named
from .reward import Reward


def call(reward: Reward, rows: Sequence[dict], texts: Sequence[str], lengths: Sequence[int] = ()) -> Any:
    """What a reward function returns when it is called as TRL does, with one completion for each row.

    What only training has gets stand-ins: `trainer_state` is at step 0, `log_extra` and `log_metric` do nothing.

    Args:
        reward (`Reward`): The function.
        rows (`Sequence[dict]`): Rows of a task; all columns but the prompt are handed on.
        texts (`Sequence[str]`): What was written, to each row.
        lengths (`Sequence[int]`): How many `completion_ids` each has, all 0; if not given a byte for four characters.
    """
    chat = not isinstance(rows[0]["prompt"], str)
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
    ids = [[0] * length for length in lengths] or [list(text[::4].encode("utf-8", "replace")) for text in texts]
    result = reward(
        prompts=fresh([row["prompt"] for row in rows]),
        completions=[[{"role": "assistant", "content": text}] if chat else text for text in texts],
        completion_ids=ids,
        trainer_state=SimpleNamespace(global_step=0, max_steps=1, epoch=0.0),
        log_extra=lambda *_: None,
        log_metric=lambda *_: None,
        **fresh(columns),
    )
    return _awaited(result) if inspect.iscoroutine(result) else result


def by_name(reward_funcs: Reward | Sequence[Reward]) -> dict[str, Reward]:
    """Each reward function under the name that TRL logs it by; the errors of `check` for what is none."""
    from torch import nn

    rewards: list[Any] = list(reward_funcs) if isinstance(reward_funcs, Sequence) else [reward_funcs]
    if models := [reward for reward in rewards if isinstance(reward, nn.Module) or not callable(reward)]:
        raise TypeError(f"{models[0]!r} is no function, and this looks at functions only: leave it out")
    names = [named(reward)[0] for reward in rewards]
    if not rewards or len(set(names)) < len(names):
        raise ValueError(f"reward functions of different names are wanted, not {', '.join(names) or 'none'}")
    return dict(zip(names, rewards, strict=True))


def _awaited(coroutine: Coroutine) -> Any:
    """The result of an async reward function, also where a notebook's own event loop runs: in another thread."""
    results = []

    def run() -> None:
        try:
            results.append(asyncio.run(coroutine))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]
