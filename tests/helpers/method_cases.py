"""Small runs of Online DPO and PPO: on a fixed rollout, and on the workshop model. As a script: one that is killed."""

import os
import signal
import sys

import tiny_model
import torch
from resume_cases import ROWS, nines
from step_cases import make_model
from transformers import AutoTokenizer, TrainerCallback

from nbhelpers import LeanOnlineDPOConfig, LeanOnlineDPOTrainer, LeanPPOConfig, LeanPPOTrainer, engines, loader
from nbhelpers.presets import WORKSHOP

KINDS = {"dpo": (LeanOnlineDPOConfig, LeanOnlineDPOTrainer), "ppo": (LeanPPOConfig, LeanPPOTrainer)}
PROMPTS = ["aaaa", "bb", "ccccccc"]
END = 1  # the tiny tokenizer's end token
# two answers to each prompt, of different lengths; the last one is cut off
ANSWERS = [[40, 41, END], [42, END], [43, 44, 45, 46, END], [47, 48, 49, END], [50, END], [51, 52, 53, 54, 55, 56]]
SCORES = [1.0, 0.0, 0.25, 0.75, 2.0, 1.0]
QUIET = {"disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2}


class Fixed(engines.Engine):
    """Writes ANSWERS, by the prompt, and does not say how likely they were."""

    name = "fixed"

    def generate(self, prompts, sampling):
        tokenizer = tiny_model.tokenizer()
        places = [PROMPTS.index(tokenizer.decode(ids)) for ids in prompts]
        order = [2 * place + n for place in places for n in range(sampling.num_generations)]
        return [engines.Completion(list(ANSWERS[i]), [float("nan")] * len(ANSWERS[i])) for i in order]


def scored(completion_ids, **_):
    """The score of each of ANSWERS, wherever it stands."""
    return [SCORES[ANSWERS.index(list(ids))] for ids in completion_ids]


def tiny(kind, folder, model=None, reward=scored, engine=None, **changes):
    """A trainer of a tiny model whose rollouts are ANSWERS."""
    config, trainer = KINDS[kind]
    settings = {"max_steps": 1, "per_device_train_batch_size": 6, "max_completion_length": 6, **QUIET, **changes}
    options = {name: settings.pop(name) for name in ("judge", "tools", "eval_dataset") if name in settings}
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    return trainer(
        make_model("qwen2") if model is None else model, None if "judge" in options else [reward],
        config(str(folder), **settings), rows, processing_class=tiny_model.tokenizer(), engine=engine or Fixed(),
        **options,
    )  # fmt: skip


def rollout(one):
    """One rollout of the fixed answers, as the trainer makes it."""
    one.model.train()
    one.current_gradient_accumulation_steps = 1
    return one._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS for _ in range(2)])


def gradients(one, batch):
    """(loss, {parameter: gradient}) of a batch, through the trainer's hook."""
    one.model.zero_grad()
    loss = one._compute_loss(one.model, batch)
    return loss.item(), {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}


def workshop(kind, folder, *callbacks, engine="auto", **changes):
    """A trainer of the workshop model with a LoRA of rank 4, in fp32."""
    torch.manual_seed(0)  # of LoRA's A
    model, tokenizer = loader.load("workshop", lora_rank=4, quantization="none", progress=False)
    config, trainer = KINDS[kind]
    own = {"num_mini_batches": 2, "num_ppo_epochs": 2} if kind == "ppo" else {"beta": 0.5, "temperature": 1.0}
    settings = {"max_steps": 7, "save_steps": 100, "per_device_train_batch_size": 4, "max_completion_length": 10,
                **QUIET, **own, "save_strategy": "steps", "learning_rate": 1e-3, **changes}  # fmt: skip
    args = config(str(folder), **settings)
    return trainer(model, [nines], args, ROWS, processing_class=tokenizer, callbacks=list(callbacks), engine=engine)


def die_at_step_5(kind: str, folder: str) -> None:
    """What a process of its own does."""

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    AutoTokenizer.from_pretrained(WORKSHOP)
    workshop(kind, folder, Kill(), save_steps=3).train()


if __name__ == "__main__":
    die_at_step_5(*sys.argv[1:])
