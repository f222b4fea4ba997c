"""GSM8K, grade-school word problems whose answers are numbers, from the hub or from a folder with a copy."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbhelpers.models import smoke

from .sources import open_source
from .task import SYSTEM_PROMPT, Task, collect, reading
from .texts import Unusable, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@reading
def gsm8k(
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    source: str | Path = "openai/gsm8k",
    max_prompt_length: int | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    system_prompt: str | None = SYSTEM_PROMPT,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Task:
    """Grade-school word problems (Cobbe et al. 2021): 7,473 to train on, 1,319 to test, answers that are numbers.

    The right answer is what follows the last "####", without thousands commas; a row that has none is left out.
    The data set on the hub has not been read here, its schema has.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): The model's; then prompts of more than
            `max_prompt_length` tokens are left out.
        source (`str` or `Path`): The hub id, or a folder with train and test as .jsonl, .json, .parquet or .csv.
        max_prompt_length (`int`, *optional*): Tokens; the default is all that the tokenizer's model takes.
        n_train (`int`, *optional*), n_test (`int`, *optional*): Only the first so many rows.
        system_prompt (`str`, *optional*): Stands before each question. None for no system message.
        chat_template_kwargs (`dict`, *optional*): What the chat template is given besides, where prompts are measured;
            that of the run (GRPOConfig).

    Raises ConnectionError if the hub is out of reach, FileNotFoundError if the folder lacks one of the two, and
    ValueError if the columns question and answer are not there, or no row is usable.
    """
    from datasets import Dataset

    folder = smoke.make_dataset() if source == smoke.DATASET else source
    parts, dropped = {}, []
    for part, n in (("train", n_train), ("test", n_test)):
        opened = open_source(folder, ("question", "answer"), config="main", split=part)
        opened = replace(opened, name=f"{part} of {source}")
        parts[part], notes = collect(
            opened, _read, tokenizer=tokenizer, system_prompt=system_prompt, max_prompt_length=max_prompt_length, n=n,
            chat_template_kwargs=chat_template_kwargs,
        )  # fmt: skip
        dropped += notes
        if not parts[part]:
            raise ValueError(f"no usable question in {part} of {source}: " + ("; ".join(notes) or f"n_{part} is {n}"))
    return Task("gsm8k", Dataset.from_list(parts["train"]), Dataset.from_list(parts["test"]), dropped)


def _read(row: dict) -> tuple[str, str]:
    _, marked, gold = text_of(row["answer"], "answer").rpartition("####")
    if not marked:
        raise Unusable("no #### before the final answer")
    return text_of(row["question"], "question"), gold.strip().replace(",", "")
