"""`LeanPPOTrainer`: PPO with a value head on the model that is trained; no second model anywhere.

The value head reads the last hidden states that the step computes anyway, and its gradient goes through the adapter.
What a token was better than the value expected is its advantage, and with one advantage for each token GRPO's clipped
loss is PPO's. TRL's private `_generate_and_score_completions` gets them; `_name`, `_tag_names` and `_paper` are for the
README of a checkpoint.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbhelpers.models import adapter

from .. import objective, settings
from ..lean_step import LeanStep
from ..packing import Packed
from ..signal_hooks import Batch, Inputs
from .equations import gae, token_rewards, value_loss, whiten
from .rollouts import RolloutConfig, RolloutTrainer


@dataclass
class LeanPPOConfig(RolloutConfig):
    """TRL's names for PPO on top of LeanGRPOConfig's.

    A rollout is `num_mini_batches` times what an update takes, and is gone through `num_ppo_epochs` times in the same
    order; `max_steps` counts updates. Several answers to a prompt (`num_generations`) are so many rollouts.

    `kl_coef` is the price of a nat away from the base without its adapter (TRL's estimator "k1"), `cliprange` GRPO's
    epsilon, `vf_coef` the weight of the value loss, `cliprange_value` how far a value may move from the rollout's,
    `gamma` and `lam` those of the advantages. Advantages are whitened, over the rollout of all processes;
    rewards too with `whiten_rewards`.
    """

    METHOD, TAKES = "PPO", "PPO takes a LeanPPOConfig"
    OWN = tuple(
        settings.Setting(name, allowed, wanted)
        for names, allowed, wanted in (
            ("num_ppo_epochs num_mini_batches", settings.whole(1), "a whole number, 1 or more"),
            ("kl_coef cliprange cliprange_value vf_coef", settings.number(0, 1e6), "a number, 0 or more"),
            ("gamma lam", settings.number(0, 1), "a number from 0 to 1"),
        )
        for name in names.split()
    )
    ONLY: ClassVar[settings.Values] = {
        "loss_type": ("bnpo",), "beta": (0.0,), "dynamic_sampling": (0,), "importance_sampling_level": ("token",),
        "off_policy_mask_threshold": (None,), "multi_objective_aggregation": ("sum_then_normalize",),
        "sync_ref_model": (False,), "steps_per_generation": (None,), "generation_batch_size": (None,),
        "num_iterations": (1,), "epsilon": (0.2,), "epsilon_high": (None,), "scale_rewards": ("group", True),
    }  # fmt: skip

    loss_type: str = "bnpo"  # a mean over all tokens
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    kl_coef: float = 0.05
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    disable_dropout: bool = True  # old and new log-probabilities would differ by it

    def _as_grpo(self) -> None:
        self.num_iterations, self.epsilon = self.num_ppo_epochs, self.cliprange
        self.steps_per_generation = self.num_mini_batches * self.gradient_accumulation_steps


class LeanPPOTrainer(RolloutTrainer):
    """PPO (arXiv:1707.06347) with LeanGRPOTrainer's arguments; `args` is `LeanPPOConfig("runs/ppo")` if not given.

    The value of the text before each token is a linear function, in fp32, of the last hidden state there; it starts at
    0. It is trained with the adapter, saved in checkpoints and resumed with them, and is no part of what `save_model`
    and `export` write. An answer that no reward function scored takes no loss. Raises as `RolloutTrainer`.
    """

    advantage_dims = 2
    args: LeanPPOConfig
    CONFIG = LeanPPOConfig
    _name, _tag_names, _paper = "PPO", ["trl", "ppo"], {}

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **options: Any):
        super().__init__(model, reward_funcs, args, *more, **options)
        inner = self.accelerator.unwrap_model(self.model)
        self._value_head = nn.Linear(inner.config.get_text_config().hidden_size, 1, device=inner.device)
        for parameter in self._value_head.parameters():
            nn.init.zeros_(parameter)
        inner.add_module(adapter.VALUE_HEAD, self._value_head)

    def _step_of(self, model: nn.Module) -> LeanStep:
        step = super()._step_of(model)
        step.put_value_head(self._value_head)
        return step

    def _generate_and_score_completions(self, inputs: Inputs) -> Batch:
        batch, args = super()._generate_and_score_completions(inputs), self.args
        scores, mask = self._own(self._totals).float(), batch["completion_mask"]
        logps, values = self._scored(batch)
        assert values is not None  # the step has a value head
        ref = self._reference(batch) if args.kl_coef else None
        if (unscored := scores.isnan()).any():
            batch["tool_mask"] = mask * ~unscored.unsqueeze(1)
        counts = objective.loss_mask(batch)
        rewards = token_rewards(scores.nan_to_num(), logps, ref, mask, args.kl_coef)
        self._log_mean("objective/rlhf_reward", rewards.sum(1))
        if ref is not None:
            self._log_mean("objective/kl", ((logps - ref) * mask).sum(1))
        if args.whiten_rewards:
            rewards = whiten(rewards, counts, shift_mean=False, reduce=self.accelerator.reduce)
        advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
        first = torch.stack((values[:, 0], advantages[:, 0])).masked_fill(scores.isnan(), torch.nan)
        self._log_used({"value": first[0], "advantage of the first token": first[1]})
        self._numbers().pop("frac_reward_zero_std", None)  # equal rewards teach too, each against its value
        advantages = whiten(advantages, counts, reduce=self.accelerator.reduce)
        return batch | {
            "advantages": advantages,
            "returns": returns,
            "old_values": values,
            "old_per_token_logps": logps,
        }

    def _value_loss(self, inputs: dict[str, Any]) -> objective.ValueLoss:
        decoder = self._step_of(self.model).decoder

        def of_tokens(packed: Packed, weights: Tensor) -> Tensor:
            old_values, returns = (inputs[name][packed.number, packed.column] for name in ("old_values", "returns"))
            assert decoder.values is not None  # the decoder has a value head
            each = value_loss(decoder.values, old_values, returns, self.args.cliprange_value)
            return self.args.vf_coef * (each * weights).sum()

        return of_tokens
