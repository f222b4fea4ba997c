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
    curves.draw(figure, history, 10, note=note)
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


def test_a_plot_alone_in_its_row_takes_all_of_it():
    wide = {}
    for count in (1, 2, 3, 4, 5):
        figure = Figure(figsize=(8, 4))
        curves._arrange(figure, ["x"] * count, [1] * count, "")
        wide[count] = [axes.get_position().width > 0.8 for axes in figure.axes]
    assert wide == {1: [True], 2: [False] * 2, 3: [False] * 2 + [True], 4: [False] * 4, 5: [False] * 4 + [True]}


NAMES = [f"{kind}_format_reward" for kind in ("strict", "soft", "integer", "correct", "tag_count")]


@pytest.mark.parametrize("said", ["REPLAY of a run", "REPLAY of a run of Qwen2.5-Coder on many things, " * 5])
@pytest.mark.parametrize("names", [["correct"], ["a", "b"], NAMES, ["x" * 60, "y" * 60], [f"f{i}" for i in range(12)]])
def test_every_curve_is_named_and_nothing_overlaps(names, said):
    spread = {name: 0.2 for name in [*names, "total"]}
    figure = drawn([row(i, names, within=spread, between=spread, kl=0.1) for i in (1, 2)], note=said)
    figure.canvas.draw()
    (note,) = figure.texts
    assert note.get_text().replace("\n", " ") == said.strip()
    boxes = [note.get_window_extent()]
    for axes in figure.axes:
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert legend(axes)[-len(lines) :] == [line.get_label() for line in lines]
        boxes += [axes.get_legend().get_window_extent(), axes.get_tightbbox(for_layout_only=True)]
        assert not boxes[-2].overlaps(axes.get_window_extent())
    several = ["total", *names] if len(names) > 1 else names
    assert len(legend(figure.axes[1])) == len(several) + 1
    for i, one in enumerate(boxes):
        assert figure.bbox.x0 <= one.x0 and one.x1 <= figure.bbox.x1 + 1 and one.y1 <= figure.bbox.y1 + 1
        others = boxes[i + 1 :] if i == 0 or i % 2 == 0 else boxes[i + 2 :]  # a legend stands in its own axes' box
        assert not any(one.overlaps(other) for other in others), (i, names)


def test_a_figure_is_used_again_and_arranged_anew_when_a_plot_comes():
    figure = drawn([row(1)])
    axes = figure.axes
    curves.draw(figure, [row(1), row(2)], 10)
    assert figure.axes == axes and [len(a.lines) for a in axes] == [2, 2, 2, 2, 2]
    assert all(len(a.collections) <= 1 for a in axes)
    curves.draw(figure, [row(1), row(2, kl=0.1)], 10)
    assert len(figure.axes) == 6


def test_smoothing():
    assert curves.smoothed([1.0, 5.0]) == [1.0, 5.0]  # too few to smooth
    assert curves.smoothed([1.0] * 20 + [math.nan] + [1.0] * 20) == pytest.approx([1.0] * 41)
    assert curves.smoothed([0.0] * 16 + [3.0] + [0.0] * 16)[14:19] == pytest.approx([0.6] * 5)
    assert all(map(math.isnan, curves.smoothed([math.nan] * 40)))
