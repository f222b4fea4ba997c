"""The curves: what is drawn of what was logged, and that it stays readable with many functions."""

import math

import pytest
from matplotlib.figure import Figure

from nbhelpers.panel import curves
from nbhelpers.panel.history import row_of


def row(step, names=("correct",), **more) -> dict:
    logged = {f"rewards/{name}/mean": 0.5 for name in names} | {f"rewards/{name}/std": 0.1 for name in names}
    logged |= {"completions/mean_length": 40.0, "completions/min_length": 9.0, "completions/max_length": 60.0}
    return {**row_of({"step": step, "reward": 1.0, "completions/clipped_ratio": 0.1, **logged}), "speed": 99.0, **more}


def drawn(history, note="") -> Figure:
    figure = Figure(figsize=(10, 4.7))
    curves.draw(figure, history, 10, ink="#333333", note=note)
    return figure


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_plots_follow_what_was_logged():
    labels = [axes.get_ylabel() for axes in drawn([row(1), row(2)]).axes]
    assert labels == ["reward", "spread of all answers", "share", "tokens an answer", "tokens / s"]
    more = [row(i, within={"correct": 0.2}, between={"total": 0.1}, kl=0.01) for i in (1, 2)]
    labels = [axes.get_ylabel() for axes in drawn(more).axes]
    assert labels == ["reward", "spread in a group", "share", "tokens an answer", "tokens / s", "KL to the start"]
    assert [axes.get_ylabel() for axes in drawn([]).axes] == ["reward"]


def test_one_function_is_drawn_once_and_several_with_their_total():
    assert legend(drawn([row(1)]).axes[0]) == ["reward"]
    assert legend(drawn([row(1, ("a", "b"))]).axes[0]) == ["total", "a", "b"]


def test_clipped_tokens_are_drawn_only_when_there_are_any():
    assert "clipped" not in curves.curves_of([row(1, clip_ratio=0.0)])["share"]
    assert curves.curves_of([row(1, clip_ratio=0.0), row(2, clip_ratio=0.1)])["share"]["clipped"] == [0.0, 0.1]


def test_the_first_plot_fills_the_holes_of_the_last_row():
    for count, columns in ((1, 3), (2, 2), (3, 1), (4, 3), (5, 2), (6, 1)):
        assert curves._width(["x"] * count) == columns


def test_nothing_overlaps_with_five_functions_and_a_note():
    names = [f"{kind}_format_reward" for kind in ("strict", "soft", "integer", "correct", "tag_count")]
    spread = {name: 0.2 for name in [*names, "total"]}
    figure = drawn([row(i, names, within=spread, between=spread, kl=0.1) for i in (1, 2)], note="REPLAY of a run")
    figure.canvas.draw()
    reward, spread_plot, share = figure.axes[:3]
    assert legend(reward) == ["total", *names] and legend(spread_plot) == ["between groups"]
    (note,) = figure.texts
    box = reward.get_legend().get_window_extent()
    assert box.y1 <= note.get_window_extent().y0 and box.x1 < spread_plot.get_window_extent().x0
    assert share.get_legend().get_window_extent().x1 <= figure.bbox.x1
    assert note.get_text() == "REPLAY of a run"


def test_a_figure_is_used_again_and_arranged_anew_when_a_plot_comes():
    figure = drawn([row(1)])
    axes = figure.axes
    curves.draw(figure, [row(1), row(2)], 10, ink="#333333")
    assert figure.axes == axes and [len(a.lines) for a in axes] == [2, 2, 2, 2, 2]
    assert all(len(a.collections) <= 1 for a in axes)
    curves.draw(figure, [row(1), row(2, kl=0.1)], 10, ink="#333333")
    assert len(figure.axes) == 6


def test_smoothing():
    assert curves.smoothed([1.0, 5.0]) == [1.0, 5.0]  # too few to smooth
    assert curves.smoothed([1.0] * 20 + [math.nan] + [1.0] * 20) == pytest.approx([1.0] * 41)
    assert curves.smoothed([0.0] * 16 + [3.0] + [0.0] * 16)[14:19] == pytest.approx([0.6] * 5)
    assert all(map(math.isnan, curves.smoothed([math.nan] * 40)))
