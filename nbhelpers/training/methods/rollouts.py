"""What Online DPO and PPO have in common: LeanGRPOTrainer's rollouts, measured against the base without its adapter.

The hooks touch one private part of TRL: `_metrics`, the numbers that it logs.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import use_adapter

from nbhelpers.models import adapter

from ..objective import unpadded
from ..settings import Setting, number, optional
from ..trainer import LeanGRPOTrainer

_PENALTY = optional(number(0, 1e6, above=True))
MISSING_EOS = Setting("missing_eos_penalty", _PENALTY, "None or a number above 0", "It is taken off a reward.")


class RolloutTrainer(LeanGRPOTrainer):
    """LeanGRPOTrainer for another method, which the errors call `method`; the other arguments are the same.

    Raises ValueError for a model without an adapter, for what the lean step cannot do, for tools, `rollout_func` and
    `environment_factory`, and as LeanGRPOTrainer does.
    """

    def __init__(self, method: str, model: Any, reward_funcs: Any, args: Any, *more: Any, **options: Any):
        for name in ("tools", "rollout_func", "environment_factory"):
            if options.get(name):
                raise ValueError(f"{name} is not served with {method}: one answer follows a prompt. Leave it out")
        if reward_funcs is None:
            raise ValueError(f"{method} needs reward_funcs, which say how good an answer is")
        funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        penalty: float | None = args.missing_eos_penalty

        def missing_eos(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
            """-penalty for an answer that was cut off; None, does not apply, for one that ended."""
            ends, longest = set(self.eos_token_ids), self.max_completion_length
            cut = [len(ids) >= longest and not ends & set(ids) for ids in completion_ids]
            return [-penalty if one and penalty else None for one in cut]

        if penalty is not None:
            funcs.append(missing_eos)
            if (weights := args.reward_weights) is not None:
                args = copy(args)
                args.reward_weights = [*weights, 1.0]
        super().__init__(model, funcs, args, *more, **options)
        if not self.lean:
            raise ValueError(f"{method} runs through the lean step alone, and this model or these settings cannot (the "
                             "line above says why): change that, or train with LeanGRPOTrainer")  # fmt: skip
        if not adapter.loras(self.accelerator.unwrap_model(self.model)):
            raise ValueError(f"{method} measures the model against itself without its adapter, and it has none: load "
                             "it with lora_rank=16, or pass peft_config")  # fmt: skip

    @torch.no_grad()
    def _scored(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities fp32 [B, T] of a rollout's tokens under the model now, and with a value head its values."""
        step, rows = self._step_of(self.model), unpadded(batch, batch["completion_mask"])
        logps, _ = step.retried(lambda: step.score(rows, batch["completion_ids"].shape), learns=False)
        return logps, step.values

    def _reference(self, batch: dict[str, Any]) -> Tensor:
        """The same log-probabilities under the base without its adapter."""
        with use_adapter(self.accelerator.unwrap_model(self.model), None):
            return self._scored(batch)[0]

    def _log_mean(self, name: str, x: Tensor) -> None:
        """Log the mean of all processes' numbers, float of any shape; NaN is left out."""
        mean = self.accelerator.gather(x.float().nanmean()).nanmean().item()
        self._metrics["train" if self.model.training else "eval"][name].append(mean)
