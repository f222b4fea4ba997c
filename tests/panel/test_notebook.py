"""What the panel shows in a notebook."""

# ruff: noqa: F811  (fixtures)

import io
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from panel_cases import ARGS, SAMPLES, clock, logs, newest, picture, run, shown  # noqa: F401
from PIL import Image
from transformers import TrainerControl, TrainerState

from nbhelpers import panel
from nbhelpers.rewards import Sample


def test_one_place_is_updated_and_ends_in_the_final_state(shown, capsys, clock):
    clock.step = 0.3
    live = run(panel.Live(every=0.0), [logs(), logs(2.0)], total=2, end=False)
    clock.now += 99
    live.on_log(ARGS, TrainerState(max_steps=2, global_step=2), TrainerControl(), logs=logs())
    live.on_train_end(ARGS, TrainerState(max_steps=2, global_step=2), TrainerControl())
    for part in ("numbers", "curves", "answers"):
        kinds = [kind for kind, name, _ in shown if name == part]
        assert kinds == ["first"] + ["update"] * (len(kinds) - 1) and len(kinds) >= 2
    first = shown[0][2]
    assert "first answers" in first["text/plain"] and "step 0/2" in first["text/html"]
    last = newest(shown, "numbers")
    assert set(last) == {"text/html", "text/plain"} and last["text/plain"] == live.line()
    assert "done: step 2/2" in last["text/html"] and "done: step 2/2" in last["text/plain"]
    assert capsys.readouterr().out == ""


def test_drawing_is_rare_enough(shown, clock):
    run(panel.Live(every=1.0), [logs()] * 3, end=False)
    assert len(shown) == 1  # the clock stands still: only the first
    shown.clear()
    clock.step = 0.05  # a look at the clock costs that much, so a drawing does
    live = run(panel.Live(every=0.0), [logs()] * 60, total=60, end=False)
    drawings = sum(name == "numbers" for _, name, _ in shown)
    assert 2 <= drawings <= 0.05 * live.history[-1]["seconds"] / 0.05 + 2  # a twentieth of the time, and the two ends


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
    wanted = "3.1 GB allocated at most · 4.0 reserved by torch · 7.5 used by all, of 15.0 GB"
    assert wanted in html and html.count("width:50.0%") == 1 and html.count("width:20.9%") == 1
    assert "memory 7.5/15.0 GB" in live.line()


def test_a_long_answer_is_shortened_in_the_middle(shown):
    run(panel.Live(), [logs()], samples=[Sample("q", "<" + "x" * 5000 + ">", {"correct": 1.0})] * 3)
    html = newest(shown, "answers")["text/html"]
    assert "xxx … xxx" in html and "&lt;x" in html and "x&gt;" in html and "x" * 500 not in html


def test_the_output_of_a_long_run_is_small(shown):
    noisy = [logs(1 + math.sin(i * 12.9898) / 2, **{"rewards/correct/mean": math.sin(i * 78.233)}) for i in range(500)]
    long = [Sample("q" * 3000, "<&" * 5000, {"correct": float(i), "form": 0.0}) for i in range(3)]
    run(panel.Live(), noisy, total=500, samples=long)
    assert sum(len(str(newest(shown, part))) for part in ("numbers", "curves", "answers")) < 90_000


def test_the_picture_suits_light_and_dark(shown):
    run(panel.Live(), [logs()] * 5)
    image = picture(newest(shown, "curves")).convert("RGBA")
    assert image.width >= 1000
    pixels = image.getcolors(image.width * image.height)
    assert sum(n for n, (*_, alpha) in pixels if alpha == 0) > 0.8 * image.width * image.height
    opaque = {(r, g, b) for _, (r, g, b, alpha) in pixels if alpha > 200}
    assert opaque and all(60 < (0.299 * r + 0.587 * g + 0.114 * b) < 200 for r, g, b in opaque)


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


def test_in_a_real_kernel_one_place_stays_and_no_widget_state():
    import nbformat
    from nbclient import NotebookClient

    root = Path(__file__).parents[2]
    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(path=[str(root / "tests" / "helpers"), str(root)]))
    book = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    numbers, curves, answers = [out for out in cell.outputs if out.output_type != "stream" or out.name != "stderr"]
    assert {out.output_type for out in (numbers, curves, answers)} == {"display_data"}
    assert numbers.data["text/plain"].startswith("done: step 3/3") and "done: step 3/3" in numbers.data["text/html"]
    assert picture(curves.data).width >= 1000 and "best answer" in answers.data["text/html"]
    assert "widgets" not in book.metadata and "widget" not in nbformat.writes(book)
    assert len(nbformat.writes(book)) < 90_000


def test_importing_the_panel_does_not_touch_pyplot():
    code = "import sys, nbhelpers.panel as p; p.Live().figure(); print('matplotlib.pyplot' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
