"""The reasoning data sets that people use, as prompts with answers that can be checked: a table and one reader.

GRPO needs no reasoning to copy: of each row the question and the final answer are taken, and for a cold start
(LeanSFTTrainer) the reasoning too. The columns and
configs in the table are those of the data sets' cards; read here were rows of the same schemas that the project wrote
itself. The real sets on the hub have not been run.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbhelpers.rewards.answers import extract_boxed

from .sources import open_source
from .task import SYSTEM_PROMPT, Task, collect, reading, split
from .texts import Unusable, text_of

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerBase

_USER, _ASSISTANT = ("user", "human"), ("assistant", "gpt")
_MARKS = re.compile(
    r"(?:\s*(?:</?think>|<\|(?:begin|end)_of_(?:thought|solution)\|>))+\s*"
)  # the form has tags of its own
_UNKNOWN = ("proof", "notfound")  # what NuminaMath, and so its heirs, write where there is no final answer


@dataclass(frozen=True)
class ReasoningSet:
    """Where a data set is and which columns matter. A column may hold text or a whole chat."""

    hub_id: str
    config: str | None
    question: str  # column; of a chat the user's turn
    answer: tuple[str, ...]  # columns, the first that has an answer counts; of a chat the assistant's turn
    text: tuple[str, ...]  # columns of the reasoning, one after another; of a chat the assistant's turn
    boxed: bool  # whether the answer is the last \boxed{...} of the text, or the whole of it
    instruction: str = ""  # what the set puts before each question and the system prompt says here


SETS = {
    "limo": ReasoningSet("GAIR/LIMO", None, "question", ("answer",), ("solution",), False),
    "openr1-math": ReasoningSet("open-r1/OpenR1-Math-220k", "default", "problem", ("answer",), ("messages",), False),
    "openthoughts": ReasoningSet(
        "open-thoughts/OpenThoughts-114k", "metadata", "problem", ("ground_truth_solution", "deepseek_solution"),
        ("deepseek_reasoning", "deepseek_solution"), True,
    ),
    "bespoke-stratos": ReasoningSet(
        "bespokelabs/Bespoke-Stratos-17k", None, "conversations", ("conversations",), ("conversations",), True,
        instruction=r"Return your final response within \boxed{}.",
    ),
    "deepscaler": ReasoningSet(
        "agentica-org/DeepScaleR-Preview-Dataset", None, "problem", ("answer",), ("solution",), False
    ),
    "dolphin-r1": ReasoningSet(
        "cognitivecomputations/dolphin-r1", "reasoning-deepseek", "messages", ("answer",), ("reasoning",), True
    ),
    "r1-distill": ReasoningSet(
        "ServiceNow-AI/R1-Distill-SFT", "v0", "problem", ("solution", "reannotated_assistant_content"),
        ("reannotated_assistant_content",), True,
    ),
}  # fmt: skip


@reading
def reasoning(
    name: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    source: "str | Path | DataFrame | None" = None,
    n: int | None = 2000,
    system_prompt: str | None = SYSTEM_PROMPT,
    max_prompt_length: int | None = None,
    test_share: float = 0.2,
    chat_template_kwargs: dict[str, Any] | None = None,
    texts: bool = False,
) -> Task:
    r"""The first `n` usable questions of a reasoning data set, a share of them held out by hash of the question.

    Left out, with the reason in `Task.dropped`: rows without an answer that can be checked (no \boxed{...} in a
    solution, a proof, code), chats of several turns, repeated questions and, with a `tokenizer`, long prompts.

    Args:
        name (`str`): One of "limo" (817 rows), "openr1-math" (94 thousand), "openthoughts" (114), "bespoke-stratos"
            (17), "deepscaler" (40), "dolphin-r1" (300), "r1-distill" (172; for non-commercial use).
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): The model's; then prompts are measured.
        source (`str`, `Path` or `pandas.DataFrame`, *optional*): A copy instead of the hub: a file, a folder with
            train.parquet, .jsonl or .csv, a frame.
        n (`int`, *optional*): From the hub only so many rows are fetched. None takes, and downloads, them all.
        system_prompt (`str`, *optional*): Stands before each question; None for no system message.
        max_prompt_length (`int`, *optional*): Tokens; the default is all that the tokenizer's model takes.
        test_share (`float`): Held out, from 0 to 1.
        chat_template_kwargs (`dict`, *optional*): What the chat template is given besides, where prompts are measured;
            that of the run (GRPOConfig).
        texts (`bool`): Rows have a `completion` too, the set's reasoning in the form of SYSTEM_PROMPT, for
            LeanSFTTrainer; those without any are left out.

    Raises ValueError if there is no such name, for a missing column (with those that there are) or fewer than two
    usable rows, and ConnectionError if the hub is out of reach.
    """
    if name not in SETS:
        raise ValueError(f"there is no reasoning set {name!r}; there are {', '.join(SETS)}")
    spec = SETS[name]
    place = spec.hub_id if source is None else source
    columns = dict.fromkeys((spec.question, *spec.answer, *(spec.text if texts else ())))
    opened = open_source(place, tuple(columns), config=spec.config, stream=n is not None)

    def read(row: dict) -> tuple[str, ...]:
        return (*_read(row, spec), _reasoning(row, spec)) if texts else _read(row, spec)

    rows, dropped = collect(
        opened, read, tokenizer=tokenizer, system_prompt=system_prompt, max_prompt_length=max_prompt_length, n=n,
        chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    return split(name, rows, dropped, test_share)


def _read(row: dict, spec: ReasoningSet) -> tuple[str, str]:
    question = _turn(row[spec.question], _USER, spec.question).removeprefix(spec.instruction).strip()
    for column in spec.answer:
        text = _turn(row[column], _ASSISTANT, column)
        answer = extract_boxed(text) if spec.boxed else text
        if answer and answer.lower() not in _UNKNOWN:
            return question, answer
    raise Unusable(rf"no \boxed{{...}} in its {' or '.join(spec.answer)}" if spec.boxed else "no answer to check")


def _reasoning(row: dict, spec: ReasoningSet) -> str:
    parts = [_MARKS.sub("\n\n", _turn(row[column], _ASSISTANT, column)).strip() for column in spec.text]
    if not all(parts):
        raise Unusable(f"no text in its {' or '.join(spec.text)}")
    return "\n\n".join(parts)


def _turn(cell: object, roles: tuple[str, ...], column: str) -> str:
    """The text of a cell, or of the one turn of these roles in a chat ({role, content} or {from, value})."""
    if not isinstance(cell, list):
        return text_of(cell, column)
    turns = [turn.get("content", turn.get("value")) for turn in cell if turn.get("role", turn.get("from")) in roles]
    if len(turns) != 1:
        raise Unusable(f"its {column} has {len(turns)} turns of the {roles[0]}, and one is wanted")
    return text_of(turns[0], column)
