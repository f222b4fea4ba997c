"""The training half of a GRPO step within a memory budget: log-probabilities of completions, and their gradients.

    step = LeanStep(model, budget_gb=15)
    batch = packing.unpad(prompt_ids, prompt_mask, completion_ids, completion_mask)
    step.differentiate(batch, objective, backward=accelerator.backward)     # gradients are in the parameters' .grad
    logps, entropies = step.score(batch, (B, T))                            # without gradients

A batch is cut into micro-batches (budget.Work.split) by tokens, not by rows; each goes forward and backward and is
gone before the next. Whatever the cut, the gradients are those of the whole batch: the objective weighs each token by
what it counts in the whole (grpo.token_weights). A group's prompt goes through once for all of its completions.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from nbhelpers import gpu, kernels
from nbhelpers.architecture import GB
from nbhelpers.memory.micro_batches import TILES, CannotFit, Part, Work, count, dense_bytes
from nbhelpers.models import families

from .layerwise import Layers, LayerwiseDecoder
from .packed_attention import choose
from .packing import Packed, Row, Rows, pack

__all__ = ["CannotFit", "LeanStep"]

RESERVE = 0.05  # of the free memory is left alone: other libraries, fragmentation
Objective = Callable[[Tensor, Tensor, Packed], Tensor]


class LeanStep:
    """Forward and backward of one model through packed completions.

    model: one for which `families.why_not` finds no reason; else ValueError.
    budget_gb: what torch may allocate in this process, weights and optimizer included, in GB (10^9 bytes); None for
        what the card has free. On a CPU there is no limit unless one is given, which then counts the work alone.
    temperature: of the distribution that was sampled from.
    autocast: gives the context to compute in, as accelerator.autocast does.
    attention: "flash", "efficient" or "rows" (attention.py) instead of the best that is there.
    share_prompts: compute a group's prompt once.
    """

    def __init__(
        self,
        model: nn.Module,
        budget_gb: float | None = None,
        temperature: float = 1.0,
        autocast=nullcontext,
        attention: str | None = None,
        share_prompts: bool = True,
    ):
        why = families.why_not(model, "training")
        if why is not None:
            raise ValueError(f"this model cannot run through the lean step: {why}")
        self.device = next(model.parameters()).device
        with autocast():
            on = torch.is_autocast_enabled(self.device.type)
            dtype = torch.get_autocast_dtype(self.device.type) if on else model.get_input_embeddings().weight.dtype
        way = attention or choose(self.device, dtype)
        self.decoder = LayerwiseDecoder(model, way, autocast)
        config = model.config.to_dict()
        stream = max(model.get_input_embeddings().weight.element_size(), dtype.itemsize)
        self.work = Work(families.architecture(config), width=stream, attention=way)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.budget_gb, self.temperature, self.share_prompts = budget_gb, temperature, share_prompts
        self.asleep = 0  # bytes that torch counts as allocated and a sleeping engine has handed back
        self.share = 1.0  # of the room that the plan counts with; less once memory has run out
        self.pending = 0  # bytes that others will still take for good, such as an optimizer before its first update
        if any(p.dtype == torch.uint8 and p.is_cuda for p in model.parameters()) and kernels.triton is not None:
            from nbhelpers.kernels.triton.lora_linear import (
                scratch,  # the kernels' buffer is made now, so that the budget sees it
            )

            scratch((dense_bytes(self.work.architecture, dtype.itemsize) // dtype.itemsize, 1), dtype, self.device)
        self.parts: list[Part] = []  # of the newest batch, to look at

    # ------------------------------------------------------------------------------------------------ the budget

    def room(self) -> float:
        """Bytes that the work of a micro-batch may take, on top of what lies on the card now."""
        coming = self.pending + sum(p.numel() * p.element_size() for p in self.trained if p.grad is None)
        if self.device.type != "cuda":
            return float("inf") if self.budget_gb is None else self.budget_gb * GB * self.share
        return gpu.room(self.device, self.budget_gb, self.asleep, RESERVE) * self.share - coming

    def retried(self, call: Callable, learns: bool = True):
        """call(); if memory runs out in its `differentiate` (learns) or `score`, once more in less room from then on.

        The error goes through where doing it again would lose the gradients of an earlier batch, and the fourth time.
        """
        lost = learns and any(p.grad is not None for p in self.trained)
        while True:
            try:
                return call()
            except torch.OutOfMemoryError:
                if lost or self.share < 0.55:
                    raise
            # not in the except: there the error still holds on to all that was computed
            self.share *= 0.8
            for parameter in self.trained if learns else ():
                parameter.grad = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            print("Out of memory in training: this batch is computed again, in smaller parts from now on.")

    def plan(self, rows: list[Row]) -> list[Part]:
        """How these rows would be cut now. CannotFit if not one of them fits."""
        lengths = [(row.prompt, row.prompt_length, row.completion_length) for row in rows]
        return self.work.split(lengths, self.room(), self.share_prompts)

    # -------------------------------------------------------------------------------------------------- the work

    def differentiate(self, batch: Rows, objective: Objective, backward: Callable = torch.Tensor.backward) -> None:
        """Add the gradients of a batch to the parameters' `.grad`.

        objective: (logps [S] fp32 with gradient, entropies [S], packed) -> scalar, for each micro-batch; the batch's
            loss is their sum. `packed.number` and `packed.column` say where each of the S tokens stands.
        backward: called with each scalar, e.g. accelerator.backward, which scales it for fp16.
        """
        self.parts = self.plan(batch.rows) if batch.rows else []
        for part in self.parts:
            packed = pack(batch, [batch.rows[i] for i in part.rows], self.device, self.share_prompts)
            self.decoder.differentiate(
                packed,
                self.temperature,
                Layers(part.kept, part.on_card, part.tile),
                lambda logps, entropies, packed=packed: objective(logps, entropies, packed),
                backward,
            )
        for parameter in self.trained:  # a batch that teaches nothing still lets the optimizer's momentum move
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def score(self, batch: Rows, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the completions' tokens as padded [B, T] fp32, 0 elsewhere."""
        logps, entropies = (torch.zeros(shape, device=self.device) for _ in range(2))
        room = self.room()
        for rows, tile in self._forward_parts(batch.rows, room):
            packed = pack(batch, rows, self.device, self.share_prompts)
            values = self.decoder.score(packed, self.temperature, tile)
            for padded, value in zip((logps, entropies), values, strict=True):
                padded[packed.number, packed.column] = value
        return logps, entropies

    def _forward_parts(self, rows: list[Row], room: float):
        """(rows, tile) of each forward, as few as fit."""
        waiting = [sorted(rows, key=lambda row: row.prompt)] if rows else []
        while waiting:
            rows = waiting.pop(0)
            tokens = count([(row.prompt, row.prompt_length, row.completion_length) for row in rows], self.share_prompts)
            tile = TILES[0] if tokens.packed <= TILES[0] else TILES[1]
            if self.work.forward(tokens, tile) <= room or len(rows) == 1:
                yield rows, tile
            else:
                waiting[:0] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]

    def rehearse(self, rows: int, num_generations: int, prompt_length: int, completion_length: int) -> list[Part]:
        """Run the longest possible batch's largest micro-batch on made-up tokens, and forget its gradients.

        CannotFit, or torch's out-of-memory error, now instead of at step 200. Call it before any gradient is there.
        """
        completions = {i: torch.zeros(completion_length, dtype=torch.long) for i in range(rows)}
        every = [Row(i, i // num_generations, prompt_length, completion_length) for i in range(rows)]
        batch = Rows(every, [torch.zeros(prompt_length, dtype=torch.long)] * (every[-1].prompt + 1), completions)
        grads = [p.grad for p in self.trained]

        def largest() -> list[Part]:
            parts = self.plan(every)
            batch.rows = [every[i] for i in max(parts, key=lambda part: part.peak).rows]
            self.differentiate(batch, lambda logps, entropies, packed: logps.sum() * 0.0)
            return parts

        parts = self.retried(largest)
        for parameter, grad in zip(self.trained, grads, strict=True):
            parameter.grad = grad
        return parts


def gradients_are_finite(named: list[tuple[str, nn.Parameter]]) -> str | None:
    """The name of the first parameter, in the backward's order, whose gradient is not finite; None if all are."""
    named = [(name, p) for name, p in named if p.grad is not None]
    if not named:
        return None
    norms = torch.stack(torch._foreach_norm([p.grad for _, p in named])).float()
    finite = torch.isfinite(norms)
    if bool(finite.all()):
        return None
    return next(name for (name, _), ok in zip(reversed(named), reversed(finite.tolist()), strict=True) if not ok)
