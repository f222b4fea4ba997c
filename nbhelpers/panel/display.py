"""How a run is shown, live or replayed: numbers, curves, and a few answers of the model, in one updating place.

No widget: three outputs that update together, HTML with the numbers, a PNG with the curves, HTML with the answers. So
a saved notebook shows them on GitHub, Kaggle and nbviewer too, and where HTML is not shown there is plain text.
"""

import base64
import html
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nbhelpers.evaluate import Answer
from nbhelpers.html import BOX, GRID, TEXT, bar, cell, framed, pre, table
from nbhelpers.rewards import Sample

from . import curves
from .curves import COLORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = {
    "reward": "mean over the answers of the newest step, all reward functions together",
    "right": "share of answers that are right in whatever form, paid or not",
    "alike": "share of the other answers that have three words of one in a row: near 100 % all are the same",
    "replaced": "share of groups without a signal in whose place other questions were asked",
    "loss": "of GRPO: near 0 by construction when each rollout serves one update; watch the reward",
    "gradient": "the length of the gradient before it is cut to max_grad_norm",
    "format": "share of answers that have exactly the wanted form",
    "length": "mean number of tokens of an answer",
    "cut off": "share of answers that did not end within max_completion_length",
    "no signal": "share of groups whose answers all got the same reward: they teach nothing",
    "clipped": "share of tokens whose probability moved too far since they were drawn to count fully",
    "KL": "distance from the model before training",
    "tokens/s": "tokens of prompts and answers, by the time of the whole step: writing, scoring, learning",
    "in rewards": "of the time elapsed: what the reward functions took",
    "left": "if the rest goes as fast as the steps so far",
    "spread in a group": "standard deviation among the answers to one question: what GRPO learns from",
    "between groups": "standard deviation of the mean rewards of the questions: how unequally hard they are",
}


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
        self.ended: float | None = None
        self.first_step = 0
        self.handles: list[Any] = []  # IPython's, of the outputs that are updated
        self._figure: Figure | None = None

    def line(self) -> str:
        """The newest step as one line of plain text."""
        note = [self.note] if self.note else []
        if not self.history:
            return " · ".join([*note, f"step 0/{self.total_steps}: the model writes its first answers"])
        row = self.history[-1]
        by_function = ", ".join(f"{name} {_number(value)}" for name, value in row["rewards"].items())
        parts = [f"reward {_number(row['reward'])}" + (f" ({by_function})" if len(row["rewards"]) > 1 else "")]
        parts += [f"{name} {value}" for name, value in self._shares(row)]
        parts += ["THE REWARD IS GAMED"] if row.get("gaming") else []
        parts += [f"memory {_memory_text(row['memory'])}"] if row["memory"] else []
        return " · ".join([*note, self._progress(), *parts, *(f"{name} {value}" for name, value in self._times(row))])

    __repr__ = line

    def figure(self) -> "Figure":
        """The curves as a `matplotlib.figure.Figure` on white, to be saved: `live.figure().savefig("curve.png")`."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 5.2), dpi=130, facecolor="white")
        curves.draw(figure, self.history, self.total_steps, ink="#333333", note=self.note)
        return figure

    def picture(self) -> bytes:
        """The curves as a small PNG on a transparent ground, legible on white and on black."""
        from matplotlib.figure import Figure

        if self._figure is None:
            self._figure = Figure(figsize=(10, 4.7), dpi=120, facecolor="none")
        curves.draw(self._figure, self.history, self.total_steps, ink=curves.GREY, note=self.note)
        return curves.png(self._figure)

    def show(self) -> None:
        """Display it, or update what is displayed."""
        from IPython.display import display

        for i, (bundle, metadata) in enumerate(self.outputs()):
            if i < len(self.handles):
                self.handles[i].update(bundle, metadata=metadata, raw=True)
            else:
                self.handles.append(display(bundle, metadata=metadata, raw=True, display_id=True))

    def outputs(self) -> list[tuple[dict, dict]]:
        """What is displayed, as (MIME bundle, metadata): numbers, curves, answers; before the first step one line."""
        if not self.history:
            return [({"text/html": f"<p>{html.escape(self.line())} …</p>", "text/plain": self.line()}, {})]
        answers = _probes_html(self.probed) + _pair_html(self.pair, self.pair_step)
        picture = base64.b64encode(self.picture()).decode()
        return [
            ({"text/html": self._numbers_html(), "text/plain": self.line()}, {}),
            # an output of its own: within HTML a viewer that cleans the HTML may leave it out
            ({"image/png": picture, "text/plain": ""}, {"image/png": {"width": 1000}}),
            ({"text/html": framed(answers), "text/plain": ""}, {}),
        ]

    # ---- pieces ----

    def _progress(self) -> str:
        row = self.history[-1]
        step = f"step {row['step']}/{self.total_steps}"
        if self.ended is None:
            return step
        return f"done: {step}" if row["step"] >= self.total_steps else f"stopped: {step}"

    def _shares(self, row: dict) -> list[tuple[str, str]]:
        shares = {
            "right": _percent(row.get("right")),
            "format": _percent(row["format"]),
            "alike": _percent(row.get("alike")),
            "length": None if row["length"] is None else f"{row['length']:.0f} tokens",
            "cut off": _percent(row["clipped"]),
            "no signal": _percent(row["zero_signal"]),
            "replaced": _percent(row.get("replaced")),
            "clipped": _percent(row["clip_ratio"]) if any(row["clip_ratio"] for row in self.history) else None,
            "KL": None if row["kl"] is None else f"{row['kl']:.3g}",
            "loss": None if row.get("loss") is None else f"{row['loss']:.2g}",
            "gradient": None if row.get("grad_norm") is None else f"{row['grad_norm']:.2g}",
            "tokens/s": None if row["speed"] is None else f"{row['speed']:,.0f}",
        }
        return [(name, value) for name, value in shares.items() if value is not None]

    def _times(self, row: dict) -> list[tuple[str, str]]:
        if self.ended is not None:
            return [("took", _clock(self.ended))]
        done = row["step"] - self.first_step
        if row["seconds"] is None or done < 1:  # resumed: no step of this session yet
            return []
        left = row["seconds"] / done * max(0, self.total_steps - row["step"])
        spent = sum(row.get("reward_seconds") or 0.0 for row in self.history[-done:])
        rewards = [("in rewards", _clock(spent))] if spent >= 1 else []
        return [("elapsed", _clock(row["seconds"])), *rewards, ("left", _clock(left))]

    def _numbers_html(self) -> str:
        row = self.history[-1]
        numbers = [("reward", _number(row["reward"])), *self._shares(row), *self._times(row)]
        values = [cell(value, f"{_CELL};font-size:115%") for _, value in numbers]
        table_of_numbers = table(_head(name for name, _ in numbers), [values])
        note = self.note and f"<p style='color:{COLORS[1]};margin:0 0 4px'><b>{html.escape(self.note)}</b></p>"
        share = min(1.0, row["step"] / max(1, self.total_steps))
        return framed(
            f"{note}{_gaming_html(row.get('gaming', []))}"
            f"<b>{self._progress()}</b>{bar({COLORS[0]: share})}{table_of_numbers}"
            f"{_rewards_html(row)}{_memory_html(row['memory'])}"
        )


_CELL = "text-align:left;padding:2px 14px 2px 0;border:0;background:none"
_FULL_WIDTH = f"{GRID};width:100%;table-layout:fixed"


def _head(names: Iterable[str]) -> list[str]:
    return [cell(name, _CELL, tag="th", title=HELP.get(name, "")) for name in names]


def _gaming_html(lines: list[str]) -> str:
    """That the reward is gamed, with the answers that show it, above all the rest."""
    if not lines:
        return ""
    why, *answers = (_shortened(line) for line in lines)
    shown = "".join(pre(answer) for answer in answers)
    return f"<div style='border-left:4px solid {COLORS[4]};padding-left:8px;margin:0 0 8px'><b>{why}</b>{shown}</div>"


def _rewards_html(row: dict) -> str:
    """Each reward function with its mean and its spread."""
    if not row["rewards"]:
        return ""
    names = [*row["rewards"], *(["total"] if len(row["rewards"]) > 1 else [])]
    head = ["reward function", "mean"]
    means = row["rewards"] | {"total": row["reward"]}
    columns = [[html.escape(name) for name in names], [_number(means[name]) for name in names]]
    if row["within"]:
        head += ["spread in a group", "between groups"]
        columns += [[_number(row[kind].get(name)) for name in names] for kind in ("within", "between")]
    else:
        head += ["spread, all answers"]
        stds = row["stds"] | {"total": row["reward_std"]}
        columns += [[_number(stds.get(name)) for name in names]]
    rows = [[cell(text, _CELL) for text in texts] for texts in zip(*columns, strict=True)]
    return table(_head(head), rows, f"{GRID};margin-top:8px")


def _memory_text(memory: dict[str, float]) -> str:
    return f"{memory['used']:.1f}/{memory['total']:.1f} GB"


def _memory_html(memory: dict[str, float] | None) -> str:
    """A gauge: on a card the most that torch allocated, what it has reserved and what everyone uses, of its memory."""
    if not memory:
        return ""
    share = {name: memory[name] / memory["total"] for name in memory if name != "total"}
    if "peak" in memory:
        text = (
            f"card memory: {memory['peak']:.1f} GB allocated at most · {memory['reserved']:.1f} reserved by torch · "
            f"{memory['used']:.1f} used by all, of {memory['total']:.1f} GB"
        )
        bars = {"#8a7a55": share["used"], "#e0871b": share["reserved"], "#3d85c6": share["peak"]}
    else:
        text = f"memory of this process: {memory['used']:.1f} of {memory['total']:.1f} GB"
        bars = {COLORS[0]: share["used"]}
    return f"<div style='margin-top:8px'><small>{text}</small>{bar(bars)}</div>"


def _probes_html(probed: dict[int, list[Answer]]) -> str:
    """The same questions, asked again and again: what was answered at each step, and the newest answer in full."""
    if not probed:
        return ""
    newest = max(probed)
    when = {step: "before" if step == 0 else f"step {step}" for step in sorted(probed)}
    rows = []
    for i, answer in enumerate(probed[newest]):
        said = [(when[step], probed[step][i].answer) for step in when]
        changes = [pair for j, pair in enumerate(said) if j == 0 or pair[1] != said[j - 1][1] or j == len(said) - 1]
        told = "<br>".join(
            f"{name}: <b>{_shortened('(no answer)' if text is None else text, 60)}</b>" for name, text in changes
        )
        rows.append([cell(_shortened(answer.question, 300)), cell(told), cell(pre(_shortened(answer.completion)))])
    widths = {"always the same questions": 25, "answer, where it changed": 22, f"{when[newest]}, in full": 53}
    head = [cell(name, f"{BOX};width:{width}%", tag="th") for name, width in widths.items()]
    return table(head, rows, f"{_FULL_WIDTH};margin-bottom:10px")


def _pair_html(pair: list[Sample], step: int) -> str:
    """The best and the worst answer of one group, side by side. Model text is escaped: it may hold anything."""
    if not pair:
        return ""
    shown = [(f"step {step}: best answer of a group", pair[0]), ("worst answer of the same group", pair[-1])]
    if len(pair) == 1:
        shown = [(f"step {step}: an answer (in each group all have the same reward)", pair[0])]
    cells = []
    for title, sample in shown:
        given = " · ".join(f"{name} {_number(value)}" for name, value in sample.rewards.items())
        advantage = "" if sample.advantage is None else f" · advantage {sample.advantage:+.2f}"
        inside = (
            f"<b>{title}</b><br><small>{html.escape(given)}{advantage}</small>"
            f"{pre(_shortened(sample.prompt), f'{TEXT};opacity:.75')}{pre(_shortened(sample.completion))}"
        )
        cells.append(cell(inside, f"{BOX};width:50%"))
    return table((), [cells], _FULL_WIDTH)


def _shortened(text: str, limit: int = 700) -> str:
    """Escaped for HTML; of a long text the two ends, since the answer comes last."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return html.escape(text.encode("utf-8", "replace").decode())


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def _clock(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{int(seconds) % 60:02}" if hours else f"{minutes}:{int(seconds) % 60:02}"


def in_notebook() -> bool:
    """Whether outputs go to a notebook (Jupyter, Colab, Kaggle, a headless runner) and not to a terminal."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
