"""The training half of a GRPO step against TRL's own, on identical tokens, weights and adapters.

    python benchmarks/step.py --first              about 90 s: is it right on this GPU, one small case
    python benchmarks/step.py --only qwen2.5-1.5b llama-3.1-8b --minutes 9 --out runs/a    two calls, and then one file
    python benchmarks/step.py --only phi-4 --minutes 9 --out runs/b
    python benchmarks/step.py --join runs/a/step.json runs/b/step.json
    python benchmarks/step.py --quick              tiny shapes on a CPU: does the script run at all?

Random weights at the presets' real shapes, made and quantised to NF4 on the card; LoRA of rank 16 on all linear layers,
fp32; 8-bit Adam's states are there; 8 completions of one prompt of 256 tokens, all of full length, loss "grpo", one
update a rollout. "ours" is objective.run under a `budget_gb` a little below the goal of that cell; "trl" is
GRPOTrainer.compute_loss and backward with gradient checkpointing, 1, 2 or 8 rows at once (`trl-1`, ...; "trl" is the
fastest of them, and the smallest peak of them). At 20K one of TRL's eight rows is run and its time multiplied by 8.

train_peak: torch's allocations, GB of 10^9 bytes; train_peak_driver: what the driver says is taken, context included;
train_time: seconds of one forward and backward of the batch, median. "planner" is memory.plan's prediction. t4: fp16,
memory-efficient attention only, loss scaled by 1024; its time is not a T4's. Every job is a process of its own.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: transformers would take kernels.py for the package `kernels`

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true")
parser.add_argument("--first", action="store_true")
parser.add_argument("--only", nargs="*", help="presets")
parser.add_argument("--jobs", nargs="*", help="of: check errors ours groups trl t4")
parser.add_argument("--lengths", nargs="*", help="of: 1K 4K 20K")
parser.add_argument("--margin", type=float, default=0.1, help="GB below a cell's goal that the step is given")
parser.add_argument("--minutes", type=float, default=60, help="no job is started after that")
parser.add_argument("--out", type=Path, help="where step.json is written, instead of benchmarks/results")
parser.add_argument("--join", nargs="+", type=Path, help="measure nothing, put the rows of these files together")
parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)  # preset, job, file for its rows: in a process of its own
ARGS = parser.parse_args()
if ARGS.quick:
    os.environ["NBHELPERS_SMOKE"] = "1"

from benchmarks import common  # noqa: E402
from nbhelpers import memory, presets  # noqa: E402

GB = 1e9
GOALS = {"qwen2.5-1.5b": (2.0, 2.2, 3.0), "llama-3.1-8b": (7.4, 7.8, 9.4), "phi-4": (11.5, 12.0, 14.0)}
CAPS = {"qwen2.5-1.5b": 5, "llama-3.1-8b": 15}  # GB of the whole process at 20K
LENGTHS = {"1K": 1024, "4K": 4096, "20K": 20480}
PROMPT, GROUP, RANK = 256, 8, 16
JOBS = ("check", "errors", "ours", "groups", "trl", "t4")
if ARGS.quick:
    LENGTHS, PROMPT, GROUP, RANK = {"1K": 48, "4K": 80}, 16, 4, 4


# ------------------------------------------------------------------------------------------------ in a job's process


class Job:
    """One preset's cases of one kind; rows are appended to a file as they come."""

    def __init__(self, name, kind, file):
        import torch

        self.torch, self.name, self.kind, self.file = torch, name, kind, file
        self.preset = presets.get(name)
        self.architecture = self.preset.architecture
        self.cuda = torch.cuda.is_available() and not ARGS.quick
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = (torch.float16 if kind == "t4" else torch.bfloat16) if self.cuda else torch.float32
        self.lengths = {n: v for n, v in LENGTHS.items() if not ARGS.lengths or n in ARGS.lengths}

    def row(self, what, who, value, unit, **more):
        found = common.row(f"{self.name}/{what}", who, float(f"{value:.5g}"), unit, **more)
        print(f"  {found['what']:44s} {who:10s} {value:12.4f} {unit} {more or ''}", flush=True)
        with open(self.file, "a") as f:
            f.write(json.dumps(found) + "\n")

    def attempt(self, what, function, *arguments):
        """Run a case; an error is printed and the next case goes on. Returns its result or None."""
        torch = self.torch
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

    def model(self, layers=None, lora=True):
        """Random NF4 weights on the device, one matrix at a time in 16 bits; adapter rounded to bf16, kept in fp32."""
        from accelerate import init_empty_weights
        from torch import nn
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils.quantization_config import QuantizationMethod

        from nbhelpers import quantize
        from nbhelpers.adapter import attach

        torch, start = self.torch, time.perf_counter()
        settings = self.architecture.config()
        settings |= {"num_hidden_layers": layers} if layers else {}
        settings |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "sliding_window": None}
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        model.requires_grad_(False)
        torch.manual_seed(0)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "layers" in name:
                weight = torch.randn(module.weight.shape, dtype=self.dtype, device=self.device) * 0.02
                new = quantize.empty_linear4bit(module, self.dtype)
                quantize.fill(new, quantize.pack(weight, self.dtype))
                if module.bias is not None:
                    bias = torch.randn(module.bias.shape, dtype=self.dtype, device=self.device) * 0.02
                    new.bias = nn.Parameter(bias, requires_grad=False)
                model.set_submodule(name, new)
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                owner, _, leaf = name.rpartition(".")
                value = torch.randn(parameter.shape, dtype=self.dtype, device=self.device)
                value = 1 + 0.1 * value if "norm" in name else value.mul_(0.02)
                setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        model.tie_weights()
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(self.device)
        model.is_loaded_in_4bit, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
        if lora:
            model = attach(model, RANK, RANK, 0.0)
            self.fill_adapter(model)
        model.train()
        print(f"  {self.name}: built in {time.perf_counter() - start:.1f} s", flush=True)
        return model

    def fill_adapter(self, model):
        torch = self.torch
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.01 if "lora_B" in name else 1 / math.sqrt(parameter.shape[1])
                value = torch.randn(parameter.shape, generator=generator) * scale
                parameter.data.copy_(value.bfloat16().float())

    def with_optimizer(self, model):
        """8-bit Adam after one step, so that its states are on the card."""
        torch = self.torch
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

    def batch(self, length, rows=GROUP):
        torch = self.torch
        generator, own = torch.Generator().manual_seed(2), length - PROMPT
        words = self.architecture.vocab_size
        prompt = torch.randint(3, words, (1, PROMPT), generator=generator).expand(rows, PROMPT).contiguous()
        found = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": torch.randint(3, words, (rows, own), generator=generator),
            "completion_mask": torch.ones(rows, own, dtype=torch.long),
            "advantages": torch.randn(rows, generator=generator),
            "num_items_in_batch": torch.tensor(rows * own),
        }
        return {name: value.to(self.device) for name, value in found.items()}

    def measure(self, function, repeats=3, warm=1):
        """(seconds, median; allocator's peak GB; driver's GB). The peak is of all runs, the first one's too."""
        torch = self.torch
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(warm + repeats):
            if self.cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if self.cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        if not self.cuda:
            return statistics.median(times[warm:]), 0.0, 0.0
        free, total = torch.cuda.mem_get_info()
        return statistics.median(times[warm:]), torch.cuda.max_memory_allocated() / GB, (total - free) / GB

    def measured(self, setting, who, function, **options):
        more = options.pop("more", {})
        seconds, peak, driver = self.measure(function, **options)
        times = more.get("rows", 1)
        note = {"note": f"one of {times} rows, time x {times}"} if times > 1 else {}
        self.row(f"{setting}/train_peak", who, peak, "GB", **note)
        self.row(f"{setting}/train_peak_driver", who, driver, "GB", **note)
        self.row(f"{setting}/train_time", who, seconds * times, "s", **note)
        return seconds * times, peak

    # ------------------------------------------------------------------------------------------------------- ours

    def lean(self, model, budget_gb=None, **options):
        from nbhelpers.step import LeanStep

        torch = self.torch
        context = (lambda: torch.autocast("cuda", dtype=self.dtype)) if self.cuda else None
        options |= {"autocast": context} if context else {}
        return LeanStep(model, budget_gb if self.cuda else None, **options)

    def run_ours(self, step, batch, backward=None):
        from nbhelpers import objective

        for parameter in step.trained:
            parameter.grad = None
        settings = objective.Settings(loss_type="grpo", max_completion_length=batch["completion_ids"].shape[1])
        return objective.run(step, batch, settings, backward=backward or self.torch.Tensor.backward)

    def describe(self, step):
        parts = [(len(p.rows), p.tokens.packed, p.kept, p.on_card, p.tile) for p in step.parts]
        host = step.decoder.store.host_bytes() / GB
        print(
            f"  {step.work.attention}; (rows, tokens, kept, on card, tile): {parts}; {host:.2f} GB pinned", flush=True
        )

    def plan_row(self, setting, length, budget, attention, rows=GROUP):
        plan = memory.plan(
            self.preset, card_gb=140, num_generations=rows, max_prompt_length=PROMPT,
            max_completion_length=length - PROMPT, lora_rank=RANK, quantization="nf4", budget_gb=budget,
            attention=attention,
        )  # fmt: skip
        self.row(f"{setting}/train_peak", "planner", plan.training_peak, "GB")

    def ours(self):
        torch = self.torch
        model = self.model()
        optimizer = self.with_optimizer(model)
        goals = dict(zip(LENGTHS, GOALS[self.name], strict=False))
        self.measure(lambda: self.run_ours(self.lean(model), self.batch(min(LENGTHS.values()))), 1, 0)  # compiles
        cases = list(self.lengths) + (["1K-roomy"] if "1K" in self.lengths and not ARGS.quick else [])
        for setting in cases:
            length = LENGTHS[setting.removesuffix("-roomy")]

            def case(setting=setting, length=length):
                budget = None if setting.endswith("-roomy") else goals[setting] - ARGS.margin
                cap = CAPS.get(self.name) if setting == "20K" and self.cuda else None
                if cap:
                    total = torch.cuda.get_device_properties(0).total_memory
                    torch.cuda.set_per_process_memory_fraction(cap * GB / total)
                step, batch = self.lean(model, budget), self.batch(length)
                long = length > 8192
                _, peak = self.measured(
                    setting, "ours", lambda: self.run_ours(step, batch), repeats=1 if long else 5, warm=0 if long else 1
                )
                if cap:
                    self.row(f"{setting}/train_peak_capped_{cap}gb", "ours", peak, "GB")
                    torch.cuda.set_per_process_memory_fraction(1.0)
                self.describe(step)
                if budget:
                    self.plan_row(setting, length, budget, step.work.attention)

            self.attempt(setting, case)
        del optimizer

    def groups(self):
        """Cost against the size of the group, at 1K."""
        model = self.model()
        optimizer = self.with_optimizer(model)
        sizes = (2, 4) if ARGS.quick else (2, 4, 8, 16, 32)
        step = self.lean(model, GOALS[self.name][0] - ARGS.margin)
        self.run_ours(step, self.batch(LENGTHS["1K"], 2))
        for size in sizes:
            batch = self.batch(LENGTHS["1K"], size)
            self.attempt(
                f"group-{size}",
                lambda size=size, batch=batch: self.measured(
                    f"1K/group-{size}", "ours", lambda: self.run_ours(step, batch), repeats=2
                ),
            )
        del optimizer

    def t4(self):
        """fp16, the memory-efficient attention alone; none of our kernels uses tl.dot."""
        torch = self.torch
        if self.cuda:
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
        model = self.model()
        optimizer = self.with_optimizer(model)
        goals = dict(zip(LENGTHS, GOALS[self.name], strict=False))
        for setting, length in self.lengths.items():

            def case(setting=setting, length=length):
                rows = 1 if length > 8192 else GROUP  # a micro-batch there is one row anyway
                budget = goals[setting] + 0.6  # K and V are expanded to all heads, which takes memory
                step = self.lean(model, budget, attention="efficient" if self.cuda else "rows")
                batch = self.batch(length, rows)
                outcomes = []

                def once():
                    outcomes[:] = [self.run_ours(step, batch, lambda loss: (loss * 1024.0).backward())]

                self.measured(f"{setting}-t4", "ours", once, repeats=1, warm=int(length < 2048))
                finite = all(torch.isfinite(p.grad).all().item() for p in step.trained)
                loss = outcomes[0].loss.item()
                self.row(f"{setting}-t4/finite", "ours", float(math.isfinite(loss) and finite), "1 = yes", rows=rows)
                self.row(f"{setting}-t4/mean_logprob", "ours", outcomes[0].logps.mean().item(), "nats")
                self.describe(step)
                self.plan_row(f"{setting}-t4", length, budget, step.work.attention, max(rows, 2))

            self.attempt(f"{setting}-t4", case)
        del optimizer

    # -------------------------------------------------------------------------------------------------------- TRL's

    def trainer(self, model):
        import trl
        from datasets import Dataset

        from nbhelpers import smoke

        args = trl.GRPOConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=GROUP, num_generations=GROUP, loss_type="grpo",
            gradient_checkpointing=True, bf16=self.cuda, use_cpu=not self.cuda, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        one = trl.GRPOTrainer(
            model, reward_funcs=[lambda completions, **_: [0.0] * len(completions)], args=args,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * GROUP}), processing_class=smoke.make_tokenizer(),
        )  # fmt: skip
        one.model.train()
        return one

    def run_trl(self, one, batch, at_once):
        one.model.zero_grad(set_to_none=True)
        rows = len(batch["advantages"])
        one.current_gradient_accumulation_steps = rows // at_once
        for start in range(0, rows, at_once):
            part = {n: v[start : start + at_once] if v.dim() else v for n, v in batch.items()}
            loss = one.compute_loss(one.model, part)
            one.accelerator.backward(loss)

    def trl(self):
        model = self.model()
        one = self.trainer(model)
        optimizer = self.with_optimizer(model)
        for setting, length in self.lengths.items():
            found = []
            long = length > 8192
            for at_once in (1,) if long else (8, 2, 1) if not ARGS.quick else (GROUP, 1):
                batch = self.batch(length, 1 if long else GROUP)

                def case(setting=setting, at_once=at_once, batch=batch, length=length, long=long):
                    return self.measured(
                        setting, f"trl-{at_once}", lambda: self.run_trl(one, batch, at_once),
                        repeats=1 if length > 2048 else 2, warm=int(length <= 2048),
                        more={"rows": GROUP if long else 1},
                    )  # fmt: skip

                result = self.attempt(f"{setting}/trl-{at_once}", case)
                found += [result] if result else []
            if found:
                self.row(f"{setting}/train_time", "trl", min(t for t, _ in found), "s")
                self.row(f"{setting}/train_peak", "trl", min(p for _, p in found), "GB")
        del optimizer

    # ------------------------------------------------------------------------------------------------ is it right?

    def gradient(self, model):
        return {n: p.grad.detach().float().cpu() for n, p in model.named_parameters() if p.requires_grad}

    def error(self, got, wanted):
        """Relative, in the norm of all gradients together."""
        top = sum((got[n] - wanted[n]).square().sum().item() for n in wanted)
        return math.sqrt(top / sum(w.square().sum().item() for w in wanted.values()))

    def errors(self):
        """Log-probabilities and gradients at 1K against fp32: ours and TRL's from the same NF4 weights."""
        torch = self.torch
        model, batch = self.model(), self.batch(LENGTHS["1K"])
        exact = self.attempt("errors/reference", lambda: self.reference(model, batch))
        if exact is None:
            return
        found = {}

        def theirs():
            one = self.trainer(model)
            ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
            with torch.no_grad():
                logps, _, _ = one._get_per_token_logps_and_entropies(
                    one.model, ids, torch.ones_like(ids), batch["completion_ids"].shape[1]
                )
            self.run_trl(one, batch, 2)
            found["trl"] = logps, self.gradient(model)
            for parameter in model.parameters():  # TRL casts them to bf16; the values are bf16's anyway
                if parameter.requires_grad:
                    parameter.data, parameter.grad = parameter.data.float(), None
            model.gradient_checkpointing_disable()

        def ours(name, **options):
            step = self.lean(model, **options)
            outcome = self.run_ours(step, batch)
            found[name] = outcome.logps, self.gradient(model)
            self.describe(step)

        self.attempt("errors/trl", theirs)
        self.attempt("errors/ours", lambda: ours("ours"))
        if self.cuda:
            tight = GOALS[self.name][0] - ARGS.margin
            self.attempt("errors/ours-tight", lambda: ours("ours-tight", budget_gb=tight))
            self.attempt("errors/ours-apart", lambda: ours("ours-apart", share_prompts=False))
            self.attempt("errors/ours-efficient", lambda: ours("ours-efficient", attention="efficient"))
        for who, (logps, gradient) in found.items():
            difference = (logps.float().cpu() - exact[0]).square().mean().sqrt().item()
            self.row("1K/logprob_error", who, difference, "nats rms")
            self.row("1K/gradient_error", who, self.error(gradient, exact[1]), "relative")

    def reference(self, model, batch):
        """(logps [B, T], gradients) of stock transformers in fp32 on the same dequantised weights, row by row."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        from nbhelpers import grpo
        from nbhelpers.adapter import attach
        from nbhelpers.kernels.reference import dequantize_nf4

        torch, inner = self.torch, model.get_base_model()
        with init_empty_weights(include_buffers=False):
            stock = AutoModelForCausalLM.from_config(inner.config, dtype=torch.float32, attn_implementation="sdpa")
        source = {n.replace(".base_layer", ""): m for n, m in inner.named_modules()}
        for name in [name for name, _ in stock.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            value = getattr(source[owner], leaf)
            if leaf == "weight" and value.dtype == torch.uint8:
                value = dequantize_nf4(value, value.quant_state, torch.float32)
            new = torch.nn.Parameter(value.detach().float().clone(), requires_grad=False)
            setattr(stock.get_submodule(owner), leaf, new)
        stock.tie_weights()
        for module in stock.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(self.device)
        stock = attach(stock, RANK, RANK, 0.0)
        self.fill_adapter(stock)
        stock.train()
        ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
        weights = grpo.token_weights(batch["completion_mask"], "grpo")
        every = []
        for i in range(len(ids)):
            logits = stock(ids[i : i + 1]).logits[:, PROMPT - 1 : -1]
            logps = logits.log_softmax(-1).gather(-1, ids[i : i + 1, PROMPT:, None]).squeeze(-1)
            del logits
            mask = batch["completion_mask"][i : i + 1]
            loss = (grpo.token_loss(logps, batch["advantages"][i : i + 1], mask) * weights[i : i + 1]).sum()
            loss.backward()
            every.append(logps.detach().cpu())
        return torch.cat(every), self.gradient(stock)

    def check(self):
        """Every way of attention, every state of the layers: gradients against one another; bytes against the plan."""
        from nbhelpers import attention
        from nbhelpers.decoder import Layers
        from nbhelpers.packing import pack, unpad

        torch = self.torch
        if self.cuda:
            for way, dtype in (("flash", torch.bfloat16), ("efficient", torch.float16), ("efficient", torch.bfloat16)):
                wrong = attention.check(way, self.device, dtype)
                print(f"  attention {way} {dtype}: {wrong or 'right'}", flush=True)
        count = 2 if ARGS.quick else 6
        model = self.model(layers=count)
        batch = self.batch(LENGTHS["1K"], 4)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        rows = unpad(*(batch[n] for n in names))
        wanted = None
        ways = (("rows", False), ("rows", True)) + ((("flash", True), ("efficient", True)) if self.cuda else ())
        states = {"kept": (count, 0), "on card": (0, count), "in host": (0, 0), "mixed": (1, 1)}
        for way, share in ways:
            for state, (kept, on_card) in states.items():

                def case(way=way, share=share, kept=kept, on_card=on_card, state=state):
                    nonlocal wanted
                    step = self.lean(model, attention=way, share_prompts=share)
                    packed = pack(rows, rows.rows, self.device, share)
                    tile = packed.ids.shape[1] if kept == count else 1024
                    peaks = []
                    for _ in range(2):  # the first run compiles, and makes the buffer that weights are made dense in
                        for parameter in step.trained:
                            parameter.grad = torch.zeros_like(parameter)
                        if self.cuda:
                            torch.cuda.reset_peak_memory_stats()
                            before = torch.cuda.memory_allocated()
                        step.decoder.differentiate(
                            packed,
                            1.0,
                            Layers(kept, on_card, tile),
                            lambda logps, _: -logps.mean(),
                            torch.Tensor.backward,
                        )
                        if self.cuda:
                            torch.cuda.synchronize()
                            peaks.append((torch.cuda.max_memory_allocated() - before) / GB)
                    got = self.gradient(model)
                    wanted = wanted or got
                    tokens = memory.count([(0, PROMPT, LENGTHS["1K"] - PROMPT)] * 4, share)
                    planned = step.work.peak(tokens, kept, on_card, tile) / GB
                    label = f"check/{way}{'-shared' if share else ''}/{state}"
                    self.row(f"{label}/gradient_difference", "ours", self.error(got, wanted), "relative")
                    if peaks:
                        self.row(f"{label}/work_peak", "ours", peaks[-1], "GB")
                        self.row(f"{label}/work_peak", "planner", planned, "GB")

                self.attempt(f"check/{way}/{state}", case)


# ------------------------------------------------------------------------------------------------------- the parent


def jobs():
    names = ARGS.only or list(GOALS)
    if ARGS.first or ARGS.quick:
        name = names[0]
        return [(name, kind) for kind in ARGS.jobs or (("check", "errors", "ours") if ARGS.first else JOBS)]
    kinds = ARGS.jobs or ("errors", "ours", "groups", "trl", "t4")
    only = {"errors": "qwen2.5-1.5b", "groups": "llama-3.1-8b"}  # made for one preset each
    return [(n, k) for k in kinds for n in names if only.get(k, n) == n or ARGS.jobs]


def main():
    start, rows = time.monotonic(), []
    flags = [f"--{n}" for n in ("quick", "first") if getattr(ARGS, n)] + ["--margin", str(ARGS.margin)]
    lengths = ARGS.lengths or (["1K"] if ARGS.first else [])
    flags += ["--lengths", *lengths] if lengths else []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, kind) in enumerate(jobs()):
            left = ARGS.minutes * 60 - (time.monotonic() - start)
            print(f"{name} {kind} ({time.monotonic() - start:.0f} s)", flush=True)
            if left < 20:
                print("  not started: --minutes is used up", flush=True)
                continue
            file = Path(folder) / f"{number}.jsonl"
            command = [sys.executable, str(Path(__file__)), *flags, "--job", name, kind, str(file)]
            env = {
                **os.environ,
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
                "TOKENIZERS_PARALLELISM": "false",
            }
            try:
                code = subprocess.run(command, env=env, timeout=left).returncode
                print(f"  exit code {code}" if code else "  done", flush=True)
            except subprocess.TimeoutExpired:
                print("  stopped: --minutes is used up", flush=True)
            if file.exists():
                rows += [json.loads(line) for line in file.read_text().splitlines()]
            if rows:
                target = Path(folder) if ARGS.quick or ARGS.first else ARGS.out or common.RESULTS
                print(f"  {common.write('step', rows, target)}", flush=True)
                if os.environ.get("OUT") and not ARGS.quick:
                    common.write("step", rows, Path(os.environ["OUT"]))
    print(f"{time.monotonic() - start:.0f} s")
    if rows:
        print(common.table(rows))


if __name__ == "__main__":
    if ARGS.job:
        job = Job(*ARGS.job)
        getattr(job, job.kind)()
    elif ARGS.join:
        common.join("step", ARGS.join, ARGS.out or common.RESULTS)
    else:
        main()
