"""One case of `python -m benchmarks.ratios` in one tree, as a script: the same measuring code for both trees.

    PYTHONPATH=TREE python -P benchmarks/ratios/cases.py JOB

`nbhelpers` and `benchmarks.random_model` are those of TREE, whose modules have other names before the house was built
(f990437): `module` knows both. It imports, waits for a line on its input, measures, and appends each row to job["out"].
In a `warm` job the model has one layer and nothing counts: it is there so that Triton has compiled."""

import gc
import importlib
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

Job = dict[str, Any]
RowWriter = Callable[..., None]  # (metric, value, unit, **more)


OLD = {
    "models.quantize": "quantize", "models.smoke": "smoke", "training.lean_step": "step",
    "training.objective": "objective", "training.trainer": "trainer",
}  # fmt: skip


def _timing() -> Any:
    """benchmarks/timing.py of the tree that this file is in, whichever is measured: the other has none."""
    spec = importlib.util.spec_from_file_location("timing", Path(__file__).parents[1] / "timing.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


timing = _timing()
wait, timed, driver_gb, GB = timing.wait, timing.timed, timing.driver_gb, timing.GB


def module(name: str) -> Any:
    """nbhelpers.<name>, by the name that it has in this tree."""
    try:
        return importlib.import_module(f"nbhelpers.{name}")
    except ModuleNotFoundError:
        if name not in OLD:
            raise
        return importlib.import_module(f"nbhelpers.{OLD[name]}")


def shape(job: Job) -> Any:
    """The architecture of the job's preset: with tiny sizes in a smoke job, with one layer in a warm one."""
    from nbhelpers import presets

    real = presets.get(job["model"]).architecture
    if job["smoke"]:
        real = replace(real, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=16, vocab_size=320)  # fmt: skip
    return replace(real, num_hidden_layers=1) if job["warm"] else real


def dtype() -> torch.dtype:
    """What the models compute in."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def build(job: Job) -> Any:
    """Random NF4 weights with a LoRA of rank 16 on all linear layers."""
    from benchmarks import random_model

    return random_model.make(shape(job), torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype(), 16)


def fresh() -> None:
    """Nothing of the measurement before is left in torch's caches."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(job: Job, call: Callable, *args: Any) -> Any:
    """A part of a case: if it fails, that is printed and the next one goes on."""
    try:
        return call(*args)
    except Exception as error:
        print(f"FAILED {job['case']} {job['who']} {call.__name__}: {type(error).__name__}: {error}", flush=True)
        traceback.print_exc()
    return None


def decode(job: Job, row: RowWriter) -> None:
    """Tokens/s and memory by batch, launches of a step, one long prompt, and the same where some layers are in 16
    bits: prompts of 200 random tokens, 256 new ones."""
    model = build(job)
    fresh()  # what building it took is no weight
    wait()
    weights = driver_gb()
    steps = {batch: attempt(job, generate, job, model, row, batch, "", weights) for batch in job["batches"]}
    if job.get("prefill"):
        attempt(job, prefill, job, model, row)
    if batch := job.get("launches"):
        attempt(job, launches, job, model, row, batch)
    if batch := job.get("dynamic"):
        kept = leave_in_16_bits(model)
        step = generate(job, model, row, batch, "-dynamic", weights)
        row(f"batch-{batch}-dynamic/step_against_nf4", step / steps[batch], "x", layers_in_16_bits=kept)


def prompts(job: Job, n: int, width: int) -> list[list[int]]:
    """`n` prompts of random tokens."""
    return torch.randint(3, shape(job).vocab_size, (n, width), generator=torch.Generator().manual_seed(n)).tolist()


def generate(job: Job, model: Any, row: RowWriter, batch: int, kind: str, weights: float) -> float:
    """The rows of one batch size; returns the milliseconds of a step."""
    from nbhelpers.engines import Sampling
    from nbhelpers.engines.graph import GraphEngine

    fresh()
    width, new = (20, 12) if job["smoke"] else (200, 20 if job["warm"] else 256)
    texts, engine = prompts(job, batch, width), GraphEngine(model, max_rows=batch)

    def write(tokens: int) -> float:
        return timed(engine.generate, texts, Sampling(max_tokens=tokens, seed=1))

    write(2), write(9), write(new)  # what is captured, and the cache at its largest, which empties torch's caches
    # a step is the difference of the two: both are read as often, as 0.1 s more or less would be 0.4 ms of a step
    times = [(write(1), write(new)) for _ in range(1 if new < 256 else 3)]
    first, seconds = (statistics.median(column) for column in zip(*times, strict=True))
    step = 1000 * (seconds - first) / (new - 1)
    row(f"batch-{batch}{kind}/decode", batch * new / seconds, "tokens/s", prompt=width, completion=new)
    row(f"batch-{batch}{kind}/step", step, "ms", prefill_s=round(first, 4))
    a = shape(job)
    kv = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * dtype().itemsize  # bytes of a token
    kv, used = batch * -(-(width + new) // 16) * 16 * kv / GB, driver_gb()
    row(f"batch-{batch}{kind}/memory_above", used - weights - kv, "GB", driver=round(used, 3), kv=round(kv, 3))
    return step


def launches(job: Job, model: Any, row: RowWriter, batch: int) -> None:
    """Kernels and copies of one step, from the profiler: 16 steps less 8, so that a prompt's are left out. On a CPU
    operators of torch."""
    if job["warm"]:  # several processes would profile one card
        return
    from torch.profiler import ProfilerActivity, profile

    from nbhelpers.engines import Sampling
    from nbhelpers.engines.graph import GraphEngine

    texts, engine = prompts(job, batch, 20 if job["smoke"] else 200), GraphEngine(model, max_rows=batch)
    counts, which = [], ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    for tokens in (17, 9, 17):  # a first token and as many steps as are left; the first run captures
        with profile(activities=[which]) as recorded:
            engine.generate(texts, Sampling(max_tokens=tokens, seed=1))
            wait()
        counts.append(sum(event.count for event in recorded.key_averages()))
    if not counts[2] > counts[1]:
        raise RuntimeError(f"the profiler saw {counts} launches: it may see none on this machine")
    row(f"batch-{batch}/launches", (counts[2] - counts[1]) / 8, "launches")


def prefill(job: Job, model: Any, row: RowWriter) -> None:
    """One prompt of 13,000 tokens and its first token."""
    from nbhelpers.engines import Sampling
    from nbhelpers.engines.graph import GraphEngine

    fresh()
    width = 40 if job["smoke"] else 13_000
    texts, engine = prompts(job, 1, width), GraphEngine(model, max_rows=1)
    times = [timed(engine.generate, texts, Sampling(max_tokens=1, seed=1)) for _ in range(1 if job["warm"] else 4)]
    row("prefill-13K/seconds", statistics.median(times[1:] or times), "s", tokens=width)


def leave_in_16_bits(model: Any) -> int:
    """Every v_proj, and gate_proj of every fourth layer, as "dynamic" 4-bit may: groups in which NF4 and 16 bits meet.
    Returns how many."""
    quantize, kept = module("models.quantize"), 0
    for i, layer in enumerate(model.get_base_model().model.layers):
        for wrapped in [layer.self_attn.v_proj, *([layer.mlp.gate_proj] if i % 4 == 0 else [])]:
            packed = wrapped.base_layer
            dense = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
            dense.weight, dense.bias = nn.Parameter(quantize.unpack(packed.weight).to(dtype()), False), packed.bias
            wrapped.base_layer = dense
            kept += 1
    return kept


def train(job: Job, row: RowWriter) -> None:
    """Forward and backward of a group of one prompt of 256 tokens, for each of the job's cells: (setting, rows, tokens
    of a row, GB or none). A cell of one row of 8 counts eight times."""
    model = build(job).train()
    for setting, rows, length, budget in job["cells"]:
        attempt(job, cell, job, model, row, setting, rows, length, budget)


def cell(job: Job, model: Any, row: RowWriter, setting: str, rows: int, length: int, budget: Any) -> None:
    """Seconds and peak of one cell of `train`."""
    fresh()
    objective, cuda = module("training.objective"), torch.cuda.is_available()
    context = {"autocast": lambda: torch.autocast("cuda", dtype=dtype())} if cuda else {}
    if not cuda or job["warm"]:
        budget = None
    prompt, length = (16, 48) if job["smoke"] else (256, length)
    step = module("training.lean_step").LeanStep(model, budget, **context)
    generator, own, words = torch.Generator().manual_seed(2), length - prompt, shape(job).vocab_size
    ids = torch.randint(3, words, (1, prompt), generator=generator).expand(rows, prompt).contiguous()
    batch = {
        "prompt_ids": ids, "prompt_mask": torch.ones_like(ids), "advantages": torch.randn(rows, generator=generator),
        "completion_ids": torch.randint(3, words, (rows, own), generator=generator),
        "completion_mask": torch.ones(rows, own, dtype=torch.long), "num_items_in_batch": torch.tensor(rows * own),
    }  # fmt: skip
    batch = {name: value.to(step.device) for name, value in batch.items()}
    settings = objective.Settings(loss_type="grpo", max_completion_length=own)

    def once() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        objective.run(step, batch, settings, backward=torch.Tensor.backward)

    timed(once)
    repeats = 1 if job["warm"] or job["smoke"] or length > 8192 else 3 if length > 2048 else 4
    seconds = statistics.median(timed(once) for _ in range(repeats))
    note = {"note": "one of 8 rows, time x 8"} if rows == 1 else {}
    cut = len(step.micro_batches if hasattr(step, "micro_batches") else step.parts)
    row(f"{setting}/train_time", seconds * (8 if rows == 1 else 1), "s", micro_batches=cut, **note)
    if cuda:
        row(f"{setting}/train_peak", torch.cuda.max_memory_allocated() / GB, "GB", **note)


def grpo(job: Job, row: RowWriter) -> None:
    """Whole GRPO steps, 8 completions of a prompt of 256 tokens, 1,024 tokens together, in a process that may take
    job["cap"] GB. The first step is not timed."""
    from datasets import Dataset
    from transformers import TrainerCallback

    trainers, ticks = module("training.trainer"), []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            ticks.append(time.perf_counter())

        on_step_end = on_step_begin

    extra = {}
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")
        # less this process's own context, whoever else is on the card, and Triton's and cuBLAS's modules
        budget = job["cap"] - min(driver_gb(), 0.8) - 0.15
        if not job["warm"]:  # beside others it cannot tell what is its own
            torch.cuda.set_per_process_memory_fraction(budget * GB / torch.cuda.mem_get_info()[1])
            extra = {"budget_gb": budget - 0.1}
    prompt, completion = (24, 8) if job["smoke"] else (256, 768)
    with tempfile.TemporaryDirectory() as folder:
        args = trainers.LeanGRPOConfig(
            folder, max_steps=2 if job["warm"] or job["smoke"] else 5, per_device_train_batch_size=8, num_generations=8,
            max_completion_length=completion, learning_rate=1e-5, save_strategy="no", disable_tqdm=True,
            optim="adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
        )  # fmt: skip
        trainer = trainers.LeanGRPOTrainer(
            build(job), lambda completions, **_: [float(i % 3) for i in range(len(completions))], args=args,
            train_dataset=Dataset.from_dict({"prompt": [chr(97 + i % 26) * prompt for i in range(32)]}),
            processing_class=module("models.smoke").make_tokenizer(), callbacks=[Clock()], engine="graph", **extra,
        )  # fmt: skip
        trainer.train()
    length = round(float(trainer.state.log_history[-2]["completions/mean_length"]), 1)
    times = [end - begin for begin, end in zip(ticks[::2], ticks[1::2], strict=True)]
    row("1K-under-4GB/step_time", statistics.median(times[1:]), "s", first_step_s=round(times[0], 2), completion=length)


def load(job: Job, row: RowWriter) -> None:
    """A checkpoint of random bf16 weights to NF4 with an adapter, twice, the quicker counts; page cache warm, all
    imported. Where the tree can keep the packed base, that again; where not, today's way stands in its row."""
    loader = module("loader")

    def once(folder: str) -> float:
        def call() -> None:
            kept[:] = loader.load(folder, quantization="nf4", lora_rank=16, dtype=torch.bfloat16, progress=False)

        kept: list[Any] = []
        seconds = timed(call)
        if folder == job["folder"] and hasattr(loader, "keep") and not packed.exists():
            loader.keep(*kept, packed)
        kept.clear()
        fresh()
        return seconds

    packed = Path(job["folder"]).with_name("packed")
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")
    times = [once(job["folder"]) for _ in range(2)]
    row("16-bits/seconds", min(times), "s", first=round(times[0], 3), page_cache="warm")
    if hasattr(loader, "keep"):
        again = [once(str(packed)) for _ in range(2)]
        row("packed/seconds", min(again), "s", first=round(again[0], 3), page_cache="warm")
    else:
        row("packed/seconds", min(times), "s", note="from 16 bits: this tree keeps no packed copy")


def checkpoint(job: Job, row: RowWriter) -> None:
    """What `load` reads."""
    from benchmarks import random_model

    random_model.write_checkpoint(shape(job), Path(job["folder"]), 4e9)


KINDS = {"decode": decode, "train": train, "grpo": grpo, "load": load, "checkpoint": checkpoint}


def main(job: Job) -> None:
    """Import, wait for the word, measure; each row is appended to job["out"]."""
    import nbhelpers

    if not Path(where := str(nbhelpers.__file__)).is_relative_to(job["tree"]):
        raise SystemExit(f"nbhelpers is imported from {where} and not from {job['tree']}")
    module("training.trainer" if job["kind"] == "grpo" else "training.lean_step")  # imports are the slow part
    module("loader")
    module("engines.graph")

    def row(metric: str, value: float, unit: str, **more: Any) -> None:
        if job["warm"]:
            return
        found = {"what": f"{job['model']}/{metric}", "who": job["who"], "value": round(value, 5), "unit": unit, **more}
        print(f"  {found['what']:44s} {job['who']:6s} {value:12.4f} {unit} {more or ''}", flush=True)
        with open(job["out"], "a") as lines:
            lines.write(json.dumps(found) + "\n")

    Path(job["out"] + job["ready"]).touch()
    if sys.stdin.readline():  # else the parent has ended
        KINDS[job["kind"]](job, row)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
