"""A trainer whose gradients come from the lean step, whatever its loss: the step, its checks and its rehearsal.

These are transformers' hooks:

    training_step                           checks the gradients before the optimizer uses them
    train                                   tries the longest possible batch first

and these private parts are touched: `_metrics`, which TRL logs; `aux_loss_enabled` is TRL's.

Whatever a trainer offers and the lean step does not (`_asked_of_trl` lists it) is left to TRL, and a line says
so.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend
from datasets import IterableDataset
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from nbhelpers.memory.residents import OPTIMIZER_BYTES
from nbhelpers.memory.room import Reserved
from nbhelpers.models import adapter, families

from . import checkpoint, run_folder
from .hooks import RunHooks
from .lean_step import LeanStep, first_non_finite
from .model_check import check_model, restore_masters
from .rehearsal import rehearse

SAMPLE = 20_000  # rows of a data set that are searched for the longest
STREAMED = 64  # of one that is streamed: to read it takes time, and is done again for the first step
REDUCED_BYTES = 256e6  # of gradients that travel together; an adapter of rank 16 for an 8B model has 168 MB
ONE_CARD_EACH = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class StepHooks(RunHooks):
    """See the module. The trainers are what people use; `LeanGRPOTrainer` says what the arguments are."""

    temperature: float = 1.0  # of the distribution that was sampled from

    def __init__(
        self, model: Any, *more: Any, args: TrainingArguments, peft_config: Any = None, budget_gb: float | None = None,
        max_skipped_steps: int = 10, lean: bool = True, **kwargs: Any,
    ):  # fmt: skip
        masters: dict[nn.Parameter, Tensor] = {}  # what is trained, before TRL takes it
        if not isinstance(model, str):
            if peft_config is None:  # what is adapted yet is frozen now
                check_model(model, args)
            adapter.drop_reference(model)  # of an earlier trainer: this cell is run again
            masters = {p: p.data for p in model.parameters() if p.requires_grad}
        run_folder.check_writable(Path(args.output_dir or "trainer_output"))  # before transformers makes it
        super().__init__(model, *more, **kwargs | {"args": args, "peft_config": peft_config})
        restore_masters(self.model, masters)
        check_model(self.model, args)
        self.budget_gb, self.max_skipped_steps = budget_gb, max_skipped_steps
        self.skipped_steps = self._skipped_in_a_row = 0
        self._steps: dict[int, LeanStep] = {}
        reason = self._why_not_lean() if lean else "lean=False"
        self.lean = reason is None
        if lean and reason is not None:
            self._left_to_trl(reason)

    def _left_to_trl(self, reason: str) -> None:
        """The loss is TRL's, for this reason."""
        print(f"The loss is TRL's own, without the lean step's memory and speed: {reason}. {self._cost()}"
              "What it costs in seconds: docs/compatibility.md.")  # fmt: skip

    def _cost(self) -> str:
        """What it costs to leave a batch to TRL, in sentences that end with a space; empty where it is not known."""
        return ""

    def _why_not_lean(self) -> str | None:
        """What this run asks for that the lean step cannot do, in words; None if it can do all of it."""
        for what, wanted in self._asked_of_trl().items():
            if wanted:
                return f"{what} is asked for"
        return families.why_not(self.accelerator.unwrap_model(self.model), "training")

    def _asked_of_trl(self) -> dict[str, bool]:
        """What only TRL can do, by name, and whether this run asks for it."""
        args = self.args
        optim = str(args.optim).rpartition(".")[2].lower()  # an enum: "OptimizerNames.LOMO"
        kind = self.accelerator.distributed_type
        return {
            "torch_compile": self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
            "neftune_noise_alpha": bool(args.neftune_noise_alpha),  # its noise depends on the length of padded rows
            "use_liger_kernel": args.use_liger_kernel,
            f"optim={optim!r}": "lomo" in optim or optim.endswith("_layerwise"),  # they update inside each backward
            "a mixture of experts' auxiliary loss": self.aux_loss_enabled,
            f"{kind}": kind not in ONE_CARD_EACH,
        }

    def _step_of(self, model: nn.Module) -> LeanStep:
        """The lean step of the policy or of the reference model; made on first use."""
        inner = self.accelerator.unwrap_model(model)
        if id(inner) not in self._steps:
            self._steps[id(inner)] = LeanStep(
                inner, self.budget_gb, self.temperature, self.accelerator.autocast, reserved=self._reserved
            )
        return self._steps[id(inner)]

    def _reserved(self) -> Reserved:
        """Bytes that the step must leave to others, as of now."""
        return Reserved(coming=self._pending_optimizer_bytes())

    def _pending_optimizer_bytes(self) -> float:
        """What the optimizer will allocate in its first update."""
        if self.optimizer is not None and self.optimizer.state:
            return 0.0
        name = str(self.args.optim).lower()  # an enum: "optimizernames.adamw_8bit"
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if "paged" in name and all(p.dtype != torch.bfloat16 for p in trained):  # whole_hooks.py's is not paged
            return 0.0
        kind = "adamw_8bit" if "8bit" in name else "adamw"
        return OPTIMIZER_BYTES[kind] * sum(p.numel() for p in trained)

    def _average_gradients(self, model: nn.Module) -> None:
        """Over all processes: the lean step bypasses DDP's forward, so DDP does not. All gradients of an adapter travel
        as one tensor: one by one each of its hundreds would wait for the others' cards."""
        if not self.accelerator.sync_gradients or self.accelerator.num_processes == 1:
            return
        grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        while grads:
            ends = accumulate(grad.numel() * grad.element_size() for grad in grads)
            together = max(1, sum(end <= REDUCED_BYTES for end in ends))
            sent, grads = grads[:together], grads[together:]
            mean = self.accelerator.reduce(torch.cat([grad.flatten() for grad in sent]), reduction="mean")
            for grad, part in zip(sent, mean.split([grad.numel() for grad in sent]), strict=True):
                grad.copy_(part.view_as(grad))

    def _write_state(self, position: checkpoint.Position) -> None:
        super()._write_state(position)
        position.counters.update(skipped=self.skipped_steps, in_a_row=self._skipped_in_a_row)
        if self.lean:
            position.counters["launches"] = self._step_of(self.model).cost.launches

    def _read_state(self, position: checkpoint.Position) -> None:
        super()._read_state(position)
        self.skipped_steps = position.counters.get("skipped", 0)
        self._skipped_in_a_row = position.counters.get("in_a_row", 0)
        if self.lean and (launches := position.counters.get("launches")):  # timed anew, they may cut a batch otherwise
            step = self._step_of(self.model)
            step.cost = replace(step.cost, launches=launches)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in TRL; before an update the gradients are checked.

        Raises FloatingPointError after `max_skipped_steps` skipped updates in a row.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._check_gradients()
        return loss

    def _check_gradients(self) -> None:
        """Skip an update whose gradients are not finite; FloatingPointError after too many of them in a row."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        name = first_non_finite(named)
        if name is None:
            # a batch that teaches nothing has gradients of exactly 0, and proves nothing
            if self._skipped_in_a_row and any(p.grad is not None and bool(p.grad.any()) for _, p in named):
                self._skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self._skipped_in_a_row += 1
            scaler = self.accelerator.scaler
            scale = "" if scaler is None else f" (fp16's loss scale is {scaler.get_scale():g} and will be halved)"
            print(f"Step {self.state.global_step + 1} is skipped: the gradient of {name} is not finite{scale}.")
            if self._skipped_in_a_row >= self.max_skipped_steps:
                raise FloatingPointError(
                    f"the gradients were not finite {self._skipped_in_a_row} times in a row, the last time first in "
                    f"{name}: lower learning_rate, or compute in bf16 if the card can (bf16=True, fp16=False); the "
                    "newest checkpoint is from before"
                )
            if scaler is None:  # with one the gradients stay: it skips the update itself once it sees them
                for _, parameter in named:
                    parameter.grad = None
        self._metrics["train"]["skipped_steps"].append(float(self.skipped_steps))

    def train(
        self,
        resume_from_checkpoint: Any = None,  # a str or a bool, as TRL has it; ResumeHooks takes a Path too
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in transformers' Trainer, after the longest batch that this run can meet, on made-up tokens."""
        if self.lean:
            self.rehearse()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def rehearse(self) -> None:
        """Compute the longest possible batch once on made-up tokens; does nothing on a CPU without a budget.

        Raises CannotFit, or torch.OutOfMemoryError, before the first step instead of at step 200.
        """
        if not torch.cuda.is_available() and self.budget_gb is None:
            return
        if self.accelerator.num_processes > 1:  # NCCL allocates its buffers on first use
            self.accelerator.reduce(torch.zeros(1, device=self.accelerator.device))
        step = self._step_of(self.model)
        rehearse(step, self.args.per_device_train_batch_size, *self._longest_row())
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _first_rows(self) -> Iterator[dict[str, Any]]:
        """The rows that are searched for the longest."""
        return islice(self.train_dataset, STREAMED if isinstance(self.train_dataset, IterableDataset) else SAMPLE)

    def _longest_row(self) -> tuple[int, int, int]:
        """Completions of a prompt, tokens of the longest prompt and of the longest completion that a step can meet."""
        raise NotImplementedError
