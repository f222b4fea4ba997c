"""How good is the model now? Held-out accuracy with an interval, and the same questions before and after.

A comparison is worth something only if nothing but the weights differs, so every answer carries the exact prompt and
the decoding that it came from, and answers that differ in these are not compared. Asking leaves no trace: the modes
of the model, the tokenizer and the random numbers of the training that follows are as they were.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nbhelpers.rewards import extract_answer, formatted, is_correct
from nbhelpers.tasks import messages

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


# ---- what comes back ----


@dataclass(frozen=True)
class Decoding:
    """How completions were drawn: all that could make two runs differ apart from the weights and the prompts."""

    max_new_tokens: int
    temperature: float  # 0.0: greedy
    seed: int
    batch_size: int
    engine: str = ""  # what wrote: another one rounds otherwise


@dataclass(frozen=True)
class Answer:
    """One question and what the model wrote.

    Args:
        question (`str`): The last message of the prompt.
        completion (`str`): What the model wrote, without special tokens.
        answer (`str` or `None`): The text of its answer tag (see `rewards.extract_answer`).
        tokens (`int`): Number of tokens written, the end token included.
        finished (`bool`): Whether it ended by itself; False when it was cut off at `max_new_tokens`.
        prompt (`str`): All that the model was given: chat template, system prompt and question.
        decoding (`Decoding`): How the completion was drawn.
    """

    question: str
    completion: str
    answer: str | None
    tokens: int
    finished: bool
    prompt: str = field(repr=False)
    decoding: Decoding = field(repr=False)


@dataclass(frozen=True)
class Row(Answer):
    """An answer to a question whose right answer, `gold`, is known."""

    gold: str
    correct: bool
    formatted: bool


@dataclass(frozen=True)
class Proportion:
    """A share of n with its Wilson 95 % interval, all three between 0 and 1.

    The interval (Wilson 1927, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22) is never empty and never leaves [0, 1], not even at 0 of n or n of n.
    """

    value: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, n: int) -> "Proportion":
        """The share hits / n, for n of at least 1."""
        if not 0 <= hits <= n or n < 1:
            raise ValueError(f"{hits} of {n} is no proportion")
        p, z2 = hits / n, Z95**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        # at the ends the bound is exact on paper, and one rounding error off here
        return cls(p, n, 0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half)

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%}, n = {self.n})"


@dataclass(frozen=True)
class Score:
    """The outcome of `accuracy`: two shares with intervals, the mean length in tokens, and the row behind each."""

    accuracy: Proportion
    format: Proportion
    mean_length: float
    rows: list[Row] = field(repr=False)

    def __str__(self) -> str:
        return f"accuracy {self.accuracy} · format {self.format} · mean length {self.mean_length:.1f} tokens"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = {"accuracy": self.accuracy, "format": self.format, "mean length": f"{self.mean_length:.1f} tokens"}
        cells = "".join(f"<tr><th style='text-align:left'>{name}</th><td>{rows[name]}</td></tr>" for name in rows)
        return f"<table>{cells}</table>"


@dataclass(frozen=True)
class Paired:
    """The same questions before and after: how many went which way."""

    both_right: int
    gained: int
    lost: int
    both_wrong: int

    def __str__(self) -> str:
        return f"both right {self.both_right} · gained {self.gained} · lost {self.lost} · both wrong {self.both_wrong}"


# ---- asking ----


def ask(
    model,
    tokenizer,
    questions: Sequence[str],
    *,
    system_prompt: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    engine="auto",
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


def accuracy(
    model,
    tokenizer,
    dataset,
    *,
    n: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    correct: Callable[[str, str], bool] = is_correct,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    engine="auto",
) -> Score:
    """Answer the questions of a data set and count what is right.

    Args:
        model, tokenizer, temperature, seed, max_new_tokens, batch_size, engine: See `ask`.
        dataset (`datasets.Dataset` or `list[dict]`): Rows with `prompt` (chat messages) and `answer` (str), held out
            from training.
        n (`int`, *optional*): Only the first n rows.
        correct (`Callable[[str, str], bool]`): Given the completion's text and the right answer, whether it is right.

    Returns:
        `Score`: One completion a question, so the shares are means of independent draws, as the interval wants.

    Raises:
        ValueError: Without rows or without the two columns, which names the columns that there are.
    """
    rows = [dataset[i] for i in range(len(dataset) if n is None else min(n, len(dataset)))]
    if not rows:
        raise ValueError("no rows to score: the data set is empty, or n is 0")
    if not {"prompt", "answer"} <= set(rows[0]):
        raise ValueError(f"a row needs the columns prompt and answer; this data set has {', '.join(rows[0])}")
    decoding = Decoding(max_new_tokens, temperature, seed, batch_size)
    given = answers(model, tokenizer, [row["prompt"] for row in rows], decoding, engine)
    scored = [
        Row(
            **vars(answer),
            gold=row["answer"],
            correct=bool(correct(answer.completion, row["answer"])),
            formatted=formatted(answer.completion),
        )
        for row, answer in zip(rows, given, strict=True)
    ]
    return Score(
        accuracy=Proportion.of(sum(row.correct for row in scored), len(scored)),
        format=Proportion.of(sum(row.formatted for row in scored), len(scored)),
        mean_length=sum(row.tokens for row in scored) / len(scored),
        rows=scored,
    )


def check_comparable(before: Sequence[Answer], after: Sequence[Answer]) -> None:
    """Raises ValueError unless both lists hold the same prompts in the same order, decoded in the same way."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} answers before and {len(after)} after: ask the same questions both times")
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.question != new.question:
            raise ValueError(f"question {i} differs: {old.question[:80]!r} before, {new.question[:80]!r} after")
        if old.prompt != new.prompt:
            raise ValueError(
                f"question {i} is the same, but its prompt is not (system prompt or chat template): "
                f"{old.prompt[:200]!r} before, {new.prompt[:200]!r} after"
            )
        if old.decoding != new.decoding:
            raise ValueError(f"the decoding differs: {old.decoding} before, {new.decoding} after")


def paired(before: Score, after: Score) -> Paired:
    """Count what became of each question.

    Args:
        before (`Score`), after (`Score`): From `accuracy`, on the same rows with the same settings.

    Returns:
        `Paired`

    Raises:
        ValueError: If questions, prompts, right answers or decoding differ.
    """
    check_comparable(before.rows, after.rows)
    counts = {(True, True): 0, (False, True): 0, (True, False): 0, (False, False): 0}
    for i, (old, new) in enumerate(zip(before.rows, after.rows, strict=True)):
        if old.gold != new.gold:
            raise ValueError(f"the right answer to question {i} was {old.gold!r} before and is {new.gold!r} after")
        counts[old.correct, new.correct] += 1
    return Paired(*counts.values())


# ---- decoding ----


def answers(model, tokenizer, prompts: Sequence[list[dict]], decoding: Decoding, engine="auto") -> list[Answer]:
    """One completion for each prompt (a list of chat messages), in their order; what `ask` and `accuracy` share."""
    from nbhelpers import engines

    if not prompts:
        return []
    ids = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)["input_ids"]
    ends = end_tokens(model, tokenizer)
    _check_length(model, ids, decoding.max_new_tokens)
    engine = engines.choose(engine, model, tokenizer, rows=decoding.batch_size, quiet=True)
    decoding = replace(decoding, engine=engine.name)
    # each question draws from a stream of its own: neither the others nor how long they took matter
    seeds = [decoding.seed * 1_000_003 + i for i in range(len(ids))]
    sampling = engines.Sampling(decoding.max_new_tokens, temperature=decoding.temperature, stop_ids=ends, seed=seeds)
    written = engine.generate(ids, sampling)
    texts = tokenizer.batch_decode([completion.token_ids for completion in written], skip_special_tokens=True)
    return [
        Answer(
            question=prompt[-1]["content"],
            completion=text,
            answer=extract_answer(text),
            tokens=len(completion.token_ids),
            finished=completion.reason == "stop_id",
            prompt=tokenizer.decode(row),
            decoding=decoding,
        )
        for prompt, row, completion, text in zip(prompts, ids, written, texts, strict=True)
    ]


def end_tokens(model, tokenizer) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's own and all that the model declares, as in TRL's trainers."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    return tuple(sorted({*declared, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}))


def _check_length(model, ids: list[list[int]], max_new_tokens: int) -> None:
    limit = model.config.get_text_config().max_position_embeddings
    for i, row in enumerate(ids):
        if len(row) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens; with max_new_tokens={max_new_tokens} that is more than the "
                f"{limit} that the model can hold. Shorten it, or lower max_new_tokens to {max(0, limit - len(row))}"
            )
