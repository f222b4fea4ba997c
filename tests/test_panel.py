import base64
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_model
from PIL import Image
from transformers import TrainerControl, TrainerState

from nbhelpers import panel
from nbhelpers.rewards import Sample

GOOD = "<reasoning>\nwhy\n</reasoning>\n<answer>\n9.9\n</answer>\n"
BAD = "</pre></td></table><script>alert(1)</script> $x$ \ud800"
SAMPLES = [
    Sample("middle?", "so so", {"correct": 1.0, "form": None}),
    Sample("q <b>?", GOOD, {"correct": 2.0, "form": 0.5}, 1.25),
    Sample("worst?", BAD, {"correct": 0.0, "form": 0.0}, -0.5),
]


def logs(reward: float | None = 1.5, **more) -> dict:
    return {
        "loss": 0.0,
        "reward": reward,
        "reward_std": 0.25,
        "rewards/correct/mean": 1.25,
        "rewards/correct/std": 9.0,
        "rewards/form/mean": 0.25,
        "completions/mean_length": 41.4,
        "completions/clipped_ratio": 0.02,
        "frac_reward_zero_std": 0.31,
        **more,
    }


def run(live, steps, *, total=60, samples=SAMPLES, start=0, history=(), end=True):
    state = TrainerState(max_steps=total, global_step=start, log_history=list(history))
    live.on_train_begin(None, state, TrainerControl())
    for log in steps:
        state.global_step += 1
        if samples is not None:
            state.samples = samples
        live.on_log(None, state, TrainerControl(), logs=log)
    if end:
        live.on_train_end(None, state, TrainerControl())
    return live


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by `clock.step` seconds at each look."""

    class Clock:
        now, step = 0.0, 0.0

        def monotonic(self):
            self.now += self.step
            return self.now

    made = Clock()
    monkeypatch.setattr(panel, "time", made)
    return made


@pytest.fixture
def shown(monkeypatch):
    """What a notebook gets: a list of (first or update, mime bundle)."""
    seen = []

    class Handle:
        def update(self, bundle, raw):
            seen.append(("update", bundle))

    def display(bundle, raw, display_id):
        assert raw and display_id
        seen.append(("first", bundle))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(panel, "_in_notebook", lambda: True)
    return seen


def picture(bundle: dict) -> Image.Image:
    (data,) = re.findall(r"data:image/png;base64,([^']*)'", bundle["text/html"])
    return Image.open(io.BytesIO(base64.b64decode(data)))


# ---- data ----


def test_history_holds_what_trl_logs(clock):
    live = panel.Live()
    clock.step = 1.0
    run(live, [logs(), logs(2.0, kl=0.5)])
    assert live.history[0] == {
        "step": 1, "reward": 1.5, "reward_std": 0.25, "rewards": {"correct": 1.25, "form": 0.25}, "length": 41.4,
        "clipped": 0.02, "zero_signal": 0.31, "kl": None, "format": pytest.approx(1 / 3), "seconds": 1.0,
    }  # fmt: skip
    assert [(row["step"], row["reward"], row["kl"]) for row in live.history] == [(1, 1.5, None), (2, 2.0, 0.5)]
    assert live.samples == SAMPLES
    json.dumps(live.history)


def test_other_logs_are_no_steps():
    live = run(panel.Live(), [{"train_runtime": 9.0}, {"eval_reward": 1.0}, None])
    assert live.history == []


def test_none_and_nan_are_gaps():
    live = run(panel.Live(), [logs(None), logs(math.nan, **{"rewards/form/mean": math.nan})], samples=None)
    assert [row["reward"] for row in live.history] == [None, None]
    assert live.history[1]["rewards"] == {"correct": 1.25, "form": None}
    assert live.history[0]["format"] is None and live.samples == []
    assert "reward none (correct 1.25, form none)" in live.line() and "format" not in live.line()
    live.figure()


def test_a_resumed_run_goes_on_where_it_was_and_a_new_one_starts_empty(clock):
    clock.step = 1.0
    before = [{**logs(), "step": step} for step in (1, 2)] + [{"train_runtime": 1.0, "step": 2}]
    live = run(panel.Live(), [logs()], start=2, history=before)
    assert [row["step"] for row in live.history] == [1, 2, 3]
    assert [row["seconds"] for row in live.history] == [None, None, 1.0]
    run(live, [logs()])
    assert [row["step"] for row in live.history] == [1]


def test_other_processes_show_nothing(capsys, monkeypatch):
    live, state = panel.Live(), TrainerState(max_steps=2, is_world_process_zero=False)
    live.on_train_begin(None, state, TrainerControl())
    live.on_log(None, state, TrainerControl(), logs=logs())
    live.on_train_end(None, state, TrainerControl())
    assert capsys.readouterr().out == "" and live.history == []


# ---- a terminal ----


def test_a_terminal_gets_a_line_for_each_step(capsys, clock):
    clock.step = 0.5
    run(panel.Live(), [logs(), logs(2.0, kl=0.5)], total=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "step 1/4 · reward 1.50 (correct 1.25, form 0.25) · format 33% · length 41 tokens · cut off 2% · "
        "no signal 31% · elapsed 0:00 · left 0:01"
    )
    assert lines[1].startswith("step 2/4 · reward 2.00") and "KL 0.5" in lines[1]
    assert lines[2].startswith("stopped: step 2/4") and "took 0:01" in lines[2] and len(lines) == 3


def test_the_end_is_told_from_a_stop(capsys):
    run(panel.Live(), [logs()] * 2, total=2)
    assert capsys.readouterr().out.splitlines()[-1].startswith("done: step 2/2")


def test_time_left_counts_this_sessions_steps(clock):
    live = run(panel.Live(), [], start=50, history=[{**logs(), "step": 50}], end=False)
    assert "left" not in live.line()  # nothing to go by yet
    clock.now += 7200
    state = TrainerState(max_steps=60, global_step=54)
    live.on_log(None, state, TrainerControl(), logs=logs())
    assert live.line().endswith("elapsed 2:00:00 · left 3:00:00")
    live = run(panel.Live(total_steps=100), [logs()], end=False)
    assert live.line().startswith("step 1/100")


# ---- a notebook ----


def test_one_output_is_updated_and_ends_in_the_final_state(shown, capsys, clock):
    clock.step = 0.3
    live = run(panel.Live(every=0.0), [logs(), logs(2.0)], total=2, end=False)
    clock.now += 99
    live.on_log(None, TrainerState(max_steps=2, global_step=2), TrainerControl(), logs=logs())
    live.on_train_end(None, TrainerState(max_steps=2, global_step=2), TrainerControl())
    assert [kind for kind, _ in shown] == ["first"] + ["update"] * (len(shown) - 1) and len(shown) >= 3
    assert "first answers" in shown[0][1]["text/plain"] and "step 0/2" in shown[0][1]["text/html"]
    last = shown[-1][1]
    assert set(last) == {"text/html", "text/plain"} and last["text/plain"] == live.line()
    assert "done: step 2/2" in last["text/html"] and "done: step 2/2" in last["text/plain"]
    assert capsys.readouterr().out == ""


def test_drawing_is_rare_enough(shown, clock):
    run(panel.Live(every=1.0), [logs()] * 3, end=False)
    assert len(shown) == 1  # the clock stands still: only the first
    shown.clear()
    clock.step = 0.05
    run(panel.Live(every=0.0), [logs()] * 300, total=300, end=False)
    seconds, drawings = 300 * 2 * 0.05, len(shown)
    assert 2 <= drawings <= seconds / (panel.WORK * 0.05) + 2


def test_html_escapes_the_models_text(shown):
    run(panel.Live(), [logs()])
    html = shown[-1][1]["text/html"]
    html.encode()
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html and "q &lt;b&gt;?" in html
    assert html.count("<table") == html.count("</table>") == 2 and html.count("<pre") == html.count("</pre>") == 4
    assert "tex2jax_ignore" in html  # or Jupyter would typeset $x$


def test_best_and_worst_are_shown(shown):
    run(panel.Live(), [logs()])
    html = shown[-1][1]["text/html"]
    best, worst = html.index("best answer"), html.index("worst answer")
    assert best < html.index("correct 2.00 · form 0.50 · advantage +1.25") < html.index("q &lt;b&gt;?") < worst
    assert worst < html.index("correct 0.00 · form 0.00 · advantage -0.50") < html.index("worst?")
    assert "middle?" not in html
    run(panel.Live(), [logs()], samples=[SAMPLES[0]] * 3)
    assert "all have the same reward" in shown[-1][1]["text/html"]


def test_a_long_answer_is_shortened_in_the_middle(shown):
    run(panel.Live(), [logs()], samples=[Sample("q", "<" + "x" * 5000 + ">", {"correct": 1.0})])
    html = shown[-1][1]["text/html"]
    assert "xxx … xxx" in html and "&lt;x" in html and "x&gt;" in html and "x" * 500 not in html


def test_the_output_of_a_long_run_is_small(shown):
    noisy = [logs(1 + math.sin(i * 12.9898) / 2, **{"rewards/correct/mean": math.sin(i * 78.233)}) for i in range(500)]
    long = [Sample("q" * 3000, "<&" * 5000, {"correct": 1.0}), Sample("q" * 3000, "<&" * 5000, {"correct": 0.0})]
    run(panel.Live(), noisy, total=500, samples=long)
    assert len(shown[-1][1]["text/html"]) < 60_000


def test_the_picture_suits_light_and_dark(shown):
    run(panel.Live(), [logs()] * 5)
    image = picture(shown[-1][1]).convert("RGBA")
    assert image.width >= 1000
    pixels = image.getcolors(image.width * image.height)
    assert sum(n for n, (*_, alpha) in pixels if alpha == 0) > 0.8 * image.width * image.height
    opaque = {(r, g, b) for _, (r, g, b, alpha) in pixels if alpha > 200}
    assert opaque and all(60 < (0.299 * r + 0.587 * g + 0.114 * b) < 200 for r, g, b in opaque)


def test_the_picture_follows_the_data(shown):
    live = run(panel.Live(), [logs()], end=False)
    first = live._picture()
    assert live._picture() == first
    live.history.append({**live.history[-1], "step": 30, "reward": 3.0})
    assert live._picture() != first


def test_figure_for_saving():
    live = run(panel.Live(), [logs(i / 10, **{"rewards/correct/mean": i / 20}) for i in range(32)])
    figure = live.figure()
    reward, share, _ = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["reward", "share", "tokens"]
    assert [text.get_text() for text in reward.get_legend().get_texts()] == ["total", "correct", "form"]
    assert [text.get_text() for text in share.get_legend().get_texts()] == [
        "format",
        "cut off",
        "groups without signal",
    ]
    points, smooth = reward.lines[:2]
    assert list(points.get_ydata()) == [row["reward"] for row in live.history]
    assert smooth.get_ydata()[16] == pytest.approx(1.6) and smooth.get_ydata()[0] == pytest.approx(0.1)
    out = io.BytesIO()
    figure.savefig(out)
    assert Image.open(out).convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    panel.Live().figure()  # before any step


def test_one_function_is_drawn_once():
    live = run(panel.Live(), [{"reward": 1.0, "rewards/correct/mean": 1.0}], samples=None)
    assert [text.get_text() for text in live.figure().axes[0].get_legend().get_texts()] == ["reward"]
    assert "reward 1.00 ·" in live.line()


def test_smoothing():
    assert panel.smoothed([1.0, 5.0]) == [1.0, 5.0]  # too few to smooth
    flat = panel.smoothed([1.0] * 20 + [math.nan] + [1.0] * 20)
    assert flat == [1.0] * 41
    assert panel.smoothed([0.0] * 16 + [3.0] + [0.0] * 16)[14:19] == [
        pytest.approx(v) for v in (0.6, 0.6, 0.6, 0.6, 0.6)
    ]


NOTEBOOK = """
import sys; sys.path[:0] = {path!r}
from test_panel import run, logs, panel
live = run(panel.Live(every=0.0), [logs()] * 3, total=3)
"""


def test_in_a_real_kernel_one_output_stays_and_no_widget_state():
    import nbformat
    from nbclient import NotebookClient

    root = Path(__file__).parents[1]
    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(path=[str(root / "tests"), str(root)]))
    book = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    outputs = [output for output in cell.outputs if output.output_type != "stream" or output.name != "stderr"]
    (output,) = outputs
    assert output.output_type == "display_data" and output.data["text/plain"].startswith("done: step 3/3")
    assert "widgets" not in book.metadata and "application/vnd.jupyter.widget-view+json" not in output.data
    assert len(nbformat.writes(book)) < 60_000


def test_importing_the_panel_does_not_touch_pyplot():
    code = "import sys, nbhelpers.panel as p; p.Live().figure(); print('matplotlib.pyplot' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# ---- with TRL's own trainer ----


def test_a_real_run(tmp_path, capsys):
    """TRL's plain trainer: its log keys are those that the panel reads, and it lives with guarded functions."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from nbhelpers.guard import RewardError, guard_all

    calls = []

    def length(completions, completion_ids, answer, **_):
        calls.append(answer)
        if len(calls) == 2:
            raise OSError("a hiccup")
        return [float(len(ids)) for ids in completion_ids]

    def some(completions, **_):
        return [None if row % 2 else 1.0 for row in range(len(completions))]

    def trainer(funcs, steps):
        args = GRPOConfig(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, num_generations=2, beta=0.1,
            max_completion_length=8, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
            disable_tqdm=True,
        )  # fmt: skip
        rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": str(i)} for i in range(8)]
        live = panel.Live()
        made = GRPOTrainer(
            tiny_model.model(), args=args, reward_funcs=guard_all(funcs), train_dataset=Dataset.from_list(rows),
            processing_class=tiny_model.tokenizer(), callbacks=[live],
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        return made, live

    run_one, live = trainer([length, some], 3)
    capsys.readouterr()
    with pytest.warns(RuntimeWarning, match="'length' failed with OSError: a hiccup"):
        run_one.train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3", "done: step 3/3"]
    assert [row["step"] for row in live.history] == [1, 2, 3] and live.samples == []
    for row in live.history:
        for key in ("reward", "reward_std", "length", "clipped", "zero_signal", "kl", "seconds"):
            assert isinstance(row[key], float) and math.isfinite(row[key]), key
        assert set(row["rewards"]) == {"length", "some"} and row["rewards"]["some"] == 1.0
    assert [row["rewards"]["length"] is None for row in live.history] == [False, True, False]
    assert all(parameter.isfinite().all() for parameter in run_one.model.parameters())

    def nothing(completions, **_):
        return [None] * len(completions)

    with pytest.raises(RewardError, match=r"no reward function \(nothing\) scored any completion"):
        trainer([nothing], 5)[0].train()
