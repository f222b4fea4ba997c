"""A recorded run: saved by the panel, shown again by the same panel, never without its mark."""

import json

import pytest
from panel_cases import ARGS, GOOD, SAMPLES, logs, newest, picture, run, shown  # noqa: F401

from nbhelpers import gpu, host, panel, presets
from nbhelpers.evaluate import Answer, Decoding
from nbhelpers.panel import display, replay

MARK = "REPLAY of a recorded run: my model, {}, {} — nothing was trained here"


@pytest.fixture
def recorded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "nbhelpers.panel.history.memory_now", lambda: {"used": 1.26, "total": 15.0}
    )  # the file rounds it
    live = panel.Live()
    run(live, [logs(i / 10) for i in range(30)], total=30)
    answer = Answer("9.11 or 9.9?", GOOD, "9.9", 9, True, "u:…", Decoding(8, 0.0, 0, 64, "graph"),
                    messages=[{"role": "user", "content": "9.11 or 9.9?"}])  # fmt: skip
    live.probed = {0: [answer], 20: [answer]}
    capsys.readouterr()
    return live, live.save(tmp_path / "runs" / "run.json", "my model")


def test_what_was_recorded_is_shown(recorded, capsys):
    live, path = recorded
    shown_again = replay.run(path, seconds=0)
    (line,) = capsys.readouterr().out.splitlines()
    mark = MARK.format(shown_again.hardware, shown_again.date)
    assert line == f"{mark} · {live.line()}" and shown_again.note == mark
    assert [row["reward"] for row in shown_again.history] == [row["reward"] for row in live.history]
    assert shown_again.history[3]["rewards"] == live.history[3]["rewards"]
    assert shown_again.pair == [SAMPLES[1], SAMPLES[2]] == live.pair and shown_again.probed == live.probed
    assert shown_again.ended == pytest.approx(live.ended, rel=1e-3)
    assert shown_again.versions == host.versions()


def test_it_goes_through_the_run_in_the_given_time(recorded, capsys, monkeypatch):
    class Clock:
        now, slept = 0.0, []

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.slept.append(seconds)
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(replay, "time", clock)
    replay.run(recorded[1], seconds=5)
    lines = capsys.readouterr().out.splitlines()
    assert clock.now == pytest.approx(5.0) and len(lines) == 10
    assert all(line.startswith("REPLAY of a recorded run: my model") for line in lines)
    assert "step 3/30" in lines[0] and "done: step 30/30" in lines[-1] and "done" not in lines[-2]


def test_early_steps_know_nothing_of_later_ones(recorded, capsys):
    again = replay.Replay(recorded[1])
    again.show_at(10)
    assert [row["step"] for row in again.history] == list(range(1, 11)) and again.ended is None
    assert list(again.probed) == [0] and "left" in again.line()
    again.show_at(11)
    assert again.pair_step == 10 and "step 10: best answer" in again.outputs()[3][0]["text/html"]


def test_the_mark_is_in_text_and_picture(recorded, shown):  # noqa: F811
    live, path = recorded
    again = replay.run(path, seconds=0)
    html, plain = newest(shown, "head")["text/html"], newest(shown, "head")["text/plain"]
    assert "nothing was trained here" in html and plain.startswith("REPLAY of a recorded run: my model")
    assert [text.get_text() for text in again.figure().texts] == [again.note]
    live.note = ""
    with_mark, without = picture(newest(shown, "curves")), live.picture()
    assert without != with_mark
    top = with_mark.convert("RGB").crop((0, 0, with_mark.width, 36)).getcolors(10**6)
    assert sum(n for n, color in top if max(color) < 120) > 500  # as dark as all text


def test_as_the_last_line_of_a_cell_it_is_shown_once_and_in_a_new_cell_again(recorded, shown, monkeypatch):  # noqa: F811
    from IPython.core.formatters import DisplayFormatter

    again = replay.run(recorded[1], seconds=0)
    before = len(shown)
    assert DisplayFormatter().format(again) == ({}, {}) and len(shown) == before == 4
    monkeypatch.setattr(display, "this_cell", lambda: "another")
    assert DisplayFormatter().format(again) == ({}, {}) and [kind for kind, *_ in shown[4:]] == ["first"] * 4


def test_a_file_of_another_kind_is_refused(tmp_path):
    for text in ("{}", "[]", "no json", '{"recorded_run": 7}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=r"x\.json is not a recorded run of this version .*live\.save"):
            replay.run(tmp_path / "x.json")
    with pytest.raises(ValueError, match="no step was logged"):
        panel.Live().save(tmp_path / "y.json", "m")
    with pytest.raises(FileNotFoundError):
        replay.run(tmp_path / "none.json")


def test_the_run_that_comes_with_the_package(capsys):
    """A real one: of the workshop model, small, with nothing of the machine's folders in it."""
    text = replay.RECORDED.read_text()
    assert len(text) <= 100_000 and str(presets.WORKSHOP) not in text and "/home/" not in text and "/work" not in text
    again = replay.run(seconds=0)
    assert "the workshop model" in again.model and again.hardware and again.date and "torch" in again.versions
    assert [row["step"] for row in again.history] == list(range(1, again.total_steps + 1))
    seconds = [row["seconds"] for row in again.history]
    assert seconds == sorted(seconds) and again.ended >= seconds[-1]
    assert len(again.probed) >= 3 and all(len(answers) == 3 for answers in again.probed.values())
    json.loads(text)


def test_a_preset_with_a_recorded_run_shows_its_own(recorded, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    monkeypatch.setattr(gpu, "cards", lambda: [])
    monkeypatch.setattr(replay, "RUNS", tmp_path / "runs")
    (tmp_path / "runs" / "qwen2.5-1.5b.json").write_text(recorded[1].read_text())
    for name, shown_model in (("qwen2.5-1.5b", "my model"), ("qwen2.5-3b", "the workshop model")):
        with pytest.raises(host.CannotRun, match=f"What you saw is a recorded run of {shown_model}"):
            replay.instead_of(presets.get(name), seconds=0)
        assert f"REPLAY of a recorded run: {shown_model}" in capsys.readouterr().out


def test_recorded_runs_that_come_with_the_package_are_of_presets_or_a_lesson_and_can_be_shown():
    for file in replay.RUNS.glob("*.json"):
        assert file.stem in (*presets.names(), "countdown") and len(file.read_bytes()) < 200_000
        assert replay.Replay(file).steps


def test_instead_of_stops_only_where_there_is_no_gpu(capsys, monkeypatch):
    big = presets.get("llama-3.1-8b")
    monkeypatch.setattr(gpu, "cards", lambda: [])
    with pytest.raises(host.CannotRun, match=r"Llama 3\.1 8B Instruct was not trained.*T4 GPU.*replay\.instead_of"):
        replay.instead_of(big, seconds=0)
    assert "REPLAY" in capsys.readouterr().out
    replay.instead_of(presets.get("workshop"), seconds=0)
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    replay.instead_of(presets.get("llama-3.1-8b"), seconds=0)
    monkeypatch.setattr(gpu, "cards", lambda: [gpu.Card("Tesla T4", 16 * 10**9, (7, 5))])
    replay.instead_of(big, seconds=0)
    assert capsys.readouterr().out == ""
