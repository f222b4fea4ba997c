"""Prompts in, answers out, scored where the right one is known: what `ask`, `accuracy` and `check_signal` share."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from nbhelpers.models import chat
from nbhelpers.progress import Clock, interruptible
from nbhelpers.rewards import REASONING, Tags, in_form, question_of, read, right

from .results import Answer, Decoding, Row

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nbhelpers.engines import Engine

# a decorator of what lets a model answer
answering = interruptible("questions were answered", "the model is as it was, and these answers are not kept")


def scored(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    dataset: "Dataset | list[dict]",
    n: int | None,
    correct: Callable[[str, str], bool] | None,
    decoding: Decoding,
    engine: "str | Engine",
    tags: Tags,
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
    given = answers(model, tokenizer, [row["prompt"] for row in rows], decoding, engine, tags)
    each, correct = decoding.num_generations, correct or partial(right, tags=tags)
    return [
        [
            Row(
                **vars(answer),
                gold=row["answer"],
                correct=bool(correct(answer.completion, row["answer"])),
                formatted=in_form(answer.completion, tags),
            )
            for answer in given[i * each : (i + 1) * each]
        ]
        for i, row in enumerate(rows)
    ]


def answers(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[dict]],
    decoding: Decoding,
    engine: "str | Engine" = "auto",
    tags: Tags = REASONING,
    *,
    progress: bool = True,
) -> list[Answer]:
    """`decoding.num_generations` completions for each prompt (chat messages), in order. A line with a clock says how
    many are written, where that takes long; `progress=False` leaves it out."""
    from nbhelpers import engines

    if not prompts:
        return []
    if decoding.chat_template_kwargs is None:
        decoding = replace(decoding, chat_template_kwargs=chat.template_kwargs(tokenizer))
    ids = [chat.prompt_ids(tokenizer, prompt, decoding.chat_template_kwargs) for prompt in prompts]
    ends = chat.end_ids(model, tokenizer)
    if (end := chat.end_of_turn(tokenizer, ends)) is not None:
        warnings.warn(chat.goes_on(tokenizer, ends, end), stacklevel=4)
    limit = model.config.get_text_config().max_position_embeddings
    engines.base.check_length(ids, decoding.max_new_tokens, limit, option="max_new_tokens")
    writer = engines.choose(engine, model, tokenizer, rows=decoding.batch_size, quiet=True)
    decoding = replace(decoding, engine=writer.name)
    each = decoding.num_generations
    # each completion draws from a stream of its own: neither the others nor how long they took matter
    seeds = [decoding.seed * 1_000_003 + i for i in range(each * len(ids))]
    with Clock("answers", len(seeds), shown=progress) as clock:
        sampling = engines.Sampling(
            decoding.max_new_tokens, num_generations=each, temperature=decoding.temperature, stop_ids=ends,
            stop_strings=decoding.stop_strings, seed=seeds, on_end=clock.step,
        )  # fmt: skip
        written = writer.generate(ids, sampling)
    texts = tokenizer.batch_decode([completion.token_ids for completion in written], skip_special_tokens=True)
    return [
        Answer(
            question=question_of(prompts[i // each]),
            completion=text,
            answer=_answer(text, tags),
            tokens=len(completion.token_ids),
            finished=completion.reason != engines.base.LENGTH,
            prompt=str(tokenizer.decode(ids[i // each])),
            decoding=decoding,
            messages=prompts[i // each],
            tags=tags,
        )
        for i, (completion, text) in enumerate(zip(written, texts, strict=True))
    ]


def _answer(text: str, tags: Tags) -> str | None:
    """What stands in the place of the answer; where that is all behind the thought, the answer that is read of it."""
    answer = tags.extract(text)
    return answer if answer is None or tags.answer_open else read(answer) or answer
