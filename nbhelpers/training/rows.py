"""The rows that a trainer is given: what it cannot train on is refused with the row, before the first step."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import trl

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# What TRL hands to reward functions itself under these names: a column of the same name clashes or is lost.
TAKEN = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


def as_dataset(rows: Any, name: str) -> "Dataset | IterableDataset":
    """The rows as TRL wants them: a list of rows becomes a Dataset, a Dataset or IterableDataset stays.

    Args:
        rows: What the trainer was given; not None.
        name (`str`): Of the trainer's argument, for the errors.

    Raises TypeError for anything else, with what to pass instead; ValueError for a list that is no table.
    """
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(rows, (list, tuple)) and all(isinstance(row, dict) for row in rows):
        try:
            return Dataset.from_list(list(rows))
        except Exception as error:  # pyarrow's own, of several kinds
            raise ValueError(f"{name} is a list whose rows differ in their types, so it is no table: {error}") from None
    if isinstance(rows, (DatasetDict, IterableDatasetDict)):
        raise TypeError(f"{name} is a {type(rows).__name__} of {', '.join(map(str, rows))}: pass one of them, "
                        f'like dataset["{next(iter(rows), "train")}"]')  # fmt: skip
    if not isinstance(rows, (Dataset, IterableDataset)):
        raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, got `{type(rows).__name__}`: pass a "
                        "datasets.Dataset (task.train of a Task, Dataset.from_pandas of a frame, Dataset.from_list of "
                        "rows)")  # fmt: skip
    return rows


def check(dataset: "Dataset | IterableDataset", name: str, owned: bool = False) -> None:
    """Look at the columns, and at every prompt where the rows are at hand (an IterableDataset is not read).

    `owned`: an environment may write the prompts, so they need no column.

    Raises ValueError for no rows, no column `prompt`, a column whose name TRL takes for itself, and a prompt that is no
    text and no messages, with its row.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name} is empty: the run would stop at once and call it a success. Check the task's rows")
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns and not owned:
        raise ValueError(f"{name} has the columns {', '.join(columns)} but no 'prompt': "
                         "build it with nbhelpers.tasks, or rename your column")  # fmt: skip
    for column in TAKEN:
        if columns is not None and column in columns:
            raise ValueError(f"{name} has a column {column!r}, the name under which reward functions get something "
                             f'else: dataset.rename_column("{column}", "my_{column}")')  # fmt: skip
    for row, prompt in () if owned else prompts(dataset):
        if why := _why_no_prompt(prompt):
            raise ValueError(f"{name}, row {row} (the first is 0): {why}")


def prompts(dataset: "Dataset | IterableDataset") -> Iterator[tuple[int, Any]]:
    """The number and the prompt of each row; none where reading a row costs: a stream, a custom transform."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    row = 0
    for batch in dataset.with_format(None).select_columns(["prompt"]).iter(1000):
        for prompt in batch["prompt"]:
            yield row, prompt
            row += 1


def _why_no_prompt(prompt: Any) -> str | None:
    if isinstance(prompt, str) and prompt:
        return None
    if not isinstance(prompt, list) or not prompt:
        return f"its prompt is {prompt!r}, and a text or a list of messages is wanted"
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not message.get("role"):
            return f"message {i} of its prompt is {message!r}, without a role"
        if message.get("content") is None and not message.get("tool_calls"):
            return f"message {i} of its prompt has no content"
    return None


def enough(dataset: "Dataset | IterableDataset", args: trl.GRPOConfig) -> None:
    """Raises ValueError if one rollout takes more questions than the data set has: TRL would make no step at all."""
    from datasets import Dataset

    size, group = args.generation_batch_size, args.num_generations
    if not isinstance(dataset, Dataset) or size is None or not group or len(dataset) >= size // group:
        return
    rows, batch = len(dataset), args.per_device_train_batch_size * args.world_size
    fitting = [n for n in range(1, rows * group // batch + 1) if n * batch % group == 0]  # batches of whole groups
    if fitting:
        steps = "gradient_accumulation_steps"
        name = steps if args.steps_per_generation == args.gradient_accumulation_steps else "steps_per_generation"
        remedy = f"{name} to {fitting[-1]}"
    else:
        remedy = f"per_device_train_batch_size to {max(1, rows * group // args.world_size)}"
        remedy += " and gradient_accumulation_steps to 1" if args.gradient_accumulation_steps > 1 else ""
    raise ValueError(
        f"train_dataset has {rows} row{'s' if rows > 1 else ''} and a step takes {size // group} questions ({size} "
        f"answers / num_generations={group}), so there would be no step at all: lower {remedy}, or bring more rows"
    )


def refuse_longer(
    dataset: "Dataset | IterableDataset", name: str, most: int, tokens: Callable[[list[Any]], list[int]], why: str
) -> None:
    """Raises ValueError for a prompt of more than `most` tokens, with its row.

    A token is a byte at least, so only prompts with many bytes are tokenized, and of those the 256 with the most.

    Args:
        dataset (`Dataset` or `IterableDataset`): A stream is not read.
        name (`str`): Of the trainer's argument.
        most (`int`): Tokens.
        tokens (`Callable[[list], list[int]]`): From prompts to how many tokens each has, the chat template's with them.
        why (`str`): Ends the sentence.
    """
    around = 0  # tokens that the chat template adds: no more than a whole short prompt has
    large: list[tuple[int, int, Any]] = []
    for row, prompt in prompts(dataset):
        if row == 0:
            around = tokens([prompt])[0]
        size = _bytes(prompt) + around
        if size > most:
            large.append((size, row, prompt))
    large = sorted(large, key=lambda one: -one[0])[:256]
    for (_, row, _), count in zip(large, tokens([prompt for *_, prompt in large]) if large else [], strict=True):
        if count > most:
            raise ValueError(f"{name}, row {row} (the first is 0): its prompt has {count} tokens, {why}")


def _bytes(prompt: Any) -> int:
    """Bytes of a prompt's text in UTF-8, 8 more for each message."""
    if isinstance(prompt, str):
        return len(prompt.encode(errors="replace"))
    return sum(8 + len(str(message.get("content", "")).encode(errors="replace")) for message in prompt)


def each(given: Any, name: str, look: Callable[[Any, str], None]) -> Any:
    """A trainer's data set, or several by name, or None, as `as_dataset` has it and after a `look` at it."""
    if isinstance(given, Mapping):
        return {key: each(one, name, look) for key, one in given.items()}
    if given is not None:
        given = as_dataset(given, name)
        look(given, name)
    return given


def looked_at(train: Any, evaluation: Any, args: trl.GRPOConfig, owned: bool) -> tuple[Any, Any]:
    """Both of a trainer's data sets, as TRL wants them. Raises as `as_dataset`, `check` and `enough`.

    Args:
        train, evaluation: What the trainer was given as `train_dataset` and `eval_dataset`.
        args (`trl.GRPOConfig`): The run's arguments.
        owned (`bool`): There is an environment, which may own the data and write the prompts.
    """
    if train is not None:
        train = as_dataset(train, "train_dataset")
        check(train, "train_dataset", owned)
        enough(train, args)
    elif not owned:
        raise ValueError("`train_dataset` is required unless an `environment_factory` is provided: the run would stop "
                         "at once and call it a success. Check the task's rows")  # fmt: skip
    return train, each(evaluation, "eval_dataset", partial(check, owned=owned))


def texts_looked_at(train: Any, evaluation: Any, field: str, formatted: bool) -> tuple[Any, Any]:
    """The data sets of a trainer that learns texts, from a column `field` or in TRL's other forms.

    `formatted`: texts are made of the rows, whose columns are then nobody's business.

    Raises as `as_dataset`, and ValueError for no rows and for columns that hold no text to learn.
    """

    def look(data: "Dataset | IterableDataset", name: str) -> None:
        if hasattr(data, "__len__") and len(data) == 0:
            raise ValueError(f"{name} is empty: there is nothing to learn. Check its rows")
        columns = set(data.column_names or ())
        forms = ({field}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"})
        if columns and not formatted and not any(form <= columns for form in forms):
            raise ValueError(
                f"{name} has the columns {', '.join(sorted(columns))}, and no text to learn: it needs {field!r}, "
                "'messages', or 'prompt' and 'completion', as tasks.decimals and tasks.reasoning give them with "
                "texts=True"
            )

    if train is None:
        raise ValueError("train_dataset is missing: there is nothing to learn")
    return each(train, "train_dataset", look), each(evaluation, "eval_dataset", look)


def several(given: Any) -> list[Any]:
    """The data sets of an `eval_dataset`: none, one, or several by name."""
    return [] if given is None else list(given.values()) if isinstance(given, Mapping) else [given]
