"""TRL's GRPOTrainer whose log-probabilities and gradients come from the lean step: three of its hooks.

    _compute_loss                           forward AND backward of a batch, micro-batch by micro-batch
    _get_per_token_logps_and_entropies      without gradients: the "old" and the reference pass
    log                                     leaves an entropy out that is not of all rows

It also adds to `_metrics`, which TRL logs, and calls `_tokenize_prompts` to know how long the longest prompt is. The
adaptive entropy bonus is TRL's, and so is its state: `_entropy_bonus_enabled`, `_last_world_entropy`,
`_entropy_window_stats`, `entropy_coef`; `get_high_entropy_mask` says which tokens top_entropy_quantile keeps.

What every loss shares is in step_hooks.py.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nbhelpers.architecture import GB
from nbhelpers.memory.micro_batches import StepCost, Tokens
from nbhelpers.models import families

from . import checkpoint, losses, objective
from .hooks import Hooks
from .packing import unpad
from .step_hooks import StepHooks


class LeanStepHooks(StepHooks, Hooks):
    """See the module. `trainer.LeanGRPOTrainer` is what people use."""

    def _cost(self) -> str:
        """The planner's bytes of all of a batch's completions at once."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        rows, length = args.per_device_train_batch_size, self.max_completion_length
        said = f"TRL computes the {rows} rows of a batch at once, padded"
        try:
            shapes = families.architecture(model.config.to_dict())
        except (ValueError, KeyError):
            return f"{said}: how many GB that takes is not known for this architecture. "
        step = StepCost(shapes, 2 if args.bf16 or args.fp16 else model.dtype.itemsize)
        tokens, layers = Tokens(*[rows * length] * 3), step.layers
        whole, inputs = (step.peak(tokens, saved, layers - saved, tokens.packed) / GB for saved in (layers, 0))
        needs = f"{whole:.2g} GB ({inputs:.2g} GB with gradient_checkpointing=True)"
        if args.gradient_checkpointing:
            needs = f"{inputs:.2g} GB"
        return (
            f"{said}: for completions of {length} tokens that is at least {needs} on top of the weights, where the "
            f"lean step gets by with {step.least([(0, 1, length)]) / GB:.2g} GB. "
        )

    def _asked_of_trl(self) -> dict[str, bool]:
        return {"cast_lm_head_to_fp32": self.args.cast_lm_head_to_fp32, **super()._asked_of_trl()}

    def _longest_row(self) -> tuple[int, int, int]:
        return self.num_generations, self._longest_prompt(), self.max_completion_length

    advantage_dims = 1  # one for each completion; 2: one for each token, as PPO has them

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

    def _value_loss(self, inputs: dict[str, Any]) -> objective.ValueLoss | None:
        """What this batch's loss has beside the policy's; nothing but PPO's has any."""
        return None

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

    def _write_state(self, position: checkpoint.Position) -> None:
        super()._write_state(position)
        last = self._last_world_entropy  # TRL keeps it in a checkpoint too, but not for a step that is cut short
        position.extra["entropy"] = [self.entropy_coef, None if last == float("inf") else last]

    def _read_state(self, position: checkpoint.Position) -> None:
        super()._read_state(position)
        self.entropy_coef, last = position.extra.get("entropy", (self.args.entropy_coef, None))
        self._last_world_entropy, self._entropy_window_stats = float("inf") if last is None else last, None

    # ------------------------------------------------------------------------------------------------- TRL's hooks

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if not self.lean or "pixel_values" in inputs or inputs["advantages"].dim() != self.advantage_dims:
            return super()._compute_loss(model, inputs)
        training = self.model.training
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
            high_entropy if self.top_entropy_quantile < 1.0 else None, self._value_loss(inputs) if training else None,
        )  # fmt: skip
        if training:
            self._average_gradients(model)
        metrics = objective.metrics(outcome, inputs, settings, self.accelerator.reduce, self.accelerator.gather)
        for name, value in metrics.items():
            self._numbers()[name].append(value)
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL, which averages what is known; an entropy that misses some of a step's rows is no entropy of it."""
        measured = self._numbers()
        if any(math.isnan(value) for value in measured.get("entropy", ())):
            measured["entropy"] = [math.nan]
        super().log(logs, start_time)

    def _longest_prompt(self) -> int:
        """Tokens of the longest prompt among the first rows of the data set, by its 8 longest in characters."""
        prompts = [row["prompt"] for row in self._first_rows() if "prompt" in row]  # an environment may ask instead
        longest = sorted(prompts, key=lambda prompt: len(str(prompt)))[-8:]
        return max(len(ids) for ids in self._tokenize_prompts(longest)[0]) if longest else 1
