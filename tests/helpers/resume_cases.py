"""A small run for tests of checkpoints, what is compared of it, and ways to end it. As a script: one that is killed."""

import os
import signal
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from nbhelpers import tasks
from nbhelpers.presets import WORKSHOP
from nbhelpers.training import trainer

ROWS = tasks.decimals(n_train=6, n_test=1).train  # two prompts a generation: three generations an epoch
PLAIN = {"max_steps": 7, "save_steps": 100}


def nines(completions, **_):
    """Differs within a group even when the model is sure of its answer."""
    return [float(sum(map(ord, completion[0]["content"])) % 7) for completion in completions]


class At(TrainerCallback):
    """Raises at the end of a step, or (`inside`) between two, where the next one's completions are there already."""

    def __init__(self, step: int, what: type, event: str = "on_step_end"):
        def raiser(args, state, control, **_):
            if state.global_step == step:
                raise what

        setattr(self, event, raiser)


def make(tokenizer, folder, *callbacks, model=None, rows=ROWS, eval_rows=None, reward=nines, engine="hf",
         max_skipped_steps=10, **changes):  # fmt: skip
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 10,
                "learning_rate": 1e-3, "disable_tqdm": True, "beta": 0.02, **changes}  # fmt: skip
    args = trainer.LeanGRPOConfig(str(folder), **settings)
    rewards = reward if isinstance(reward, list) else [reward]
    return trainer.LeanGRPOTrainer(
        model, rewards, args, rows, eval_rows, tokenizer, callbacks=list(callbacks), engine=engine,
        max_skipped_steps=max_skipped_steps,
    )  # fmt: skip


def weights(run) -> dict:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def curve(run) -> list:
    names = ("step", "reward", "loss", "num_tokens", "learning_rate", "epoch")
    logs = [log for log in run.state.log_history if "train_runtime" not in log]  # the summary repeats the last step
    return [[log.get(name) for name in names] for log in logs if "loss" in log]


def undisturbed(tokenizer, folder, **changes) -> tuple[dict, list]:
    """Weights and curve of a run that nobody stopped."""
    run = make(tokenizer, folder, **changes)
    run.train()
    return weights(run), curve(run)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def die_at_step_5(folder: str) -> None:
    """What a process of its own does."""

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    make(AutoTokenizer.from_pretrained(WORKSHOP), folder, Kill(), **{**PLAIN, "save_steps": 2}).train()


if __name__ == "__main__":
    die_at_step_5(sys.argv[1])
