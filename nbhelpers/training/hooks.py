"""What every kind of hooks is built on: a trainer, the types of its attributes, and state for a checkpoint.

A kind of hooks is a mixin in a file of its own, whose docstring lists the private parts of TRL and transformers that it
touches. Each method that several kinds may have calls super(), so that none of them knows another:

    class LeanGRPOTrainer(ResumeHooks, LeanStepHooks, trl.GRPOTrainer)

`RunHooks` know of no method, `Hooks` of rollouts: those of TRL's GRPOTrainer.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import trl
from torch import Tensor
from transformers import Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, PrinterCallback

from nbhelpers import panel
from nbhelpers.progress import interruptible

from . import checkpoint

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# a decorator of a trainer's `__init__`
making = interruptible("the trainer was made", "no step is done and no file is written; run this cell again")


class RunHooks(Trainer):
    """TRL's trainer of whatever method, typed as it is once `__init__` is through: much of it is left open there.

    What TRL keeps of rollouts and rewards has the value here that it has without them.
    """

    model: "PreTrainedModel"
    processing_class: "PreTrainedTokenizerBase"
    train_dataset: "Dataset | IterableDataset"
    aux_loss_enabled: bool  # of a mixture of experts
    reward_funcs: Any = ()
    reward_func_names: Sequence[str] = ()
    num_iterations: int = 1  # updates with each rollout
    _name: str  # of the method, in TRL's words
    _step: int = 0  # micro-batches of TRL's that rollouts were used for
    _buffered_inputs: Any = None  # the newest rollout's micro-batches, list[dict[str, Tensor | None]]
    _metrics: dict[str, defaultdict[str, list[float]]]  # numbers that are not logged yet, by mode and name

    @property
    def _steps_per_generation(self) -> int:
        """Micro-batches of TRL's that one rollout is cut into."""
        return 1

    def _numbers(self) -> defaultdict[str, list[float]]:
        """What is logged next of the mode, training or evaluation, that the model is in."""
        return self._metrics["train" if self.model.training else "eval"]

    def _panels(self) -> list[panel.Live]:
        """The panels among the callbacks; with one, transformers' own progress goes: one updating output, not two.

        The trainer knows the panel, not the panel the trainer: transformers hands callbacks neither an engine nor the
        list of callbacks, so any other way would be an attribute that both sides have to know of.
        """
        panels = [callback for callback in self.callback_handler.callbacks if isinstance(callback, panel.Live)]
        for other in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback) if panels else ():
            self.remove_callback(other)
        return panels

    def _write_state(self, position: checkpoint.Position) -> None:
        """Put into `position.counters` or `.extra` what these hooks must find again in a resumed run; call super()."""

    def _read_state(self, position: checkpoint.Position) -> None:
        """Take it out again; call super(). A run that starts afresh hands over a position without any."""

    def _identity(self) -> dict[str, Any]:
        """What else, beyond arguments, model, data and rewards, makes it this run, as JSON; add to super()'s."""
        return {"method": self._name}


class Hooks(RunHooks, trl.GRPOTrainer):
    """TRL's GRPOTrainer, typed in the same way."""

    args: trl.GRPOConfig
    chat_template_kwargs: dict[str, Any]  # a str, in TRL's words, only until GRPOConfig has read it
    max_completion_length: int
    reward_func_names: list[str]
    num_generations: int
    num_generations_eval: int
    entropy_coef: float
    _entropy_bonus_enabled: bool
    _last_world_entropy: float  # nats per token, of the last update; infinite before the first
    _entropy_window_stats: Any  # fp32 [2] of the update that is being computed: sum of entropies, tokens; or None
    _logs: dict[str, Any]  # the newest rollout: a column for each name, under "rewards" one for each function

    @property
    def _steps_per_generation(self) -> int:
        assert self.args.steps_per_generation is not None  # GRPOConfig sets it where it was not given
        return self.args.steps_per_generation

    def _own(self, rows: Tensor) -> Tensor:
        """This process's part of something of all rows."""
        count = len(rows) // self.accelerator.num_processes
        return rows[self.accelerator.process_index * count :][:count]
