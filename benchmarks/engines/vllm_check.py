"""Colocated vLLM on one GPU: is it right, what does it cost, how fast is it?

    python -m benchmarks.engines.vllm_check --out results-folder              Qwen2.5-1.5B, then Llama-3.1-8B
    python -m benchmarks.engines.vllm_check --models qwen2.5-1.5b --only start pointers greedy

NF4 with a live LoRA of rank 16 on all linear layers, random weights at the real shapes. Each model runs in a process of
its own; a check that fails prints its traceback and does not stop the others. Written after each process: vllm.json
(the rows); beside it a log of everything. bfloat16 rounds differently in two engines, and in vLLM also from one call to
the next, so tokens may part at near-ties, which are counted and their gap shown.
"""

import gc
import json
import os
import statistics
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, harness
from benchmarks.harness import GB, Job, driver_gb, peak_driver, timed, wait
from nbhelpers.engines import Sampling
from nbhelpers.engines.base import Engine
from nbhelpers.engines.graph import GraphEngine

from .cases import COMPLETION, PROMPT, prompts_of
from .check import NEAR, OFF, compare, errors, forward_logps

MODELS = ("qwen2.5-1.5b", "llama-3.1-8b")
ROWS = 128
DTYPE = torch.bfloat16  # what counts as a near-tie, and as exact, goes by it


class Check:
    """One model in this process: the checks in their order, and what they hand on to each other."""

    def __init__(self, job: Job):
        self.job = job
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        print(text, flush=True)
        with Path(self.job["lines"]).open("a") as lines:
            lines.write(text + "\n")

    def row(self, metric: str, value: float, unit: str, who: str = "vllm", **more: Any) -> None:
        what = f"{self.job['model']}/{metric}"
        harness.append_row(common.row(what, who, round(value, 5), unit, **more), self.job["rows"])
        self.say(f"     {self.job['model']}/{metric} {who} = {value:,.4f} {unit} {more}")

    def judge(self, name: str, good: bool, detail: str) -> None:
        self.say(f"{'ok  ' if good else 'FAIL'} {name}: {detail}")
        if not good:
            self.failed.append(name)

    def run(self) -> int:
        """The checks that the job names; returns how many failed."""
        for name in self.job["only"]:
            self.say(f"---- {self.job['model']} {name}")
            begun = time.perf_counter()
            try:
                CHECKS[name](self)
            except Exception:
                self.failed.append(name)
                self.say(f"FAIL {name} with an error:\n{traceback.format_exc()[-3500:]}")
                if name == "start":
                    break
            self.say(f"     {name} took {time.perf_counter() - begun:.1f} s")
        self.say(f"==== {self.job['model']}: failed: {', '.join(self.failed) or 'nothing'}")
        return len(self.failed)

    # ---- the checks ----

    def start(self) -> None:
        from nbhelpers.engines.vllm import ENVIRONMENT, VLLMEngine

        self.model = harness.build(self.job)
        wait()
        torch.cuda.empty_cache()
        self.weights = driver_gb()
        self.row("colocated/driver_weights", self.weights, "GB")
        begun = time.perf_counter()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm

        imported = time.perf_counter() - begun
        self.say(f"     vllm {vllm.__version__} imported in {imported:.1f} s")
        self.engine = VLLMEngine(self.model, max_rows=ROWS, max_length=PROMPT + COMPLETION)
        made = time.perf_counter() - begun
        self.engine.generate(prompts_of(self.job, 8), Sampling(max_tokens=2, seed=1))
        wait()
        ready = time.perf_counter() - begun
        self.row("ready", ready, "s", import_s=round(imported, 2), made_s=round(made, 2))
        config = self.engine.llm.llm_engine.vllm_config
        worker = self.engine.llm.llm_engine.model_executor.driver_worker.worker
        self.say(
            f"     runner {type(worker.model_runner).__module__}, graphs {config.compilation_config.cudagraph_mode}, "
            f"async {config.scheduler_config.async_scheduling}, blocks {config.cache_config.num_gpu_blocks}, "
            f"head {config.model_config.head_dtype}, kv {self.engine.kv_bytes / GB:.2f} GB"
        )

    def pointers(self) -> None:
        ours = {p.data_ptr() for name, p in self.model.named_parameters() if "lora_" not in name}
        theirs = {name: p.data_ptr() for name, p in self.engine.vllm_model.named_parameters()}
        alone = [name for name, place in theirs.items() if place not in ours]
        biases = {p.data_ptr() for n, p in self.model.named_parameters() if "lora_" not in n and n.endswith("bias")}
        unused = (
            ours - set(theirs.values()) - biases
        )  # biases are read from our modules: vLLM has no parameter for them
        self.row("colocated/parameters_not_shared", len(alone) + len(unused), "tensors", shared=len(theirs))
        self.judge("pointers", not alone and not unused, f"vLLM's own: {alone[:5]}, unused of ours: {len(unused)}")

    def memory(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        asleep = driver_gb()
        self.engine.wake()
        awake, kv = driver_gb(), self.engine.kv_bytes / GB
        self.engine.sleep()
        self.row("colocated/driver_asleep", asleep, "GB", above_weights=round(asleep - self.weights, 3))
        self.row("colocated/driver_awake", awake, "GB", kv=round(kv, 3), beside=round(awake - self.weights - kv, 3))
        self.alone = awake  # nothing of training is there yet but the weights and the adapter's fp32 numbers
        self.judge("sleep gives the memory back", awake - asleep > 0.9 * kv, f"{awake - asleep:.2f} GB of {kv:.2f}")

    def _greedy(self, label: str) -> list[list[int]]:
        texts = prompts_of(self.job, 8)
        written = self.engine.generate(texts, Sampling(max_tokens=64, temperature=0.0))
        gaps: list[float] = []
        each: list[Tensor] = []
        same = 0
        for text, completion in zip(texts, written, strict=True):
            logps = forward_logps(self.model, text, completion.token_ids)
            tokens = torch.tensor(completion.token_ids, device=logps.device)[:, None]
            chosen = logps.gather(1, tokens)[:, 0]
            gaps.append((logps.amax(-1) - chosen).max().item())
            same += int((logps.argmax(-1) == tokens[:, 0]).sum())
            each.append((chosen.cpu() - torch.tensor(completion.logprobs)).abs())
        off = torch.cat(each)
        detail = (
            f"{same} of {off.numel()} tokens are the training forward's argmax, largest gap {max(gaps):.4f}; "
            f"log-probabilities off by {off.mean():.5f} on average, {off.max():.4f} at most"
        )
        self.judge(f"greedy {label}", max(gaps) < NEAR[DTYPE] and off.mean().item() < OFF[DTYPE], detail)
        self.row(f"colocated/greedy_gap_{label}", max(gaps), "nats", same=same, tokens=off.numel())
        self.row(f"colocated/logprob_error_{label}", off.mean().item(), "nats", largest=round(off.max().item(), 4))
        return [completion.token_ids for completion in written]

    def greedy(self) -> None:
        before = self._greedy("before")
        texts = prompts_of(self.job, 8)
        seconds: list[float] = []
        for _ in range(20):
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(torch.randn_like(parameter), alpha=0.1 * parameter.std().item())
            seconds.append(timed(self.engine.generate, texts, Sampling(max_tokens=1, seed=1)))
        after = self._greedy("after_20_updates")
        self.judge("20 updates changed the tokens", before != after, "they did" if before != after else "THE SAME")
        self.row("colocated/prefill_with_wake_update_sleep", statistics.median(seconds), "s", rows=8)
        with self.model.disable_adapter():
            off = self._greedy("adapter_off")
        self.judge("without the adapter other tokens", off != after, "they are" if off != after else "THE SAME")
        self.engine.wake()
        updates = [timed(self.engine.update_adapter) for _ in range(5)]
        self.row("colocated/adapter_update", statistics.median(updates), "s")
        self.engine.sleep()

    def sampling(self) -> None:
        texts = prompts_of(self.job, 8)
        draw = Sampling(max_tokens=48, temperature=0.9, seed=4)
        one, two = self.engine.generate(texts, draw), self.engine.generate(texts, draw)
        parted = sum(a.token_ids != b.token_ids for a, b in zip(one, two, strict=True))
        self.judge("a seed repeats", parted < len(texts), f"{parted} of {len(texts)} rows part from the same call's")
        off = errors(self.model, texts, one, 0.9)
        right = off.mean().item() < OFF[DTYPE]
        self.judge("log-probabilities of draws", right, f"off by {off.mean():.5f}, at most {off.max():.4f}")
        stop = one[0].token_ids[5]
        stopped = self.engine.generate(texts, replace(draw, stop_ids=(stop,)))[0]
        wanted = one[0].token_ids[: one[0].token_ids.index(stop) + 1]
        detail = f"{stopped.token_ids} for {wanted}, {stopped.reason}"
        self.judge("a stop id", stopped.token_ids == wanted and stopped.reason == "stop_id", detail)
        every = replace(draw, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, min_tokens=20, stop_ids=(stop,))
        filtered = self.engine.generate(texts, replace(every, num_generations=4))
        finite = all(torch.tensor(c.logprobs).isfinite().all() and len(c.token_ids) >= 20 for c in filtered)
        self.judge("all filters at once", finite and len(filtered) == 32, f"{len(filtered)} completions")

    def sleeping(self) -> None:
        texts, greedy = prompts_of(self.job, 8), Sampling(max_tokens=32, temperature=0.0)
        before = self.engine.generate(texts, greedy)
        torch.cuda.empty_cache()
        seen: list[float] = []
        waking: list[float] = []
        falling: list[float] = []
        for _ in range(50):
            waking.append(timed(self.engine.wake))
            falling.append(timed(self.engine.sleep))
            seen.append(driver_gb())
        drift = 1000 * (seen[-1] - seen[0])
        self.row("colocated/sleep_drift_50_cycles", drift, "MB", first=round(seen[0], 4), last=round(seen[-1], 4))
        self.row("colocated/wake", statistics.median(waking), "s")
        self.row("colocated/sleep", statistics.median(falling), "s")
        self.judge("50 sleeps", abs(drift) < 100, f"drift {drift:.1f} MB")
        forks, gap = compare(self.model, texts, self.engine.generate(texts, greedy), before)
        self.judge(
            "the same tokens after 50 sleeps", gap < NEAR[DTYPE], f"{forks} of {len(texts)} rows part, gap {gap:.4f}"
        )

    def decode(self) -> None:
        for batch in (8, 32, 128):
            texts, draw = prompts_of(self.job, batch), Sampling(max_tokens=COMPLETION, seed=1)
            self.engine.generate(texts, replace(draw, max_tokens=4))
            with peak_driver() as peak:
                times = [timed(self.engine.generate, texts, draw) for _ in range(2)]
            speed = batch * COMPLETION / min(times)
            more: dict[str, Any] = {"prompt": PROMPT, "completion": COMPLETION, "sleeping_included": True}
            self.row(f"batch-{batch}/decode", speed, "tokens/s", **more)
            self.row(f"batch-{batch}/driver", peak[0], "GB", above_weights=round(peak[0] - self.weights, 3))
            prefill = timed(self.engine.generate, texts, replace(draw, max_tokens=1))
            self.row(f"batch-{batch}/step", 1000 * (min(times) - prefill) / (COMPLETION - 1), "ms", first_s=prefill)

    def grpo(self) -> None:
        """The first step's loss is 0 when the engine's policy is the trained one; with our default correction, by
        token, and with TRL's. The project's own decoder beside it shows what rounding alone does.

        loss_type="grpo" is a mean over completions, whose advantages add up to 0; the default, dapo, is one over tokens
        and not 0 as soon as one completion is shorter than another."""
        graph = GraphEngine(self.model, max_rows=8)
        # what training may add to the weights: less than the keys and values that sleep meanwhile
        budget = torch.cuda.memory_allocated() / GB - self.engine.kv_bytes / GB + 3.0
        for mode in ("token_truncate", "sequence_mask"):
            self._steps("vllm", self.engine, mode, budget)
            self._steps("graph", graph, mode, None)

    def _steps(self, who: str, engine: Engine, mode: str, budget: float | None) -> None:
        from datasets import Dataset

        from nbhelpers.models import smoke
        from nbhelpers.training.trainer import LeanGRPOConfig, LeanGRPOTrainer

        data = Dataset.from_dict({"prompt": [chr(97 + i % 26) * 150 for i in range(32)]})
        gc.collect()
        torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory() as folder, peak_driver() as peak:
            args = LeanGRPOConfig(
                folder, max_steps=2, per_device_train_batch_size=8, num_generations=8, max_completion_length=256,
                learning_rate=1e-6, optim="adamw_8bit", save_strategy="no", disable_tqdm=True,
                loss_type="grpo", vllm_importance_sampling_mode=mode,
            )  # fmt: skip
            trainer = LeanGRPOTrainer(
                self.model, lambda completions, **_: [float(i % 3) for i in range(len(completions))], args, data,
                processing_class=smoke.make_tokenizer(), engine=engine, budget_gb=budget,
            )  # fmt: skip
            if not args.vllm_importance_sampling_correction:
                raise AssertionError("the correction is off")
            begun = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - begun
        log = trainer.state.log_history[0]
        kept = {k.removeprefix("sampling/"): round(float(v), 5) for k, v in log.items() if "sampling" in k}
        loss = float(log["loss"])
        self.row(f"colocated/first_loss_{mode}", loss, "", who, grad_norm=log.get("grad_norm"), **kept)
        self.judge(f"first loss, {who}, {mode}", abs(loss) < 0.005, f"{loss:.6f}; two steps in {seconds:.1f} s")
        if who == "vllm":
            self.row("colocated/driver_trainer_and_engine", peak[0], "GB", above_alone=round(peak[0] - self.alone, 3))
            detail = f"{peak[0]:.2f} GB, the engine alone {self.alone:.2f}"
            self.judge("trainer and engine", peak[0] <= self.alone + 1.0, detail)


CHECKS = {
    "start": Check.start, "pointers": Check.pointers, "memory": Check.memory, "greedy": Check.greedy,
    "sampling": Check.sampling, "sleeping": Check.sleeping, "decode": Check.decode, "grpo": Check.grpo,
}  # fmt: skip


def attempt(model: str, only: list[str], folder: Path, seconds: float) -> list[common.Row]:
    """One model in a process of its own: its rows."""
    name = folder.resolve() / model
    job: Job = {"model": model, "only": only, "rows": f"{name}.rows", "lines": f"{name}.txt"}
    for file in (Path(job["rows"]), Path(job["lines"])):
        file.unlink(missing_ok=True)
    begun = time.perf_counter()
    with Path(f"{name}.log").open("w") as log:
        code = harness.run_child("benchmarks.engines.vllm_check", job, seconds, os.environ, log=log)
    lines = Path(job["lines"]).read_text() if Path(job["lines"]).exists() else ""
    print(lines)
    if "====" not in lines:
        print(f"---- the process ended early ({code}); the last lines of its log:")
        print("\n".join(line[:300] for line in Path(f"{name}.log").read_text().splitlines()[-40:]))
    print(f"-- {model}: {time.perf_counter() - begun:.0f} s, exit {code}", flush=True)
    return harness.read_rows(Path(job["rows"]))


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--only", nargs="*", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--seconds", type=float, default=560, help="of all of it")
    args = parser.parse_args()
    if args.child:
        raise SystemExit(Check(json.loads(args.child)).run())
    if args.join:
        common.join("vllm", args.join, args.out or common.RESULTS)
        return
    if "start" not in args.only:
        args.only.insert(0, "start")
    folder = args.out or common.RESULTS  # of the logs too
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    rows: list[common.Row] = []
    for i, model in enumerate(args.models):
        left = end - time.monotonic()
        rows += attempt(model, args.only, folder, left / (len(args.models) - i))
        common.write("vllm", rows, folder)
    print(common.table(rows) if rows else "nothing was measured")


if __name__ == "__main__":
    main()
