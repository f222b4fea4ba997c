"""What a trainer tells the panel, a clock that a test winds, and what a notebook is shown."""

import base64
import io
from types import SimpleNamespace
from typing import ClassVar

import pytest
from PIL import Image
from transformers import TrainerControl, TrainerState

from nbhelpers import panel
from nbhelpers.panel import display
from nbhelpers.rewards import Sample

GOOD = "<reasoning>\nwhy\n</reasoning>\n<answer>\n9.9\n</answer>\n"
BAD = "</pre></td></table><script>alert(1)</script> $x$ \ud800"
SAMPLES = [
    Sample("middle?", "so so", {"correct": 1.0, "form": None}),
    Sample("q <b>?", GOOD, {"correct": 2.0, "form": 0.5}, 1.25),
    Sample("worst?", BAD, {"correct": 0.0, "form": 0.0}, -0.5),
]
ARGS = SimpleNamespace(num_generations=3, reward_weights=None)


def logs(reward: float | None = 1.5, **more) -> dict:
    return {
        "loss": 0.0,
        "reward": reward,
        "reward_std": 0.25,
        "rewards/correct/mean": 1.25,
        "rewards/correct/std": 9.0,
        "rewards/form/mean": 0.25,
        "completions/mean_length": 41.4,
        "completions/min_length": 11.0,
        "completions/max_length": 60.0,
        "clip_ratio/region_mean": 0.0,
        "num_tokens": 1000.0,
        "completions/clipped_ratio": 0.02,
        "frac_reward_zero_std": 0.31,
        **more,
    }


def run(live, steps, *, total=60, samples=SAMPLES, start=0, history=(), end=True, args=ARGS):
    state = TrainerState(max_steps=total, global_step=start, log_history=list(history))
    live.on_train_begin(args, state, TrainerControl())
    for log in steps:
        state.global_step += 1
        if samples is not None:
            state.samples = samples
        live.on_log(args, state, TrainerControl(), logs=log)
    if end:
        live.on_train_end(ARGS, state, TrainerControl())
    return live


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by `clock.step` seconds at each look."""

    class Clock:
        now, step = 0.0, 0.0

        def monotonic(self):
            self.now += self.step
            return self.now

        thread_time = monotonic  # all that happens is work

    made = Clock()
    monkeypatch.setattr(panel, "time", made)
    return made


@pytest.fixture
def shown(monkeypatch):
    """What a notebook gets: a list of (first or update, part, mime bundle)."""
    seen = []

    class Handle:
        def __init__(self, part):
            self.part = part

        def update(self, bundle, metadata=None, raw=False):
            assert raw
            seen.append(("update", self.part, bundle))

    def show(bundle, metadata, raw, display_id):
        assert raw and display_id
        before = seen[-1][1] if seen and seen[-1][0] == "first" else None
        part = "curves" if "image/png" in bundle else {"curves": "numbers", "numbers": "answers"}.get(before, "head")
        seen.append(("first", part, bundle))
        return Handle(part)

    monkeypatch.setattr("IPython.display.display", show)
    monkeypatch.setattr(display, "in_notebook", lambda: True)
    monkeypatch.setattr(display, "this_cell", lambda: "a cell")
    monkeypatch.setattr(panel, "Ticker", Ticks)
    Ticks.running.clear()
    return seen


class Ticks:
    """A ticker that ticks when a test says so."""

    running: ClassVar["list[Ticks]"] = []

    def __init__(self, tick):
        self.tick = tick
        self.running.append(self)

    def stop(self):
        self.running.remove(self)


def newest(shown, part: str) -> dict:
    return next(bundle for _, name, bundle in reversed(shown) if name == part)


def picture(bundle: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
