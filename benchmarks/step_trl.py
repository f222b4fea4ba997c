"""The peer's training half for benchmarks/step.py: GRPOTrainer's own loss and backward, gradient checkpointing on."""

import tempfile


def trainer(job, model):
    import trl
    from datasets import Dataset

    from nbhelpers.models import smoke

    args = trl.GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=job.group, num_generations=job.group, loss_type="grpo",
        gradient_checkpointing=True, bf16=job.cuda, use_cpu=not job.cuda, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    one = trl.GRPOTrainer(
        model, reward_funcs=[lambda completions, **_: [0.0] * len(completions)], args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * job.group}), processing_class=smoke.make_tokenizer(),
    )  # fmt: skip
    one.model.train()
    return one


def step(one, batch, at_once):
    one.model.zero_grad(set_to_none=True)
    rows = len(batch["advantages"])
    one.current_gradient_accumulation_steps = rows // at_once
    for start in range(0, rows, at_once):
        part = {n: v[start : start + at_once] if v.dim() else v for n, v in batch.items()}
        loss = one.compute_loss(one.model, part)
        one.accelerator.backward(loss)


def measure(job):
    model = job.model()
    one = trainer(job, model)
    optimizer = job.with_optimizer(model)
    for setting, length in job.lengths.items():
        found = []
        long = length > 8192
        for at_once in (1,) if long else (8, 2, 1) if not job.quick else (job.group, 1):
            batch = job.batch(length, 1 if long else job.group)

            def case(setting=setting, at_once=at_once, batch=batch, length=length, long=long):
                return job.measured(
                    setting, f"trl-{at_once}", lambda: step(one, batch, at_once),
                    repeats=1 if length > 2048 else 2, warm=int(length <= 2048),
                    more={"rows": job.group if long else 1},
                )  # fmt: skip

            result = job.attempt(f"{setting}/trl-{at_once}", case)
            found += [result] if result else []
        if found:
            job.row(f"{setting}/train_time", "trl", min(t for t, _ in found), "s")
            job.row(f"{setting}/train_peak", "trl", min(p for _, p in found), "GB")
    del optimizer
