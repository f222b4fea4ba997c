"""RLOO, Online DPO and PPO in two processes (gloo): the gradients are those of one process that has all answers."""

import os
import sys
from pathlib import Path

import tiny_model
import torch
from method_cases import KINDS, QUIET, gradients
from step_cases import difference, end_of_a_process, in_two_processes, make_model

from nbhelpers import LeanRLOOConfig, LeanRLOOTrainer, engines

# two answers to each prompt, as many tokens for the first two prompts as for the others; 1 ends, and some are cut off
ANSWERS = {
    "aaaa": ([40, 41, 1], [42, 1]), "bb": ([43, 44, 45, 46, 1], [47, 48, 49, 1]),
    "ccccccc": ([50, 1], [51, 52, 53, 54, 55, 56]), "ddd": ([57, 58, 59, 1], [60, 1]),
}  # fmt: skip
SETTINGS = {
    "rloo": {"beta": 0.3}, "dpo": {"beta": 0.3}, "ppo": {"kl_coef": 0.3, "whiten_rewards": True, "vf_coef": 0.7},
}  # fmt: skip


class Fixed(engines.Engine):
    name = "fixed"

    def generate(self, prompts, sampling):
        found = [ANSWERS[tiny_model.tokenizer().decode(ids)][n] for ids in prompts for n in range(2)]
        return [engines.Completion(list(ids), [float("nan")] * len(ids)) for ids in found]


def scored(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def gradients_of(kind, folder, prompts):
    """{parameter: gradient} of one rollout of the fixed answers to these prompts, averaged over the processes."""
    config, trainer = {**KINDS, "rloo": (LeanRLOOConfig, LeanRLOOTrainer)}[kind]
    args = config(str(folder), max_completion_length=6, per_device_train_batch_size=2 * len(prompts),
                  missing_eos_penalty=0.5, **QUIET, **SETTINGS[kind])  # fmt: skip
    rows = [{"prompt": prompt} for prompt in ANSWERS]
    one = trainer(make_model("qwen2"), [scored], args, rows, processing_class=tiny_model.tokenizer(), engine=Fixed())
    for name, p in one.model.named_parameters():
        if "lora_B.default" in name:
            p.data *= 1.5  # away from the reference
        if "value_head" in name:
            torch.nn.init.constant_(p, 0.1)
    one.model.train()
    one.current_gradient_accumulation_steps = 1
    batch = one._generate_and_score_completions([{"prompt": prompt} for prompt in prompts for _ in range(2)])
    return gradients(one, batch)[1]


def run(folder: str) -> None:
    """In each of two processes: the gradients from half of the answers."""
    rank = int(os.environ["RANK"])
    found = {kind: gradients_of(kind, folder, list(ANSWERS)[2 * rank :][:2]) for kind in SETTINGS}
    torch.save(found, Path(folder, f"{rank}.pt"))
    end_of_a_process()


def test_two_processes_have_the_gradients_of_one(tmp_path, warm):
    in_two_processes(warm, __file__, tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for kind in SETTINGS:
        wanted = gradients_of(kind, tmp_path, list(ANSWERS))
        assert max(g.abs().max() for g in wanted.values()) > 0
        for found in both:
            assert difference(found[kind], wanted) < 1e-4, kind


if __name__ == "__main__":
    run(sys.argv[1])
