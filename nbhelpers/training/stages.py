"""A completion length that grows in stages (DeepScaleR: 8K, 16K, 24K tokens), and what begins the next one.

    LeanGRPOConfig(stages=[Stage(8192, cut_off=0.2), Stage(16384, steps=500), Stage(24576)])

`memory.plan_stages` says what each stage takes.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

ROLLOUTS = 10  # whose share of cut-off completions counts


class Stage(NamedTuple):
    """One length, and what ends it: whichever of the three comes first. The last stage has no end but the run's.

    Args:
        max_completion_length (`int`): Tokens.
        steps (`int`, *optional*): So many updates were made in this stage.
        cut_off (`float`, *optional*): Of the completions of the stage's newest 10 rollouts at least this share was cut
            off: there is more to say than there is room.
        plateau (`int`, *optional*): The mean reward of the newest so many rollouts is no higher than that of as many
            before them.
    """

    max_completion_length: int
    steps: int | None = None
    cut_off: float | None = None
    plateau: int | None = None

    def over(self, steps: int, cut_off: Sequence[float], rewards: Sequence[float]) -> str | None:
        """Why this stage is over, in words; None: it goes on.

        Args:
            steps (`int`): Updates in this stage.
            cut_off (`Sequence[float]`), rewards (`Sequence[float]`): Of its rollouts, oldest first: the share of
                cut-off completions and the mean reward.
        """
        if self.steps is not None and steps >= self.steps:
            return f"after {steps} steps"
        if self.cut_off is not None and len(cut_off) >= ROLLOUTS and fmean(cut_off[-ROLLOUTS:]) >= self.cut_off:
            return f"{fmean(cut_off[-ROLLOUTS:]):.0%} of the completions were cut off"
        if self.plateau is not None and len(rewards) >= 2 * self.plateau:
            newest, before = rewards[-self.plateau :], rewards[-2 * self.plateau : -self.plateau]
            if fmean(newest) <= fmean(before):
                return f"the reward, {fmean(newest):.3g}, has not risen for {self.plateau} rollouts"
        return None
