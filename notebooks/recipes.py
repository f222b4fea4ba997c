"""Run a published recipe, or see what it takes.

    python notebooks/recipes.py                        what there is
    python notebooks/recipes.py limo --plan            on an RTX 4090; --card T4 for another
    python notebooks/recipes.py limo                   train; again, and it goes on from its newest checkpoint
    NBHELPERS_SMOKE=1 python notebooks/recipes.py limo    on a CPU: a small random model, two steps, made-up rows

docs/recipes.md says what was published of each, what was run here, and what was not.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's nbhelpers, installed or not
from nbhelpers import (
    LeanGRPOConfig,
    LeanGRPOTrainer,
    LeanSFTConfig,
    LeanSFTTrainer,
    evaluate,
    export,
    host,
    loader,
    memory,
    panel,
    recipes,
    rewards,
    tasks,
)
from nbhelpers.presets import Preset
from nbhelpers.presets.recipes import Recipe

# the five functions of the published script, by their names here
REWARDS = [rewards.tag_count, rewards.soft_format, rewards.strict_format, rewards.integer_answer, rewards.correctness]
PROBE_EVERY = 500  # steps
SEED = 0


def run(recipe: Recipe, out: Path, data: str | Path | None = None, steps: int | None = None) -> Path:
    """Train by a recipe and write the adapter; called again with the same folder it goes on where it was.

    Args:
        recipe (`Recipe`): From `recipes.get`.
        out (`Path`): Folder of checkpoints; the adapter goes into `reasoner` in it.
        data (`str` or `Path`, *optional*): Your own rows instead of the recipe's: of "long-run" a folder with GSM8K's
            files, of the others a file with the columns question, solution and answer.
        steps (`int`, *optional*): Fewer than the recipe's, for a first look.

    Returns the adapter's folder. Raises host.CannotRun without a GPU and where it does not fit, before anything is
    downloaded; ValueError for rows that cannot be used.
    """
    preset, card_gb = recipe.preset, host.card_gb()
    if not preset.smoke:
        if card_gb is None:
            raise host.CannotRun(f"{recipe.name} needs a GPU, and there is none here. --plan says what it takes; "
                                 "NBHELPERS_SMOKE=1 tries it with a small random model")  # fmt: skip
        plan = memory.plan(**recipe.takes | {"card": None, "card_gb": card_gb})
        print(plan)
        if not plan.fits:
            raise host.CannotRun(plan.verdict()[0])
    torch.manual_seed(SEED)  # the first numbers of a LoRA are drawn
    model, tokenizer = loader.load(preset)
    if recipe.method == "sft":
        _learn_texts(recipe, model, tokenizer, out, data, steps)
    else:
        _learn_by_rewards(recipe, model, tokenizer, out, data, steps)
    return export.save(model, tokenizer, out / "reasoner")


def _learn_by_rewards(recipe: Recipe, model: Any, tokenizer: Any, out: Path, data: Any, steps: int | None) -> None:
    """GSM8K by GRPO, with the probes before, now and then, and after."""
    preset = recipe.preset
    task = tasks.gsm8k(
        tokenizer, source=data or preset.dataset, max_prompt_length=preset.max_prompt_length,
        system_prompt=preset.system_prompt,
    )  # fmt: skip
    print(task)
    before = evaluate.ask(model, tokenizer, list(tasks.PROBE_ANSWERS), **preset.asking)
    settings = _settings(recipe, out, len(task.train) // preset.questions_per_step, steps)
    args = LeanGRPOConfig(
        **settings, num_generations=preset.num_generations, max_completion_length=preset.max_completion_length,
        per_device_train_batch_size=preset.questions_per_step * preset.num_generations,
    )  # fmt: skip
    trainer = LeanGRPOTrainer(
        model, REWARDS, args, task.train, processing_class=tokenizer,
        callbacks=[panel.Live(probes=before, probe_every=PROBE_EVERY)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint="auto")
    after = evaluate.ask_again(model, tokenizer, before)
    print(panel.before_after(before, after, list(tasks.PROBE_ANSWERS.values())))


def _learn_texts(recipe: Recipe, model: Any, tokenizer: Any, out: Path, data: Any, steps: int | None) -> None:
    preset, longest = recipe.preset, recipe.preset.max_prompt_length + recipe.preset.max_completion_length
    rows = texts(preset, tokenizer, made_up() if data is None and preset.smoke else data, longest)
    settings = _settings(recipe, out, -(-len(rows) // recipe.rows), steps)
    args = LeanSFTConfig(**settings, max_length=longest, per_device_train_batch_size=min(recipe.rows, len(rows)))
    trainer = LeanSFTTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[panel.Live()]
    )  # fmt: skip
    trainer.train(resume_from_checkpoint="auto")


def _settings(recipe: Recipe, out: Path, of_epoch: int, steps: int | None) -> dict[str, Any]:
    """The arguments that both configs take; `of_epoch`: steps in which all rows are seen once."""
    preset = recipe.preset
    most = preset.max_steps if preset.smoke else recipe.epochs * of_epoch
    return {
        "output_dir": str(out), "max_steps": steps or most, "learning_rate": preset.learning_rate,
        "optim": "adamw_8bit", "seed": SEED, **recipe.settings,
    }  # fmt: skip


def texts(
    preset: Preset, tokenizer: PreTrainedTokenizerBase, data: str | Path | pandas.DataFrame | None, longest: int
) -> Dataset:
    """LIMO's rows, or rows of yours with its columns, as prompt and completion: all that have at most `longest` tokens.

    Args:
        preset (`Preset`): Its system prompt asks for the form in which the answers stand.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Of the model.
        data (`str`, `Path` or `pandas.DataFrame`, *optional*): Columns question, solution and answer; None: the hub's.
        longest (`int`): Tokens of a whole text. A longer one is left out, and said: cut off, it would not teach where a
            text ends.

    Raises ValueError if fewer than two rows are left.
    """
    task = tasks.reasoning(
        "limo", tokenizer, source=data, n=None, texts=True, test_share=0.0, system_prompt=preset.system_prompt,
        max_prompt_length=preset.max_prompt_length,
    )  # fmt: skip
    rows = concatenate_datasets([task.train, task.test])  # the answers are known; nothing is held out

    def fits(row: dict[str, Any]) -> bool:
        messages = [*row["prompt"], *row["completion"]]
        return len(tokenizer.apply_chat_template(messages, return_dict=False)) <= longest

    short = rows.filter(fits)
    if len(short) < 2:
        raise ValueError(f"{len(short)} of {len(rows)} texts have at most {longest} tokens, and at least 2 are needed")
    said = f", and {len(rows) - len(short)} longer than {longest} tokens are left out" if len(short) < len(rows) else ""
    print("\n".join([f"{len(short)} texts{said}", *task.dropped]))
    return short


def made_up() -> pandas.DataFrame:
    """A few rows in LIMO's columns, for smoke runs."""
    pairs = [(a, b) for a in range(2, 7) for b in range(3, 7)]
    return pandas.DataFrame({
        "question": [f"A made-up shelf has {a} rows of {b} jars. How many jars are there?" for a, b in pairs],
        "solution": [f"Each row has {b} jars. With {a} rows that is {a} * {b} = {a * b}." for a, b in pairs],
        "answer": [str(a * b) for a, b in pairs],
    })  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", choices=recipes.NAMES)
    parser.add_argument("--plan", action="store_true", help="say what it takes, and do nothing")
    parser.add_argument("--card", help='a card by its name, for --plan: "T4"')
    parser.add_argument("--out", help="folder of checkpoints and adapter; runs/RECIPE if not given")
    parser.add_argument("--data", help="rows of your own, in the columns of the recipe's data set")
    parser.add_argument("--steps", type=int, help="fewer, for a first look")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: 1 or more; leave it out for all of the recipe's")
    try:
        if args.recipe is None:
            print("\n".join(f"{name:<10} {recipes.get(name).about}" for name in recipes.NAMES))
        elif args.plan or args.card:
            recipe = recipes.get(args.recipe)
            print(memory.plan(**recipe.takes | {"card": args.card or recipe.card}))
        else:
            out = Path(args.out or f"runs/{args.recipe}")
            print(run(recipes.get(args.recipe), out, args.data, args.steps))
    except (host.CannotRun, ValueError, FileNotFoundError, ConnectionError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
