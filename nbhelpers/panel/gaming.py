"""Has the model found a way to be paid without being right? One rule, for the panel and for what ends a run.

The signs are those of runs that somebody has seen. A SmolLM2-135M, paid for the form by parts, learned within 50 steps
to copy the placeholder of its own prompt: the reward rose, no answer was right, and all were the same 22 tokens.
"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from nbhelpers.rewards import Sample

Log = dict[str, Any]  # one step's entry of TRL's log
STEPS = 20  # of a window: what is compared is the newest one with those before it
RISEN = 0.5  # of the reward, as a share of its range so far: more is a rise
GAINED, LOST = 0.02, 0.05  # of right answers: less is no gain, more is a loss and no noise
FEW, MOST = 0.05, 0.5  # of the answers
ALIKE, GROWN = 0.7, 0.2  # where answers are alike, and by how much they have grown so
SHOWN = 300  # characters of an answer that is quoted


def alikeness(texts: Sequence[str], num_generations: int = 1) -> float:
    """How alike answers to different questions are, 0.0 to 1.0; 0.0 with one question.

    The share of the other questions' answers in which three words in a row of an answer stand too, on average: 1.0
    where all have the same words, 0.2 to 0.4 where a form and its phrases are the same. It takes time in proportion to
    the characters, not to the pairs of texts.

    Args:
        texts (`Sequence[str]`): The answers, those to one question side by side.
        num_generations (`int`): How many to a question.
    """
    words = [text.split() for text in texts]
    runs = [{tuple(one[i : i + 3]) for i in range(max(1, len(one) - 2))} for one in words]
    groups = [runs[i : i + num_generations] for i in range(0, len(runs), num_generations)]
    all_texts = Counter(run for of_one in runs for run in of_one)
    shares = []
    for group in groups:
        own, others = Counter(run for of_one in group for run in of_one), len(texts) - len(group)
        shares += [count * (all_texts[run] - count) / others for run, count in own.items() if others]
    return sum(shares) / max(1, all_texts.total())


def why(logs: Sequence[Log], samples: Sequence[Sample] = (), steps: int = STEPS) -> str | None:
    """That the reward is gamed, by which signs, and what to do; None where nothing shows it.

    It is gamed where, since some earlier window, the reward rose and right answers did not, and the answers have grown
    alike. Where hardly any answer is right, or fewer are than before, it is enough that they are in form, or a fraction
    of their length. A model that is mostly right and stays so may learn form and brevity, and one that is right now
    and then may learn the form first.

    Args:
        logs (`Sequence[dict]`): What was logged so far, oldest first, under TRL's names and the trainer's own `right`,
            `in_form` and `alike`. Without `right` only alike answers are a sign.
        samples (`Sequence[Sample]`): The newest answers.
        steps (`int`): Of a window.
    """
    logs = [log for log in logs if isinstance(log.get("reward"), (int, float)) and math.isfinite(log["reward"])]
    newest, rewards = logs[-steps:], [log["reward"] for log in logs]
    span = max(rewards, default=0.0) - min(rewards, default=0.0)
    for start in range(0, len(logs) - 2 * steps + 1, steps):
        found = _since(logs[start : start + steps], newest, span, samples)
        if found is not None:
            return found
    return None


def _since(first: Sequence[Log], newest: Sequence[Log], span: float, samples: Sequence[Sample]) -> str | None:
    """`why`, against one earlier window; `span` is what the rewards of the whole run lie between."""
    rise = _mean("reward", newest) - _mean("reward", first)
    if rise < max(0.02, RISEN * span):
        return None
    measured = _known("right", first, newest)
    before, now = (_mean("right", window) if measured else 0.0 for window in (first, newest))
    if now - before > GAINED or (now > MOST and now - before > -LOST):
        return None
    signs = _alike(first, newest, samples)
    if measured and (now < FEW or now - before < -LOST):
        signs = _shape(first, newest) + signs
    if not signs:
        return None
    said = f" and right answers did not ({before:.0%} before, {now:.0%} now)" if measured else ""
    name, share = _payer(first, newest)
    carried = f", which carries {share:.0%} of the rise" if share > 0.9 else ""
    return (
        f"The reward rose by {rise:.2f}{said}: the model has found a way to be paid without being right; "
        f"{', and '.join(signs)}. Try that answer with rewards.check, and close the hole in {name}{carried}."
    )


def _mean(name: str, logs: Sequence[Log]) -> float:
    return fmean(log[name] for log in logs)


def _known(name: str, *windows: Sequence[Log]) -> bool:
    return all(name in log for window in windows for log in window)


def _shape(first: Sequence[Log], newest: Sequence[Log]) -> list[str]:
    """In words, what the form and the length of the answers show."""
    signs, length = [], "completions/mean_length"
    if _known("in_form", newest) and _mean("in_form", newest) > 0.9:
        signs.append(f"{_mean('in_form', newest):.0%} of the answers are in form")
    if _known(length, first, newest) and _mean(length, newest) < 0.4 * _mean(length, first):
        signs.append(f"they shrank from {_mean(length, first):.0f} to {_mean(length, newest):.0f} tokens")
    return signs


def _alike(first: Sequence[Log], newest: Sequence[Log], samples: Sequence[Sample]) -> list[str]:
    """In words, what shows that the answers have grown alike."""
    logged = _known("alike", first, newest)
    before, now = (_mean("alike", window) if logged else 1.0 for window in (first, newest))
    most = max(Counter(sample.completion.strip() for sample in samples).values(), default=0)
    if most > 0.5 * len(samples) and now > 0.0:  # not where there is only one question
        return [f"{most} of the newest {len(samples)} are the same text"]
    if now > ALIKE and now - before > GROWN:
        return [f"they have grown alike ({before:.0%} of their words in common before, {now:.0%} now)"]
    return []


def _payer(first: Sequence[Log], newest: Sequence[Log]) -> tuple[str, float]:
    """The reward function whose mean rose most, and its share of all that rose."""
    names = [key for key in newest[-1] if key.startswith("rewards/") and key.endswith("/mean")]
    rises = {name: _mean(name, newest) - _mean(name, first) for name in names if _known(name, first, newest)}
    if not rises:
        return "the rewards", 0.0
    best = max(rises, key=lambda name: rises[name])
    all_rises = sum(rise for rise in rises.values() if rise > 0)
    return best.removeprefix("rewards/").removesuffix("/mean"), rises[best] / all_rises if all_rises else 0.0


def quoted(samples: Sequence[Sample], count: int) -> list[str]:
    """So many answers as they are, one a line with their rewards; different ones where there are such."""
    distinct = list({sample.completion: sample for sample in samples}.values())[:count]
    return [f"  the answer {sample.completion[:SHOWN]!r} got {sample.rewards}" for sample in distinct]
