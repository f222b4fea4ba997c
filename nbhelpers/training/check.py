"""What is refused before anything is computed, because it would fail late or train nothing without a word."""

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from trl import GRPOConfig

OF_REWARDS = ("prompts", "completions")  # what TRL calls reward functions with


def check(
    model: "str | PreTrainedModel | PeftModel",
    train_dataset: Any,
    args: "GRPOConfig",
    eval_dataset: Any = None,
    adapted: bool = False,
    owned: bool = False,
) -> None:
    """Refuse what is known before the trainer is made.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The policy.
        train_dataset (`Dataset` or `IterableDataset`): See `check_rows`; anything may be given.
        eval_dataset (*optional*): What to evaluate on, or a dictionary of such.
        args (`GRPOConfig`): The run's arguments.
        adapted (`bool`): The model gets an adapter yet, and is frozen otherwise: `check_model` has to wait for it.
        owned (`bool`): There is an environment, which may own the data.

    Raises as `check_rows` and `check_model` do, and ValueError for a temperature that is not above 0, which TRL refuses
    in its first generation.
    """
    if not (owned and train_dataset is None):
        check_rows(train_dataset, owned)
    for rows in eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,):
        if isinstance(rows, (Dataset, IterableDataset)):  # TRL evaluates on other things too
            check_columns(rows, "eval_dataset", owned)
    if not adapted and not isinstance(model, str):
        check_model(model, args)
    if args.temperature <= 0:
        raise ValueError(
            f"temperature={args.temperature} has to be strictly positive: at 0 all answers to a question are the "
            "same, and GRPO learns from how they differ. Set temperature=1.0 in the config"
        )


def check_rows(rows: Any, owned: bool) -> None:
    """Raises TypeError for what is no data set; ValueError without rows, and as `check_columns`."""
    if rows is None or (isinstance(rows, Dataset) and len(rows) == 0):
        raise ValueError(
            "`train_dataset` is required unless an `environment_factory` is provided, and it is empty: GRPO would stop "
            "at once and call it a success. Check the task's rows"
        )
    if not isinstance(rows, (Dataset, IterableDataset)):
        raise TypeError(
            f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(rows).__name__}`: take task.train "
            'of a task, one split of a dictionary (splits["train"]), datasets.Dataset.from_list(rows) of a list'
        )
    check_columns(rows, "train_dataset", owned)


def check_columns(rows: "Dataset | IterableDataset", name: str, owned: bool) -> None:
    """Refuse columns that TRL would stumble over in the middle of a step.

    Args:
        rows (`Dataset` or `IterableDataset`): The data.
        name (`str`): The argument that it was given as.
        owned (`bool`): An environment may write the prompts, so they need no column.

    Raises ValueError without a `prompt` column, and for one whose name TRL passes to reward functions itself.
    """
    columns = rows.column_names or ["prompt"]  # a stream may not know them
    if "prompt" not in columns and not owned:
        raise ValueError(
            f"{name} has the columns {', '.join(columns)} but no 'prompt': "
            "build it with nbhelpers.tasks, or rename your column"
        )
    taken = next((column for column in columns if column in OF_REWARDS), None)
    if taken is not None:
        raise ValueError(
            f"{name} has a column {taken!r}, and reward functions get TRL's own {taken} under that name: "
            f"{name}.rename_column({taken!r}, 'my_{taken}')"
        )


def check_model(model: "PreTrainedModel | PeftModel", args: "GRPOConfig") -> None:
    """Raises ValueError without a trainable parameter, and for fp16 master weights under fp16."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model is trainable: load it with lora_rank > 0, or with lora_rank=0 and "
                         "quantization='none' to train all of it, or pass peft_config")  # fmt: skip
    halves = [name for name, p in trained if p.dtype == torch.float16]
    if args.fp16 and halves:
        raise ValueError(
            f"fp16 training needs fp32 master weights, but {len(halves)} trainable parameters are fp16, the first is "
            f"{halves[0]}: load the model with nbhelpers.loader.load, or cast them with .float()"
        )
