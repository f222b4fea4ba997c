"""How good is the model now? Held-out accuracy with an interval, pass@k, and the same questions before and after.

What comes back is in results.py, and is compared there. Asking leaves no trace: the modes of the model, the
tokenizer and the random numbers of the training that follows are as they were.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nbhelpers.rewards import REASONING, Tags
from nbhelpers.tasks import messages

from .asking import answering, answers, scored
from .results import Answer as Answer
from .results import Decoding, PassAtK, Proportion, Score, unbiased_pass_at_k
from .results import Paired as Paired
from .results import Row as Row
from .results import check_comparable as check_comparable
from .results import paired as paired
from .signal import Signal as Signal
from .signal import check_signal as check_signal

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nbhelpers.engines import Engine

# ---- asking ----


@answering
def ask(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str | list[dict]],
    *,
    system_prompt: str | None = None,
    tags: Tags = REASONING,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    engine: "str | Engine" = "auto",
    stop_strings: Sequence[str] = (),
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Answer]:
    """Put questions to the model and read its answers.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): The model, on the device where it stays.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        questions (`Sequence[str | list[dict]]`): Each the user's message of a chat of its own; or the `prompt` of a
            task's row, which is asked as it is.
        system_prompt (`str`, *optional*): The system's message before each; use the one of the training data.
        tags (`rewards.Tags`): Where the answer stands.
        max_new_tokens (`int`): Completions longer than this are cut off.
        temperature (`float`): 0.0 takes the likeliest token each time; above it tokens are drawn, with no other
            filter, whatever the model's own generation defaults say.
        seed (`int`): Of the drawing.
        batch_size (`int`): Questions at a time. More is faster and takes more memory.
        engine (`str` or `engines.Engine`): What writes: "auto", "graph", "hf", or a trainer's own, `trainer.engine`.
        stop_strings (`Sequence[str]`): A completion ends with these too; use those of the training.
        chat_template_kwargs (`dict`, *optional*): What the chat template is given besides the messages, as in
            GRPOConfig; None for those of the run that trained with this tokenizer.

    Returns:
        `list[Answer]`: In the order of the questions.

    Raises:
        ValueError: If `questions` is a bare string, or a prompt with its completion does not fit the model.
    """
    if isinstance(questions, str):
        raise ValueError(f"questions must be a list: write [{questions[:40]!r}]")
    prompts = [messages(asked, system_prompt) if isinstance(asked, str) else asked for asked in questions]
    decoding = Decoding(
        max_new_tokens, temperature, seed, batch_size, stop_strings=tuple(stop_strings),
        chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    return answers(model, tokenizer, prompts, decoding, engine, tags)


@answering
def ask_again(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    before: Sequence[Answer],
    engine: "Engine | None" = None,
    *,
    progress: bool = True,
) -> list[Answer]:
    """Put the questions of `before` once more, with the same prompts and the same decoding.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): The model, on the device where it stays.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        before (`Sequence[Answer]`): From `ask`.
        engine (`engines.Engine`, *optional*): What writes, `trainer.engine` for instance; if it is of another kind than
            the one that wrote `before`, or not given, one of that kind is made.
        progress (`bool`): Show how far it is, where it takes longer than a moment.

    Returns:
        `list[Answer]`: In the same order, comparable with `before`.

    Raises:
        ValueError: If `before` is not of one call of `ask`.
    """
    if not before:
        return []
    decoding = before[0].decoding
    if any(answer.decoding != decoding for answer in before) or decoding.num_generations != 1:
        raise ValueError("the answers to ask again must come from one call of evaluate.ask")
    writer = decoding.engine if engine is None or engine.name != decoding.engine else engine
    prompts = [answer.messages for answer in before]
    return answers(model, tokenizer, prompts, decoding, writer, before[0].tags, progress=progress)


def with_and_without(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str | list[dict]],
    **options: Any,
) -> tuple[list[Answer], list[Answer]]:
    """The answers of the model before the training and as it is now: `ask` with its adapter off, and on again.

    Args:
        model (`PeftModel`): A model whose adapter was trained.
        tokenizer (`transformers.PreTrainedTokenizerBase`), questions (`Sequence[str | list[dict]]`): See `ask`.
        options (`Any`): The other arguments of `ask`, for both alike.

    Returns:
        `tuple[list[Answer], list[Answer]]`: Before and after, comparable: prompts, decoding and engine are the same.

    Raises ValueError for a model without an adapter, whose earlier weights are gone, and as `ask`.
    """
    from nbhelpers.models import adapter

    if not adapter.loras(model):
        raise ValueError("the model has no adapter to switch off: its weights before the training are gone")
    with model.disable_adapter():
        before = ask(model, tokenizer, questions, **options)
    return before, ask(model, tokenizer, questions, **options)


@answering
def accuracy(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    dataset: "Dataset | list[dict]",
    *,
    n: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    correct: Callable[[str, str], bool] | None = None,
    tags: Tags = REASONING,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    engine: "str | Engine" = "auto",
    stop_strings: Sequence[str] = (),
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Score:
    """Answer the questions of a data set and count what is right.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): The model, on the device where it stays.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        dataset (`datasets.Dataset` or `list[dict]`): Rows with `prompt` (chat messages) and `answer` (str), held out
            from training.
        n (`int`, *optional*): Only the first n rows.
        temperature (`float`), seed (`int`): See `ask`.
        correct (`Callable[[str, str], bool]`, *optional*): Given the completion's text and the right answer, whether it
            is right; `rewards.right` if not given.
        tags (`rewards.Tags`): The wanted form.
        max_new_tokens (`int`), batch_size (`int`), engine (`str` or `engines.Engine`), stop_strings (`Sequence[str]`),
            chat_template_kwargs (`dict`, *optional*): See `ask`.

    Returns:
        `Score`: One completion a question, so the shares are means of independent draws, as the interval wants.

    Raises:
        ValueError: Without rows or without the two columns, which names the columns that there are.
    """
    decoding = Decoding(
        max_new_tokens, temperature, seed, batch_size, stop_strings=tuple(stop_strings),
        chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    rows = [row for (row,) in scored(model, tokenizer, dataset, n, correct, decoding, engine, tags)]
    return Score(
        accuracy=Proportion.of(sum(row.correct for row in rows), len(rows)),
        format=Proportion.of(sum(row.formatted for row in rows), len(rows)),
        mean_length=sum(row.tokens for row in rows) / len(rows),
        rows=rows,
    )


@answering
def pass_at_k(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    dataset: "Dataset | list[dict]",
    *,
    k: Sequence[int] = (1, 8),
    num_generations: int = 16,
    n: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    correct: Callable[[str, str], bool] | None = None,
    tags: Tags = REASONING,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    engine: "str | Engine" = "auto",
    stop_strings: Sequence[str] = (),
    chat_template_kwargs: dict[str, Any] | None = None,
) -> PassAtK:
    """How often at least one of k completions is right: what the model can do, where `accuracy` is what it mostly does.

    GRPO brings pass@1 towards the pass@k of the model before training.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`), tokenizer
            (`transformers.PreTrainedTokenizerBase`), dataset (`datasets.Dataset` or `list[dict]`): See `accuracy`.
        k (`Sequence[int]`): The numbers of tries to estimate for, each at most `num_generations`.
        num_generations (`int`): Completions of each question; more make a better estimate. The prompt is computed once
            for all of them.
        n (`int`, *optional*): Only the first n rows.
        temperature (`float`): Above 0, or all completions of a question are the same.
        seed (`int`), correct (`Callable[[str, str], bool]`), tags (`rewards.Tags`), max_new_tokens (`int`), batch_size
            (`int`), engine (`str` or `engines.Engine`), stop_strings (`Sequence[str]`), chat_template_kwargs (`dict`,
            *optional*): See `accuracy`.

    Returns:
        `PassAtK`, from the unbiased estimator of arXiv 2107.03374.

    Raises:
        ValueError: As in `accuracy`, and for a k or a temperature that makes no sense.
    """
    if not k or not all(1 <= tries <= num_generations for tries in k):
        raise ValueError(f"k={tuple(k)}: each is between 1 and num_generations={num_generations}")
    if temperature <= 0:
        raise ValueError("at temperature 0 all completions of a question are the same: pass@k needs one above 0")
    decoding = Decoding(
        max_new_tokens, temperature, seed, batch_size, num_generations=num_generations,
        stop_strings=tuple(stop_strings), chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    rows = scored(model, tokenizer, dataset, n, correct, decoding, engine, tags)
    hits = [sum(row.correct for row in group) for group in rows]
    values = {tries: sum(unbiased_pass_at_k(num_generations, c, tries) for c in hits) / len(hits) for tries in k}
    return PassAtK(values, num_generations, hits, rows)
