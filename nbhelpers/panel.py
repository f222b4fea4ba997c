"""What a person watches while a model trains: one output with the curves, the numbers and a few answers of the model.

In a notebook the output updates in place and needs no widget: it is HTML with one picture, so it stays readable in a
saved notebook. In a terminal it is one line for each logged step. The data behind it stays on the `Live` object.
"""

import base64
import html
import io
import math
import sys
import time

from transformers.trainer_callback import TrainerCallback

from nbhelpers.rewards import Sample, formatted

COLORS = ("#3d85c6", "#e0871b", "#2f9e6e", "#a56cc1", "#c9566b", "#8a7a55")  # legible on white and on black
GREY = "#808488"
WORK = 20  # of this many seconds at most one goes into drawing
# column of the history -> TRL's log key
METRICS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "length": "completions/mean_length",
    "clipped": "completions/clipped_ratio",
    "zero_signal": "frac_reward_zero_std",
    "kl": "kl",
}
HELP = {
    "reward": "mean over the answers of the newest step, all reward functions together",
    "format": "share of answers that have exactly the wanted form",
    "length": "mean number of tokens of an answer",
    "cut off": "share of answers that did not end within max_completion_length",
    "no signal": "share of groups whose answers all got the same reward: they teach nothing",
    "KL": "distance from the model before training",
    "left": "if the rest goes as fast as the steps so far",
}


class Live(TrainerCallback):
    """One updating output for a GRPO run: pass it to a trainer as `callbacks=[live]`.

    Args:
        total_steps (`int`, *optional*): Length of the run, for the time left; the trainer's own if not given.
        every (`float`): Seconds between two drawings in a notebook. Where drawing is slow it is done less often. A
            terminal gets a line for each logged step.

    Attributes:
        history (`list[dict]`): One dict a logged step: `step`, `reward`, `reward_std`, `rewards` (by function),
            `format`, `length` (tokens), `clipped`, `zero_signal`, `kl`, `seconds` since the start. What was not
            logged is None. After a resume the steps of the earlier session are there too, without seconds.
        samples (`list[rewards.Sample]`): The newest answers. They come from `state.samples`, which LeanGRPOTrainer
            sets; with TRL's plain trainer there are none, and no format rate either.

    Example:
    ```python
    live = panel.Live()
    trainer = LeanGRPOTrainer(..., callbacks=[live])
    trainer.train()
    live.figure().savefig("reward_curve.png")
    ```
    """

    def __init__(self, total_steps: int | None = None, every: float = 1.0):
        self.total_steps = total_steps
        self.every = every
        self.history: list[dict] = []
        self.samples: list[Sample] = []
        self.ended: float | None = None  # seconds that the run took
        self._total = total_steps or 0
        self._first_step = 0
        self._started = time.monotonic()
        self._draw_again = 0.0  # not before this time
        self._handle = None  # of the notebook's output
        self._figure = None

    # ---- what the trainer calls ----

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.history = [_row(log, seconds=None) for log in state.log_history if "reward" in log]
        self.samples, self.ended, self._handle = [], None, None
        self._total = self.total_steps or state.max_steps
        self._first_step = state.global_step
        self._started = time.monotonic()
        self._draw_again = 0.0
        if _in_notebook():
            self._draw()  # at once: a large model's first step takes a while

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "reward" not in (logs or {}):
            return  # the last log of a run holds its run time, not a step
        self.samples = list(vars(state).get("samples", []))
        row = _row({**logs, "step": state.global_step}, seconds=time.monotonic() - self._started)
        if self.samples:
            row["format"] = sum(formatted(sample.completion) for sample in self.samples) / len(self.samples)
        self.history.append(row)
        if not _in_notebook():
            print(self.line(), flush=True)
        elif time.monotonic() >= self._draw_again:
            self._draw()

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.ended = time.monotonic() - self._started
            if _in_notebook():
                self._draw()
            else:
                print(self.line(), flush=True)

    # ---- what it shows ----

    def line(self) -> str:
        """The newest step as one line of plain text."""
        if not self.history:
            return f"step 0/{self._total}: the model writes its first answers"
        row = self.history[-1]
        by_function = ", ".join(f"{name} {_number(value)}" for name, value in row["rewards"].items())
        parts = [f"reward {_number(row['reward'])}" + (f" ({by_function})" if len(row["rewards"]) > 1 else "")]
        parts += [f"{name} {value}" for name, value in self._shares(row)]
        return " · ".join([self._progress(), *parts, *(f"{name} {value}" for name, value in self._times(row))])

    def figure(self):
        """The curves as a `matplotlib.figure.Figure` on white, to be saved: `live.figure().savefig("curve.png")`."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.2), dpi=130, facecolor="white")
        draw_curves(figure, self.history, self._total, ink="#333333")
        return figure

    def _progress(self) -> str:
        row = self.history[-1]
        step = f"step {row['step']}/{self._total}"
        if self.ended is None:
            return step
        return f"done: {step}" if row["step"] >= self._total else f"stopped: {step}"

    def _shares(self, row: dict) -> list[tuple[str, str]]:
        found = {
            "format": _percent(row["format"]),
            "length": None if row["length"] is None else f"{row['length']:.0f} tokens",
            "cut off": _percent(row["clipped"]),
            "no signal": _percent(row["zero_signal"]),
            "KL": None if row["kl"] is None else f"{row['kl']:.3g}",
        }
        return [(name, value) for name, value in found.items() if value is not None]

    def _times(self, row: dict) -> list[tuple[str, str]]:
        if self.ended is not None:
            return [("took", _clock(self.ended))]
        done = row["step"] - self._first_step
        if row["seconds"] is None or done < 1:  # resumed: no step of this session yet
            return []
        left = row["seconds"] / done * max(0, self._total - row["step"])
        return [("elapsed", _clock(row["seconds"])), ("left", _clock(left))]

    def _draw(self) -> None:
        from IPython.display import display

        start = time.monotonic()
        bundle = {"text/html": self._html(), "text/plain": self.line()}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
        now = time.monotonic()
        self._draw_again = now + max(self.every, WORK * (now - start))

    def _html(self) -> str:
        if not self.history:
            return f"<p>{html.escape(self.line())} …</p>"
        row = self.history[-1]
        numbers = [("reward", _number(row["reward"])), *self._shares(row), *self._times(row)]
        head = "".join(f"<th title='{HELP.get(name, '')}' style='{_CELL}'>{name}</th>" for name, _ in numbers)
        cells = "".join(f"<td style='{_CELL};font-size:115%'>{value}</td>" for _, value in numbers)
        share = min(1.0, row["step"] / max(1, self._total))
        return (
            "<div class='mathjax_ignore tex2jax_ignore' style='max-width:1000px'>"
            f"<b>{self._progress()}</b>"
            "<div style='height:6px;margin:4px 0 8px;border-radius:3px;background:rgba(128,128,128,.25)'>"
            f"<div style='height:6px;border-radius:3px;width:{share:.1%};background:{COLORS[0]}'></div></div>"
            f"<table style='border-collapse:collapse'><tr>{head}</tr><tr>{cells}</tr></table>"
            f"<img alt='{html.escape(self.line(), quote=True)}' style='width:100%;margin:8px 0' "
            f"src='data:image/png;base64,{self._picture()}'>{_samples_html(self.samples)}</div>"
        )

    def _picture(self) -> str:
        """The curves as a small PNG on a transparent ground, base64."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image

        if self._figure is None:
            self._figure = Figure(figsize=(10, 2.5), dpi=120, facecolor="none")
            FigureCanvasAgg(self._figure)
        draw_curves(self._figure, self.history, self._total, ink=GREY)
        self._figure.canvas.draw()
        size = self._figure.canvas.get_width_height()
        image = Image.frombytes("RGBA", size, bytes(self._figure.canvas.buffer_rgba()))
        out = io.BytesIO()
        image.quantize(48, method=Image.Quantize.FASTOCTREE).save(out, "PNG", optimize=True)  # a third of the bytes
        return base64.b64encode(out.getvalue()).decode()


# ---- the curves ----


def draw_curves(figure, history: list[dict], total_steps: int, *, ink: str) -> None:
    """Draw reward, shares and completion length by step. A figure used before keeps its axes: half the time.

    Args:
        figure (`matplotlib.figure.Figure`): Where to draw.
        history (`list[dict]`): As in `Live.history`.
        total_steps (`int`): Right end of the step axis.
        ink (`str`): Colour of axes and text.
    """
    steps = [row["step"] for row in history]
    names = list(dict.fromkeys(name for row in history for name in row["rewards"]))
    rewards = {"total": [row["reward"] for row in history]}
    rewards |= {name: [row["rewards"].get(name) for row in history] for name in names}
    plots = {
        "reward": rewards if len(names) > 1 else {"reward": rewards["total"]},
        "share": {
            "format": [row["format"] for row in history],
            "cut off": [row["clipped"] for row in history],
            "groups without signal": [row["zero_signal"] for row in history],
        },
        "tokens": {"answer length": [row["length"] for row in history]},
    }
    if not figure.axes:
        for axes, label in zip(figure.subplots(1, 3), plots, strict=True):
            _dress(axes, label, ink)
    for axes, curves in zip(figure.axes, plots.values(), strict=True):
        for line in list(axes.lines):
            line.remove()
        for i, (name, values) in enumerate(curves.items()):
            raw = [math.nan if value is None else value for value in values]
            if all(math.isnan(value) for value in raw):
                continue
            color = COLORS[i % len(COLORS)]
            axes.plot(steps, raw, ".", color=color, alpha=0.35, markersize=3)
            axes.plot(steps, smoothed(raw), color=color, label=name, linewidth=2.2 if i == 0 else 1.5)
        axes.set_xlim(0, 1.01 * max([1, total_steps, *steps]))
        if curves.keys() == {"answer length"}:
            axes.set_ylim(0, 1.08 * max([1, *(value for value in curves["answer length"] if value is not None)]))
        if axes.lines:
            axes.legend(
                loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, fontsize=8, frameon=False, labelcolor=ink,
                handlelength=1.2, columnspacing=1.0, borderaxespad=0.2,
            )  # fmt: skip
    legend_rows = max(1, math.ceil(len(plots["reward"]) / 3))
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.19, top=0.96 - 0.08 * legend_rows, wspace=0.24)


def _dress(axes, label: str, ink: str) -> None:
    axes.set_facecolor("none")
    axes.set_ylabel(label, color=ink, fontsize=9)
    axes.set_xlabel("step", color=ink, fontsize=9)
    axes.tick_params(colors=ink, labelsize=8)
    axes.grid(color=ink, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    if label == "share":
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])


def smoothed(values: list[float]) -> list[float]:
    """The mean over the neighbouring steps, up to a sixteenth of the run to each side; NaN is left out."""
    half = min(len(values) // 16, 25)
    means = []
    for i in range(len(values)):
        near = [value for value in values[max(0, i - half) : i + half + 1] if not math.isnan(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


# ---- pieces ----

_CELL = "text-align:left;padding:2px 14px 2px 0;border:0;background:none"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;text-align:left;margin:2px 0;background:none;color:inherit"


def _samples_html(samples: list[Sample]) -> str:
    """The best and the worst of the newest answers, side by side. Model text is escaped: it may hold anything."""
    if not samples:
        return ""
    ranked = sorted(samples, key=_total_reward)
    shown = [("best answer of this step", ranked[-1]), ("worst answer of this step", ranked[0])]
    if _total_reward(ranked[0]) == _total_reward(ranked[-1]):
        shown = [("an answer of this step (all have the same reward)", ranked[-1])]
    cells = ""
    for title, sample in shown:
        given = " · ".join(f"{name} {_number(value)}" for name, value in sample.rewards.items())
        advantage = "" if sample.advantage is None else f" · advantage {sample.advantage:+.2f}"
        cells += (
            "<td style='vertical-align:top;text-align:left;width:50%;padding:6px 10px;"
            "border:1px solid rgba(128,128,128,.4)'>"
            f"<b>{title}</b><br><small>{html.escape(given)}{advantage}</small>"
            f"<pre style='{_TEXT};opacity:.75'>{_shortened(sample.prompt)}</pre>"
            f"<pre style='{_TEXT}'>{_shortened(sample.completion)}</pre></td>"
        )
    return f"<table style='border-collapse:collapse;width:100%;table-layout:fixed'><tr>{cells}</tr></table>"


def _total_reward(sample: Sample) -> float:
    return sum(value for value in sample.rewards.values() if value is not None)


def _shortened(text: str, limit: int = 700) -> str:
    """Escaped for HTML; of a long text the two ends, since the answer comes last."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return html.escape(text.encode("utf-8", "replace").decode())


def _row(log: dict, seconds: float | None) -> dict:
    """One entry of the history from one log of TRL's; NaN counts as not logged."""
    values = {key: None if value is None or value != value else value for key, value in log.items()}
    rewards = {
        key.removeprefix("rewards/").removesuffix("/mean"): value
        for key, value in values.items()
        if key.startswith("rewards/") and key.endswith("/mean")
    }
    row = {"step": log["step"], **{name: values.get(key) for name, key in METRICS.items()}}
    return {**row, "rewards": rewards, "format": None, "seconds": seconds}


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def _clock(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{int(seconds) % 60:02}" if hours else f"{minutes}:{int(seconds) % 60:02}"


def _in_notebook() -> bool:
    """Whether outputs go to a notebook (Jupyter, Colab, Kaggle, a headless runner) and not to a terminal."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
