"""`LeanRLOOTrainer`: REINFORCE Leave-One-Out (arXiv:2402.14740), TRL's RLOOConfig and equations on GRPO's hooks.

A prompt gets G completions with rewards r. With KL the sum of logp - ref_logp over a completion's tokens, and the ratio
the product of those of its tokens,

    R = clip(r, reward_clip_range) - beta KL
    A = R - mean of the other completions' R        (normalize_advantages: minus their mean, over their std + 1e-4)
    loss = -mean over completions of min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)

TRL's private `_logs` gets these advantages; `_name`, `_tag_names` and `_paper` are RLOO's, for the model card.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor

from nbhelpers.grpo import leave_one_out

from .. import losses, settings
from ..config import LeanGRPOConfig
from ..signal_hooks import Batch, Inputs
from .rollouts import RolloutConfig, RolloutTrainer

GRPO_ONLY = {field.name for field in fields(trl.GRPOConfig)} - {field.name for field in fields(trl.RLOOConfig)}


@dataclass
class LeanRLOOConfig(RolloutConfig):
    """TRL's RLOOConfig with what `LeanGRPOConfig` adds; what only GRPO has is refused. No reference with `beta=0.0`."""

    METHOD = "RLOO"
    TAKES = "pass a LeanRLOOConfig or trl.RLOOConfig"
    ONLY: ClassVar[settings.Values] = {
        **{one.name: (one.default,) for one in fields(LeanGRPOConfig) if one.name in GRPO_ONLY},
        "vllm_importance_sampling_correction": (False,),
    }

    beta: float = 0.05
    vllm_importance_sampling_correction: bool = False
    normalize_advantages: bool = False
    reward_clip_range: tuple[float, float] | None = None

    @classmethod
    def from_trl(cls, args: Any) -> "LeanRLOOConfig | None":
        if not isinstance(args, trl.RLOOConfig):
            return None
        made = cls(args.output_dir)
        vars(made).update(vars(args))  # as TRL has read them
        return made


class LeanRLOOTrainer(RolloutTrainer):
    """RLOO with all that `LeanGRPOTrainer` has, and its arguments; `args` is a `LeanRLOOConfig` or `trl.RLOOConfig`.

    The reference is TRL's. Raises as `RolloutTrainer`.
    """

    args: LeanRLOOConfig
    CONFIG = LeanRLOOConfig
    against_base = False
    _name, _tag_names, _paper = trl.RLOOTrainer._name, trl.RLOOTrainer._tag_names, trl.RLOOTrainer._paper

    def settings(self) -> losses.Settings:
        """GRPO's loss, with the ratio of whole completions and averaged over them; the KL is in the reward."""
        return replace(
            super().settings(), loss_type="grpo", importance_sampling_level="completion", beta=0.0, correction=None
        )

    def _drawn_and_scored(self, inputs: Inputs) -> Batch:
        batch = super()._drawn_and_scored(inputs)
        rewards = self._totals
        if self.args.reward_clip_range is not None:
            rewards = rewards.clamp(*self.args.reward_clip_range)
        if self.beta:
            rewards = rewards - self.beta * self._divergence(batch)
        self._totals = rewards  # with the KL in it no group is silent, unless all of it costs the same
        group = self.num_generations if self.model.training else self.num_generations_eval
        advantages = leave_one_out(rewards, group, self.args.normalize_advantages)
        logged = self._logs["advantages"]  # a deque: TRL's own make room for these
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        batch["advantages"] = self._own(advantages)
        return batch

    def _divergence(self, batch: Batch) -> Tensor:
        """The KL of each completion of all processes to the reference, nats, [B]; the policy's log-probabilities stay
        in the batch, as those of the rollout."""
        if batch.get("old_per_token_logps") is None:
            batch["old_per_token_logps"], _ = self._scored(batch)
        mask = batch["completion_mask"]
        of_token = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * mask
        total, tokens = self.accelerator.reduce(torch.stack([of_token.sum(), mask.sum().float()])).tolist()
        self._numbers()["kl"].append(total / max(tokens, 1.0))
        return self.accelerator.gather(of_token.sum(-1))
