"""A run whose completions may get longer on the way: which stage it is in, and when the next one begins.

A stage is left between two rollouts, never within one, by what the rollouts of that stage were like. These numbers are
in each checkpoint, so a resumed run changes where it would have. The hooks of TRL's GRPOTrainer, both private:

    _generate_and_score_completions     a rollout begins, perhaps the first of the next stage
    _metrics                            what it was like: TRL's reward and share of cut-off completions
"""

import math
from collections.abc import Sequence
from typing import Any

from . import checkpoint
from .lean_hooks import LeanStepHooks
from .stages import ROLLOUTS, Stage


class StageHooks(LeanStepHooks):
    """See the module. `trainer.LeanGRPOTrainer` is what people use; `stages` is empty without any.

    Attributes:
        stage (`int`): The number of the stage, from 0.
    """

    def _begin_stages(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._enter(0, 0, [], [])

    def _enter(self, stage: int, began: int, cut_off: list[float], rewards: list[float]) -> None:
        """Be in a stage that began at step `began` and has had these rollouts."""
        self.stage, self._began, self._cut_off, self._rewards = stage, began, cut_off, rewards
        if self.stages:
            self.max_completion_length = self.stages[stage].max_completion_length

    def _longest_row(self) -> tuple[int, int, int]:
        """Of the whole run: what does not fit is known before the first step of the first stage."""
        group, prompt, longest = super()._longest_row()
        return group, prompt, max([longest, *(stage.max_completion_length for stage in self.stages)])

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.stages or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        steps = self.state.global_step
        if why := self.stages[self.stage].over(steps - self._began, self._cut_off, self._rewards):
            self._enter(self.stage + 1, steps, [], [])
            print(f"Step {steps + 1}: stage {self.stage + 1} of {len(self.stages)} begins, with up to "
                  f"{self.max_completion_length:,} tokens a completion: {why}.")  # fmt: skip
        batch = super()._generate_and_score_completions(inputs)
        metrics, now = self._metrics["train"], self.stages[self.stage]
        self._cut_off = [*self._cut_off, metrics["completions/clipped_ratio"][-1]][-ROLLOUTS:]
        if now.plateau is not None and math.isfinite(reward := metrics["reward"][-1]):
            self._rewards = [*self._rewards, reward][-2 * now.plateau :]
        metrics["max_completion_length"].append(float(self.max_completion_length))
        return batch

    def _write_state(self, position: checkpoint.Position) -> None:
        super()._write_state(position)
        if self.stages:
            position.extra["stage"] = [self.stage, self._began, self._cut_off, self._rewards]

    def _read_state(self, position: checkpoint.Position) -> None:
        super()._read_state(position)
        stage, began, cut_off, rewards = position.extra.get("stage", (0, 0, [], []))
        self._enter(stage, began, cut_off, rewards)
