"""When going on is a waste: a run without a signal, a task that is solved, a reward that is gamed. Says so, and stops.

    trainer = LeanGRPOTrainer(..., stop_when=StopWhen())

The judgement is a function of what was logged, so that it can be tested on runs that somebody has seen.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from nbhelpers.rewards import Sample

Log = dict[str, Any]  # one step's entry of TRL's log
ALMOST_ALL = 0.95  # a share that counts as all
RISEN = 0.1  # of the reward, as a share of its range so far: more is a rise
SHOWN = 300  # characters of an answer that is quoted


@dataclass(frozen=True)
class StopWhen:
    """What ends a run early. `None` switches a rule off.

    Args:
        silent_steps (`int`, *optional*): Steps in a row in which no group had a signal.
        solved_steps (`int`, *optional*): Steps in a row in which nearly every answer was right, and most groups had no
            signal: a model that is right may still learn the form, or to be brief.
        gaming_steps (`int`, *optional*): Steps over which the reward rose and nothing else did: right answers did not,
            and the answers are in form, alike, or a fraction of their length. A model that is mostly right, and stays
            so, may learn to be brief.
    """

    silent_steps: int | None = 10
    solved_steps: int | None = 20
    gaming_steps: int | None = 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 2:
                raise ValueError(f"StopWhen({name}={value}): a number of steps, at least 2, or None for never")

    def reason(self, logs: Sequence[Log], samples: Sequence["Sample"] = ()) -> str | None:
        """Why the run should end now, in a sentence or two with what to change; None: it should go on.

        Args:
            logs (`Sequence[dict]`): The steps so far, oldest first, under TRL's names and `right` and `in_form`, the
                shares of answers that are right, in whatever form, and in form, whether right or not.
            samples (`Sequence[Sample]`): The newest answers.
        """
        return self._silence(logs) or self._solved(logs) or self._gaming(logs, samples)

    def _silence(self, logs: Sequence[Log]) -> str | None:
        newest = _newest(logs, self.silent_steps)
        if newest is None or any(log["frac_reward_zero_std"] < 1.0 for log in newest):
            return None
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
        return head + (
            "none is right, in whatever form. The task is too hard for this model: take easier questions, a larger "
            "model or more tokens (max_completion_length), or let the rewards pay for steps on the way."
        )

    def _solved(self, logs: Sequence[Log]) -> str | None:
        newest = _newest(logs, self.solved_steps)
        if newest is None or not all(log.get("right", 0.0) > ALMOST_ALL for log in newest):
            return None
        if _mean("frac_reward_zero_std", newest) < 0.5:
            return None
        return (
            f"The task is solved: for {len(newest)} steps {fmean(log['right'] for log in newest):.1%} of the answers "
            "were right. More steps would teach little: take harder questions."
        )

    def _gaming(self, logs: Sequence[Log], samples: Sequence["Sample"]) -> str | None:
        steps = self.gaming_steps
        if steps is None or len(logs) < 2 * steps or "right" not in logs[-1]:
            return None
        first, newest = logs[:steps], logs[-steps:]
        rise, gained = _change("reward", first, newest), _change("right", first, newest)
        highest = max(log["reward"] for log in logs) - min(log["reward"] for log in logs)
        if rise < max(0.02, RISEN * highest) or rise < 0.5 * highest or gained > 0.02:
            return None
        if _mean("right", newest) > 0.5 and gained > -0.02:
            return None
        signs = _signs(first, newest, samples)
        if not signs:
            return None
        return (
            f"The reward rose by {rise:.2f} and right answers did not ({_mean('right', first):.0%} before, "
            f"{_mean('right', newest):.0%} now): the model has found a way to be paid without being right; "
            f"{', and '.join(signs)}. Try that answer with rewards.check, and close the hole in "
            f"{_payer(first, newest)}."
        )


def _newest(logs: Sequence[Log], steps: int | None) -> Sequence[Log] | None:
    return logs[-steps:] if steps is not None and len(logs) >= steps else None


def _mean(name: str, logs: Sequence[Log]) -> float:
    return fmean(log[name] for log in logs)


def _change(name: str, first: Sequence[Log], newest: Sequence[Log]) -> float:
    return _mean(name, newest) - _mean(name, first)


def _payer(first: Sequence[Log], newest: Sequence[Log]) -> str:
    """The reward function whose mean rose most."""
    names = [key for key in newest[-1] if key.startswith("rewards/") and key.endswith("/mean")]
    best = max(names, key=lambda name: _change(name, first, newest), default="rewards/the rewards/mean")
    return best.removeprefix("rewards/").removesuffix("/mean")


def _signs(first: Sequence[Log], newest: Sequence[Log], samples: Sequence["Sample"]) -> list[str]:
    """What besides the reward shows that it is gamed, in words."""
    signs = []
    if _mean("in_form", newest) > 0.9:
        signs.append(f"{_mean('in_form', newest):.0%} of the answers are in form")
    lengths = _mean("completions/mean_length", first), _mean("completions/mean_length", newest)
    if lengths[1] < 0.4 * lengths[0]:
        signs.append(f"they shrank from {lengths[0]:.0f} to {lengths[1]:.0f} tokens")
    if samples:
        _, most = Counter(sample.completion.strip() for sample in samples).most_common(1)[0]
        if most > 0.5 * len(samples):
            signs.append(f"{most} of the newest {len(samples)} are the same text")
    return signs


class Stopper(TrainerCallback):
    """Ends the run at the first reason that a `StopWhen` gives, prints it with three real answers, and keeps it.

    Attributes:
        reason (`str`, *optional*): Why the run was ended; None if it was not.
    """

    def __init__(self, rules: StopWhen):
        self.rules = rules
        self.reason: str | None = None

    def on_train_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self.reason = None

    def on_log(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any) -> None:
        samples = list(vars(state).get("samples", ()))
        logs = [log for log in state.log_history if "frac_reward_zero_std" in log]
        if self.reason is None and (reason := self.rules.reason(logs, samples)) is not None:
            self.reason = reason
            control.should_training_stop = control.should_save = True
            if state.is_world_process_zero:
                print(f"Stopped after step {state.global_step}. {reason}", *_quoted(samples), sep="\n")


def _quoted(samples: Sequence["Sample"]) -> list[str]:
    """Three answers, as they are; different ones where there are such."""
    distinct = list({sample.completion: sample for sample in samples}.values())[:3]
    return [f"  the answer {sample.completion[:SHOWN]!r} got {sample.rewards}" for sample in distinct]
