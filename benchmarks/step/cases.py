"""One preset's cases of `python -m benchmarks.step`, in a process of their own: what they share, and the cases of ours.

The peer's are in trl.py, the comparisons with exact results in check.py.
"""

import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import common, harness, random_model
from benchmarks.harness import GB
from benchmarks.random_model import Model
from nbhelpers import memory, presets

if TYPE_CHECKING:
    from nbhelpers.training.lean_step import LeanStep
    from nbhelpers.training.objective import Outcome

LENGTHS = {"1K": 1024, "4K": 4096, "20K": 20480}
GOALS = {
    "qwen2.5-1.5b": (2.0, 2.2, 3.0),
    "qwen3-1.7b": (2.4, 2.7, 3.6),
    "llama-3.1-8b": (7.4, 7.8, 9.4),
    "phi-4": (11.5, 12.0, 14.0),
}
CAPS = {"qwen2.5-1.5b": 5, "llama-3.1-8b": 15}  # GB of the whole process at 20K

Batch = dict[str, Tensor]


class Job:
    """One preset's cases of one kind; rows are appended to a file as they come.

    Args:
        preset (`str`): Its name.
        kind (`str`): Which cases: "ours", "trl", ...
        file (`str`): Where rows go.
        quick (`bool`): Tiny shapes on a CPU.
        margin (`float`): GB below a cell's goal that the step is given.
        lengths (`list[str]`): Of "1K", "4K" and "20K"; empty: all of them.
    """

    def __init__(self, preset: str, kind: str, file: str, quick: bool, margin: float, lengths: list[str]):
        self.name, self.kind, self.file, self.quick, self.margin = preset, kind, file, quick, margin
        self.every_length = {"1K": 48, "4K": 80} if quick else LENGTHS
        self.prompt, self.group, self.rank = (16, 4, 4) if quick else (256, 8, 16)
        self.lengths = {n: v for n, v in self.every_length.items() if not lengths or n in lengths}
        self.preset = presets.get(preset)
        self.architecture = self.preset.architecture
        self.cuda = torch.cuda.is_available() and not quick
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = (torch.float16 if kind == "t4" else torch.bfloat16) if self.cuda else torch.float32

    def row(self, what: str, who: str, value: float, unit: str, **more: Any) -> None:
        """Write one measurement to the file and to the screen."""
        row = common.row(f"{self.name}/{what}", who, float(f"{value:.5g}"), unit, **more)
        print(f"  {row['what']:44s} {who:10s} {value:12.4f} {unit} {more or ''}", flush=True)
        harness.append_row(row, self.file)

    def attempt(self, what: str, function: Callable, *arguments: Any) -> Any:
        """Run a case; an error is printed and the next case goes on. Returns its result or None."""
        try:
            return function(*arguments)
        except Exception as error:
            print(f"  FAILED {self.name}/{what}: {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, torch.OutOfMemoryError):
                traceback.print_exc()
        finally:
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()
        return None

    # ---------------------------------------------------------------------------------------- model, tokens, measuring

    def model(self, layers: int | None = None) -> Model:
        """Random NF4 weights on the device; the adapter rounded to bf16, kept in fp32."""
        start = time.perf_counter()
        shape = replace(self.architecture, num_hidden_layers=layers) if layers else self.architecture
        model = random_model.make(shape, self.device, self.dtype, self.rank)
        self.fill_adapter(model)
        print(f"  {self.name}: built in {time.perf_counter() - start:.1f} s", flush=True)
        return model.train()

    def fill_adapter(self, model: Model) -> None:
        """The same random numbers for every model of this shape: fp32 that bf16 can hold."""
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.01 if "lora_B" in name else 1 / math.sqrt(parameter.shape[1])
                value = torch.randn(parameter.shape, generator=generator) * scale
                parameter.data.copy_(value.bfloat16().float())

    def with_optimizer(self, model: Model) -> torch.optim.Optimizer | None:
        """8-bit Adam after one step, so that its states are on the card."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.cuda:
            from bitsandbytes.optim import AdamW8bit

            optimizer = AdamW8bit(trained, lr=0.0)
            for p in trained:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return optimizer
        return None

    def batch(self, length: int, rows: int | None = None) -> Batch:
        """`rows` completions (by default a group) of one prompt, `length` tokens with it, as TRL's trainer has them."""
        rows = rows or self.group
        generator, own = torch.Generator().manual_seed(2), length - self.prompt
        words = self.architecture.vocab_size
        prompt = torch.randint(3, words, (1, self.prompt), generator=generator).expand(rows, self.prompt).contiguous()
        batch = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": torch.randint(3, words, (rows, own), generator=generator),
            "completion_mask": torch.ones(rows, own, dtype=torch.long),
            "advantages": torch.randn(rows, generator=generator),
            "num_items_in_batch": torch.tensor(rows * own),
        }
        return {name: value.to(self.device) for name, value in batch.items()}

    def measure(self, function: Callable, repeats: int = 3, warm: int = 1) -> tuple[float, float, float]:
        """(seconds, median; allocator's peak GB; driver's GB). The peak is of all runs, the first one's too."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = [harness.timed(function) for _ in range(warm + repeats)]
        if not self.cuda:
            return statistics.median(times[warm:]), 0.0, 0.0
        return statistics.median(times[warm:]), torch.cuda.max_memory_allocated() / GB, harness.driver_gb()

    def measured(
        self, setting: str, who: str, function: Callable, repeats: int = 3, warm: int = 1, times: int = 1
    ) -> tuple[float, float]:
        """`measure`, and its rows. times: of how many rows `function` does one. Returns (seconds of all, peak GB)."""
        seconds, peak, driver = self.measure(function, repeats, warm)
        note = {"note": f"one of {times} rows, time x {times}"} if times > 1 else {}
        self.row(f"{setting}/train_peak", who, peak, "GB", **note)
        self.row(f"{setting}/train_peak_driver", who, driver, "GB", **note)
        self.row(f"{setting}/train_time", who, seconds * times, "s", **note)
        return seconds * times, peak

    def lean(self, model: Model, budget_gb: float | None = None, **options: Any) -> "LeanStep":
        """Ours: a LeanStep of the model within `budget_gb`, with the options given."""
        from nbhelpers.training.lean_step import LeanStep

        context = (lambda: torch.autocast("cuda", dtype=self.dtype)) if self.cuda else None
        options |= {"autocast": context} if context else {}
        return LeanStep(model, budget_gb if self.cuda else None, **options)

    def run_ours(self, step: "LeanStep", batch: Batch, backward: Callable[[Tensor], None] | None = None) -> "Outcome":
        """One forward and backward of the batch; gradients are in the parameters afterwards."""
        from nbhelpers.training import objective

        for parameter in step.trained:
            parameter.grad = None
        settings = objective.Settings(loss_type="grpo", max_completion_length=batch["completion_ids"].shape[1])
        return objective.run(step, batch, settings, backward=backward or torch.Tensor.backward)

    def describe(self, step: "LeanStep") -> None:
        """Print how the last batch was cut."""
        parts = [(len(p.rows), p.tokens.packed, p.saved, p.on_device, p.tile) for p in step.micro_batches]
        host = step.decoder.store.host_bytes() / GB
        print(
            f"  {step.cost.attention}; (rows, tokens, saved, on device, tile): {parts}; {host:.2f} GB pinned",
            flush=True,
        )

    def plan_row(self, setting: str, length: int, budget: float, attention: str, rows: int | None = None) -> None:
        """What the planner predicts for the same case."""
        plan = memory.plan(
            self.preset, card_gb=140, num_generations=rows or self.group, max_prompt_length=self.prompt,
            max_completion_length=length - self.prompt, lora_rank=self.rank, quantization="nf4", budget_gb=budget,
            attention=attention,
        )  # fmt: skip
        self.row(f"{setting}/train_peak", "planner", plan.training_peak, "GB")


# ---- the cases of ours ----


def ours(job: Job) -> None:
    """Each length within its goal, and 1K with as much memory as it likes."""
    model = job.model()
    optimizer = job.with_optimizer(model)
    goals = dict(zip(job.every_length, GOALS[job.name], strict=False))
    job.measure(lambda: job.run_ours(job.lean(model), job.batch(min(job.every_length.values()))), 1, 0)  # compiles
    cases = list(job.lengths) + (["1K-roomy"] if "1K" in job.lengths and not job.quick else [])
    for setting in cases:
        length = job.every_length[setting.removesuffix("-roomy")]

        def case(setting: str = setting, length: int = length) -> None:
            budget = None if setting.endswith("-roomy") else goals[setting] - job.margin
            cap = CAPS.get(job.name) if setting == "20K" and job.cuda else None
            if cap:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(cap * GB / total)
            step, batch = job.lean(model, budget), job.batch(length)
            long = length > 8192
            _, peak = job.measured(
                setting, "ours", lambda: job.run_ours(step, batch), repeats=1 if long else 5, warm=0 if long else 1
            )
            if cap:
                job.row(f"{setting}/train_peak_capped_{cap}gb", "ours", peak, "GB")
                torch.cuda.set_per_process_memory_fraction(1.0)
            job.describe(step)
            if budget:
                job.plan_row(setting, length, budget, step.cost.attention)

        job.attempt(setting, case)
    del optimizer


def groups(job: Job) -> None:
    """Cost against the size of the group, at 1K."""
    model = job.model()
    optimizer = job.with_optimizer(model)
    sizes = (2, 4) if job.quick else (2, 4, 8, 16, 32)
    step = job.lean(model, GOALS[job.name][0] - job.margin)
    job.run_ours(step, job.batch(job.every_length["1K"], 2))
    for size in sizes:
        batch = job.batch(job.every_length["1K"], size)
        job.attempt(
            f"group-{size}",
            lambda size=size, batch=batch: job.measured(
                f"1K/group-{size}", "ours", lambda: job.run_ours(step, batch), repeats=2
            ),
        )
    del optimizer


def t4(job: Job) -> None:
    """fp16, the memory-efficient attention alone; none of our kernels uses tl.dot."""
    if job.cuda:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    model = job.model()
    optimizer = job.with_optimizer(model)
    goals = dict(zip(job.every_length, GOALS[job.name], strict=False))
    for setting, length in job.lengths.items():

        def case(setting: str = setting, length: int = length) -> None:
            rows = 1 if length > 8192 else job.group  # a micro-batch there is one row anyway
            budget = goals[setting] + 0.6  # K and V are expanded to all heads, which takes memory
            step = job.lean(model, budget, attention="efficient" if job.cuda else "rows")
            batch = job.batch(length, rows)
            outcomes: list[Outcome] = []

            def once() -> None:
                outcomes[:] = [job.run_ours(step, batch, lambda loss: (loss * 1024.0).backward())]

            job.measured(f"{setting}-t4", "ours", once, repeats=1, warm=1 if length < 2048 else 0)
            finite = all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in step.trained)
            loss = outcomes[0].loss.item()
            job.row(f"{setting}-t4/finite", "ours", float(math.isfinite(loss) and finite), "1 = yes", rows=rows)
            job.row(f"{setting}-t4/mean_logprob", "ours", outcomes[0].logps.mean().item(), "nats")
            job.describe(step)
            job.plan_row(f"{setting}-t4", length, budget, step.cost.attention, max(rows, 2))

        job.attempt(f"{setting}-t4", case)
    del optimizer
