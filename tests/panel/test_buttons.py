"""Buttons beside the panel: what a press does to a run, and that nothing of them is saved."""

# ruff: noqa: F811  (fixtures)

from types import SimpleNamespace

import pytest
from panel_cases import logs, newest, run, shown  # noqa: F401
from resume_cases import PLAIN, curve, make, same, undisturbed, weights
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState

from nbhelpers import evaluate, hands_on, panel
from nbhelpers.panel import buttons
from nbhelpers.presets import WORKSHOP
from nbhelpers.training import checkpoint

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """A run in which nobody presses anything: its weights and its curve."""
    return undisturbed(tokenizer, tmp_path_factory.mktemp("whole"), **PLAIN)


class Press(TrainerCallback):
    """Presses at the beginning of a step, as a person does while it goes on."""

    def __init__(self, live, **when):
        self.live, self.when = live, when

    def on_step_begin(self, args, state, control, **_):
        for name, step in self.when.items():
            if state.global_step == step - 1:
                if name == "ask":
                    self.live.buttons._question.value = "9.11 or 9.9?"
                self.live.buttons._wish(name)


@pytest.fixture
def live():
    made = panel.Live()
    made.begin = made.on_train_begin

    def begin(*args, **kwargs):
        made.begin(*args, **kwargs)
        made.buttons = buttons.Buttons()

    made.on_train_begin = begin
    return made


def test_stop_and_keep_is_an_interrupt_after_the_step_and_goes_on_bit_for_bit(tokenizer, tmp_path, whole, live, capsys):
    stopped = make(tokenizer, tmp_path / "cut", live, Press(live, stop=4), **PLAIN)
    result = stopped.train()
    assert result.metrics == {"interrupted": True} and result.global_step == 4
    assert live.history[-1]["step"] == 4 and live.ended is not None and live.buttons is None
    assert "Stopped by you after step 4. What was learned is kept" in capsys.readouterr().out
    again = make(tokenizer, tmp_path / "cut", **PLAIN)
    again.train(resume_from_checkpoint="auto")
    assert same(weights(again), whole[0]) and curve(again) == whole[1]


def test_save_now_and_ask_it_change_nothing_in_the_run(tokenizer, tmp_path, whole, live):
    said, watched = [], Press(live, save=2, ask=3)
    watched.on_save = lambda *_, **__: said.append(live.buttons._line.value)
    pressed = make(tokenizer, tmp_path / "pressed", live, watched, **PLAIN)
    pressed.train()
    assert same(weights(pressed), whole[0]) and curve(pressed) == whole[1]
    saved = tmp_path / "pressed" / "checkpoint-2"
    assert saved.is_dir() and checkpoint.problem(saved) is None  # complete
    assert said[0] == f"Saved after step 2: {tmp_path}/pressed/checkpoint-2"
    ((step, question, written),) = live.asked
    assert step == 3 and question == "9.11 or 9.9?" and written


def test_a_question_is_asked_as_the_probes_are(monkeypatch):
    decoding = evaluate.Decoding(20, 0.0, 7, 1, "hf")
    system = {"role": "system", "content": "be brief"}
    probe = evaluate.Answer("q", "a", "a", 1, True, "", decoding, messages=[system, {"role": "user", "content": "q"}])
    asked = []

    def ask_again(model, tokenizer, before, engine, progress):
        asked.extend(before)
        raise ValueError("the prompt is too long")

    monkeypatch.setattr("nbhelpers.evaluate.ask_again", ask_again)
    live = panel.Live(probes=[probe])
    live._ask("why?", 5, None, None, None, None)
    assert asked[0].messages == [system, {"role": "user", "content": "why?"}] and asked[0].decoding == decoding
    assert live.asked == [(5, "why?", "the prompt is too long")]  # no reason to lose a run


def test_with_trls_own_trainer_stop_saves_and_ends_the_run():
    live = panel.Live()
    live.buttons = buttons.Buttons()
    live.buttons._wish("stop")
    control = TrainerControl()
    live.on_step_end(None, TrainerState(global_step=3), control)
    live.on_step_begin(None, TrainerState(global_step=3), control)  # nothing is raised
    assert control.should_training_stop and control.should_save


def test_the_buttons_have_names_and_an_empty_question_asks_nothing():
    made = buttons.Buttons()
    row, line = made._all.children
    assert [part.description for part in row.children] == ["Stop and keep", "Save now", "Ask it", "Ask"]
    assert "its own stop button" in line.value  # what to do where no press comes through
    for button in (row.children[1], row.children[3]):
        button.click()
    assert made.heard and made.take() == {"save": "", "ask": ""} and made.take() == {}
    row.children[2]._handle_custom_msg({"event": "submit"}, [])  # Enter, in ipywidgets 7 and 8
    row.children[2].value = " why <b>? "
    assert made.take() == {"ask": "why <b>?"} and row.children[2].value == ""
    made.say("<b>")
    assert line.value == "&lt;b&gt;"


@pytest.mark.parametrize("there, ranks, buttons_there", [(False, 1, False), (True, 1, True), (True, 2, False)])
def test_they_are_there_for_a_person_alone(shown, monkeypatch, there, ranks, buttons_there):
    """And for one process: of several each would have to hear the same press."""
    monkeypatch.setattr(hands_on, "attended", lambda: there)
    monkeypatch.setattr(buttons.Buttons, "show", lambda self: None)
    live = panel.Live()
    live.asked = [(1, "q", "of an earlier run")]
    run(live, [logs()], args=SimpleNamespace(num_generations=3, reward_weights=None, world_size=ranks), end=False)
    assert (live.buttons is not None) is buttons_there and live.asked == []
    assert (buttons.STATIC in newest(shown, "answers")["text/html"]) is not there  # the static twin


def test_shown_and_closed_no_button_stays_behind(monkeypatch):
    bundles, registered = [], []
    events = SimpleNamespace(register=lambda *a: registered.append(a), unregister=lambda *a: registered.remove(a))
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(events=events))
    handle = SimpleNamespace(update=lambda bundle, raw: bundles.append(bundle))
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw, display_id: bundles.append(bundle) or handle)
    made = buttons.Buttons()
    made.show()
    assert WIDGET in bundles[0] and bundles[0]["text/html"] == buttons.STATIC and len(registered) == 1
    made.close()  # at the end of the run, or of a cell that ended in an error
    made.close()
    assert bundles[1:] == [{"text/plain": "", "text/html": ""}] and not registered


def test_what_was_asked_is_shown_the_newest_first_and_escaped(shown):
    live = run(panel.Live(), [logs()], end=False)
    live.asked = [(1, "first <b>?", "one"), (2, "second?", "</pre><script>")]
    live.update()
    page = newest(shown, "answers")["text/html"]
    assert page.index("second?") < page.index("first &lt;b&gt;?") and "<script" not in page
