"""What Online DPO and PPO have in common: LeanGRPOTrainer's rollouts, measured against the base without its adapter.

The hooks touch one private part of TRL: `_metrics`, the numbers that it logs.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import use_adapter

from nbhelpers.models import adapter

from ..config import LeanGRPOConfig
from ..objective import unpadded
from ..trainer import LeanGRPOTrainer

OWN_TURNS = ("tools", "rollout_func", "environment_factory")  # of TRL's arguments: what writes more than one answer


class RolloutTrainer(LeanGRPOTrainer):
    """See the module.

    Args:
        model, reward_funcs, args, more, options: LeanGRPOTrainer's.
        method (`str`): What the errors call it.

    Raises ValueError for a model without an adapter, for what the lean step cannot do, for tools, `rollout_func` and
    `environment_factory`, and as LeanGRPOTrainer does.
    """

    def __init__(self, method: str, model: Any, reward_funcs: Any, args: LeanGRPOConfig, *more: Any, **options: Any):
        for name in OWN_TURNS:
            if options.get(name):
                raise ValueError(f"{name} is not served with {method}: one answer follows a prompt. Leave it out")
        if reward_funcs is None:
            raise ValueError(f"{method} needs reward_funcs, which say how good an answer is")
        penalty: float | None = vars(args)["missing_eos_penalty"]
        funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if penalty is not None:
            funcs.append(self._missing_eos(penalty))
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

    def _missing_eos(self, penalty: float) -> Callable[..., list[float | None]]:
        def missing_eos(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
            """-penalty for an answer that was cut off; None, does not apply, for one that ended."""
            ends, longest = set(self.eos_token_ids), self.max_completion_length
            cut = [len(ids) >= longest and not ends & set(ids) for ids in completion_ids]
            return [-penalty if one else None for one in cut]

        return missing_eos

    @torch.no_grad()
    def _scored(self, batch: dict[str, Any], reference: bool) -> Tensor:
        """Log-probabilities fp32 [B, T] of a rollout's tokens, under the model now or without its adapter."""
        model, shape = self.accelerator.unwrap_model(self.model), batch["completion_ids"].shape
        step, rows = self._step_of(self.model), unpadded(batch, batch["completion_mask"])
        if not reference:
            return step.retried(lambda: step.score(rows, shape), learns=False)[0]
        with use_adapter(model, None):
            return step.retried(lambda: step.score(rows, shape), learns=False)[0]

    def _log_mean(self, name: str, x: Tensor) -> None:
        """Log the mean of all processes' numbers, float of any shape; NaN is left out."""
        mean = self.accelerator.gather(x.float().nanmean()).nanmean().item()
        self._metrics["train" if self.model.training else "eval"][name].append(mean)
