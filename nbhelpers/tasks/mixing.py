"""Several tasks as one, so that what is asked for at the end is practised among the others and not only asked."""

from collections.abc import Sequence

from .task import Task


def mix(*tasks: Task, shares: Sequence[float] | None = None, n_train: int | None = None, seed: int = 0) -> Task:
    """One task whose training rows are drawn from several; it is tested on the first.

    Args:
        tasks (`Task`): At least two. Of their columns `prompt` and `answer` stay.
        shares (`Sequence[float]`, *optional*): Of the training rows, one for each task; they add up to 1. Equal parts
            if not given.
        n_train (`int`, *optional*): Training rows in all; as many as can be had without repeating one if not given.
        seed (`int`): The same seed makes the same order.

    Returns a `Task` with the test rows of the first. The test rows of the others are at hand there: `decimals.test`.

    Raises ValueError for fewer than two tasks, for shares that do not add up, and for more rows than there are.

    Example:
    >>> mix(gsm8k(), decimals(), shares=(0.8, 0.2))
    """
    from datasets import concatenate_datasets

    if len(tasks) < 2:
        raise ValueError(f"mix takes two tasks or more, not {len(tasks)}")
    weights = [1 / len(tasks)] * len(tasks) if shares is None else list(shares)
    if len(weights) != len(tasks) or not all(weight > 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"shares={tuple(weights)}: one above 0 for each of the {len(tasks)} tasks, and 1 in all")
    most = int(min(len(task.train) / weight for task, weight in zip(tasks, weights, strict=True)))
    total = most if n_train is None else n_train
    counts = [round(total * weight) for weight in weights]
    for task, count in zip(tasks, counts, strict=True):
        if not 0 < count <= len(task.train):
            raise ValueError(f"{task.name} has {len(task.train)} training rows, and {count} of {total} were to be its")
    parts = [
        task.train.select_columns(["prompt", "answer"]).shuffle(seed=seed).select(range(count))
        for task, count in zip(tasks, counts, strict=True)
    ]
    train = concatenate_datasets(parts).shuffle(seed=seed)
    dropped = [note for task in tasks for note in task.dropped]
    return Task(" + ".join(task.name for task in tasks), train, tasks[0].test, dropped)
