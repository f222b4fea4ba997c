"""Is the training half right? Against fp32, and its implementations of attention against one another."""

import math

import torch
from torch import Tensor

from benchmarks.harness import GB
from benchmarks.random_model import Model
from nbhelpers.memory import micro_batches

from . import trl
from .cases import GOALS, Batch, Job

Gradient = dict[str, Tensor]  # by name, fp32 on the CPU


def gradient(model: Model) -> Gradient:
    """The gradients of all that learns."""
    return {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.requires_grad}


def error(got: Gradient, wanted: Gradient) -> float:
    """Relative, in the norm of all gradients together."""
    top = sum((got[n] - wanted[n]).square().sum().item() for n in wanted)
    return math.sqrt(top / sum(w.square().sum().item() for w in wanted.values()))


def errors(job: Job) -> None:
    """Log-probabilities and gradients at 1K against fp32: ours and TRL's from the same NF4 weights."""
    model, batch = job.model(), job.batch(job.every_length["1K"])
    exact = job.attempt("errors/reference", lambda: reference(job, model, batch))
    if exact is None:
        return
    results: dict[str, tuple[Tensor, Gradient]] = {}

    def theirs() -> None:
        one = trl.trainer(job, model)
        ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
        with torch.no_grad():  # TRL's own and private: its log-probabilities have no public name
            logps, _, _ = one._get_per_token_logps_and_entropies(
                one.model, ids, torch.ones_like(ids), batch["completion_ids"].shape[1]
            )
        trl.step(one, batch, 2)
        results["trl"] = logps, gradient(model)
        for parameter in model.parameters():  # TRL casts them to bf16; the values are bf16's anyway
            if parameter.requires_grad:
                parameter.data, parameter.grad = parameter.data.float(), None
        model.gradient_checkpointing_disable()

    def ours(name: str, **options) -> None:
        step = job.lean(model, **options)
        outcome = job.run_ours(step, batch)
        results[name] = outcome.logps, gradient(model)
        job.describe(step)

    job.attempt("errors/trl", theirs)
    job.attempt("errors/ours", lambda: ours("ours"))
    if job.cuda:
        tight = GOALS[job.name][0] - job.margin
        job.attempt("errors/ours-tight", lambda: ours("ours-tight", budget_gb=tight))
        job.attempt("errors/ours-apart", lambda: ours("ours-apart", share_prompts=False))
        job.attempt("errors/ours-efficient", lambda: ours("ours-efficient", attention="efficient"))
    for who, (logps, got) in results.items():
        difference = (logps.float().cpu() - exact[0]).square().mean().sqrt().item()
        job.row("1K/logprob_error", who, difference, "nats rms")
        job.row("1K/gradient_error", who, error(got, exact[1]), "relative")


def reference(job: Job, model: Model, batch: Batch) -> tuple[Tensor, Gradient]:
    """(logps [B, T], gradients) of stock transformers in fp32 on the same dequantised weights, row by row."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from nbhelpers import grpo
    from nbhelpers.kernels.reference import dequantize_nf4
    from nbhelpers.models.adapter import attach

    inner = model.get_base_model()
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
            module._buffers[key] = buffer.to(job.device)
    stock = attach(stock, job.rank, job.rank, 0.0)
    job.fill_adapter(stock)
    stock.train()
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    weights = grpo.token_weights(batch["completion_mask"], "grpo")
    every = []
    for i in range(len(ids)):
        logits = stock(ids[i : i + 1]).logits[:, job.prompt - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, ids[i : i + 1, job.prompt :, None]).squeeze(-1)
        del logits
        mask = batch["completion_mask"][i : i + 1]
        loss = (grpo.token_loss(logps, batch["advantages"][i : i + 1], mask) * weights[i : i + 1]).sum()
        loss.backward()
        every.append(logps.detach().cpu())
    return torch.cat(every), gradient(stock)


def check(job: Job) -> None:
    """Every attention and every state of the layers: gradients against one another, bytes against the plan."""
    from nbhelpers.training import packed_attention
    from nbhelpers.training.layerwise import Layers
    from nbhelpers.training.packing import pack, unpad

    if job.cuda:
        for name, dtype in (("flash", torch.bfloat16), ("efficient", torch.float16), ("efficient", torch.bfloat16)):
            wrong = packed_attention.check(name, job.device, dtype)
            print(f"  attention {name} {dtype}: {wrong or 'right'}", flush=True)
    count = 2 if job.quick else 6
    model = job.model(layers=count)
    batch = job.batch(job.every_length["1K"], 4)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    unpadded = unpad(*(batch[n] for n in names))
    wanted: Gradient | None = None
    attentions = (("rows", False), ("rows", True)) + ((("flash", True), ("efficient", True)) if job.cuda else ())
    states = {"kept": (count, 0), "on card": (0, count), "in host": (0, 0), "mixed": (1, 1)}
    for attention, share in attentions:
        for state, (kept, on_card) in states.items():

            def case(
                attention: str = attention,
                share: bool = share,
                kept: int = kept,
                on_card: int = on_card,
                state: str = state,
            ) -> None:
                nonlocal wanted
                step = job.lean(model, attention=attention, share_prompts=share)
                packed = pack(unpadded, unpadded.rows, job.device, share)
                tile = packed.ids.shape[1] if kept == count else 1024
                peaks = []
                for _ in range(2):  # the first run compiles, and makes the buffer that weights are made dense in
                    for parameter in step.trained:
                        parameter.grad = torch.zeros_like(parameter)
                    if job.cuda:
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                    layers = Layers(kept, on_card, tile)
                    step.decoder.differentiate(packed, 1.0, layers, lambda logps, _: -logps.mean(), Tensor.backward)
                    if job.cuda:
                        torch.cuda.synchronize()
                        peaks.append((torch.cuda.max_memory_allocated() - before) / GB)
                got = gradient(model)
                wanted = wanted or got
                tokens = micro_batches.count([(0, job.prompt, job.every_length["1K"] - job.prompt)] * 4, share)
                planned = step.cost.peak(tokens, kept, on_card, tile) / GB
                label = f"check/{attention}{'-shared' if share else ''}/{state}"
                job.row(f"{label}/gradient_difference", "ours", error(got, wanted), "relative")
                if peaks:
                    job.row(f"{label}/work_peak", "ours", peaks[-1], "GB")
                    job.row(f"{label}/work_peak", "planner", planned, "GB")

            job.attempt(f"check/{attention}/{state}", case)
