"""What the panel shows in a notebook."""

# ruff: noqa: F811  (fixtures)

import io
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.text
import pytest
from panel_cases import ARGS, SAMPLES, Ticks, clock, logs, newest, picture, run, shown  # noqa: F401
from PIL import Image
from transformers import TrainerControl, TrainerState

from nbhelpers import panel
from nbhelpers.panel import display
from nbhelpers.rewards import Sample

PARTS = ("curves", "numbers", "answers")


def test_one_place_is_updated_and_ends_in_the_final_state(shown, capsys, clock):
    clock.step = 0.3
    live = run(panel.Live(every=0.0), [logs(), logs(2.0)], total=2, end=False)
    clock.now += 99
    live.on_log(ARGS, TrainerState(max_steps=2, global_step=2), TrainerControl(), logs=logs())
    live.on_train_end(ARGS, TrainerState(max_steps=2, global_step=2), TrainerControl())
    assert [name for kind, name, _ in shown if kind == "first"] == ["head", "curves", "numbers", "answers"]
    for part in ("head", "curves", "numbers", "answers"):
        kinds = [kind for kind, name, _ in shown if name == part]
        assert kinds == ["first"] + ["update"] * (len(kinds) - 1) and len(kinds) >= 2
    first = shown[0][2]
    assert "first answers" in first["text/plain"] and "step 0/2" in first["text/html"]
    last = newest(shown, "head")
    assert set(last) == {"text/html", "text/plain"} and last["text/plain"] == live.line()
    assert "done: step 2/2" in last["text/html"] and "done: step 2/2" in last["text/plain"]
    assert capsys.readouterr().out == ""


def pictures(shown) -> int:
    return sum(name == "curves" for _, name, _ in shown)


def test_drawing_is_rare_enough(shown, clock):
    run(panel.Live(every=1.0), [logs()] * 3, end=False)
    assert len(shown) == 1 + 4  # the clock stands still: a line before the first step, all after it, no more
    shown.clear()
    clock.step = 0.05  # a look at the clock costs that much, so a drawing does
    live = run(panel.Live(every=0.0), [logs()] * 200, total=200, end=False)
    assert 4 <= pictures(shown) <= 0.05 * live.history[-1]["seconds"] / 0.05 + 4  # a twentieth of the time


@pytest.mark.parametrize("slow", [1, 4])
def test_neither_the_first_drawing_nor_one_slow_one_freezes_it(shown, clock, slow, monkeypatch):
    """The first imports matplotlib, and any may meet a busy machine: here it takes 10 s, the others 0.1 s."""
    live, drawings = panel.Live(every=1.0), []

    def picture(self):
        drawings.append(live.history[-1]["step"])
        self._figure = self
        clock.now += 10.0 if len(drawings) == slow else 0.1
        return b""

    monkeypatch.setattr(panel.Live, "picture", picture)
    run(live, [], total=40, end=False)
    for step in range(1, 41):
        clock.now += 1.0
        live.on_log(ARGS, TrainerState(max_steps=40, global_step=step), TrainerControl(), logs=logs())
    assert drawings[0] == 1 and max(b - a for a, b in pairwise(drawings)) <= 3


def test_before_the_first_step_and_within_a_long_one_a_clock_goes(shown, clock, monkeypatch):
    live = run(panel.Live(), [], end=False)
    (ticker,) = Ticks.running
    clock.now += 75
    ticker.tick()
    assert "the model writes its first answers … · 1:15" in shown[-1][2]["text/html"]
    assert "compiling" not in shown[-1][2]["text/html"]
    live.writes = False  # as LeanSFTTrainer says
    ticker.tick()
    assert "the model reads its first texts … · 1:15" in shown[-1][2]["text/html"]
    monkeypatch.setattr("nbhelpers.gpu.card", lambda: object())
    ticker.tick()
    assert shown[-1][:2] == ("update", "head") and "compiling, then" in shown[-1][2]["text/html"]
    live.on_log(ARGS, TrainerState(max_steps=60, global_step=1), TrainerControl(), logs=logs())
    before = len(shown)
    clock.now += 30
    ticker.tick()
    assert len(shown) == before + 1 and "</b> · elapsed 1:45" in shown[-1][2]["text/html"]
    live.on_train_end(ARGS, TrainerState(max_steps=60, global_step=1), TrainerControl())
    assert not Ticks.running


def test_in_a_new_cell_all_is_shown_and_goes_on_there(shown, monkeypatch):
    live = run(panel.Live(every=0.0), [logs(), logs()], end=False)
    live._ipython_display_()  # the last line of the very cell: it is there already
    assert not [part for kind, part, _ in shown[5:] if kind == "first"]
    old = list(live.handles)
    monkeypatch.setattr(display, "this_cell", lambda: "after the tab was closed")
    before = len(shown)
    live._ipython_display_()
    again = shown[before:]
    assert [(kind, part) for kind, part, _ in again] == [("first", part) for part in ("head", *PARTS)]
    assert "step 2/60" in again[0][2]["text/html"] and not set(old) & set(live.handles)
    live.on_log(ARGS, TrainerState(max_steps=60, global_step=3), TrainerControl(), logs=logs())
    live.on_train_end(ARGS, TrainerState(max_steps=60, global_step=3), TrainerControl())
    assert {kind for kind, *_ in shown[before + 4 :]} == {"update"}
    assert "step 3/60" in newest(shown, "head")["text/html"]
    live.show()  # whoever calls it wants to see it here
    assert [kind for kind, *_ in shown[-4:]] == ["first"] * 4


def test_in_a_terminal_it_is_its_line(capsys):
    live = run(panel.Live(), [logs()])
    capsys.readouterr()
    live._ipython_display_()
    assert capsys.readouterr().out == live.line() + "\n"


def test_html_escapes_the_models_text(shown):
    run(panel.Live(), [logs()])
    html = newest(shown, "answers")["text/html"]
    html.encode()
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html and "q &lt;b&gt;?" in html
    assert html.count("<table") == html.count("</table>") == 1 and html.count("<pre") == html.count("</pre>") == 4
    assert "tex2jax_ignore" in html  # or Jupyter would typeset $x$


def test_names_of_functions_are_escaped(shown):
    odd = logs(**{"rewards/<lambda>/mean": 1.0})
    run(panel.Live(), [odd])
    html = newest(shown, "numbers")["text/html"]
    assert "<lambda>" not in html and "&lt;lambda&gt;" in html


def test_best_and_worst_of_a_group_are_shown(shown):
    flat = [Sample("easy?", "same", {"correct": 9.0, "form": 0.5}, 0.0)] * 3
    run(panel.Live(), [logs()], samples=[*flat, *SAMPLES])
    html = newest(shown, "answers")["text/html"]
    best, worst = html.index("best answer"), html.index("worst answer")
    assert best < html.index("correct 2.00 · form 0.50 · advantage +1.25") < html.index("q &lt;b&gt;?") < worst
    assert worst < html.index("correct 0.00 · form 0.00 · advantage -0.50") < html.index("worst?")
    assert "middle?" not in html and "easy?" not in html
    run(panel.Live(), [logs()], samples=flat)
    assert "all have the same reward" in newest(shown, "answers")["text/html"]


def test_the_numbers_name_function_spread_and_memory(shown, monkeypatch):
    run(panel.Live(), [logs()])
    html = re.sub(r"<t[dh][^>]*>", "|", newest(shown, "numbers")["text/html"])
    assert "|reward function</th>|mean</th>|spread in a group</th>|between groups</th>" in html
    assert "|correct</td>|1.25</td>|1.00</td>|none</td>" in html and "|total</td>|1.50</td>|1.26</td>" in html
    assert "memory of this process: " in html
    run(panel.Live(), [logs()], samples=None)
    html = re.sub(r"<t[dh][^>]*>", "|", newest(shown, "numbers")["text/html"])
    assert "|spread, all answers</th>" in html and "|correct</td>|1.25</td>|9.00</td>" in html
    card = {"peak": 3.14, "reserved": 4.0, "used": 7.5, "total": 15.0}
    monkeypatch.setattr("nbhelpers.panel.history.memory_now", lambda: card)
    live = run(panel.Live(), [logs()])
    html = newest(shown, "numbers")["text/html"]
    wanted = "card memory: ■ 3.1 GB allocated at most · ■ 4.0 reserved by torch · ■ 7.5 used by all, of 15.0 GB"
    assert (
        wanted in re.sub("</?span[^>]*>", "", html)
        and html.count("width:50.0%") == 1
        and html.count("width:20.9%") == 1
    )
    assert "memory 7.5/15.0 GB" in live.line()


def test_a_long_answer_is_shortened_in_the_middle(shown):
    run(panel.Live(), [logs()], samples=[Sample("q", "<" + "x" * 5000 + ">", {"correct": 1.0})] * 3)
    html = newest(shown, "answers")["text/html"]
    assert "xxx … xxx" in html and "&lt;x" in html and "x&gt;" in html and "x" * 500 not in html


def test_the_output_of_a_long_run_is_small(shown):
    noisy = [logs(1 + math.sin(i * 12.9898) / 2, **{"rewards/correct/mean": math.sin(i * 78.233)}) for i in range(500)]
    long = [Sample("q" * 3000, "<&" * 5000, {"correct": float(i), "form": 0.0}) for i in range(3)]
    run(panel.Live(), noisy, total=500, samples=long)
    assert sum(len(str(newest(shown, part))) for part in ("head", *PARTS)) < 90_000


def test_letters_of_the_picture_are_large_enough_in_a_narrow_window():
    """800 pixels leave 600 to an output of JupyterLab's: there the smallest letters take 9."""
    live = run(panel.Live(), [logs()] * 5)
    live.picture()
    texts = live._figure.findobj(matplotlib.text.Text)
    smallest = min(text.get_fontsize() for text in texts if text.get_text())
    assert smallest / 72 / live._figure.get_figwidth() * 600 >= 9


def test_the_curves_are_told_in_words(shown):
    live = run(panel.Live(), [logs(i / 10) for i in range(20)], total=20)
    words = newest(shown, "curves")["text/plain"]
    assert words.startswith(
        "Curves of steps 1 to 20, means of the first 2 steps and of the last 2. "
        "reward: total 0.05 to 1.85, correct 1.25 to 1.25, form 0.25 to 0.25. spread in a group: "
    )
    assert live.outputs()[1][1]["image/png"]["alt"] == words  # what nbconvert and nbviewer give to a screen reader
    numbers = newest(shown, "numbers")["text/html"]
    assert f"<details><summary>The curves in words</summary>{words}</details>" in numbers  # and JupyterLab
    assert "<summary>What do these numbers mean?</summary>" in numbers and "<li><b>no signal</b>: share of" in numbers
    assert "start → end: means of the first 2 steps and of the last 2" in numbers and "0.05 → 1.85" in numbers
    bundle, metadata = live.figure()._repr_mimebundle_()
    assert bundle["text/plain"] == metadata["image/png"]["alt"] == words and bundle["image/png"].startswith(b"\x89PNG")


def test_the_picture_follows_the_data(shown):
    live = run(panel.Live(), [logs()], end=False)
    first = live.picture()
    assert live.picture() == first
    live.history.append({**live.history[-1], "step": 30, "reward": 3.0})
    assert live.picture() != first


def test_figure_for_saving():
    live = run(panel.Live(), [logs(i / 10, **{"rewards/correct/mean": i / 20}) for i in range(32)])
    figure = live.figure()
    reward = figure.axes[0]
    points, smooth = reward.lines[:2]
    assert list(points.get_ydata()) == [row["reward"] for row in live.history]
    assert smooth.get_ydata()[16] == pytest.approx(1.6) and smooth.get_ydata()[0] == pytest.approx(0.1)
    out = io.BytesIO()
    figure.savefig(out)
    assert Image.open(out).convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    panel.Live().figure()  # before any step


NOTEBOOK = """
import sys; sys.path[:0] = {path!r}
from panel_cases import run, logs, panel
live = run(panel.Live(every=0.0), [logs()] * 3, total=3)
"""


def test_in_a_real_kernel_one_place_stays_and_no_widget_state(kernel):
    import nbformat
    from nbclient import NotebookClient

    root = Path(__file__).parents[2]
    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(path=[str(root / "tests" / "helpers"), str(root)]))
    book = nbformat.v4.new_notebook(cells=[cell])
    kernel("warm")
    NotebookClient(book, timeout=120, kernel_name="warm").execute()
    head, curves, numbers, answers = [
        out for out in cell.outputs if out.output_type != "stream" or out.name != "stderr"
    ]
    assert {out.output_type for out in (head, curves, numbers, answers)} == {"display_data"}
    assert head.data["text/plain"].startswith("done: step 3/3") and "done: step 3/3" in head.data["text/html"]
    assert "reward function" in numbers.data["text/html"] and curves.metadata["image/png"]["alt"].startswith("Curves")
    assert picture(curves.data).width >= 1000 and "best answer" in answers.data["text/html"]
    assert "widgets" not in book.metadata and "vnd.jupyter.widget" not in nbformat.writes(book)
    assert len(nbformat.writes(book)) < 90_000


def test_importing_the_panel_does_not_touch_pyplot():
    code = "import sys, nbhelpers.panel as p; p.Live().figure(); print('matplotlib.pyplot' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
