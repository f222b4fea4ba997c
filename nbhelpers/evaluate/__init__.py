"""How good is the model now? Held-out accuracy with an interval, pass@k, and the same questions before and after.

What comes back is in results.py, and is compared there. Asking leaves no trace: the modes of the model, the
tokenizer and the random numbers of the training that follows are as they were.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nbhelpers.models.chat import prompt_ids
from nbhelpers.rewards import extract_answer, formatted, right
from nbhelpers.tasks import messages

from .results import Answer as Answer
from .results import Decoding, PassAtK, Proportion, Row, Score, unbiased_pass_at_k
from .results import Paired as Paired
from .results import check_comparable as check_comparable
from .results import paired as paired

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nbhelpers.engines import Engine

# ---- asking ----


def ask(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str],
    *,
    system_prompt: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    engine: "str | Engine" = "auto",
) -> list[Answer]:
    """Put questions to the model and read its answers.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): The model, on the device where it stays.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        questions (`Sequence[str]`): The questions, each the user's message of a chat of its own.
        system_prompt (`str`, *optional*): The system's message before each; use the one of the training data.
        max_new_tokens (`int`): Completions longer than this are cut off.
        temperature (`float`): 0.0 takes the likeliest token each time; above it tokens are drawn, with no other
            filter, whatever the model's own generation defaults say.
        seed (`int`): Of the drawing.
        batch_size (`int`): Questions at a time. More is faster and takes more memory.
        engine (`str` or `engines.Engine`): What writes: "auto", "graph", "hf", or a trainer's own, `trainer.engine`.

    Returns:
        `list[Answer]`: In the order of the questions.

    Raises:
        ValueError: If `questions` is a bare string, or a prompt with its completion does not fit the model.
    """
    if isinstance(questions, str):
        raise ValueError(f"questions must be a list: write [{questions[:40]!r}]")
    prompts = [messages(question, system_prompt) for question in questions]
    return answers(model, tokenizer, prompts, Decoding(max_new_tokens, temperature, seed, batch_size), engine)


def ask_again(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    before: Sequence[Answer],
    engine: "Engine | None" = None,
) -> list[Answer]:
    """Put the questions of `before` once more, with the same prompts and the same decoding.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): The model, on the device where it stays.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        before (`Sequence[Answer]`): From `ask`.
        engine (`engines.Engine`, *optional*): What writes, `trainer.engine` for instance; if it is of another kind than
            the one that wrote `before`, or not given, one of that kind is made.

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
    return answers(model, tokenizer, [answer.messages for answer in before], decoding, writer)


def accuracy(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    dataset: "Dataset | list[dict]",
    *,
    n: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    correct: Callable[[str, str], bool] = right,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    engine: "str | Engine" = "auto",
) -> Score:
    """Answer the questions of a data set and count what is right.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): The model, on the device where it stays.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        dataset (`datasets.Dataset` or `list[dict]`): Rows with `prompt` (chat messages) and `answer` (str), held out
            from training.
        n (`int`, *optional*): Only the first n rows.
        temperature (`float`), seed (`int`): See `ask`.
        correct (`Callable[[str, str], bool]`): Given the completion's text and the right answer, whether it is right.
        max_new_tokens (`int`), batch_size (`int`), engine (`str` or `engines.Engine`): See `ask`.

    Returns:
        `Score`: One completion a question, so the shares are means of independent draws, as the interval wants.

    Raises:
        ValueError: Without rows or without the two columns, which names the columns that there are.
    """
    decoding = Decoding(max_new_tokens, temperature, seed, batch_size)
    scored = [row for (row,) in _scored(model, tokenizer, dataset, n, correct, decoding, engine)]
    return Score(
        accuracy=Proportion.of(sum(row.correct for row in scored), len(scored)),
        format=Proportion.of(sum(row.formatted for row in scored), len(scored)),
        mean_length=sum(row.tokens for row in scored) / len(scored),
        rows=scored,
    )


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
    correct: Callable[[str, str], bool] = right,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    engine: "str | Engine" = "auto",
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
        seed (`int`), correct (`Callable[[str, str], bool]`), max_new_tokens (`int`), batch_size (`int`), engine
            (`str` or `engines.Engine`): See `accuracy`.

    Returns:
        `PassAtK`, from the unbiased estimator of arXiv 2107.03374.

    Raises:
        ValueError: As in `accuracy`, and for a k or a temperature that makes no sense.
    """
    if not k or not all(1 <= tries <= num_generations for tries in k):
        raise ValueError(f"k={tuple(k)}: each is between 1 and num_generations={num_generations}")
    if temperature <= 0:
        raise ValueError("at temperature 0 all completions of a question are the same: pass@k needs one above 0")
    decoding = Decoding(max_new_tokens, temperature, seed, batch_size, num_generations=num_generations)
    rows = _scored(model, tokenizer, dataset, n, correct, decoding, engine)
    hits = [sum(row.correct for row in group) for group in rows]
    values = {tries: sum(unbiased_pass_at_k(num_generations, c, tries) for c in hits) / len(hits) for tries in k}
    return PassAtK(values, num_generations, hits, rows)


def _scored(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    dataset: "Dataset | list[dict]",
    n: int | None,
    correct: Callable[[str, str], bool],
    decoding: Decoding,
    engine: "str | Engine",
) -> list[list[Row]]:
    """The completions of each of the first n questions, scored."""
    rows = [dataset[i] for i in range(len(dataset) if n is None else min(n, len(dataset)))]
    if not rows:
        raise ValueError("no rows to score: the data set is empty, or n is 0")
    if not {"prompt", "answer"} <= set(rows[0]):
        raise ValueError(f"a row needs the columns prompt and answer; this data set has {', '.join(rows[0])}")
    if isinstance(rows[0]["prompt"], str):
        raise ValueError(
            'a prompt must be chat messages, [{"role": "user", "content": ...}], and row 0 has a plain text'
        )
    given = answers(model, tokenizer, [row["prompt"] for row in rows], decoding, engine)
    each = decoding.num_generations
    return [
        [
            Row(
                **vars(answer),
                gold=row["answer"],
                correct=bool(correct(answer.completion, row["answer"])),
                formatted=formatted(answer.completion),
            )
            for answer in given[i * each : (i + 1) * each]
        ]
        for i, row in enumerate(rows)
    ]


# ---- decoding ----


def answers(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[dict]],
    decoding: Decoding,
    engine: "str | Engine" = "auto",
) -> list[Answer]:
    """`decoding.num_generations` completions for each prompt (chat messages), in order; what all of the above share."""
    from nbhelpers import engines

    if not prompts:
        return []
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    limit = model.config.get_text_config().max_position_embeddings
    engines.base.check_length(ids, decoding.max_new_tokens, limit, option="max_new_tokens")
    writer = engines.choose(engine, model, tokenizer, rows=decoding.batch_size, quiet=True)
    decoding = replace(decoding, engine=writer.name)
    each = decoding.num_generations
    # each completion draws from a stream of its own: neither the others nor how long they took matter
    seeds = [decoding.seed * 1_000_003 + i for i in range(each * len(ids))]
    sampling = engines.Sampling(
        decoding.max_new_tokens, num_generations=each, temperature=decoding.temperature, stop_ids=ends, seed=seeds
    )
    written = writer.generate(ids, sampling)
    texts = tokenizer.batch_decode([completion.token_ids for completion in written], skip_special_tokens=True)
    return [
        Answer(
            question=prompts[i // each][-1]["content"],
            completion=text,
            answer=extract_answer(text),
            tokens=len(completion.token_ids),
            finished=completion.reason == "stop_id",
            prompt=str(tokenizer.decode(ids[i // each])),
            decoding=decoding,
            messages=prompts[i // each],
        )
        for i, (completion, text) in enumerate(zip(written, texts, strict=True))
    ]


def end_tokens(model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's own and all that the model declares, as in TRL's trainers."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    return tuple(sorted({*declared, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}))
