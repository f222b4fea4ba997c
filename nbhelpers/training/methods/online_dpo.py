"""`LeanOnlineDPOTrainer`: the model writes two answers to a prompt, somebody says which is better, and it learns that.

The gradient of a pair's loss is a number, its slope, times that of log p(chosen) - log p(rejected). So the two answers
need not be in one micro-batch: each goes through GRPO's loss with this number as its advantage. TRL's private
`_generate_and_score_completions` makes slopes of advantages, `_compute_loss` reports the loss of the pairs; `_name`,
`_tag_names` and `_paper` are for the README of a checkpoint.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbhelpers.rewards import text_of
from nbhelpers.rewards.guard import is_async, named

from .. import losses, settings
from ..lean_step import LeanStep
from ..signal_hooks import Batch, Inputs
from .equations import dpo_loss
from .rollouts import RolloutConfig, RolloutTrainer

Judge = Callable[[list[Any], list[list[str]]], Sequence[int | None]]


@dataclass
class LeanOnlineDPOConfig(RolloutConfig):
    """TRL's names for Online DPO on top of LeanGRPOConfig's.

    `per_device_train_batch_size` counts answers, as with GRPO: two for each prompt. `beta` is the price of leaving the
    reference, `loss_type` "sigmoid" or "ipo"; `max_new_tokens`, if given, is max_completion_length.
    """

    METHOD, TAKES = "online DPO", "pass a LeanOnlineDPOConfig, or TRL's OnlineDPOConfig"
    OWN = (
        settings.Setting("beta", settings.number(0, 1e6, above=True), "a number above 0", "0.1 is usual."),
        settings.one_of("loss_type", ("sigmoid", "ipo")),
    )
    ONLY: ClassVar[settings.Values] = {
        "num_generations": (2,), "num_generations_eval": (None, 2), "num_iterations": (1,), "delta": (None,),
        "mask_truncated_completions": (False,), "importance_sampling_level": ("token",), "entropy_coef": (0.0,),
        "use_adaptive_entropy": (False,), "top_entropy_quantile": (1.0,), "off_policy_mask_threshold": (None,),
        "multi_objective_aggregation": ("sum_then_normalize",), "sync_ref_model": (False,),
    }  # fmt: skip

    beta: float = 0.1
    loss_type: str = "sigmoid"
    temperature: float = 0.9
    disable_dropout: bool = True
    max_new_tokens: int | None = None

    def _as_grpo(self) -> None:
        if self.max_new_tokens is not None:
            self.max_completion_length = self.max_new_tokens

    @classmethod
    def from_trl(cls, args: Any) -> "LeanOnlineDPOConfig | None":
        """TRL's batch counts prompts, not answers. Raises ValueError for what has no counterpart here."""
        if not any(kind.__name__ == "OnlineDPOConfig" for kind in type(args).__mro__):
            return None
        settings.refuse_others(cls.METHOD, args, {"reward_model_path": (None,), "max_length": (512,)})
        plain = type(args)(args.output_dir, use_cpu=True, bf16=True)  # what was not set takes this package's default
        own = {field.name for field in fields(cls) if field.init} & vars(args).keys()
        values = {name: getattr(args, name) for name in own if getattr(args, name) != getattr(plain, name)}
        values |= {name: getattr(args, name) for name in ("output_dir", "max_new_tokens", "use_cpu")}
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
        return cls(**values | {name: 2 * getattr(args, name) for name in sizes})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps_per_generation != self.gradient_accumulation_steps:
            raise ValueError("online DPO makes one update of each rollout: leave steps_per_generation and "
                             "generation_batch_size out, gradient_accumulation_steps sets both")  # fmt: skip
        if self.per_device_train_batch_size % 2:
            raise ValueError(f"per_device_train_batch_size={self.per_device_train_batch_size} counts answers, and a "
                             "prompt gets two: take an even number")  # fmt: skip


def as_reward(judge: Judge) -> Callable[..., list[float]]:
    """The judge as a reward function: 1.0 for the better answer of a pair, 0.0 for the other, and for both of a tie."""
    if not callable(judge) or is_async(named(judge)[1]):
        raise ValueError("judge is a plain function: judge(prompts, pairs) -> a list of 0, 1 or -1, one for each pair")

    def judged(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        texts = [text_of(completion) for completion in completions]
        pairs = [texts[i : i + 2] for i in range(0, len(texts), 2)]
        winners = list(judge(prompts[::2], pairs))
        if len(winners) != len(pairs) or any(winner not in (0, 1, -1, None) for winner in winners):
            raise ValueError(f"the judge gave {winners!r} for {len(pairs)} pairs: one of 0, 1 and -1 for each")
        return [float(winner == place) for winner in winners for place in (0, 1)]

    judged.__name__ = named(judge)[0]
    return judged


class LeanOnlineDPOTrainer(RolloutTrainer):
    """Online DPO (arXiv:2402.04792) with LeanGRPOTrainer's arguments; loss and gradient are TRL's OnlineDPOTrainer's.

    The reference is the base without its adapter, so there is no second copy. Two answers of equal reward are a tie:
    the pair adds nothing to the loss, whose mean is over all pairs, and is counted in `frac_reward_zero_std`;
    `dynamic_sampling` draws others in its place. The log has TRL's names: logps/chosen, rewards/margins, objective/kl.

    Args:
        reward_funcs (*optional*): As in LeanGRPOTrainer; the answer with the larger sum is the chosen one.
        args (`LeanOnlineDPOConfig` or TRL's `OnlineDPOConfig`, *optional*): `LeanOnlineDPOConfig("runs/online_dpo")`.
        judge (`Callable`, *optional*): In place of reward_funcs: judge(prompts, pairs), prompts as in the data set,
            pairs of texts, returns for each pair the place of the better answer, 0 or 1, or -1 for neither. It is
            guarded as a reward function is.

    Rows need a `prompt`, a text or messages, as those of TL;DR have; reward functions get the other columns, as in TRL
    without one named `completion`.

    Raises ValueError for both or neither of reward_funcs and judge, and as `RolloutTrainer`.
    """

    args: LeanOnlineDPOConfig
    CONFIG = LeanOnlineDPOConfig
    _name, _tag_names, _paper = "Online DPO", ["trl", "online-dpo"], {}

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, judge: Judge | None = None,
        **options: Any,
    ):  # fmt: skip
        args = copy(LeanOnlineDPOConfig.of(args))
        if (judge is None) == (reward_funcs is None):
            raise ValueError("who says which answer is better? Pass either reward_funcs or judge")
        beta, kind = args.beta, args.loss_type
        args.beta, args.loss_type = 0.0, "grpo"  # TRL would keep a copy of the adapter as its reference
        super().__init__(model, reward_funcs if judge is None else as_reward(judge), args, *more, **options)
        self.args.beta, self.args.loss_type = beta, kind

    def settings(self) -> losses.Settings:
        """A policy gradient of whole completions, as "luspo" sums them; no correction for the engine, as in TRL."""
        return replace(super().settings(), loss_type="luspo", beta=0.0, correction=None)

    def _step_of(self, model: nn.Module) -> LeanStep:
        step = super()._step_of(model)
        step.temperature = 1.0  # of the model that is trained, however its answers were drawn: as in TRL
        return step

    def _generate_and_score_completions(self, inputs: Inputs) -> Batch:
        batch, beta = super()._generate_and_score_completions(inputs), self.args.beta
        for name in ("old_per_token_logps", "importance_sampling_ratio", "sampling_per_token_logps"):
            batch.pop(name, None)  # of another temperature, and of no use here
        first, second = batch["advantages"].view(-1, 2).unbind(1)
        better = (first - second).sign()  # of the first answer: 1, -1, or 0 for a tie
        logps, mask = self._scored(batch)[0], batch["completion_mask"]
        shifts = ((logps - self._reference(batch)) * mask).sum(1).view(-1, 2)  # [P, 2], log p / p_ref
        with torch.enable_grad():
            margins = (better * (shifts[:, 0] - shifts[:, 1])).requires_grad_()
            pair_losses = dpo_loss(margins, beta, self.args.loss_type) * better.abs()
            (slopes,) = torch.autograd.grad(pair_losses.sum(), margins)
        slopes = -2 * better * slopes  # GRPO's mean is over answers, this one over pairs
        batch["advantages"] = torch.stack((slopes, -slopes), dim=1).flatten()
        batch["pair_losses"] = pair_losses.detach().repeat_interleave(2)

        order = torch.stack((better < 0, better > 0), dim=1).long()  # the chosen one's place, the rejected one's
        tied = (better == 0).unsqueeze(1)
        sums = (logps * mask).sum(1).view(-1, 2)
        for name, of_each in (("logps", sums), ("rewards", beta * shifts)):
            chosen, rejected = of_each.gather(1, order).masked_fill(tied, torch.nan).unbind(1)
            self._log_mean(f"{name}/chosen", chosen)
            self._log_mean(f"{name}/rejected", rejected)
        self._log_mean("rewards/margins", chosen - rejected)
        self._log_mean("rewards/accuracies", (chosen > rejected).float().masked_fill(tied[:, 0], torch.nan))
        self._log_mean("objective/kl", shifts)
        rows = shifts.numel() * self.accelerator.num_processes
        drawn = self._own(torch.tensor(list(self._logs["advantages"])[-rows:], device=shifts.device))
        implicit = (beta * shifts).masked_fill(drawn.view(-1, 2) == 0, torch.nan)  # of a tie, or one replaced since
        self._log_used({"implicit reward": implicit, "margin": implicit - implicit.flip(1)})
        return batch

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        surrogate, loss = super()._compute_loss(model, inputs), inputs["pair_losses"].mean()
        return (loss / self.current_gradient_accumulation_steps).requires_grad_() if surrogate.requires_grad else loss
