"""The reader's own questions: a file, a pandas frame or a data set on the hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sources import open_source
from .task import SYSTEM_PROMPT, Task, collect, reading
from .task import split as split_by_hash
from .texts import Unusable, text_of

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerBase


@reading
def from_data(
    source: "str | Path | DataFrame",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    question: str = "question",
    answer: str = "answer",
    system_prompt: str | None = SYSTEM_PROMPT,
    max_prompt_length: int | None = None,
    test_share: float = 0.2,
    config: str | None = None,
    split: str = "train",
    n: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    control_tokens: bool = False,
) -> Task:
    """The reader's own questions.

    Rows that cannot be used are left out, and `Task.dropped` says which and why: no question, no answer, a question
    that occurs twice, a comma without quotes, a text without end, and, with a `tokenizer`, a prompt that is too long.

    Args:
        source (`str`, `Path` or `pandas.DataFrame`): A .csv, .jsonl, .json or .parquet file, a folder with a file
            `split` of one of these kinds, a frame, or the id of a data set on the hub (owner/name).
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): The model's; then prompts are measured.
        question (`str`), answer (`str`): The columns.
        system_prompt (`str`, *optional*): Stands before each question. The default asks for the form that the
            format rewards look for; `evaluate.ask` wants the same one. None for no system message.
        max_prompt_length (`int`, *optional*): Tokens; the default is all that the tokenizer's model takes.
        test_share (`float`): Held out, from 0 to 1, chosen by hash of the question.
        config (`str`, *optional*), split (`str`): Which part of a data set on the hub.
        n (`int`, *optional*): Only the first n usable rows; from the hub no more than needed are fetched.
        chat_template_kwargs (`dict`, *optional*): What the chat template is given besides, where prompts are measured;
            that of the run (GRPOConfig).
        control_tokens (`bool`): Whether a question may hold control tokens of the model, such as <|im_end|>. By default
            a space in them makes them plain text, and `Task.dropped` says so.

    Raises FileNotFoundError if there is no such file, ValueError for another kind of file, broken JSON or CSV (with the
    line), a missing column (with those that there are) or fewer than two usable rows, and ConnectionError if the hub is
    out of reach.
    """
    opened = open_source(source, (question, answer), config=config, split=split, stream=n is not None)

    def read(row: dict) -> tuple[str, str]:
        if row.get(None):  # where csv.DictReader puts what is left of a row
            raise Unusable("more fields than columns; a text with a comma in it needs quotes around it")
        texts = text_of(row.get(question), "question"), text_of(row.get(answer), "answer")
        if texts == (question, answer):
            raise Unusable("the header once more")
        return texts

    rows, dropped = collect(
        opened, read, tokenizer=tokenizer, system_prompt=system_prompt, max_prompt_length=max_prompt_length, n=n,
        chat_template_kwargs=chat_template_kwargs,
        control_tokens=control_tokens,
    )  # fmt: skip
    return split_by_hash(Path(opened.name).stem, rows, dropped, test_share)


def from_file(path: str | Path, **options: Any) -> Task:
    """`from_data` for a file: a name that is not there is a missing file and never a data set on the hub."""
    return from_data(Path(path), **options)
