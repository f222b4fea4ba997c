"""TRL's GRPOTrainer whose log-probabilities and gradients come from the lean step: five of its hooks.

    _compute_loss                           forward AND backward of a batch, micro-batch by micro-batch
    _get_per_token_logps_and_entropies      without gradients: the "old" and the reference pass
    training_step                           checks the gradients before the optimizer uses them
    log                                     leaves an entropy out that is not of all rows
    train                                   tries the longest possible batch first

It also adds to `_metrics`, which TRL logs, and calls `_tokenize_prompts` to know how long the longest prompt is. The
adaptive entropy bonus is TRL's, and so is its state: `_entropy_bonus_enabled`, `_last_world_entropy`,
`_entropy_window_stats`, `entropy_coef`; `get_high_entropy_mask` says which tokens top_entropy_quantile keeps.

Whatever TRL offers and the lean step does not (`why_not` lists it) is left to TRL, and a printed line says so.
"""

import math
from itertools import islice
from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend
from datasets import IterableDataset
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from nbhelpers.architecture import GB
from nbhelpers.memory.micro_batches import OPTIMIZER_BYTES, StepCost, Tokens
from nbhelpers.memory.room import Reserved
from nbhelpers.models import families

from . import checkpoint, losses, objective
from .hooks import Hooks
from .lean_step import LeanStep, first_non_finite
from .packing import unpad

ONE_CARD_EACH = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
SAMPLE = 20_000  # rows of a data set that are searched for the longest prompt
STREAMED = 64  # of one that is streamed: to read it takes time, and is done again for the first step


def why_not(trainer: Hooks) -> str | None:
    """What this run asks for that the lean step cannot do, in words; None if it can do all of it."""
    args = trainer.args
    optim = str(args.optim).rpartition(".")[2].lower()  # an enum: "OptimizerNames.LOMO"
    asked = {
        "torch_compile": trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
        "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32,
        "neftune_noise_alpha": bool(args.neftune_noise_alpha),  # its noise depends on the length of padded rows
        "use_liger_kernel": args.use_liger_kernel,
        f"optim={optim!r}": "lomo" in optim or optim.endswith("_layerwise"),  # they update inside each backward
        "a mixture of experts' auxiliary loss": trainer.aux_loss_enabled,
        f"{trainer.accelerator.distributed_type}": trainer.accelerator.distributed_type not in ONE_CARD_EACH,
    }
    for what, wanted in asked.items():
        if wanted:
            return f"{what} is asked for"
    return families.why_not(trainer.accelerator.unwrap_model(trainer.model), "training")


def cost(trainer: Hooks) -> str:
    """What it costs to leave a batch to TRL, as a sentence: the planner's bytes of all of its completions at once."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    rows, length = args.per_device_train_batch_size, trainer.max_completion_length
    said = f"TRL computes the {rows} rows of a batch at once, padded"
    try:
        shapes = families.architecture(model.config.to_dict())
    except (ValueError, KeyError):
        return f"{said}: how many GB that takes is not known for this architecture."
    step = StepCost(shapes, 2 if args.bf16 or args.fp16 else model.dtype.itemsize)
    tokens, layers = Tokens(*[rows * length] * 3), step.layers
    whole, inputs = (step.peak(tokens, saved, layers - saved, tokens.packed) / GB for saved in (layers, 0))
    needs = f"{whole:.2g} GB ({inputs:.2g} GB with gradient_checkpointing=True)"
    if args.gradient_checkpointing:
        needs = f"{inputs:.2g} GB"
    return (
        f"{said}: for completions of {length} tokens that is at least {needs} on top of the weights, where the lean "
        f"step gets by with {step.least([(0, 1, length)]) / GB:.2g} GB."
    )


class LeanStepHooks(Hooks):
    """See the module. `trainer.LeanGRPOTrainer` is what people use.

    Args:
        args, kwargs: TRL's.
        budget_gb (`float`, *optional*): What torch may allocate for training, weights included, GB (10^9 bytes); None
            for what the card has.
        max_skipped_steps (`int`): Updates in a row that may be skipped for gradients that are not finite, before the
            run stops.
        lean (`bool`): False leaves everything to TRL, to compare.
    """

    def __init__(
        self, *args: Any, budget_gb: float | None = None, max_skipped_steps: int = 10, lean: bool = True, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.budget_gb, self.max_skipped_steps = budget_gb, max_skipped_steps
        self.skipped_steps = self._skipped_in_a_row = 0
        self._steps: dict[int, LeanStep] = {}
        reason = why_not(self) if lean else "lean=False"
        self.lean = reason is None
        if lean and not self.lean:
            print(f"The loss is TRL's own, without the lean step's memory and speed: {reason}. {cost(self)}"
                  " What it costs in seconds: docs/compatibility.md.")  # fmt: skip

    def settings(self) -> losses.Settings:
        """What decides the loss, as it is set now."""
        args = self.args
        return losses.Settings(
            loss_type=args.loss_type,
            beta=self.beta,
            epsilon=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=args.delta,
            importance_sampling_level=self.importance_sampling_level,
            use_bias_correction_kl=args.use_bias_correction_kl,
            max_completion_length=self.max_completion_length,
            sapo_temperatures=(args.sapo_temperature_pos, args.sapo_temperature_neg),
            vespo_pos=(args.vespo_k_pos, args.vespo_lambda_pos),
            vespo_neg=(args.vespo_k_neg, args.vespo_lambda_neg),
            off_policy_mask_threshold=self.off_policy_mask_threshold,
            entropy_bonus=self._entropy_bonus_enabled,
            entropy_coef=self._entropy_coef(),
            correction=args.vllm_importance_sampling_mode if args.vllm_importance_sampling_correction else None,
            correction_min=args.vllm_importance_sampling_clip_min,
            correction_max=args.vllm_importance_sampling_clip_max,
        )

    def _entropy_coef(self) -> float:
        """The factor of the entropy bonus in this batch: 0 if the entropy was above its target in the last update."""
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return self.entropy_coef

    def _adapt_entropy_coef(self, entropies: Tensor, acts: Tensor) -> None:
        """TRL's controller of the entropy bonus: it moves once an update, by the mean entropy of the update's tokens.

        Args:
            entropies (`Tensor`): fp32 [B, T], nats.
            acts (`Tensor`): [B, T], 1 on the tokens that the bonus acts on.
        """
        args = self.args
        if self.use_adaptive_entropy:
            window = torch.stack([(entropies * acts).sum(), acts.sum()])
            window = window if self._entropy_window_stats is None else self._entropy_window_stats + window
            self._entropy_window_stats = window
            if self.accelerator.sync_gradients:
                total, tokens = self.accelerator.reduce(window, reduction="sum").tolist()
                mean = total / max(tokens, 1.0)
                if mean <= args.entropy_target:
                    self.entropy_coef = min(self.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
                else:
                    self.entropy_coef = max(self.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
                self._last_world_entropy, self._entropy_window_stats = mean, None
        if self.accelerator.sync_gradients:
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)

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

    def _write_state(self, position: checkpoint.Position) -> None:
        super()._write_state(position)
        position.counters.update(skipped=self.skipped_steps, in_a_row=self._skipped_in_a_row)
        last = self._last_world_entropy  # TRL keeps it in a checkpoint too, but not for a step that is cut short
        position.extra["entropy"] = [self.entropy_coef, None if last == float("inf") else last]

    def _read_state(self, position: checkpoint.Position) -> None:
        super()._read_state(position)
        self.entropy_coef, last = position.extra.get("entropy", (self.args.entropy_coef, None))
        self._last_world_entropy, self._entropy_window_stats = float("inf") if last is None else last, None
        self.skipped_steps = position.counters.get("skipped", 0)
        self._skipped_in_a_row = position.counters.get("in_a_row", 0)

    # ------------------------------------------------------------------------------------------------- TRL's hooks

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if not self.lean or "pixel_values" in inputs or inputs["advantages"].dim() != 1:
            return super()._compute_loss(model, inputs)
        training = self.model.training
        mode = "train" if training else "eval"
        accumulation = self.current_gradient_accumulation_steps if training else 1.0
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if training:  # TRL counts the items of a whole rollout; an update uses this share of it
            items = items * accumulation / self._steps_per_generation
        settings = self.settings()
        backward = self.accelerator.backward if training else None

        def high_entropy(entropies: Tensor, mask: Tensor) -> Tensor:
            return self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)

        outcome = objective.run(
            self._step_of(model), inputs, settings, accumulation, items, backward,
            high_entropy if self.top_entropy_quantile < 1.0 else None,
        )  # fmt: skip
        if training and self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for parameter in model.parameters():  # the lean step bypasses DDP's forward, so DDP does not average them
                if parameter.requires_grad:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        metrics = objective.metrics(outcome, inputs, settings, self.accelerator.reduce, self.accelerator.gather)
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if training and settings.entropy_bonus:
            self._adapt_entropy_coef(outcome.entropies, outcome.acts)
        # the gradients are in place: TRL calls backward() on this detached scalar, which does nothing
        return outcome.loss.requires_grad_() if training else outcome.loss

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        more = [name for name, value in kwargs.items() if value is not None and value is not False]
        if not self.lean or torch.is_grad_enabled() or more:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        ids, mask = (
            (tensor[:, :-logits_to_keep], tensor[:, -logits_to_keep:]) for tensor in (input_ids, attention_mask)
        )
        rows = unpad(ids[0], mask[0], ids[1], mask[1])
        logps, entropies = self._step_of(model).score(rows, (ids[1].shape[0], ids[1].shape[1]))
        return logps, entropies if compute_entropy else None, None

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL, which averages what is known; an entropy that misses some of a step's rows is no entropy of it."""
        measured = self._metrics["train" if self.model.training else "eval"]
        if any(math.isnan(value) for value in measured.get("entropy", ())):
            measured["entropy"] = [math.nan]
        super().log(logs, start_time)

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
        step.rehearse(
            self.args.per_device_train_batch_size, self.num_generations, self._longest_prompt(),
            self.max_completion_length,
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _longest_prompt(self) -> int:
        """Tokens of the longest prompt among the first rows of the data set, by its 8 longest in characters."""
        rows = islice(self.train_dataset, STREAMED if isinstance(self.train_dataset, IterableDataset) else SAMPLE)
        prompts = [row["prompt"] for row in rows if "prompt" in row]  # an environment may ask instead
        longest = sorted(prompts, key=lambda prompt: len(str(prompt)))[-8:]
        return max(len(ids) for ids in self._tokenize_prompts(longest)[0]) if longest else 1
