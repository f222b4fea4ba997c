"""What RLOO, Online DPO and PPO have in common: LeanGRPOTrainer's rollouts, and a loss that the lean step alone has.

The hooks touch two private parts of TRL: `_metrics`, the numbers that it logs, and `_logs`, the newest rollout.
"""

from collections import deque
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from trl.trainer.utils import use_adapter

from nbhelpers.models import adapter
from nbhelpers.rewards import Sample

from .. import settings
from ..config import LeanGRPOConfig
from ..objective import unpadded
from ..trainer import LeanGRPOTrainer


@dataclass
class RolloutConfig(LeanGRPOConfig):
    """LeanGRPOConfig for another method. `missing_eos_penalty` is taken off the reward of an answer that was cut off.

    A setting that is not among the values which `ONLY` has for it is refused by name, the usual one comes first.
    """

    METHOD: ClassVar[str]  # for the errors
    TAKES: ClassVar[str]  # which config, too
    ONLY: ClassVar[settings.Values] = {}

    num_generations: int | None = 2
    missing_eos_penalty: float | None = None

    def __post_init__(self) -> None:
        settings.refuse(self, self.OWN)
        settings.refuse_others(self.METHOD, self, self.ONLY)
        self._as_grpo()
        super().__post_init__()

    @classmethod
    def of(cls, args: Any) -> Self:
        """`args`, or one of the same settings as TRL's for this method, or the defaults for None; else TypeError."""
        if args is None:
            return cls(f"runs/{cls.METHOD.lower().replace(' ', '_')}")
        made = args if isinstance(args, cls) else cls.from_trl(args)
        if made is None:
            raise TypeError(f"args is a {type(args).__name__}: {cls.TAKES}")
        return made

    @classmethod
    def from_trl(cls, args: Any) -> Self | None:
        """The same settings, if `args` is TRL's config for this method; None if not."""
        return None

    def _as_grpo(self) -> None:
        """Set what GRPO knows by another name."""


class RolloutTrainer(LeanGRPOTrainer):
    """LeanGRPOTrainer for the method that its config, `CONFIG`, names; the other arguments are the same.

    Raises TypeError for another config; ValueError for tools, `rollout_func`, `environment_factory`, no reward, what
    the lean step cannot do, and a model without an adapter where `against_base`; and as LeanGRPOTrainer does.
    """

    args: RolloutConfig
    CONFIG: ClassVar[type[RolloutConfig]]
    against_base = True  # the model is measured against itself without its adapter

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **options: Any):
        args = self.CONFIG.of(args)
        for name in ("tools", "rollout_func", "environment_factory", "lean"):
            if options.get(name) not in (None, True):
                raise ValueError(f"{name}={options[name]!r} is not served with {args.METHOD}: leave it out")
        if reward_funcs is None:
            raise ValueError(f"{args.METHOD} needs reward_funcs, which say how good an answer is")
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
        if self.against_base and not adapter.loras(self.accelerator.unwrap_model(self.model)):
            raise ValueError(f"{args.METHOD} measures the model against itself without its adapter, and it has none: "
                             "load it with lora_rank=16, or pass peft_config")  # fmt: skip

    def _left_to_trl(self, reason: str) -> None:
        raise ValueError(f"{self.args.METHOD} runs through the lean step alone, and {reason}: leave that out, or train "
                         "with LeanGRPOTrainer")  # fmt: skip

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

    def _log_used(self, of_each: dict[str, Tensor]) -> None:
        """Show what is learned from in place of an advantage over the group: float of B elements; NaN is left out."""
        columns = self.accelerator.gather(torch.stack([x.flatten() for x in of_each.values()], dim=1)).tolist()
        rows = self._logs.setdefault("used", deque(maxlen=self._logs["advantages"].maxlen))
        rows.extend({name: x for name, x in zip(of_each, row, strict=True) if x == x} for row in columns)

    def samples(self) -> list[Sample]:
        """As LeanGRPOTrainer's, with what `_log_used` was told."""
        samples = super().samples()
        used = self._logs.get("used", ())
        return [replace(one, advantage=None, used=x) for one, x in zip(samples, used, strict=False)] or samples

    def _log_mean(self, name: str, x: Tensor) -> None:
        """Log the mean of all processes' numbers, float of any shape; NaN is left out."""
        self._numbers()[name].append(self.accelerator.gather(x.float().nanmean()).nanmean().item())
