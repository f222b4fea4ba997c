"""A recorded run, shown again with the same panel where there is no GPU to train on. Always marked as a replay.

A preset's own is panel/runs/<its name>.json, from live.save, whose `model` says which weights and questions it had.

replay.run()                 # the run that comes with the package: the workshop model, on a CPU
replay.run("run.json")       # one of your own, from live.save("run.json", "my model")
"""

import json
import time
from pathlib import Path

from nbhelpers import host
from nbhelpers.evaluate import Answer, Decoding
from nbhelpers.presets import WORKSHOP, Preset
from nbhelpers.progress import interruptible
from nbhelpers.rewards import Sample, Tags

from . import display

RECORDED = WORKSHOP / "recorded_run.json"
RUNS = Path(__file__).parent / "runs"
PICTURES_PER_SECOND = 2


class Replay(display.View):
    """A recorded run; `show_at(step)` shows it as it was after that step.

    Args:
        path (`str` or `Path`, *optional*): From `live.save`; the workshop model's run if not given.

    Attributes:
        model (`str`), hardware (`str`), date (`str`), versions (`dict[str, str]`): Of the recording.
        history, pair, probed, ended: What is shown, as in `panel.Live`.

    Raises ValueError if the file is not a recorded run.
    """

    def __init__(self, path: str | Path | None = None):
        path = RECORDED if path is None else Path(path)
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
            if recorded["recorded_run"] != 1:
                raise ValueError(f"its form is {recorded['recorded_run']}")
            self.model, self.hardware, self.date = recorded["model"], recorded["hardware"], recorded["date"]
            self.versions = recorded["versions"]
            super().__init__(
                recorded["total_steps"],
                f"REPLAY of a recorded run: {self.model}, {self.hardware}, {self.date} — nothing was trained here",
            )
            self.method = recorded.get("method", "GRPO")
            self._history, self._seconds = recorded["history"], recorded["seconds"]
            self._pairs = {int(step): [Sample(**s) for s in pair] for step, pair in recorded["pairs"].items()}
            self._probed = {int(step): [_answer(a) for a in answers] for step, answers in recorded["probed"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a recorded run of this version ({type(error).__name__}: {error}): record one with "
                'live.save("run.json", "the model\'s name")'
            ) from None

    @property
    def steps(self) -> list[int]:
        """The steps that were logged."""
        return [row["step"] for row in self._history]

    def show_at(self, step: int) -> None:
        """Show what was known after `step`: in a notebook in the same place as before, in a terminal as a line."""
        self.history = [row for row in self._history if row["step"] <= step]
        self.first_step = self._history[0]["step"] - 1
        self.pair_step = max((at for at in self._pairs if at <= step), default=0)
        self.pair = self._pairs.get(self.pair_step, [])
        self.probed = {at: answers for at, answers in self._probed.items() if at <= step}
        self.ended = self._seconds if step >= self._history[-1]["step"] else None
        if display.in_notebook():
            self.update()
        else:
            print(self.line(), flush=True)


@interruptible("a recorded run was shown", "nothing is changed")
def run(path: str | Path | None = None, seconds: float = 20.0) -> Replay:
    """Show a recorded run as if it went on now, in `seconds`; 0 shows its end at once.

    Args:
        path (`str` or `Path`, *optional*): From `live.save`; the workshop model's run if not given.
        seconds (`float`): How long the replay takes. The times in it are the recorded run's.

    Returns:
        `Replay`, with what it shows.

    Raises:
        ValueError: If the file is not a recorded run.
    """
    replay = Replay(path)
    steps, start = replay.steps, time.monotonic()
    pictures = max(1, min(len(steps), round(seconds * PICTURES_PER_SECOND)))
    for i in range(1, pictures + 1):
        replay.show_at(steps[len(steps) * i // pictures - 1])
        time.sleep(max(0.0, start + seconds * i / pictures - time.monotonic()))
    return replay


def recorded(preset: Preset) -> Path:
    """The recorded run of `preset`; where it has none the workshop model's."""
    own = RUNS / f"{preset.name}.json"
    return own if own.exists() else RECORDED


def instead_of(preset: Preset, seconds: float = 20.0) -> None:
    """Where training `preset` would take days, for lack of a GPU, replay a recorded run and stop; elsewhere nothing.

    Args:
        preset (`presets.Preset`): What the notebook trains.
        seconds (`float`): How long the replay takes.

    It is the preset's own recorded run if there is one, else the workshop model's.

    Raises host.CannotRun after the replay, so that "Run all" ends there, with what to do for a run of one's own.
    """
    if not host.needs_gpu(preset):
        return
    shown = run(recorded(preset), seconds=seconds)
    raise host.CannotRun(
        f"{preset.title} was not trained: this machine has no CUDA GPU. What you saw is a recorded run of "
        f"{shown.model}. Open this notebook where there is a GPU. {host.GET_A_GPU}. 00_quickstart trains on a CPU. To "
        "go on here all the same, with minutes for one answer, delete the line with replay.instead_of"
    )


def _answer(recorded: dict) -> Answer:
    tags = {"tags": Tags(**recorded["tags"])} if "tags" in recorded else {}  # runs of 0.1 have none
    return Answer(**{**recorded, "decoding": Decoding(**recorded["decoding"]), **tags})
