"""What fits: whole GRPO steps of large, whole and swapped models, 128K tokens, and the recipes' shapes, under a cap.

    python -m benchmarks.step.sizes                              every case, one after the other
    python -m benchmarks.step.sizes --only 32b 70b --minutes 9 --out runs/a
    python -m benchmarks.step.sizes --only long-run 24k-train 24k-decode 32b-sft --minutes 9 --out runs/recipes
    python -m benchmarks.step.sizes --join runs/a/sizes.json runs/b/sizes.json
    python -m benchmarks.step.sizes --smoke                      tiny shapes on a CPU: does every case run to its end?

Random weights at the presets' real shapes, made on the card layer by layer. A case is a process of its own, with a cap
for all that it takes of the card and a time limit: one that fails takes no other with it, and the rows that it wrote
before count.

step_peak_driver: what the driver says is taken at most over all steps, context included, GB of 10^9 bytes.
train_peak: torch's allocations. `planned`: what memory.plan says of the same thing, for a time with the speed of the
card that runs it; `off`: how far the measured value is from it. moved: what a step copied to the card for layers that
wait on the host.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, harness, random_model
from benchmarks.engines.grpo import KEPT, logged, watch, workload
from benchmarks.harness import GB
from nbhelpers import memory
from nbhelpers.memory.seconds import CARDS
from nbhelpers.models import swap
from nbhelpers.models.finite import first_not_finite

from . import cases

ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TOKENIZERS_PARALLELISM": "false"}
STEPS, DECODED = 3, 64
PROMPT = 256  # tokens


@dataclass(frozen=True)
class Case:
    """One thing that is to fit.

    Args:
        preset (`str`): Its name.
        kind (`str`): A key of KINDS.
        label (`str`): In the rows' names: "1K".
        cap (`float`): GB of the whole process.
        tokens (`int`): Of a prompt and its completion.
        whole (`bool`): Every weight is trained, in bf16; else NF4 and a LoRA.
        swap (`bool`): Layers that do not fit wait on the host, as many as the plan says.
        rank (`int`): Of the LoRA.
        rows (`int`): Completions of a step; 0: as many as the call says.
        steps (`int`): Of a whole run.
        seconds (`float`): After that it is killed.
    """

    preset: str
    kind: str
    label: str
    cap: float
    tokens: int = 1024
    whole: bool = False
    swap: bool = False
    rank: int = 16
    rows: int = 0
    steps: int = STEPS
    seconds: float = 560


CASES = {
    "32b": Case("qwen2.5-32b", "steps", "1K", 24),
    "70b": Case("llama-3.3-70b", "steps", "1K", 48),
    "3b-whole": Case("qwen2.5-3b", "steps", "whole", 24, whole=True),
    "1.5b-whole": Case("qwen2.5-1.5b", "steps", "whole", 12, whole=True),
    "8b-swap": Case("llama-3.1-8b", "steps", "swap", 6, swap=True),
    "128k-train": Case("llama-3.1-8b", "train", "128K", 48, 2**17),
    "128k-decode": Case("llama-3.1-8b", "decode", "128K", 48, 2**17),
    # docs/recipes.md: 22,419 steps of 6 answers; the last stage of 8K, 16K, 24K; a text that a 32B learns
    "long-run": Case("qwen2.5-3b", "steps", "long-run", 24, PROMPT + 200, rank=32, rows=6, steps=20),
    "24k-train": Case("qwen2.5-1.5b", "train", "24K", 24, PROMPT + 24_576),
    "24k-decode": Case("qwen2.5-1.5b", "decode", "24K", 24, PROMPT + 24_576),
    "32b-sft": Case("qwen2.5-32b", "train", "sft-8K", 24, 8192, rank=8),
}


class Capped(cases.Job):
    """A case in a process that may take `case.cap` GB; on a CPU there is no cap.

    Args:
        case (`Case`): What is measured.
        file (`str`): Where rows go.
        smoke (`bool`): Tiny shapes on a CPU.
        rows (`int`): Completions of a step.
    """

    def __init__(self, case: Case, file: str, smoke: bool, rows: int):
        super().__init__(case.preset, case.kind, file, smoke, 0.0, [])
        self.case, self.smoke, self.rows = case, smoke, case.rows or rows
        self.rank = 4 if smoke else case.rank
        if case.whole:
            self.rank, self.dtype = 0, torch.bfloat16
        self.prompt = 24 if smoke else PROMPT
        self.tokens = {"steps": 32}.get(case.kind, 256) if smoke else case.tokens
        self.budget: float | None = None  # GB that torch may give out
        self.card: str | None = None  # the planner's name of this one, if it has its data sheet
        if self.cuda:
            name = torch.cuda.get_device_name()
            self.card = name if any(card.name in name for card in CARDS) else None
            self.budget = harness.hold(case.cap)

    def made(self) -> random_model.Model:
        """The model with its random weights on the device, and nothing else there."""
        start = time.perf_counter()
        swapped = 0
        if self.case.swap:
            swapped = 2 if self.smoke else self.plan(self.rows).setting.swapped
        model = random_model.make(
            self.architecture, self.device, self.dtype, self.rank, not self.case.whole, swapped
        )  # fmt: skip
        if self.case.whole:
            model.requires_grad_(True)
        if self.cuda:
            torch.cuda.empty_cache()
        print(f"  {self.name}: built in {time.perf_counter() - start:.1f} s, {harness.driver_gb():.2f} GB", flush=True)
        return model

    def plan(self, rows: int) -> memory.Plan:
        """What the planner says of `rows` completions of this case."""
        return memory.plan(
            self.preset, card_gb=self.case.cap, num_generations=rows, max_prompt_length=self.prompt,
            max_completion_length=self.tokens - self.prompt, lora_rank=self.rank, quantization="nf4", rows=rows,
            budget_gb=self.budget, attention="flash", train="all" if self.case.whole else None, swap=self.case.swap,
            card=self.card,
        )  # fmt: skip

    def against(self, what: str, measured: float, planned: float, **more: Any) -> None:
        """A row in GB with what was planned, and by how much it is off; nothing was measured on a CPU."""
        off = round(measured / planned - 1, 3) if self.cuda else None
        self.row(f"{self.case.label}/{what}", "ours", measured, "GB", planned=round(planned, 3), off=off,
                 cap=self.case.cap, **more)  # fmt: skip


def steps(job: Capped) -> None:
    """Whole steps of LeanGRPOTrainer: generating, forward, backward and update. The time is the median of those after
    the first, which compiles."""
    from nbhelpers.training.trainer import LeanGRPOConfig, LeanGRPOTrainer

    model = job.made()
    settings, parts, times = workload(job.smoke, job.tokens, job.rows)
    with tempfile.TemporaryDirectory() as folder, harness.peak_driver() as peak:
        settings |= {"optim": "adamw_8bit"} if job.case.whole else {}  # rounded_adam.py's, on a CPU too
        args = LeanGRPOConfig(folder, max_steps=job.case.steps, **settings)
        trainer = LeanGRPOTrainer(model, args=args, engine="graph", budget_gb=job.budget, **parts)
        generated, trained = watch(trainer.engine, "generate"), watch(trainer, "compute_loss")
        trainer.train()
    bad = first_not_finite((n, p) for n, p in model.named_parameters() if p.requires_grad)
    numbers = [float(log[name]) for log in trainer.state.log_history if "loss" in log for name in ("loss", "grad_norm")]
    finite = bad is None and all(map(math.isfinite, numbers))
    written: dict[str, Any] = {"rows": job.rows, "steps": len(times), "finite": finite}
    written |= logged(trainer.state.log_history[-2], KEPT)  # -1: the whole run's
    written |= {"generating_s": round(generated[-1], 2), "training_s": round(trained[-1], 2)}
    plan, swapped = job.plan(job.rows), swap.of(model)
    job.row(f"{job.case.label}/step_time", "ours", statistics.median(times[1:]), "s", first_s=round(times[0], 1),
            cap=job.case.cap, planned=plan.step_seconds if job.cuda else None, **written)  # fmt: skip
    if swapped is not None:
        job.row(f"{job.case.label}/moved", "ours", swapped.moved / job.case.steps / GB, "GB", layers=swapped.count,
                host_gb=round(swapped.host_bytes / GB, 2), planned=round(plan.swap_gb, 1),
                planned_s=round(plan.swap_gb / plan.host_gb_s, 1))  # fmt: skip
    halves = {"generating": sum(plan.generation.values()), "training": sum(plan.training.values())}
    job.against("step_peak_driver", peak[0], max(halves.values()), rows=job.rows, finite=finite)


def train(job: Capped) -> None:
    """The training half of one row."""
    model = job.made().train()
    optimizer = job.with_optimizer(model)
    step = job.lean(model, job.budget)
    job.run_ours(step, job.batch(min(1024, job.tokens // 2), 1))  # compiles
    seconds, peak, driver = job.measure(lambda: job.run_ours(step, job.batch(job.tokens, 1)), repeats=1, warm=0)
    job.describe(step)
    finite = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in step.trained)
    planned = job.plan(1)
    job.against("train_peak", peak, planned.training_peak, rows=1, finite=finite)
    job.against("train_peak_driver", driver, sum(planned.training.values()), rows=1)
    job.row(f"{job.case.label}/train_time", "ours", seconds, "s", rows=1, finite=finite)
    del optimizer


def decode(job: Capped) -> None:
    """64 tokens at the end of one text, from the graph engine; `prefill_s` is what the text before them took."""
    from nbhelpers.engines import Sampling
    from nbhelpers.engines.graph import GraphEngine

    model = job.made()
    engine = GraphEngine(model, budget_gb=job.budget, max_rows=1)
    text = torch.randint(3, job.architecture.vocab_size, (job.tokens - DECODED - 1,)).tolist()
    engine.generate([text[:64]], Sampling(max_tokens=9))  # compiles, and makes the graph
    spent = watch(engine._runner, "run")
    with harness.peak_driver() as peak:
        seconds = harness.timed(engine.generate, [text], Sampling(max_tokens=DECODED + 1, seed=1))
    plan = memory.plan(
        job.preset, card_gb=job.case.cap, num_generations=1, max_prompt_length=len(text), lora_rank=job.rank,
        max_completion_length=job.tokens - len(text), quantization="nf4", rows=1, budget_gb=job.budget,
    )  # fmt: skip
    job.row(f"{job.case.label}/decode_step", "ours", 1000 * sum(spent) / DECODED, "ms", tokens=DECODED,
            prefill_s=round(seconds - sum(spent), 2))  # fmt: skip
    job.against("decode_peak_driver", peak[0], sum(plan.generation.values()))


KINDS: dict[str, Callable[[Capped], None]] = {"steps": steps, "train": train, "decode": decode}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", nargs="*", choices=CASES, help="cases; all of them if none is named")
    parser.add_argument("--rows", type=int, default=8, help="completions of a step: 4 where eight do not fit")
    parser.add_argument("--minutes", type=float, default=60, help="no case goes on after that")
    args = parser.parse_args()
    if args.child:
        child = json.loads(args.child)
        job = Capped(CASES[child["case"]], child["file"], child["smoke"], child["rows"])
        KINDS[job.case.kind](job)
        return
    if args.join:
        common.join("sizes", args.join, args.out or common.RESULTS)
        return
    run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """The cases that are asked for. What has been measured so far is written after each of them."""
    start, rows = time.monotonic(), []
    failed: list[str] = []
    environment = os.environ | ENVIRONMENT | ({"NBHELPERS_SMOKE": "1"} if args.smoke else {})
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or CASES:
            left = args.minutes * 60 - (time.monotonic() - start)
            print(f"{name} ({time.monotonic() - start:.0f} s)", flush=True)
            if left < 20:
                print("  not started: --minutes is used up", flush=True)
                continue
            file = str(Path(folder, f"{name}.jsonl"))
            child = {"case": name, "file": file, "smoke": args.smoke, "rows": args.rows}
            code = harness.run_child("benchmarks.step.sizes", child, min(CASES[name].seconds, left), environment)
            print(f"  exit {code}" if code else "  done", flush=True)
            failed += [name] if code else []
            rows += harness.read_rows(Path(file))
            if rows and not args.smoke:
                print(f"  {common.publish('sizes', rows, args.out)}", flush=True)
    if rows:
        print(common.table(rows))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
