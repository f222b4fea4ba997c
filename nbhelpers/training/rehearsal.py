"""The longest batch of a run, once, on made-up tokens: its memory, its kernels and its launches are met before step 1.

    rehearse(step, rows=8, num_generations=8, prompt_length=256, completion_length=768)

What a rehearsal leaves behind is what the step has learned: how small its micro-batches have to be, and how long a
pass through a layer takes to launch. Gradients and random numbers are as before.
"""

import math
import time
from copy import copy

import torch
from torch import Tensor, nn

from nbhelpers.engines.forward import Layer
from nbhelpers.kernels import ahead
from nbhelpers.memory.micro_batches import RECOMPUTED, MicroBatch
from nbhelpers.models import families

from .layerwise import Layers
from .lean_step import LeanStep
from .packing import Packed, Row, Rows, pack

FORMS = 4  # of layers that a dry pass goes through, at most: with LoRA's dropout each layer is one


def rehearse(
    step: LeanStep, rows: int, num_generations: int, prompt_length: int, completion_length: int
) -> list[MicroBatch]:
    """Run the longest possible batch's largest micro-batch on made-up tokens, and forget its gradients.

    Args:
        step (`LeanStep`): Whose batch it is.
        rows (`int`): Completions of the batch.
        num_generations (`int`): Completions of a prompt.
        prompt_length (`int`): Tokens of the longest prompt.
        completion_length (`int`): Tokens of the longest completion.

    Returns how the whole batch is cut. Raises CannotFit, or torch.OutOfMemoryError, now instead of at step 200.
    Call it before there are gradients.
    """
    completions = {i: torch.zeros(completion_length, dtype=torch.long) for i in range(rows)}
    all_rows = [Row(i, i // num_generations, prompt_length, completion_length) for i in range(rows)]
    prompts = [torch.zeros(prompt_length, dtype=torch.long)] * (all_rows[-1].prompt + 1)
    scored = {i: torch.arange(completion_length) for i in range(rows)}
    batch = Rows(all_rows, prompts, completions, scored)

    def largest() -> list[MicroBatch]:
        micro_batches = step.plan(all_rows)
        batch.rows = [all_rows[i] for i in max(micro_batches, key=lambda one: one.peak).rows]
        step.differentiate(batch, _no_signal)
        return micro_batches

    # what cannot fit is refused with its own lengths, not those of what is timed
    first = max(step.plan(all_rows), key=lambda one: one.peak)
    on_card = step.device.type == "cuda"
    grads = [p.grad for p in step.trained]
    with torch.random.fork_rng([step.device] if on_card else []):  # dropout's draws are as many as there are cuts
        _compile(step, batch, first)
        if on_card:
            step.retried(lambda: time_launches(step))
        micro_batches = step.retried(largest)
    _have(step, grads)
    return micro_batches


def time_launches(step: LeanStep) -> float:
    """Time a pass of a few tokens through a layer, most of which is Python and its launches; from now on batches are
    cut by what it takes here. Returns its seconds. Call it before there are gradients."""
    few, made_up = 8, torch.zeros(8, dtype=torch.long)
    batch = Rows([Row(0, 0, few, few)], [made_up], {0: made_up}, {0: torch.arange(few)})
    times = []
    for _ in range(3):  # the first one compiles
        start = time.perf_counter()
        step.differentiate(batch, _no_signal)
        if step.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    _have(step, [None] * len(step.trained))
    saved = step.micro_batches[0].saved
    seconds = min(times[1:]) / (2 * saved + (2 + RECOMPUTED) * (step.cost.layers - saved))
    seconds = 2.0 ** round(math.log2(seconds))  # noise of a clock must not cut the same run in another way
    step.set_launches(seconds)
    return seconds


def _compile(step: LeanStep, batch: Rows, micro_batch: MicroBatch) -> None:
    """Have the kernels of a micro-batch compiled side by side; not where a hook would see the noise of a dry pass, nor
    where layers wait on the host."""
    if families.hooked(step.model, "training") or step.decoder.swapped is not None:
        return
    grads = [p.grad for p in step.trained]
    _have(step, [None] * len(grads))  # noise is not added to them
    ahead.compile_for(step.device, lambda: _dry_pass(step, batch, micro_batch))
    _have(step, grads)


def _dry_pass(step: LeanStep, batch: Rows, micro_batch: MicroBatch) -> None:
    """For kernels/ahead.py: forward and backward of a micro-batch through one layer of each form, which saves all where
    the real ones do, and through the head."""
    packed = pack(batch, [batch.rows[i] for i in micro_batch.rows], step.device, step.share_prompts)
    decoder, family = copy(step.decoder), families.of(step.model)
    assert family is not None  # or there would be no step
    each = list({Layer.of(families.layer(family, layer)).form(): layer for layer in decoder.layers}.values())[:FORMS]
    decoder.layers = nn.ModuleList(each if micro_batch.saved in (0, len(step.decoder.layers)) else 2 * each)
    layers = Layers(min(micro_batch.saved, len(each)), len(each), micro_batch.tile)
    decoder.differentiate(packed, step.temperature, layers, lambda logps, _: logps.sum() * 0.0, Tensor.backward)


def _no_signal(logps: Tensor, entropies: Tensor, packed: Packed) -> Tensor:
    return logps.sum() * 0.0


def _have(step: LeanStep, grads: list[Tensor | None]) -> None:
    """These gradients, instead of those that have come since."""
    for parameter, grad in zip(step.trained, grads, strict=True):
        parameter.grad = grad
