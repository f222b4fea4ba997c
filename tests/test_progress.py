"""The line with a clock, of what takes long."""

import re
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from nbhelpers import progress


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook is shown: (first or update, plain text), and what was registered for the end of the cell."""
    seen, at_end = [], []

    class Handle:
        def update(self, bundle, raw):
            seen.append(("update", bundle["text/plain"], bundle["text/html"]))

    def display(bundle, raw, display_id):
        seen.append(("first", bundle["text/plain"], bundle["text/html"]))
        return Handle()

    events = SimpleNamespace(
        register=lambda event, call: at_end.append(call), unregister=lambda event, call: at_end.remove(call)
    )
    monkeypatch.setattr(progress, "_shell", lambda: SimpleNamespace(config={"IPKernelApp": {}}, events=events))
    monkeypatch.setattr("IPython.display.display", display)
    return seen, at_end


class Ticks:
    def __init__(self, tick):
        self.tick = tick

    def stop(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    made = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(progress, "Ticker", Ticks)
    return made


def test_how_much_how_long_and_how_long_still(notebook, clock):
    with progress.Clock("answers", 100) as line:
        clock.now = 1.9
        line._tick()
        assert notebook[0] == []  # too short to be worth a line
        clock.now = 35
        line._tick()
        for _ in range(41):
            line.step()
        line._tick()
        clock.now = 85
    assert [(kind, text) for kind, text, _ in notebook[0]] == [
        ("first", "answers: 0 of 100 · 0:35"),
        ("update", "answers: 41 of 100 · 0:35 · about 0:50 left"),
        ("update", "answers: 100 in 1:25"),
    ]
    assert "width:41.0%" in notebook[0][1][2] and "width:" not in notebook[0][2][2].replace("max-width", "")


def test_what_is_done_in_a_moment_or_not_to_be_shown_has_no_line(notebook, clock, monkeypatch):
    with progress.Clock("answers", 3) as line:
        line.step()
    with progress.Clock("answers", 3, shown=False):
        clock.now += 60
    monkeypatch.setenv("RANK", "1")
    with progress.Clock("answers", 3) as line:
        clock.now += 60
        assert line._ticker is None
    assert notebook[0] == []


def test_an_interrupt_leaves_what_was_done(notebook, clock):
    with pytest.raises(KeyboardInterrupt), progress.Clock("answers", 10) as line:
        line.step()
        clock.now = 20
        line._tick()
        raise KeyboardInterrupt
    assert notebook[0][-1][1] == "answers: 1 of 10 · 0:20 · about 3:00 left"


def test_a_terminal_gets_one_line_and_a_file_none(capsys, clock, monkeypatch):
    with progress.Clock("answers", 10) as line:
        clock.now = 20
        assert line._ticker is None
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Clock("answers", 10) as line:
        clock.now = 25
        line._tick()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.split(r" *[\r\n]", said)[1:3] == [
        "answers: 0 of 10 · 0:05",
        "answers: 10 in 0:05",
    ]


def test_a_ticker_ends_with_the_cell(notebook):
    ticked = threading.Event()
    before = threading.active_count()
    progress.Ticker(ticked.set, 0.001)
    assert ticked.wait(10)
    (end_of_cell,) = notebook[1]
    end_of_cell(None)
    assert threading.active_count() == before and notebook[1] == []


def test_durations():
    assert [progress.duration(s) for s in (7, 750, 7500)] == ["0:07", "12:30", "2:05:00"]
    assert time.monotonic() > 0 and not progress.in_notebook() and progress.this_cell() is None


def test_evaluation_counts_its_answers(monkeypatch):
    """Each completion once, whichever engine writes; the probes of a run are asked without a line."""
    import tiny_model

    from nbhelpers import evaluate
    from nbhelpers.evaluate import asking

    made = []

    class Counting(progress.Clock):
        def __init__(self, what, total, *, shown=True):
            super().__init__(what, total, shown=shown)
            made.append((self, shown))

    monkeypatch.setattr(asking, "Clock", Counting)
    model, tokenizer = tiny_model.model(), tiny_model.tokenizer()
    for engine in ("graph", "hf"):
        asked = evaluate.ask(model, tokenizer, ["1?", "2?", "3?"], max_new_tokens=4, batch_size=2, engine=engine)
        assert (made[-1][0].what, made[-1][0].total, made[-1][0].done, made[-1][1]) == ("answers", 3, 3, True)
    evaluate.ask_again(model, tokenizer, asked, progress=False)
    assert made[-1][0].done == 3 and made[-1][1] is False


def test_calibration_counts_its_matrices(monkeypatch):
    import tiny_model
    import torch

    from nbhelpers.models import quantize

    made = []

    class Counting(progress.Clock):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(quantize, "Clock", Counting)
    model = tiny_model.model()
    quantize.choose(model, [torch.ones(1, 8, dtype=torch.long)] * 2)
    assert made[0].done == made[0].total == 2 * len(quantize.linears(model))
