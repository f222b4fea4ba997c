"""What `benchmarks.recipes --real` runs: DeepSeek-R1's stages, or a completion length that grows.

The stages are those of lesson 6, the trainers, rewards and settings those of the model notebook, the questions
`tasks.word_problems`. The model is loaded once: back to the base means that its LoRA gets its first numbers again.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import TrainerCallback

from benchmarks import common, harness
from benchmarks.method_tables import MODEL
from nbhelpers import engines, evaluate, gpu, loader, presets, rewards, tasks
from nbhelpers.training.config import LeanGRPOConfig
from nbhelpers.training.methods.sft import LeanSFTConfig, LeanSFTTrainer
from nbhelpers.training.stages import Stage
from nbhelpers.training.trainer import LeanGRPOTrainer

from . import cells, worked

RESULT = "recipes_gpu"  # says of one machine what it measured
TRAINED_ON = 1000  # questions; those behind them are for the rejection sampling
ROWS = 128  # answered at once
FOR_TRAINING = 0.85  # of the time that is left; the rest is for the scores
KNOWN = ("max_completion_length", "completions/mean_length", "completions/clipped_ratio", "reward", "right")


class Watch(TrainerCallback):
    """Ends a training at `until` (`time.monotonic`), and keeps `points`: [step, and KNOWN] of each."""

    def __init__(self, until: float, write: Callable[[], None]) -> None:
        self.until, self.write = until, write
        self.points: list[list[float | None]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= time.monotonic() > self.until

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            values = [None if (value := logs.get(name)) is None else round(value, 4) for name in KNOWN]
            self.points.append([state.global_step, *values])
            if len(self.points) % 10 == 0:
                self.write()


class Told(Stage):
    """A stage that remembers what has ended it."""

    why: str | None = None

    def over(self, *seen: Any) -> str | None:
        self.why = super().over(*seen)
        return self.why


class Run:
    """A model, its questions, and the rows that are known by now.

    Args:
        args (`argparse.Namespace`): Of `benchmarks.recipes`.
        kind (`str`): "r1_recipe" or "stages", as the rows say it.
        longest (`int`, *optional*): Tokens of an answer; the preset's for a card of 7 GB if not given.
    """

    def __init__(self, args: argparse.Namespace, kind: str, longest: int | None = None) -> None:
        self.args, self.label, self.began = args, f"{MODEL}/{kind}", time.monotonic()
        self.rows: list[common.Row] = []
        exec(cells.begin({"mode": kind, "cap": args.gb}), {})  # the card that presets, planner and torch see
        preset = presets.get("qwen2.5-1.5b").on_card(args.gb or 7.0)  # a larger card's answers would take longer
        self.preset = replace(preset, hub_id=str(args.real))
        self.steps = min(args.steps, preset.max_steps)  # two in smoke mode
        self.longest = longest or preset.max_completion_length
        self.task = tasks.word_problems(
            TRAINED_ON + args.sampled, args.n, seed=args.seed, system_prompt=preset.system_prompt
        )
        self.practice = self.task.train.select(range(TRAINED_ON))
        torch.manual_seed(args.seed)  # the first numbers of the LoRA
        self.model, self.tokenizer = loader.load(self.preset)
        gpu.grow_blocks()  # as a trainer would, before anything is captured
        self.engine = engines.choose("auto", self.model, self.tokenizer, rows=ROWS)  # one for all: its graphs too
        self.first = {name: p.detach().cpu().clone() for name, p in self.trained().items()}
        self.folder = tempfile.TemporaryDirectory()
        self._peak = harness.peak_driver()
        self._seen = self._peak.__enter__()

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def back_to_the_base(self) -> None:
        with torch.no_grad():
            for name, p in self.trained().items():
                p.copy_(self.first[name])

    # ---- two trainers, as in lesson 6 ----

    def learn_texts(self, rows: Dataset) -> dict[str, float]:
        """SFT of the rows' completions; returns what the stage's row says of it."""
        steps = min(self.args.text_steps, self.preset.max_steps)
        args = LeanSFTConfig(**self._settings(steps), learning_rate=1e-4, per_device_train_batch_size=16)
        rows = rows.select_columns(["prompt", "completion"])
        return self._trained(LeanSFTTrainer(self.model, args, train_dataset=rows, processing_class=self.tokenizer))

    def learn_rewards(
        self, what: str, functions: list[Any], steps: int, left: int, stages: list[Told] | None = None
    ) -> dict[str, float]:
        """RL with these rewards, `steps` of `left` updates that are still to be made in the time that is left."""
        longest = {"stages": stages} if stages else {"max_completion_length": self.longest}
        group = self.preset.num_generations
        args = LeanGRPOConfig(
            **self._settings(steps), **longest, learning_rate=self.preset.learning_rate, num_generations=group,
            per_device_train_batch_size=self.args.questions_per_step * group, temperature=1.0, beta=0.0,
            dynamic_sampling=1,
        )  # fmt: skip
        now = time.monotonic()
        seconds = FOR_TRAINING * (self.began + 60 * self.args.minutes - now) * steps / left
        watch = Watch(now + seconds, self.write)
        points = common.row(f"{self.label}/{what}", "ours", steps, "steps", points=watch.points, points_are=KNOWN)
        self.rows.append(points)
        trainer = LeanGRPOTrainer(
            self.model, functions, args, self.practice, processing_class=self.tokenizer, engine=self.engine,
            tags=self.preset.tags, callbacks=[watch],
        )  # fmt: skip
        made = self._trained(trainer)
        points["value"] = made["steps"]
        return made

    def _settings(self, steps: int) -> dict[str, Any]:
        return {
            "output_dir": self.folder.name, "save_strategy": "no", "seed": self.args.seed, "max_steps": steps,
            "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "max_grad_norm": 0.2, "optim": "adamw_8bit",
        }  # fmt: skip

    def _trained(self, trainer: LeanGRPOTrainer | LeanSFTTrainer) -> dict[str, float]:
        began = time.monotonic()
        trainer.train()
        made = {"steps": trainer.state.global_step, "seconds": round(time.monotonic() - began, 1)}
        self.model.zero_grad(set_to_none=True)
        return made

    def functions(self) -> list[Any]:
        """The model notebook's rewards, `correct` and `in_form`, and lesson 6's `brief`."""
        names: dict[str, Any] = {"preset": self.preset, "rewards": rewards}
        exec(cells.rewards(), names)

        def brief(completions: list[Any], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            texts = [rewards.text_of(completion) for completion in completions]
            return [
                rewards.is_correct(text, gold, self.preset.tags) * (1 - len(ids) / self.longest)
                for text, gold, ids in zip(texts, answer, completion_ids, strict=True)
            ]

        return [names["correct"], names["in_form"], brief]

    # ---- rows ----

    def measure(self, what: str, **about: Any) -> None:
        """Ask the held-out questions, and write the row."""
        gc.collect()  # the trainer of before, and its optimizer: the next one needs the memory
        score = evaluate.accuracy(
            self.model, self.tokenizer, self.task.test, tags=self.preset.tags, max_new_tokens=self.longest,
            batch_size=ROWS, engine=self.engine, seed=self.args.seed,
        )  # fmt: skip
        print(f"{what}: {score}\n{score.rows[0].completion}", flush=True)
        right, form = score.accuracy, score.format
        about = {
            "n": right.n, "low": round(right.low, 4), "high": round(right.high, 4),
            "in_form": round(form.value, 4), "in_form_low": round(form.low, 4), "in_form_high": round(form.high, 4),
            "tokens": round(score.mean_length, 1), "seed": self.args.seed, "gb": self.args.gb, **about,
        }  # fmt: skip
        self.rows.append(common.row(f"{self.label}/{what}", "ours", round(right.value, 4), "share", **about))
        self.write()

    def write(self) -> None:
        """What is known by now."""
        all_of_it = {
            "gb": self.args.gb, "questions_per_step": self.args.questions_per_step, "quantization":
            self.preset.quantization, "lora_rank": self.preset.lora_rank, "learning_rate": self.preset.learning_rate,
            "max_completion_length": self.longest,
        }  # fmt: skip
        seconds = round(time.monotonic() - self.began, 1)
        rows = [
            *self.rows,
            common.row(f"{self.label}/seconds", "ours", seconds, "s", **all_of_it),
            common.row(f"{self.label}/peak_driver", "ours", round(self._seen[0], 3), "GB", cap=self.args.gb),
        ]
        common.publish(RESULT, common.merged(RESULT, rows, list), self.args.out)


def good_ones(asked: Dataset, answered: list[list[evaluate.Row]]) -> list[dict[str, Any]]:
    """Rejection sampling: of each question's answers the shortest that is right and in form, as a row of SFT."""
    kept = []
    for row, answers in zip(asked, answered, strict=True):
        good = [answer for answer in answers if answer.correct and answer.formatted]
        if good:
            text = min(good, key=lambda answer: answer.tokens).completion
            kept.append({"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}]})
    return kept


def r1(args: argparse.Namespace) -> list[common.Row]:
    """The five stages, then R1-Zero with as many updates as both RL stages made."""
    run = Run(args, "r1_recipe")
    correct, in_form, brief = run.functions()
    run.measure("accuracy_base", steps=0, seconds=0.0)

    few = worked.rows(run.preset.system_prompt)
    run.measure("accuracy_cold_start", **run.learn_texts(few), texts=len(few))
    rl = run.learn_rewards("curve_rl", [correct, in_form], run.steps, left=4 * run.steps)
    run.measure("accuracy_rl", **rl)

    asked = run.task.train.select(range(TRAINED_ON, TRAINED_ON + args.sampled))
    sampled = evaluate.pass_at_k(
        run.model, run.tokenizer, asked, num_generations=8, tags=run.preset.tags, max_new_tokens=run.longest,
        batch_size=ROWS, engine=run.engine, seed=args.seed,
    )  # fmt: skip
    kept = good_ones(asked, sampled.rows)
    run.back_to_the_base()
    made = run.learn_texts(Dataset.from_list(kept) if kept else few)
    run.measure("accuracy_sft", **made, asked=len(asked), kept=len(kept))
    last = run.learn_rewards("curve_after", [correct, in_form, brief], run.steps, left=3 * run.steps)
    run.measure("accuracy_after", **last)

    run.back_to_the_base()
    both = int(rl["steps"] + last["steps"])
    zero = run.learn_rewards("curve_zero", [correct, in_form], both, left=both)
    run.measure("accuracy_zero", **zero)
    return run.rows


def stages(args: argparse.Namespace) -> list[common.Row]:
    """RL whose completions may get longer: each stage but the last ends after 2 of 5 updates, or before that when 10 %
    of the completions of ten rollouts were cut off."""
    run = Run(args, "stages", args.lengths[-1])
    most = max(1, run.steps * 2 // 5)
    lengths = [Told(length, steps=most, cut_off=0.1) for length in args.lengths[:-1]] + [Told(args.lengths[-1])]
    correct, in_form, _ = run.functions()
    run.measure("right_before")
    made = run.learn_rewards("curve", [correct, in_form], run.steps, run.steps, lengths)
    of_step = [point[1] for point in run.rows[-1]["points"]]
    for stage, length in zip(lengths, args.lengths, strict=True):
        ended = stage.why or ("the run ended" if length in of_step else "not reached")
        row = common.row(f"{run.label}/steps_{length}", "ours", of_step.count(length), "steps", ended=ended)
        run.rows.append(row)
    run.measure("right_after", **made)
    return run.rows
