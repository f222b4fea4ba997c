"""The curves of a run: up to six small plots on white, and what they show in words."""

import math
import textwrap
from typing import TYPE_CHECKING

from nbhelpers.html import COLORS as COLORS

from . import history as past

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#333333"  # of axes and text
GREY = "#767676"
DASHES = (
    "-",
    (0, (5, 1.2)),
    (0, (1.2, 1)),
    (0, (6, 1.2, 1.2, 1.2)),
    (0, (3, 1.2)),
    (0, (8, 2)),
)  # by curve, as the colours
COLUMNS = 2  # plots in a row: in three the letters are too small for a narrow window
WIDTH = 8.0  # inches, of a picture for a notebook; with LETTER it decides how large letters are in a narrow window
ROW = 1.55  # inches, a row of plots without its legends
LETTER = 9.0  # points, of the smallest letters
LETTERS = 50  # of a legend fit above one plot
LONGEST_NAME = 34  # letters of it in a legend


def learns_texts(history: list[dict]) -> bool:
    """Whether it is a run without rewards, which has a loss to watch."""
    return bool(history) and not any(row["rewards"] or row["reward"] is not None for row in history)


def curves_of(history: list[dict]) -> dict[str, dict[str, list]]:
    """{plot: {curve: its values, None where there is none}}: only what was logged, but the reward always;
    without rewards the loss.

    Args:
        history (`list[dict]`): As in `Live.history`.
    """

    def column(name: str, key: str | None = None) -> list:
        return [row.get(name) if key is None else row[name].get(key) for row in history]

    names = functions(history)
    several = ["total", *names] if len(names) > 1 else names
    reward = {name: column("rewards", name) for name in names} if len(names) > 1 else {}
    spread = {name: column("within", name) for name in several} | {"between groups": column("between", "total")}
    if not any(row["within"] for row in history):  # TRL's plain trainer: no groups to look at
        spread = {name: column("stds", name) for name in names}
    clip_ratio = column("clip_ratio") if any(column("clip_ratio")) else []  # 0 with one update a rollout
    plots = {
        "reward": {"total" if reward else "reward": column("reward"), **reward},
        "spread in a group" if "between groups" in spread else "spread of all answers": spread,
        "share": {
            "in form": column("format"),
            "cut off": column("clipped"),
            "no signal": column("zero_signal"),
            "clipped": clip_ratio,
            "agree": column("agree"),
        },
        "tokens an answer": {"mean": column("length"), "shortest": column("shortest"), "longest": column("longest")},
        "tokens / s": {"prompts and answers": column("speed")},
        "KL to the start": {"KL": column("kl"), "KL an answer": column("kl_answer")},
    }
    margins = column("margin")
    if any(margin is not None for margin in margins):  # what pairs teach, whose rewards have no other spread
        plots = {"margin of a pair" if "spread" in name else name: curves for name, curves in plots.items()}
        plots["margin of a pair"] = {"margin": margins}
    if learns_texts(history):
        plots = {
            "loss": {"nats a token": column("loss")},
            "gradient": {"before it is cut": column("grad_norm")},
            "tokens / s": {"texts": column("speed")},
        }
    logged = {}
    for label, curves in plots.items():
        known = {name: values for name, values in curves.items() if any(value is not None for value in values)}
        if known or label in ("reward", "loss"):
            logged[label] = known
    return logged


def functions(history: list[dict]) -> list[str]:
    """The names of the reward functions, those too that have not applied yet."""
    return list(dict.fromkeys(name for row in history for name in row["rewards"]))


def words(history: list[dict]) -> str:
    """What the curves show, in words, for those who do not see them.

    Args:
        history (`list[dict]`): As in `Live.history`.
    """
    if not history:
        return "Curves of a run before its first step."
    told = []
    for label, curves in curves_of(history).items():
        ends = {name: past.ends(values) for name, values in curves.items()}
        parts = [f"{name} {_told(start)} to {_told(end)}" for name, (start, end) in ends.items()]
        told.append(f"{label}: {', '.join(parts)}")
    steps = f"steps {history[0]['step']} to {history[-1]['step']}, {past.of_what(history)}"
    return f"Curves of {steps}. {'. '.join(told)}."


def _told(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def draw(figure: "Figure", history: list[dict], total_steps: int, *, note: str = "") -> None:
    """Draw the curves by step. A figure used before for the same plots keeps its axes: half the time.

    Args:
        figure (`matplotlib.figure.Figure`): Where to draw. Its height is set.
        history (`list[dict]`): As in `Live.history`.
        total_steps (`int`): Right end of the step axis.
        note (`str`): Written above the plots.
    """
    plots = curves_of(history)
    steps = [row["step"] for row in history]
    legends = [_legend_columns(curves) for curves in plots.values()]
    wanted = str(list(zip(plots, legends, strict=True)))
    if figure.get_gid() != wanted:  # its name says what it is arranged for
        _arrange(figure, list(plots), [rows for _, rows in legends], note)
        figure.set_gid(wanted)
    for axes, (label, curves), (columns, _) in zip(figure.axes, plots.items(), legends, strict=True):
        _plot(axes, label, steps, curves)
        _legend(axes, columns)
        axes.set_xlim(0, 1.01 * max([1, total_steps, *steps]))


def _legend_columns(curves: dict[str, list]) -> tuple[int, int]:
    """Columns and rows of a plot's legend, so that every curve is named."""
    names = [_short(name) for name in curves] or [""]
    columns = max(1, min(len(names), LETTERS // (5 + max(map(len, names)))))
    return columns, math.ceil(len(names) / columns)


def _short(name: str) -> str:
    """A function's name, a long one without its middle."""
    half = LONGEST_NAME // 2 - 1
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def _arrange(figure: "Figure", labels: list[str], legend_rows: list[int], note: str) -> None:
    """Empty axes, each row of them with room for its legends above it."""
    figure.clear()
    rows = math.ceil(len(labels) / COLUMNS)
    line = 1.45 * LETTER / 72  # inches
    heads = [0.12 + line * max(legend_rows[row * COLUMNS : (row + 1) * COLUMNS]) for row in range(rows)]
    width = figure.get_figwidth()
    note = textwrap.fill(note, math.floor(11.5 * width))  # letters of an inch, in bold
    top = 0.3 + line * note.count("\n") if note else 0.05
    bottom, below = 0.22, 0.26  # below: a row's numbers of steps
    height = top + sum(heads) + rows * (ROW + below) + bottom
    figure.set_figheight(height)
    left, gap, right = 0.68, 0.72, 0.08
    wide = (width - left - right - gap * (COLUMNS - 1)) / COLUMNS
    y = height - top
    for i, label in enumerate(labels):
        row, column = divmod(i, COLUMNS)
        if column == 0:
            y -= heads[row] + ROW + (below if row else 0.0)
        last = i == len(labels) - 1 and column == 0  # alone in the last row
        across = width - left - right if last else wide
        axes = figure.add_axes(((left + column * (wide + gap)) / width, y / height, across / width, ROW / height))
        axes.set_ylabel(label, color=INK, fontsize=LETTER + 1)
        if row == rows - 1:
            axes.set_xlabel("step", color=INK, fontsize=LETTER + 1, labelpad=1)
        axes.tick_params(colors=INK, labelsize=LETTER)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        if label == "tokens / s":
            axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
        if label == "share":
            axes.set_ylim(-0.03, 1.03)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    if note:
        figure.text(0.005, 1 - 0.06 / height, note, color=INK, fontsize=LETTER, weight="bold", va="top")


def _plot(axes: "Axes", label: str, steps: list[int], curves: dict[str, list]) -> None:
    for artist in [*axes.lines, *axes.collections]:
        artist.remove()
    smooth = {name: smoothed([math.nan if v is None else v for v in values]) for name, values in curves.items()}
    if "longest" in curves and "shortest" in curves:  # the range of the answers as a band around their mean
        low, high = smooth.pop("shortest"), smooth.pop("longest")
        axes.fill_between(steps, low, high, color=COLORS[0], alpha=0.2, linewidth=0, label="shortest to longest")
    for i, (name, values) in enumerate(smooth.items()):
        color, line = (COLORS[i % len(COLORS)], DASHES[i % len(DASHES)])
        raw = [math.nan if v is None else v for v in curves[name]]
        axes.plot(steps, raw, ".", color=color, alpha=0.3, markersize=2.5)
        axes.plot(steps, values, linestyle=line, color=color, label=_short(name), linewidth=2.0 if i == 0 else 1.6)
    if label not in ("reward", "share"):
        known = [0.0, *(v for values in curves.values() for v in values if v is not None)]
        low, high = 1.08 * min(known), 1.08 * max(known)
        axes.set_ylim(low, high if high > low else 1)


def _legend(axes: "Axes", columns: int) -> None:
    """Above the axes, in so many columns: every curve is named."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=columns,
            fontsize=LETTER,
            frameon=False,
            labelcolor=INK,
            handlelength=2.2,
            handletextpad=0.4,
            columnspacing=0.9,
            borderaxespad=0.1,
            labelspacing=0.25,
        )


def style() -> None:
    """Set matplotlib so that plots are legible in a light notebook and in a dark one: dark ink on white."""
    import matplotlib.pyplot as plt

    plt.rc("text", color=INK)
    plt.rc("axes", labelcolor=INK, edgecolor=INK)
    plt.rc("xtick", color=INK)
    plt.rc("ytick", color=INK)


def smoothed(values: list[float]) -> list[float]:
    """The mean over the neighbouring steps, up to a sixteenth of the run to each side; NaN is left out."""
    import numpy as np

    half = min(len(values) // 16, 25)
    numbers = np.array(values, dtype=float)
    known = ~np.isnan(numbers)
    window = np.ones(2 * half + 1)
    # "full" and a cut, for "same" takes the length of the longer of the two
    cut = slice(half, half + len(values))
    sums = np.convolve(np.where(known, numbers, 0.0), window)[cut]
    counts = np.convolve(known.astype(float), window)[cut]
    return np.where(counts > 0.5, sums / np.maximum(counts, 1.0), np.nan).tolist()
