"""How a run is shown, live or replayed: numbers, curves, and a few answers of the model, in one updating place.

No widget: four outputs that update together, HTML with how far it is, a PNG with the curves, HTML with the numbers and
with the answers. So a saved notebook shows them on GitHub, Kaggle and nbviewer too, and where HTML is not shown there
is plain text. The picture is told in words beside it, for those who do not see it.
"""

import base64
import html
import threading
from collections.abc import Callable
from itertools import pairwise
from operator import methodcaller
from statistics import median
from typing import TYPE_CHECKING, Any

from nbhelpers import gpu, host
from nbhelpers.evaluate import Answer
from nbhelpers.html import COLORS, bar, cell, framed, table
from nbhelpers.progress import duration, this_cell
from nbhelpers.progress import in_notebook as in_notebook
from nbhelpers.rewards import Sample

from . import buttons, curves, history, pieces
from .pieces import CELL, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAST = 20  # steps that the time left is told from
SHOWN_WIDTH = 840  # CSS pixels of the picture, where there is room
NOTE = f"border-left:4px solid {COLORS[1]};padding-left:8px;margin:0 0 4px"


class View:
    """What is known of a run, and its outputs.

    Args:
        total_steps (`int`): Of the whole run.
        note (`str`): A line above everything, in text and picture.

    Attributes:
        history, probed, ended: As in `panel.Live`.
        pair (`list[rewards.Sample]`): The best and the worst answer to show, or one, of step `pair_step` (`int`).
        first_step (`int`): Where this session began: more than 0 after a resume.
    """

    def __init__(self, total_steps: int = 0, note: str = ""):
        self.total_steps, self.note = total_steps, note
        self.history: list[dict] = []
        self.pair: list[Sample] = []
        self.pair_step = 0
        self.probed: dict[int, list[Answer]] = {}
        self.asked: list[tuple[int, str, str]] = []
        self.attended = True  # False where no buttons can stand beside a run, which then tells of them
        self.ended: float | None = None
        self.why = ""  # `stop_when` ended the run, in its words
        self.first_step = 0
        self.writes = True  # answers; False where it learns from texts alone
        self.method = "GRPO"  # that learns, in TRL's words
        self.handles: list[Any] = []  # IPython's, of the outputs that are updated
        self._cell: str | None = None  # in which they are
        self._figure: Figure | None = None
        self._showing = threading.RLock()  # held while the handles change: a thread shows the clock

    def line(self) -> str:
        """The newest step as one line of plain text; after the end, what changed from start to end."""
        note = [self.note] if self.note else []
        if not self.history:
            return " · ".join([*note, f"step 0/{self.total_steps}: {self._first()}"])
        row = self.history[-1]
        by_function = ", ".join(f"{name} {self._said(_reward_of(name))}" for name in row["rewards"])
        reward = self._said(lambda row: row["reward"])
        parts = [f"reward {reward}" + (f" ({by_function})" if len(row["rewards"]) > 1 else "")]
        parts = [] if curves.learns_texts(self.history) else parts
        parts += [f"{name} {value}" for name, value in self._shares(row)]
        parts += ["THE REWARD IS GAMED"] if row.get("gaming") else []
        parts += [f"memory {pieces.memory_text(row['memory'])}"] if row["memory"] else []
        times = [f"{name} {value}" for name, value in self._times(row["seconds"])]
        return " · ".join([*note, self._progress(), *parts, *times])

    __repr__ = line

    def figure(self) -> "Figure":
        """The curves as a `matplotlib.figure.Figure`, to be saved: `live.figure().savefig("curve.png")`. A notebook
        shows it."""
        from .picture import Picture

        figure = Picture(figsize=(11, 5.2), dpi=130, facecolor="white")
        figure.words = curves.words(self.history)
        curves.draw(figure, self.history, self.total_steps, note=self.note)
        return figure

    def picture(self) -> bytes:
        """The curves as a small PNG on white, whatever the notebook's theme."""
        from .picture import Picture, png

        if self._figure is None:
            self._figure = Picture(figsize=(curves.WIDTH, 1), dpi=130, facecolor="white")
        curves.draw(self._figure, self.history, self.total_steps, note=self.note)
        return png(self._figure)

    def show(self) -> None:
        """Display all of it, here and now; what comes later updates this display."""
        with self._showing:
            self.handles = []
            self.update()

    def update(self) -> None:
        """Update what is displayed, or display it."""
        from IPython.display import display

        with self._showing:
            if not self.handles:
                self._cell = this_cell()
            for i, (bundle, metadata) in enumerate(self.outputs()):
                if i < len(self.handles):
                    self.handles[i].update(bundle, metadata=metadata, raw=True)
                else:
                    self.handles.append(display(bundle, metadata=metadata, raw=True, display_id=True))

    def _ipython_display_(self) -> None:
        """As the last line of a cell: all of it, after a closed tab too; nothing where this very cell shows it."""
        if not in_notebook():
            print(self.line(), flush=True)
        elif not self.handles or self._cell != this_cell():
            self.show()

    def outputs(self) -> list[tuple[dict, dict]]:
        """What is displayed, as (MIME bundle, metadata): how far it is, curves, numbers, answers; before the first step
        one line."""
        head: tuple[dict, dict] = ({"text/html": self._head_html(), "text/plain": self.line()}, {})
        if not self.history:
            return [head]
        answers = pieces.asked_html(self.asked) + pieces.probes_html(self.probed)
        answers += pieces.pair_html(self.pair, self.pair_step, self.method)
        answers += "" if self.attended else f"<p>{buttons.STATIC}</p>"
        words = curves.words(self.history)
        # an output of its own: within HTML a viewer that cleans the HTML may leave it out
        picture = {"image/png": base64.b64encode(self.picture()).decode(), "text/plain": words}
        return [
            head,
            (picture, {"image/png": {"width": SHOWN_WIDTH, "alt": words}}),
            ({"text/html": self._numbers_html(words), "text/plain": ""}, {}),
            ({"text/html": framed(answers), "text/plain": ""}, {}),
        ]

    # ---- pieces ----

    def _progress(self) -> str:
        row = self.history[-1]
        step = f"step {row['step']}/{self.total_steps}"
        if self.ended is None:
            return step
        return f"done: {step}" if row["step"] >= self.total_steps else f"stopped: {step}"

    def _said(self, get: Callable[[dict], Any], text: Callable[[Any], str] = number) -> str:
        """A number of the newest step; after the end "start → end"."""
        if self.ended is None:
            return text(get(self.history[-1]))
        start, end = (text(value) for value in history.ends([get(row) for row in self.history]))
        return end if start == end else f"{start} → {end}"

    def _shares(self, row: dict) -> list[tuple[str, str]]:
        shares: dict[str, tuple[str, Callable[[Any], str]]] = {
            "right": ("right", percent),
            "format": ("format", percent),
            "alike": ("alike", percent),
            "length": ("length", lambda value: f"{value:.0f} tokens"),
            "cut off": ("clipped", percent),
            "no signal": ("zero_signal", percent),
            "replaced": ("replaced", percent),
            "clipped": ("clip_ratio", percent),
            "margin": ("margin", lambda value: f"{value:+.2g}"),
            "agree": ("agree", percent),
            "KL": ("kl", lambda value: f"{value:.3g}"),
            "KL an answer": ("kl_answer", lambda value: f"{value:.3g}"),
            "value loss": ("value_loss", lambda value: f"{value:.2g}"),
            "loss": ("loss", lambda value: f"{value:.2g}"),
            "gradient": ("grad_norm", lambda value: f"{value:.2g}"),
            "tokens/s": ("speed", lambda value: f"{value:,.0f}"),
        }
        if not any(row["clip_ratio"] for row in self.history):  # with one update a rollout it is 0
            del shares["clipped"]
        rows = [row] if self.ended is None else self.history
        said = {
            name: self._said(methodcaller("get", key), text)
            for name, (key, text) in shares.items()
            if any(row.get(key) is not None for row in rows)
        }
        if "tokens/s" in said:
            said["tokens/s"] = said["tokens/s"].split(" → ")[-1]  # the first steps compiled
        return list(said.items())

    def _times(self, elapsed: float | None) -> list[tuple[str, str]]:
        """Took, or elapsed and left."""
        if self.ended is not None:
            return [("took", duration(self.ended))]
        each = self._step_seconds()
        if elapsed is None or each is None:  # resumed: no step of this session yet
            return []
        row = self.history[-1]
        left = each * max(0, self.total_steps - row["step"])
        spent = sum(row.get("reward_seconds") or 0.0 for row in self.history if row["seconds"] is not None)
        rewards = [("in rewards", duration(spent))] if spent >= 1 else []
        return [("elapsed", duration(elapsed)), *rewards, ("left", duration(left) + self._session(left))]

    def _step_seconds(self) -> float | None:
        """Of a step, the median of the last ones: neither the first, which compiles, nor one with probes counts."""
        ends = [(self.first_step, 0.0)]
        ends += [(row["step"], row["seconds"]) for row in self.history if row["seconds"] is not None]
        each = [(then[1] - now[1]) / (then[0] - now[0]) for now, then in pairwise(ends) if then[0] > now[0]]
        return median(each[1:][-LAST:] or each) if each else None

    def _session(self, left: float) -> str:
        """What to add where the session ends before the run."""
        ends_in = host.session_left()
        if ends_in is None or left < ends_in:
            return ""
        return f", and {host.where()} ends this session in {duration(ends_in)} at the latest: run it again to go on"

    def _head_html(self, elapsed: float | None = None) -> str:
        """Where the run is, above all the rest. `elapsed` (seconds): by the clock, not by the newest step."""
        note = self.note and f"<p style='{NOTE}'><b>{html.escape(self.note)}</b></p>"
        if not self.history:
            since = "" if elapsed is None else f" · {duration(elapsed)}"
            return framed(f"{note}<b>step 0/{self.total_steps}</b>: {self._first()} …{since}{bar({COLORS[0]: 0.0})}")
        row = self.history[-1]
        share = min(1.0, row["step"] / max(1, self.total_steps))
        times = "".join(f" · {name} {value}" for name, value in self._times(elapsed or row["seconds"]))
        gamed = pieces.gaming_html(row.get("gaming", []))
        why = self.why and f"<p>{html.escape(self.why)}</p>"
        return framed(f"{note}{gamed}<b>{self._progress()}</b>{times}{why}{bar({COLORS[0]: share})}")

    def _first(self) -> str:
        """What takes so long before the first step."""
        does = "writes its first answers" if self.writes else "reads its first texts"
        return f"{'compiling, then ' if gpu.card() else ''}the model {does}"

    def _numbers_html(self, words: str) -> str:
        row = self.history[-1]
        reward = [] if curves.learns_texts(self.history) else [("reward", self._said(lambda row: row["reward"]))]
        numbers = [*reward, *self._shares(row)]
        values = [cell(value, f"{CELL};font-size:115%") for _, value in numbers]
        names = [name for name, _ in numbers]
        several = self.ended is not None and len(self.history) > 1
        caption = f"<div>start → end: {history.of_what(self.history)}</div>" if several else ""
        rewards, told = pieces.rewards_html(row, self._said, self.method), list(names)
        told += ["spread in a group", "between groups"] if row["within"] else []
        told += [name for name in (self.pair[0].used if self.pair else ()) if name not in told]
        return framed(
            f"<details><summary>The curves in words</summary>{html.escape(words)}</details>{caption}"
            f"{table(pieces.head(names, self.method), [values])}{rewards}{pieces.memory_html(row['memory'])}"
            f"{pieces.meanings_html(told, self.method)}"
        )


def _reward_of(name: str) -> Callable[[dict], float | None]:
    return lambda row: row["rewards"].get(name)
