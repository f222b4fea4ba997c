"""The training half of a GRPO step within a memory budget: log-probabilities of completions, and their gradients.

    step = LeanStep(model, budget_gb=15)
    batch = packing.unpad(prompt_ids, prompt_mask, completion_ids, completion_mask)
    step.differentiate(batch, objective, backward=accelerator.backward)     # gradients are in the parameters' .grad
    logps, entropies = step.score(batch, (B, T))                            # without gradients

A batch is cut into micro-batches (memory's StepCost.split) by tokens, not by rows; each goes forward and backward and
is freed before the next. Whatever the cut, the gradients are those of the whole batch: the objective weights each token
by its share of the whole (grpo.token_weights). A group's prompt is computed once for all of its completions.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from nbhelpers import gpu, kernels
from nbhelpers.architecture import GB
from nbhelpers.memory.micro_batches import TILES, CannotFit, Lengths, MicroBatch, StepCost, count
from nbhelpers.memory.residents import scratch_bytes
from nbhelpers.memory.room import Reserved, Room
from nbhelpers.memory.seconds import REACHED, card_of, launch_tokens
from nbhelpers.models import each, families
from nbhelpers.models.finite import first_not_finite

from .layerwise import Layers, LayerwiseDecoder
from .packed_attention import LONG, choose, prefers_sdpa
from .packing import Packed, Row, Rows, pack

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["CannotFit", "LeanStep", "first_non_finite"]

T = TypeVar("T")
Objective = Callable[[Tensor, Tensor, Packed], Tensor]


class LeanStep:
    """Forward and backward of one model through packed completions.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): One for which `families.why_not` finds no reason.
        budget_gb (`float`, *optional*): What torch may allocate in this process, weights and optimizer included, GB
            (10^9 bytes); None for what the card has free. On a CPU there is no limit unless one is given, which then
            counts the work alone.
        temperature (`float`): Of the distribution that was sampled from.
        autocast (`Callable[[], AbstractContextManager]`): The context to compute in, as accelerator.autocast.
        attention (`str`, *optional*): The backend: "flash", "efficient" or "rows" (packed_attention.py) instead of the
            best one available.
        share_prompts (`bool`): Compute a group's prompt once.
        reserved (`Callable[[], Reserved]`): Bytes of others, asked for each batch: see `memory.Room`.

    Raises ValueError, with the reason, for a model that `families.why_not` refuses.
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        budget_gb: float | None = None,
        temperature: float = 1.0,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        attention: str | None = None,
        share_prompts: bool = True,
        reserved: Callable[[], Reserved] = Reserved,
    ):
        why = families.why_not(model, "training")
        if why is not None:
            raise ValueError(f"this model cannot run through the lean step: {why}")
        self.device = next(model.parameters()).device
        with autocast():
            on = torch.is_autocast_enabled(self.device.type)
            embedding = next(model.get_input_embeddings().parameters())
            dtype = torch.get_autocast_dtype(self.device.type) if on else embedding.dtype
        backend = attention or choose(self.device, dtype)
        shapes = families.architecture(model.config.to_dict())
        # timed now, when there is room for it
        heads = (shapes.num_attention_heads, shapes.num_key_value_heads, shapes.head_dim)
        alone = LONG if backend == "flash" and prefers_sdpa(self.device, dtype, *heads) else 0
        self.decoder = LayerwiseDecoder(model, backend, autocast)
        width = max(embedding.element_size(), dtype.itemsize)
        dropped, adapted = map(max, zip(*map(_of_lora, self.decoder.layers), strict=True))
        whole = self.decoder.head.weight.requires_grad
        self.cost = StepCost(shapes, width, backend, dropped, whole=whole, adapted=adapted, alone=alone)
        if self.device.type == "cuda":
            self.set_launches(REACHED.layer)  # until a rehearsal has timed them
        self.model, self._parameters = model, each.parameters(model)
        self.temperature, self.share_prompts = temperature, share_prompts
        self.room = Room(self.device, budget_gb, reserved)
        packed = any(p.dtype == torch.uint8 and p.is_cuda for p in model.parameters())
        buffer = scratch_bytes(shapes, dtype.itemsize) // dtype.itemsize
        self._dtype, self._scratch = dtype, buffer if packed and kernels.triton is not None else 0  # in numbers
        self._left()
        self.micro_batches: list[MicroBatch] = []  # of the newest batch, to look at
        self.values: Tensor | None = None  # of the tokens of the newest `score`, fp32 [B, T]; with a value head

    def put_value_head(self, head: nn.Module) -> None:
        """Let `head`, [S, H] fp32 to [S, 1], read the hidden states of scored tokens: `values`, `decoder.values`."""
        self.decoder.value_head, self.cost = head, replace(self.cost, valued=True)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained now: while TRL asks for the reference's log-probabilities it is another adapter."""
        self._parameters = each.parameters(self.model)
        return self._known()

    def _known(self) -> list[nn.Parameter]:
        """`trained` without a look at every module, for which the GPU would wait before a step: an adapter that was
        added since the last step is missing."""
        return [p for p in self._parameters if p.requires_grad]

    def _refuse_hooks(self, trained: Iterable[nn.Parameter] = ()) -> None:
        """Raises ValueError for a hook that was not called, set since this step was made; the gradients of `trained`,
        made without it, are dropped. Asked last: the GPU is at work then, and the update comes later."""
        if (why := families.missed_hook(self.model, "training")) is not None:
            for parameter in trained:
                parameter.grad = None
            raise ValueError(f"this model cannot run through the lean step: {why}. Remove the hook, set it before the "
                             "trainer is made, or give the trainer lean=False")  # fmt: skip

    # ------------------------------------------------------------------------------------------------ the budget

    def available(self) -> float:
        """Bytes that the work of a micro-batch may take, on top of what is allocated and of gradients to come."""
        return self._left(self._coming())

    def _left(self, coming: int = 0) -> float:
        """`room.for_step`, with the kernels' buffer for dequantised weights allocated, so that it counts as taken: a
        generation may have freed it."""
        if self._scratch:
            from nbhelpers.kernels.triton.lora_linear import scratch

            scratch((self._scratch, 1), self._dtype, self.device)
        return self.room.for_step(coming)

    def _coming(self) -> int:
        """Bytes of gradients that are not there yet."""
        return sum(p.numel() * p.element_size() for p in self._known() if p.grad is None)

    def retried(self, call: Callable[[], T], learns: bool = True) -> T:
        """call(); if memory runs out in it, it is called again with smaller micro-batches from then on.

        Args:
            call (`Callable`): Runs this step's `differentiate` (learns) or `score`.
            learns (`bool`): Whether it leaves gradients.

        Raises torch.OutOfMemoryError where a retry would lose the gradients of an earlier batch, and once the room has
        shrunk as far as it may (`Room.shrink`).
        """
        lost = learns and any(p.grad is not None for p in self._known())
        while True:
            try:
                return call()
            except torch.OutOfMemoryError:
                if lost or not self.room.shrink():
                    raise
            # retried outside of `except`: the traceback keeps tensors alive
            for parameter in self.trained if learns else ():
                parameter.grad = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            print("Out of memory in training: this batch is computed again, in smaller parts from now on.")

    def plan(self, rows: list[Row]) -> list[MicroBatch]:
        """How these rows would be cut now. Raises CannotFit if not one of them fits."""
        coming = self._coming()
        return self.cost.split(_lengths(rows), self._left(coming), self.share_prompts, coming)

    # -------------------------------------------------------------------------------------------------- the work

    def differentiate(
        self,
        batch: Rows,
        objective: Objective,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        entropy_grad: bool = False,
    ) -> None:
        """Add the gradients of a batch to the parameters' `.grad`.

        Args:
            batch (`Rows`): The completions, which may be none.
            objective (`Callable`): (logps [S] fp32 with gradient, entropies [S] fp32, packed) -> scalar, called for
                each micro-batch; the batch's loss is their sum. `packed.number` and `packed.column` are the row and the
                column of each of the S tokens.
            backward (`Callable`): Called with each scalar, e.g. accelerator.backward, which scales it for fp16.
            entropy_grad (`bool`): The entropies have a gradient too; the head is then computed again in the backward.

        Raises CannotFit if not even one row fits, ValueError for a hook that would not be called.
        """
        self.micro_batches = self.plan(batch.rows) if batch.rows else []
        for micro_batch in self.micro_batches:
            packed = pack(batch, [batch.rows[i] for i in micro_batch.rows], self.device, self.share_prompts)

            def of_tokens(logps: Tensor, entropies: Tensor, packed: Packed = packed) -> Tensor:
                return objective(logps, entropies, packed)

            layers = Layers(micro_batch.saved, micro_batch.on_device, micro_batch.tile)
            self.decoder.differentiate(packed, self.temperature, layers, of_tokens, backward, entropy_grad)
        trained = self.trained
        for parameter in trained:  # without a signal the gradients are 0, and the optimizer's momentum still acts
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._refuse_hooks(trained)

    @torch.no_grad()
    def score(self, batch: Rows, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the completions' tokens, both padded: fp32 [B, T], 0 elsewhere.

        Args:
            batch (`Rows`): The completions, which may be none.
            shape (`tuple[int, int]`): (B, T).

        Raises ValueError for a hook that would not be called.
        """
        logps, entropies, given = (torch.zeros(shape, device=self.device) for _ in range(3))
        for rows, tile in self._forward_batches(batch.rows, self.available()):
            packed = pack(batch, rows, self.device, self.share_prompts)
            values = self.decoder.score(packed, self.temperature, tile)
            for padded, value in zip((logps, entropies), values, strict=True):
                padded[packed.number, packed.column] = value
            if self.decoder.values is not None:
                given[packed.number, packed.column] = self.decoder.values
        self.values = None if self.decoder.value_head is None else given
        self._refuse_hooks()
        return logps, entropies

    def _forward_batches(self, rows: list[Row], room: float) -> Iterator[tuple[list[Row], int]]:
        """(rows, tile) of each forward without gradients, as few as fit."""
        waiting = [sorted(rows, key=lambda row: row.prompt)] if rows else []
        while waiting:
            rows = waiting.pop(0)
            tokens = count(_lengths(rows), self.share_prompts)
            tile = TILES[0] if tokens.packed <= TILES[0] else TILES[1]
            if self.cost.forward(tokens, tile) <= room or len(rows) == 1:
                yield rows, tile
            else:
                waiting[:0] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]

    def set_launches(self, seconds: float) -> None:
        """Cut batches by this time of a pass through a layer, on the card of this process."""
        if card := gpu.card():
            kind = card_of(card.total / GB, card.name)
            self.cost = replace(self.cost, launches=launch_tokens(self.cost.architecture, kind, seconds))


def _of_lora(layer: nn.Module) -> tuple[int, int]:
    """Of a decoder layer: features that go through LoRA's dropout, and columns of the products with LoRA's A."""
    from peft.tuners.lora import LoraLayer

    dropped = columns = 0
    for module in layer.modules():
        if isinstance(module, LoraLayer):
            columns += max(module.r.values(), default=0)
            if any(isinstance(one, nn.Dropout) for one in module.lora_dropout.values()):
                dropped += module.in_features or 0
    return dropped, columns


def _lengths(rows: list[Row]) -> list[Lengths]:
    return [(row.prompt, row.prompt_length, row.completion_length) for row in rows]


def first_non_finite(named: list[tuple[str, nn.Parameter]]) -> str | None:
    """Which gradient overflowed first.

    Args:
        named (`list[tuple[str, nn.Parameter]]`): As `named_parameters()` gives them; those without a gradient are
            passed over.

    Returns the name of the parameter that comes first in the backward's order (the last of the list) among those whose
    gradient has a norm that is not finite; None if all norms are finite. Synchronises with the GPU once.
    """
    return first_not_finite([(name, p.grad) for name, p in reversed(named) if p.grad is not None], order=2)
