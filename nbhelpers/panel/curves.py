"""The curves of a run: up to six small plots, on white for a file or on nothing for a notebook, light or dark."""

import io
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#3d85c6", "#e0871b", "#2f9e6e", "#a56cc1", "#c9566b", "#8a7a55")  # legible on white and on black
GREY = "#808488"
COLUMNS = 3  # plots in a row
LETTERS = 46  # of a legend fit above one plot


def curves_of(history: list[dict]) -> dict[str, dict[str, list]]:
    """{plot: {curve: its values, None where there is none}}: only what was logged, but the reward always.

    Args:
        history (`list[dict]`): As in `Live.history`.
    """

    def column(name: str, key: str | None = None) -> list:
        return [row[name] if key is None else row[name].get(key) for row in history]

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
        },
        "tokens an answer": {"mean": column("length"), "shortest": column("shortest"), "longest": column("longest")},
        "tokens / s": {"prompts and answers": column("speed")},
        "KL to the start": {"KL": column("kl")},
    }
    logged = {}
    for label, curves in plots.items():
        known = {name: values for name, values in curves.items() if any(value is not None for value in values)}
        if known or label == "reward":
            logged[label] = known
    return logged


def functions(history: list[dict]) -> list[str]:
    """The names of the reward functions, those too that have not applied yet."""
    return list(dict.fromkeys(name for row in history for name in row["rewards"]))


def draw(figure: "Figure", history: list[dict], total_steps: int, *, ink: str, note: str = "") -> None:
    """Draw the curves by step. A figure used before for the same plots keeps its axes: half the time.

    Args:
        figure (`matplotlib.figure.Figure`): Where to draw.
        history (`list[dict]`): As in `Live.history`.
        total_steps (`int`): Right end of the step axis.
        ink (`str`): Colour of axes and text.
        note (`str`): Written above the plots.
    """
    plots = curves_of(history)
    steps = [row["step"] for row in history]
    columns, legend_rows = _columns(["total", *functions(history)], list(plots))
    if [axes.get_ylabel() for axes in figure.axes] != list(plots):
        _arrange(figure, list(plots), legend_rows, ink, note)
    for axes, (label, curves) in zip(figure.axes, plots.items(), strict=True):
        _plot(axes, label, steps, curves, ink)
        _legend(axes, list(curves), columns if label == "reward" else None, ink)
        axes.set_xlim(0, 1.01 * max([1, total_steps, *steps]))


def _width(labels: list[str]) -> int:
    """Columns of the first plot: it takes what would be holes in the last row."""
    return 1 + -len(labels) % COLUMNS


def _columns(names: list[str], labels: list[str]) -> tuple[int, int]:
    """Columns and rows of the first plot's legend."""
    letters = LETTERS * _width(labels) + 8  # the gap beside the plot
    columns = max(1, min(len(names), letters // (4 + max(map(len, names)))))
    return columns, math.ceil(len(names) / columns)


def _arrange(figure: "Figure", labels: list[str], legend_rows: int, ink: str, note: str) -> None:
    """Empty axes, with room for the first one's legend."""
    figure.clear()
    rows, wide = math.ceil(len(labels) / COLUMNS), _width(labels)
    grid = figure.add_gridspec(rows, COLUMNS)
    cells: list[tuple[int, int | slice]] = [(0, slice(0, wide))]
    cells += [divmod(i, COLUMNS) for i in range(wide, rows * COLUMNS)]
    for (row, column), label in zip(cells, labels, strict=True):
        axes = figure.add_subplot(grid[row, column])
        axes.set_facecolor("none")
        axes.set_ylabel(label, color=ink, fontsize=9)
        if row == rows - 1:
            axes.set_xlabel("step", color=ink, fontsize=9)
        axes.tick_params(colors=ink, labelsize=8)
        axes.grid(color=ink, alpha=0.2, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        if label == "tokens / s":
            axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
        if label == "share":
            axes.set_ylim(-0.03, 1.03)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    inches = figure.get_figheight()
    head = 0.2 + 0.15 * legend_rows + (0.24 if note else 0.0)
    figure.subplots_adjust(
        left=0.06, right=0.99, bottom=0.42 / inches, top=1 - head / inches, wspace=0.24, hspace=0.34 if rows > 1 else 0
    )
    if note:
        figure.text(0.005, 1 - 0.06 / inches, note, color=COLORS[1], fontsize=9, weight="bold", va="top")


def _plot(axes: "Axes", label: str, steps: list[int], curves: dict[str, list], ink: str) -> None:
    for artist in [*axes.lines, *axes.collections]:
        artist.remove()
    smooth = {name: smoothed([math.nan if v is None else v for v in values]) for name, values in curves.items()}
    if "longest" in curves and "shortest" in curves:  # the range of the answers as a band around their mean
        low, high = smooth.pop("shortest"), smooth.pop("longest")
        axes.fill_between(steps, low, high, color=COLORS[0], alpha=0.2, linewidth=0, label="shortest to longest")
    for i, (name, values) in enumerate(smooth.items()):
        color, line = (GREY, "--") if name == "between groups" else (COLORS[i % len(COLORS)], "-")
        raw = [math.nan if v is None else v for v in curves[name]]
        axes.plot(steps, raw, ".", color=color, alpha=0.3, markersize=2.5)
        axes.plot(steps, values, line, color=color, label=name, linewidth=2.0 if i == 0 else 1.4)
    if label not in ("reward", "share"):
        top = max((v for values in curves.values() for v in values if v is not None), default=0.0)
        axes.set_ylim(0, 1.08 * top or 1)


def _legend(axes: "Axes", names: list[str], columns: int | None, ink: str) -> None:
    """Above the axes: in so many columns, or in one line, which leaves the functions out (colours as for the reward) if
    they do not fit."""
    handles, labels = axes.get_legend_handles_labels()
    if columns is None and sum(len(name) + 4 for name in names) > LETTERS:
        handles, labels = handles[-1:], labels[-1:]
    if labels:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.99),
            ncols=columns or len(labels),
            fontsize=7.5,
            frameon=False,
            labelcolor=ink,
            handlelength=1.4,
            handletextpad=0.4,
            columnspacing=0.8,
            borderaxespad=0.1,
            labelspacing=0.3,
        )


def style() -> None:
    """Set matplotlib so that plots are legible on a white page and on a black one: grey ink on nothing."""
    import matplotlib.pyplot as plt

    plt.rc("text", color=GREY)
    plt.rc("axes", labelcolor=GREY, edgecolor=GREY, facecolor="none")
    plt.rc("ytick", color=GREY)
    plt.rc("xtick", color="#7a7e82")  # a shade darker: where all ticks are light, Jupyter adds a dark background
    plt.rc("figure", facecolor="none")
    plt.rc("savefig", facecolor="none")
    plt.rc("legend", framealpha=0.0)


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


def png(figure: "Figure") -> bytes:
    """The figure as a PNG of few colours, a third of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    out = io.BytesIO()
    image.quantize(64, method=Image.Quantize.FASTOCTREE).save(out, "PNG", optimize=True)
    return out.getvalue()
