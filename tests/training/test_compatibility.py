"""The table of what of TRL and peft runs how: it is whole, the page says the same, and what it says is true."""

import contextlib
import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import trl
from step_cases import ROWS, length_reward, make_model
from tiny_model import tokenizer

from nbhelpers import LeanGRPOConfig
from nbhelpers.training import compatibility, trainer
from nbhelpers.training.compatibility import ADAPTERS, ARGUMENTS, BOTH, FAST, GENERATION, LOSS, MEANING, REFUSED

ROOT = Path(__file__).parents[2]
OURS = ("graph",)  # engines of our own; "hf" is transformers' generate


def test_every_field_of_trls_config_stands_in_it():
    fields = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert fields - set(compatibility.fields()) == set(), "put what this version of TRL adds into the table"
    assert set(compatibility.fields()) - fields == set()


def test_a_field_that_stands_in_it_twice_says_of_which_values():
    for name in compatibility.fields():
        entries = [entry for entry in ARGUMENTS if name in entry.names.split()]
        assert len({entry.when for entry in entries}) == len(entries), name
    assert {entry.how for entry in (*ARGUMENTS, *ADAPTERS)} == set(MEANING)


def test_the_page_is_written_from_the_table():
    done = subprocess.run([sys.executable, "-m", "benchmarks.compatibility", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `python -m benchmarks.compatibility` and commit docs/compatibility.md"


def made(folder, model, peft_config=None, **settings):
    """(trainer, what it printed)."""
    args = dict(
        per_device_train_batch_size=4, num_generations=4, max_completion_length=8, use_cpu=True, bf16=False,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        one = trainer.LeanGRPOTrainer(
            model, [length_reward], LeanGRPOConfig(str(folder), **{**args, **settings}), ROWS,
            processing_class=tokenizer(), peft_config=peft_config,
        )  # fmt: skip
    return one, said.getvalue()


def runs(how, one, said):
    lean, drawn = one.lean, one.engine is not None and one.engine.name in OURS
    assert (lean, drawn) == (how not in (LOSS, BOTH), how not in (GENERATION, BOTH)), said
    if not lean:
        assert "The loss is TRL's own" in said and "GB" in said


def each(entries):
    for entry in entries:
        for number, tried in enumerate(entry.tries):
            yield pytest.param(entry.how, tried, id=f"{entry.names.split()[0]}-{number}-{entry.how}")


@pytest.mark.parametrize("how, settings", [*each(ARGUMENTS)])
def test_arguments_run_as_the_table_says(tmp_path, how, settings):
    if how == REFUSED:
        with pytest.raises((ValueError, NotImplementedError), match=next(iter(settings))):
            made(tmp_path, make_model(), **settings)
        return
    one, said = made(tmp_path, make_model(), **settings)
    runs(how, one, said)
    if how == FAST:
        one.args.max_steps = 1
        one.train()


@pytest.mark.parametrize("how, config", [*each(ADAPTERS)])
def test_adapters_run_as_the_table_says(tmp_path, how, config):
    ((kind, options),) = config.items()
    family = "llama" if kind == "AdaptionPromptConfig" else "qwen2"  # the former is all that peft takes there
    one, said = made(tmp_path, make_model(family, lora=False), getattr(peft, kind)(**options))
    runs(how, one, said)
