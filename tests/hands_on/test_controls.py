"""Widgets where a person sits, the same as a static page everywhere else."""

import subprocess
import sys

import ipywidgets
import pytest

from nbhelpers import hands_on
from nbhelpers.hands_on import HandsOn, Page, Slider, Text, controls

WIDGET = "application/vnd.jupyter.widget-view+json"


def made() -> HandsOn:
    def show(clip: float, text: str) -> Page:
        if clip > 0.4:
            raise ValueError("clip <b> is too large")
        return Page(f"<b>{clip:.1f} {len(text)}</b>", f"{clip:.1f} {len(text)}")

    inputs = {"clip": Slider("clip", 0.0, 0.5, 0.1, 0.2), "text": Text("an answer", "<i>")}
    return HandsOn(show, inputs, [{"clip": 0.5}, {"text": ""}])


def test_the_static_page_has_the_first_values_and_the_examples():
    page, text = made()._repr_html_(), str(made())
    assert page.count("<b>0.2 3</b>") == 1 and page.count("<b>0.2 0</b>") == 1
    assert "clip: 0.2 · an answer\n&lt;i&gt;" in page and "<i>" not in page and "(nothing)" in page
    assert "clip &lt;b&gt; is too large" in page and "clip <b> is too large" in text
    assert "0.2 3" in text and repr(made()) == text


@pytest.mark.parametrize("there", [True, False])
def test_the_bundle_has_the_widget_only_for_a_person(monkeypatch, there):
    monkeypatch.setattr(controls, "attended", lambda: there)
    bundle = made()._repr_mimebundle_()
    assert (WIDGET in bundle) is there
    assert bundle["text/html"] == made()._repr_html_() and bundle["text/plain"] == str(made())  # beside it, always


def test_what_follows_follows():
    box = made().widget()
    (fields, text), follows = box.children[0].children, box.children[1]
    field, clip = fields.children
    assert isinstance(clip, ipywidgets.FloatSlider) and (clip.min, clip.max, clip.step) == (0.0, 0.5, 0.1)
    assert field.description == "clip" and text.description == "an answer"  # a name for who does not see it
    assert follows.value == "<b>0.2 3</b>"
    clip.value = 0.4
    assert field.value == 0.4
    text.value = "seven"
    assert follows.value == "<b>0.4 5</b>"
    field.value = 0.5
    assert clip.value == 0.5
    assert follows.value == "<p>clip &lt;b&gt; is too large</p>"  # a sentence, not a traceback that nobody sees


def test_whole_numbers_stay_whole():
    assert isinstance(Slider("answers", 2, 32, 1, 8).widgets()[0], ipywidgets.BoundedIntText)
    assert isinstance(Slider("card, GB", 4, 96, 0.5, 15).widgets()[0], ipywidgets.BoundedFloatText)


def test_nobody_sits_at_a_run_that_nobody_can_be_asked_in(monkeypatch):
    """nbclient, nbmake, papermill and Kaggle's batch runs say so in every request."""
    asked = {"content": {"allow_stdin": True}}
    monkeypatch.setattr(controls, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.get_ipython", lambda: type("Shell", (), {"get_parent": lambda self: asked})())
    assert hands_on.attended()
    asked["content"]["allow_stdin"] = False
    assert not hands_on.attended()
    asked["content"]["allow_stdin"] = True
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # not installed
    assert not hands_on.attended() and WIDGET not in made()._repr_mimebundle_()


def test_no_torch_and_no_widgets_before_they_are_needed():
    code = "import sys; from nbhelpers import hands_on; print({'torch', 'ipywidgets', 'IPython'} & {*sys.modules})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"
