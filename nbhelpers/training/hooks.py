"""What every kind of hooks is built on: TRL's trainer, the types of its attributes, and state for a checkpoint.

A kind of hooks is a mixin in a file of its own, whose docstring lists the private parts of TRL and transformers that it
touches. Each method that several kinds may have calls super(), so that none of them knows another:

    class LeanGRPOTrainer(ResumeHooks, LeanStepHooks, trl.GRPOTrainer)
"""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import trl

from . import checkpoint

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Hooks(trl.GRPOTrainer):
    """TRL's trainer, typed as it is once `__init__` is through: TRL and transformers leave much of it open."""

    args: trl.GRPOConfig
    model: "PreTrainedModel"
    processing_class: "PreTrainedTokenizerBase"
    train_dataset: "Dataset | IterableDataset"
    chat_template_kwargs: dict[str, Any]  # a str, in TRL's words, only until GRPOConfig has read it
    max_completion_length: int
    reward_func_names: list[str]
    num_generations: int
    num_generations_eval: int
    _buffered_inputs: Any  # the newest rollout's micro-batches, list[dict[str, Tensor | None]], or None
    _metrics: dict[str, defaultdict[str, list[float]]]  # numbers that are not logged yet, by mode and name
    entropy_coef: float
    _entropy_bonus_enabled: bool
    _last_world_entropy: float  # nats per token, of the last update; infinite before the first
    _entropy_window_stats: Any  # fp32 [2] of the update that is being computed: sum of entropies, tokens; or None
    _logs: dict[str, Any]  # the newest rollout: a column for each name, under "rewards" one for each function

    @property
    def _steps_per_generation(self) -> int:
        """Micro-batches of TRL's that one rollout is cut into."""
        assert self.args.steps_per_generation is not None  # GRPOConfig sets it where it was not given
        return self.args.steps_per_generation

    def _write_state(self, position: checkpoint.Position) -> None:
        """Put into `position.counters` or `.extra` what these hooks must find again in a resumed run; call super()."""

    def _read_state(self, position: checkpoint.Position) -> None:
        """Take it out again; call super(). A run that starts afresh hands over a position without any."""

    def _identity(self) -> dict[str, Any]:
        """What else, beyond arguments, model, data and rewards, makes it this run, as JSON; add to super()'s."""
        return {}
