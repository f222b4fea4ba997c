"""The peer's training half: GRPOTrainer's own loss and backward, gradient checkpointing on."""

import tempfile
from typing import TYPE_CHECKING

from benchmarks.random_model import Model

from .cases import Batch, Job

if TYPE_CHECKING:
    from trl import GRPOTrainer


def trainer(job: Job, model: Model) -> "GRPOTrainer":
    """TRL's trainer of this model, for the job's group size."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from nbhelpers.models import smoke

    args = GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=job.group, num_generations=job.group, loss_type="grpo",
        gradient_checkpointing=True, bf16=job.cuda, use_cpu=not job.cuda, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    one = GRPOTrainer(
        model, reward_funcs=[lambda completions, **_: [0.0] * len(completions)], args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * job.group}), processing_class=smoke.make_tokenizer(),
    )  # fmt: skip
    wrapped: Model = one.model
    wrapped.train()
    # transformers does this in train(), which is not called here; its name is another from 5.2x on
    enable = getattr(wrapped, "activation_checkpointing_enable", None) or wrapped.gradient_checkpointing_enable
    enable()
    return one


def step(one: "GRPOTrainer", batch: Batch, at_once: int) -> None:
    """Forward and backward of the batch, `at_once` rows at a time."""
    model: Model = one.model
    model.zero_grad(set_to_none=True)
    rows = len(batch["advantages"])
    one.current_gradient_accumulation_steps = rows // at_once
    for start in range(0, rows, at_once):
        part = {n: v[start : start + at_once] if v.dim() else v for n, v in batch.items()}
        loss = one.compute_loss(model, part)
        one.accelerator.backward(loss)


def measure(job: Job) -> None:
    """Each length with 8, 2 and 1 rows at once."""
    model = job.model()
    one = trainer(job, model)
    optimizer = job.with_optimizer(model)
    for setting, length in job.lengths.items():
        results: list[tuple[float, float]] = []
        long = length > 8192
        for at_once in (1,) if long else (8, 2, 1) if not job.quick else (job.group, 1):
            batch = job.batch(length, 1 if long else job.group)

            def case(
                setting: str = setting,
                at_once: int = at_once,
                batch: Batch = batch,
                length: int = length,
                long: bool = long,
            ) -> tuple[float, float]:
                return job.measured(
                    setting, f"trl-{at_once}", lambda: step(one, batch, at_once),
                    repeats=1 if length > 2048 else 2, warm=0 if length > 2048 else 1,
                    times=job.group if long else 1,
                )  # fmt: skip

            result = job.attempt(f"{setting}/trl-{at_once}", case)
            results += [result] if result else []
        if results:
            job.row(f"{setting}/train_time", "trl", min(t for t, _ in results), "s")
            job.row(f"{setting}/train_peak", "trl", min(p for _, p in results), "GB")
    del optimizer
