"""Small models, trainers and rollouts for the tests of the lean step, and how far apart two sets of gradients are."""

import os
import subprocess
from pathlib import Path

import pytest
import tiny_model
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from nbhelpers.training import lean_step, packing, trainer

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
VOCAB = len(tiny_model.CHARS) + len(tiny_model.SPECIAL)
ROWS = Dataset.from_dict({"prompt": [c * n for c in "abcdefgh" for n in (2, 5, 9)]})


def make_model(family="llama", lora=True, seed=0, **config):
    cls_config, cls = FAMILIES[family]
    settings = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.08, sliding_window=None,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = cls(cls_config(**{**settings, **config}))
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, so that A would get no gradient
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def length_reward(completions, **_):
    return [float(len(set(text)) % 3) for text in completions]


def make_trainer(cls, model, folder, **changes):
    lean = {name: changes.pop(name) for name in ("budget_gb", "max_skipped_steps") if name in changes}
    callbacks, evaluated = changes.pop("callbacks", None), changes.pop("eval_dataset", False)
    if cls is trainer.LeanGRPOTrainer:
        lean["engine"] = None  # TRL writes the completions of both, so that both draw alike
    settings = dict(
        max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=12, learning_rate=1e-2,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
        report_to="none", logging_steps=1, seed=3,
    )  # fmt: skip
    args = trl.GRPOConfig(str(folder), **(settings | changes))
    return cls(
        model, reward_funcs=[length_reward], args=args, train_dataset=ROWS, callbacks=callbacks,
        eval_dataset=ROWS.select(range(2)) if evaluated else None,
        processing_class=tiny_model.tokenizer(), **lean,
    )  # fmt: skip


def configure(
    one, loss_type="dapo", beta=0.0, accumulation=1, level="token", epsilon=0.2, high=0.28, delta=None, bias=True,
    quantile=1.0, threshold=None, coef=0.0, adaptive=False, **arguments,
):  # fmt: skip
    """Set what TRL reads when it computes a loss, on a trainer that is there already."""
    one.loss_type = one.args.loss_type = loss_type
    one.beta = one.args.beta = beta
    one.importance_sampling_level = one.args.importance_sampling_level = level
    one.epsilon_low, one.epsilon_high, one.args.delta = epsilon, high, delta
    one.args.use_bias_correction_kl = bias
    one.top_entropy_quantile, one.off_policy_mask_threshold = quantile, threshold
    one.entropy_coef, one.use_adaptive_entropy = coef, adaptive
    one._entropy_bonus_enabled, one._last_world_entropy = coef != 0 or adaptive, float("inf")
    for name, value in arguments.items():
        setattr(one.args, name, value)
    one.current_gradient_accumulation_steps = one.args.steps_per_generation = accumulation
    one._metrics["train"].clear()
    one.model.train()
    one.model.zero_grad()


def make_batch(groups=2, size=4, seed=0, old=True, ref=True, zeros=False, tools=False):
    """A rollout as TRL hands it over: prompts padded on the left, completions on the right, all lengths different."""
    torch.manual_seed(seed)
    rows, p, t = groups * size, 9, 12
    prompt_lengths = torch.randint(2, p + 1, (groups,)).repeat_interleave(size)[:, None]
    lengths = torch.randint(1, t + 1, (rows,))[:, None]
    lengths[0], lengths[-1] = t, 1
    prompts = torch.randint(3, VOCAB, (groups, p)).repeat_interleave(size, 0)
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": (torch.arange(p) >= p - prompt_lengths).long(),
        "completion_ids": torch.randint(3, VOCAB, (rows, t)),
        "completion_mask": (torch.arange(t) < lengths).long(),
        "advantages": torch.randn(rows),
    }
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    near = -torch.rand(rows, t) * 0.8 - 4.2  # around what a random model gives, so that some ratios are clipped
    if old:
        batch["old_per_token_logps"] = near
    if ref:
        batch["ref_per_token_logps"] = near + 0.3 * torch.randn(rows, t)
    if zeros:
        batch["advantages"][:size] = 0.0
    if tools:  # in the middle, at the start, at the end and nowhere; the last completion has one token
        batch["tool_mask"] = torch.ones(rows, t, dtype=torch.long)
        for row, span in enumerate((slice(3, 7), slice(0, 2), slice(t - 3, t))):
            batch["tool_mask"][row, span] = 0
        batch["num_items_in_batch"] = (batch["completion_mask"] * batch["tool_mask"]).sum()
    order = torch.randperm(rows)  # TRL shuffles a rollout
    return {name: value[order] if value.dim() else value for name, value in batch.items()}


def chunks(batch, count):
    size = len(batch["advantages"]) // count
    for i in range(count):
        yield {n: v[i * size : (i + 1) * size] if v.dim() else v for n, v in batch.items()}


def gradients(one, batch, accumulation=1):
    """(loss, {parameter: gradient}) of one optimizer step's worth of rows, through the trainer's own hook."""
    losses = []
    for part in chunks(batch, accumulation):
        loss = one.compute_loss(one.model, part)
        losses.append(loss.item())
        one.accelerator.backward(loss)
    return sum(losses), {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}


def difference(got, wanted):
    assert got.keys() == wanted.keys() and wanted
    parts = [((got[n] - wanted[n]).norm().item(), wanted[n].norm().item()) for n in wanted]
    assert all(norm > 0 for _, norm in parts)
    return sum(d**2 for d, _ in parts) ** 0.5 / sum(n**2 for _, n in parts) ** 0.5


def compare(pair, batch, **settings):
    results = []
    for one in pair:
        configure(one, **settings)
        results.append(gradients(one, batch, settings.get("accumulation", 1)))
    (wanted_loss, wanted), (got_loss, got) = results
    assert got_loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-6)  # a sum of fp32 losses of 0.4 that may cancel
    assert difference(got, wanted) < 1e-5
    return [{name: list(values) for name, values in one._metrics["train"].items()} for one in pair]


def rollout(**options):
    batch = make_batch(**options)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return packing.unpad(*(batch[name] for name in names)), torch.randn(batch["completion_ids"].shape)


def through(model, rows, weights, **options):
    """(logps [B, T], gradients) of sum(weights * logps)."""
    one, seen = lean_step.LeanStep(model, **options), torch.zeros(weights.shape)
    model.zero_grad()

    def objective(logps, entropies, packed):
        place = packed.number, packed.column
        seen[place] = logps.detach()
        return (logps * weights[place]).sum()

    one.differentiate(rows, objective)
    return seen, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}, one.micro_batches


def in_two_processes(python: list[str], file: str, folder: Path) -> None:
    """`file folder` as a script of `python` in two processes (gloo), which must end well."""
    command = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", *python]
    helpers = Path(__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{helpers.parents[1]}{os.pathsep}{helpers}"}
    out = subprocess.run([*command, file, str(folder)], env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-4000:]


def end_of_a_process() -> None:
    """The last line of such a script: gloo's threads now and then end the process with an abort without it."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
