"""When going on is a waste: a run without a signal, a task that is solved, a reward that is gamed. Says so, and stops.

    trainer = LeanGRPOTrainer(..., stop_when=StopWhen())

The judgement is a function of what was logged, so that it can be tested on runs that somebody has seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from nbhelpers.panel import gaming

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from nbhelpers.rewards import Sample

Log = dict[str, Any]  # one step's entry of TRL's log
ALMOST_ALL = 0.95  # a share that counts as all


@dataclass(frozen=True)
class StopWhen:
    """What ends a run early. `None` switches a rule off.

    Args:
        silent_steps (`int`, *optional*): Steps in a row in which no group had a signal.
        solved_steps (`int`, *optional*): Steps in a row in which nearly every answer was right, and most groups had no
            signal: a model that is right may still learn the form, or to be brief.
        gaming_steps (`int`, *optional*): Steps over which the reward rose and right answers did not, by the rule of
            `panel.gaming.why`, which the panel shows too.
    """

    silent_steps: int | None = 10
    solved_steps: int | None = 20
    gaming_steps: int | None = gaming.STEPS

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 2:
                raise ValueError(f"StopWhen({name}={value}): a number of steps, at least 2, or None for never")

    def reason(self, logs: Sequence[Log], samples: Sequence["Sample"] = ()) -> str | None:
        """Why the run should end now, in a sentence or two with what to change; None: it should go on.

        Args:
            logs (`Sequence[dict]`): The steps so far, oldest first, under TRL's names and `right` and `in_form`, the
                shares of answers that are right, in whatever form, and in form, whether right or not. Where
                `frac_reward_zero_std` is missing, as with PPO, equal rewards are no silence.
            samples (`Sequence[Sample]`): The newest answers.
        """
        return self._gaming(logs, samples, self.gaming_steps) or self._silence(logs, samples) or self._solved(logs)

    def _gaming(self, logs: Sequence[Log], samples: Sequence["Sample"], steps: int | None) -> str | None:
        return None if steps is None or self.gaming_steps is None else gaming.why(logs, samples, steps)

    def _silence(self, logs: Sequence[Log], samples: Sequence["Sample"]) -> str | None:
        newest = _newest(logs, self.silent_steps)
        if newest is None or any(log.get("frac_reward_zero_std", 0.0) < 1.0 for log in newest):
            return None
        gamed = self._gaming(logs, samples, len(newest))
        if gamed is not None:  # where all have learned the same trick, groups are silent too
            return gamed
        rights = [log["right"] for log in newest if "right" in log]
        head = f"For {len(newest)} steps all answers to a question got the same reward, so nothing was learned: "
        if rights and fmean(rights) > ALMOST_ALL:
            return head + "they are all right. The task is too easy for this model: take harder questions."
        if rights and fmean(rights) > 0.05:
            return head + (
                f"{fmean(rights):.0%} of them are right, but not in a form that the rewards read "
                f"({fmean(log['in_form'] for log in newest):.0%} in form). Let a right answer pay in any form "
                "(rewards.right), pay the form by parts, or choose another system prompt."
            )
        if not rights:
            return head + (
                "let the rewards tell better answers from worse ones, or take questions whose answers differ "
                "(rewards.check tries a reward on such answers)."
            )
        return head + (
            "none is right, in whatever form. The task is too hard for this model: take easier questions, a larger "
            "model or more tokens (max_completion_length), or let the rewards pay for steps on the way."
        )

    def _solved(self, logs: Sequence[Log]) -> str | None:
        newest = _newest(logs, self.solved_steps)
        if newest is None or not all(log.get("right", 0.0) > ALMOST_ALL for log in newest):
            return None
        if fmean(log.get("frac_reward_zero_std", 1.0) for log in newest) < 0.5:
            return None
        return (
            f"The task is solved: for {len(newest)} steps {fmean(log['right'] for log in newest):.1%} of the answers "
            "were right. More steps would teach little: take harder questions."
        )


def _newest(logs: Sequence[Log], steps: int | None) -> Sequence[Log] | None:
    return logs[-steps:] if steps is not None and len(logs) >= steps else None


# What a run without `stop_when` is told, once: that it goes on and learns nothing.
SILENCE = StopWhen(silent_steps=15, solved_steps=None, gaming_steps=None)


class Stopper(TrainerCallback):
    """Ends the run at the first reason that a `StopWhen` gives, prints it with three real answers, and keeps it.

    Args:
        rules (`StopWhen`): What it looks for.
        ends (`bool`): False lets the run go on, and prints the reason alone.

    Attributes:
        reason (`str`, *optional*): The first reason of this run; None as long as there was none.
    """

    def __init__(self, rules: StopWhen, ends: bool = True):
        self.rules, self.ends = rules, ends
        self.reason: str | None = None

    def on_train_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self.reason = None
        vars(state).pop("stop_reason", None)

    def on_log(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any) -> None:
        samples = list(vars(state).get("samples", ()))
        logs = [log for log in state.log_history if "reward" in log]
        if self.reason is None and (reason := self.rules.reason(logs, samples)) is not None:
            self.reason = reason
            if self.ends:
                control.should_training_stop = control.should_save = True
                vars(state)["stop_reason"] = reason  # the panel shows it beside "stopped"
            if not self.ends and state.is_world_process_zero:
                print(f"Step {state.global_step}: {reason} The run goes on; stop_when=StopWhen() would end it.")
            elif state.is_world_process_zero:
                print(f"Stopped after step {state.global_step}. {reason}", *gaming.quoted(samples, 3), sep="\n")
