"""What is measured of a real model: how much is right, before and after, in time and memory."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from nbhelpers import evaluate, loader, presets, tasks
from nbhelpers.evaluate import Answer, Proportion
from nbhelpers.rewards import right

from . import plain

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nbhelpers import LeanGRPOTrainer
    from nbhelpers.panel import Live


ROWS = 128  # answered at once
PROMPTS = {  # candidates for a preset's system prompt
    "as_shipped": tasks.SYSTEM_PROMPT,
    "this_form": presets.REASONING_PROMPT,
    "named_parts": (
        "Write your reply in this form:\n<reasoning>\nyour steps\n</reasoning>\n<answer>\nthe result alone\n</answer>"
    ),
    "in_words": (
        "Think step by step between <reasoning> and </reasoning>. Then write the result, and nothing else, between "
        "<answer> and </answer>."
    ),
    "with_example": (
        "Write your reply in the form of this example:\n<reasoning>\nFour boxes of 6 are 4 * 6 = 24 pens. After 5 are "
        "gone, 24 - 5 = 19 are left.\n</reasoning>\n<answer>\n19\n</answer>"
    ),
    "boxed": r"Think step by step, and put the result into \boxed{}.",
    "none": None,
}


def rows_of(file: Path, system_prompt: str | None, n: int | None = None) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines()[:n]
    rows = [json.loads(line) for line in lines]
    return [
        {
            "prompt": tasks.messages(row["question"], system_prompt),
            "answer": row["answer"].rpartition("####")[2].strip().replace(",", ""),
        }
        for row in rows
    ]


def problems(job: dict[str, Any], system_prompt: str | None) -> tasks.Task:
    """What the notebook trains on in the place of GSM8K."""
    from datasets import Dataset

    if job["train_on"] == "word_problems":
        return tasks.word_problems(4000, job["n"], system_prompt=system_prompt)
    folder = Path(job["questions"])
    train = rows_of(folder / "train.jsonl", system_prompt)
    test = rows_of(folder / "test_numbers.jsonl", system_prompt, job["n"])
    return tasks.Task("questions", Dataset.from_list(train), Dataset.from_list(test))


def changes(job: dict[str, Any]) -> dict[str, Any]:
    """What the call changes of the preset; a system prompt by its name in PROMPTS."""
    changed = json.loads(job["preset"])
    return changed | {"system_prompt": PROMPTS[changed["system_prompt"]]} if "system_prompt" in changed else changed


def scores(
    job: dict[str, Any], model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase",
    preset: presets.Preset, decimals: tasks.Task, passes: bool = False,
) -> dict[str, Proportion]:  # fmt: skip
    """Shares of right answers, in whatever form, and of those in form, on every kind of test question."""
    folder, prompt, n = Path(job["questions"]), preset.system_prompt, job["n"]
    own = tasks.word_problems(50, n // 2, system_prompt=prompt)
    data = {
        "numbers": rows_of(folder / "test_numbers.jsonl", prompt, n),
        "templates": rows_of(folder / "test_templates.jsonl", prompt, n),
        "decimals": decimals.test.select(range(n // 2)),
        "own_templates": own.test,
        "plain": [{"prompt": tasks.messages(q, prompt), "answer": a} for q, a in plain.QUESTIONS],
    }
    how = {"max_new_tokens": preset.max_completion_length, "batch_size": ROWS}
    shares: dict[str, Proportion] = {}
    for name, rows in data.items():
        score = evaluate.accuracy(model, tokenizer, rows, correct=_contains if name == "plain" else right, **how)
        shares[name], shares[f"{name}_in_form"] = score.accuracy, score.format
    both = shares["numbers_in_form"], shares["templates_in_form"]
    shares["in_form"] = Proportion.of(sum(round(s.value * s.n) for s in both), sum(s.n for s in both))
    if passes:
        tried = evaluate.pass_at_k(
            model, tokenizer, data["numbers"][: n // 4], k=(1, 8), num_generations=8, correct=right, **how
        )
        solved = sum(hits > 0 for hits in tried.correct)
        shares["pass_8"] = Proportion.of(solved, len(tried.correct))
    return shares


def _contains(completion: str, answer: str) -> bool:
    """Whether a plain question is answered: the answer stands in the text, or is what is read of it."""
    return answer.casefold() in completion.casefold() or right(completion, answer)


class Timer:
    """Seconds of the training and the most memory that the driver said was taken."""

    def __init__(self) -> None:
        self._watch = harness.peak_driver()
        self._seen = self._watch.__enter__()
        self._started = time.monotonic()
        self.seconds = self.peak = 0.0

    def stop(self) -> None:
        self.seconds = time.monotonic() - self._started
        self._watch.__exit__(None, None, None)
        self.peak = self._seen[0]


def report(
    job: dict[str, Any], before: dict[str, Proportion], after: dict[str, Proportion], timer: Timer,
    trainer: "LeanGRPOTrainer", live: "Live", asked: Sequence[Answer], asked_again: Sequence[Answer],
    preset: presets.Preset,
) -> None:  # fmt: skip
    """Write what the parent turns into rows, and the recorded run beside it."""
    shares = named(before, "before") | named(after, "after")
    probes = [
        {
            "question": old.question,
            "right_before": right(old.completion, tasks.PROBE_ANSWERS[old.question]),
            "right_after": right(new.completion, tasks.PROBE_ANSWERS[new.question]),
        }
        for old, new in zip(asked, asked_again, strict=True)
    ]
    steps = trainer.state.global_step
    settings = {
        "learning_rate": trainer.args.learning_rate, "lora_rank": preset.lora_rank, "quantization": preset.quantization,
        "dynamic_sampling": vars(trainer.args).get("dynamic_sampling", 0),  # not every method has it
        "max_completion_length": preset.max_completion_length,
    }  # fmt: skip
    found = {
        "shares": shares, "seconds": timer.seconds, "peak_driver": timer.peak, "steps": steps, "settings": settings,
        "stopped_at": steps if steps < trainer.args.max_steps else None, "probes": probes,
        "curve": curve(live.history),
        "live": live.save(Path(job["folder"]) / "live.json", preset.title).read_text(),
    }  # fmt: skip
    write(job, found)


def named(shares: dict[str, Proportion], when: str) -> dict[str, dict[str, float]]:
    """Shares as the report has them."""
    return {f"{name}_{when}": vars(share) for name, share in shares.items()}


def write(job: dict[str, Any], found: dict[str, Any]) -> None:
    """The report, for the parent."""
    Path(job["folder"], "report.json").write_text(json.dumps(found))


def curve(history: list[dict[str, Any]]) -> list[list[float | None]]:
    """[step, reward, loss, right] of each logged step of `Live.history`; None for what a method does not log."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    return [[row["step"], *(rounded(row.get(name)) for name in ("reward", "loss", "right"))] for row in history]


def prompts(job: dict[str, Any]) -> None:
    """How often a model keeps the form, and is right in whatever form, by system prompt; two kinds of questions."""
    preset = presets.get("qwen2.5-1.5b")
    model, tokenizer = loader.load(job["weights"], quantization="nf4", lora_rank=16)
    found = []
    for name, prompt in PROMPTS.items():
        own = tasks.word_problems(50, job["n"] // 2, system_prompt=prompt)
        for kind, rows in (
            ("numbers", rows_of(Path(job["questions"]) / "test_numbers.jsonl", prompt, job["n"] // 2)),
            ("own", own.test),
        ):
            score = evaluate.accuracy(
                model, tokenizer, rows, correct=right, max_new_tokens=preset.max_completion_length, batch_size=ROWS
            )
            for what, share in (("right", score.accuracy), ("in_form", score.format)):
                interval = {"n": share.n, "low": round(share.low, 4), "high": round(share.high, 4)}
                found.append((f"prompt/{name}/{kind}/{what}", share.value, interval))
            print(name, kind, score, flush=True)
    Path(job["folder"], "report.json").write_text(json.dumps(found))
