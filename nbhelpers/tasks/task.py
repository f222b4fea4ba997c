"""What every task is made of: a question as chat messages, the right answer as text, and what had to be left out.

A task is two `datasets.Dataset`s, train and test. A row holds `prompt`, a list of chat messages (system, user), and
`answer`, the right answer as a string; TRL hands both, and any other column, to the reward functions.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from nbhelpers.models.chat import InUserTurn, prompt_ids
from nbhelpers.progress import interruptible

from .preview import Preview
from .sources import Source
from .texts import Unusable, harmless, visible

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_PATIENCE = 1_000_000  # rows
_CHANGED = (
    "the question holds {}, which is no text for the model but a control token: a space was put into it "
    "(control_tokens=True leaves it as it is)"
)
SYSTEM_PROMPT = "Think first. Answer as <reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"
# a decorator of what reads a data set
reading = interruptible("the questions were read", "nothing is left of them; run this again")


@dataclass
class Task:
    """Train and test rows of one task, and what was left out of them and why.

    Args:
        name (`str`): As `print` and `preview` call it.
        train (`datasets.Dataset`), test (`datasets.Dataset`): Rows of `prompt` (chat messages), `answer` (str) and
            whatever else the reward functions want.
        dropped (`list[str]`): A sentence for each reason why rows were left out.
    """

    name: str
    train: "Dataset"
    test: "Dataset"
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.train)} questions to train on, {len(self.test)} held out"]
        return "\n".join(lines + self.dropped)

    def per_step(self, wanted: int) -> int:
        """How many questions a step can take: `wanted`, or where there are fewer to train on all of them, which is
        said. A step that wants more than there are is never made."""
        if len(self.train) < wanted:
            print(f"only {len(self.train)} questions to train on, so a step takes {len(self.train)} and not {wanted}: "
                  "results will be noisy, more questions help")  # fmt: skip
        return min(wanted, len(self.train))

    def preview(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        n: int = 3,
        *,
        most: int = 2000,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Preview:
        """What the model really reads. The last line of a notebook cell shows it; `print` does too.

        Args:
            tokenizer (`transformers.PreTrainedTokenizerBase`): The model's, with a chat template.
            n (`int`): How many training prompts are shown, token by token.
            most (`int`): How many are measured, from the first on.
            chat_template_kwargs (`dict`, *optional*): What the chat template is given besides the messages, as in
                GRPOConfig; None for those of the run that trained with this tokenizer.
        """
        rows = list(islice(self.train, most))
        ids = [prompt_ids(tokenizer, row["prompt"], chat_template_kwargs) for row in rows]
        shown = [(row["answer"], tokens) for row, tokens in zip(rows[:n], ids, strict=False)]
        return Preview.of(self.name, tokenizer, shown, [len(tokens) for tokens in ids], len(self.train), self.dropped)


def messages(question: str, system_prompt: str | None = SYSTEM_PROMPT) -> list[dict[str, str]]:
    """One question as the chat messages that training, evaluation and probes all use.

    Args:
        question (`str`): What is asked.
        system_prompt (`str`, *optional*): The system's message; none for None. `InUserTurn` stands behind the question.
    """
    if isinstance(system_prompt, InUserTurn):
        return [{"role": "user", "content": f"{question}\n\n{system_prompt}"}]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def worked(reasoning: str, answer: str) -> list[dict[str, str]]:
    """A worked answer in the form of SYSTEM_PROMPT, as the chat messages that `LeanSFTTrainer` learns."""
    text = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"
    return [{"role": "assistant", "content": text}]


def collect(
    source: Source,
    read: Callable[[dict], tuple[str, ...]],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    system_prompt: str | None = SYSTEM_PROMPT,
    max_prompt_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    n: int | None = None,
    control_tokens: bool = False,
) -> tuple[list[dict], list[str]]:
    """The usable rows as {prompt, answer}, and a note for each reason why others were left out.

    Args:
        source (`Source`): The rows with their numbers, and what the notes call them.
        read (`Callable[[dict], tuple[str, ...]]`): Question and answer of a row, and where texts are wanted the
            reasoning between them, which with the answer becomes the row's `completion`; may raise `Unusable`.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): With it, prompts that are too long are left out.
        system_prompt (`str`, *optional*): Stands before each question.
        max_prompt_length (`int`, *optional*): Tokens; with a tokenizer the default is all that its model takes.
        chat_template_kwargs (`dict`, *optional*): What the chat template is given besides, where prompts are measured;
            that of the run (GRPOConfig).
        n (`int`, *optional*): Stop after so many usable rows, or when `_PATIENCE` rows have brought fewer.
        control_tokens (`bool`): Whether a question may hold control tokens of the model; else a space makes them text.
    """
    control: set[str] = set()
    if tokenizer is not None:
        control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest = max_prompt_length
    if tokenizer is not None and longest is None:
        longest = tokenizer.model_max_length
    kept: dict[str, dict] = {}
    dropped, changed, notes = _Noted(source), _Noted(source), []
    for count, (number, row) in enumerate(source.rows):
        if n is not None and len(kept) >= n:
            break
        if n is not None and count >= max(_PATIENCE, 100 * n):
            notes = [f"stopped reading {source.name} after {count:,} rows, of which {len(kept)} can be used"]
            break
        try:
            question, answer, *reasoning = read(row)
            marks: list[str] = []
            if not control_tokens:
                question, marks = harmless(question, control)
            if not question or not answer:
                raise Unusable(f"no {'answer' if question else 'question'}")
            if question in kept:
                raise Unusable("the question occurs twice")
            prompt = messages(question, system_prompt)
            length = 0 if tokenizer is None else len(prompt_ids(tokenizer, prompt, chat_template_kwargs))
            if longest is not None and length > longest:
                raise Unusable(f"the prompt is longer than {longest} tokens")
            kept[question] = {"prompt": prompt, "answer": answer}
            for text in reasoning:
                kept[question]["completion"] = worked(harmless(text, control)[0], answer)
            for mark in marks:
                changed.add(_CHANGED.format(visible(mark)), number)
        except Unusable as reason:
            dropped.add(str(reason), number)
    return list(kept.values()), [*dropped.sentences("left out"), *changed.sentences("changed"), *notes]


def split(name: str, rows: list[dict], dropped: list[str], test_share: float) -> Task:
    """A task of rows that came in one piece: `test_share` of them, chosen by hash of the question, is held out.

    The hash, not the position: whoever adds rows to a file keeps most of the old ones on their side.
    Raises ValueError for fewer than two rows.
    """
    from datasets import Dataset

    if len(rows) < 2:
        raise ValueError(
            f"{name} has {len(rows)} usable questions, and at least 2 are needed (one to train on, one to test): "
            + ("; ".join(dropped) or "it has no other row")
        )
    ordered = sorted(rows, key=lambda row: hashlib.sha256(row["prompt"][-1]["content"].encode()).digest())
    held_out = min(max(1, round(test_share * len(ordered))), len(ordered) - 1)
    return Task(name, Dataset.from_list(ordered[held_out:]), Dataset.from_list(ordered[:held_out]), dropped)


class _Noted:
    """Rows by what there is to say of them: how many, and the numbers of the first."""

    def __init__(self, source: Source):
        self.source = source
        self.rows: dict[str, tuple[int, list[int]]] = {}

    def add(self, reason: str, number: int) -> None:
        count, first = self.rows.setdefault(reason, (0, []))
        self.rows[reason] = (count + 1, first if count >= 10 else [*first, number])

    def sentences(self, verb: str) -> list[str]:
        return [
            f"{verb} {count} row{'s' if count > 1 else ''} ({self.source.unit} {', '.join(map(str, first))}"
            f"{', ...' if count > 10 else ''}) of {self.source.name}: {reason}"
            for reason, (count, first) in self.rows.items()
        ]
