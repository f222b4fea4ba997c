"""The plan moved by hand is the plan."""

import pytest

from nbhelpers import memory, presets


def test_the_first_page_is_the_plan_of_the_card():
    sliders = memory.sliders("qwen2.5-1.5b", card_gb=15.8)
    assert str(memory.plan("qwen2.5-1.5b", 15.8)) in str(sliders) and "card, GB: 15.8" in str(sliders)
    first, longer, smaller = sliders.examples
    assert longer["max_completion_length"] == 4 * first["max_completion_length"] and smaller["card_gb"] == 7.9
    assert sliders._repr_html_().count("<table>") == 3


def test_a_moved_slider_is_a_plan_of_its_own():
    box = memory.sliders("llama-3.1-8b", card_gb=15).widget()
    (card, group, prompt, answer), follows = [pair.children[0] for pair in box.children[0].children], box.children[1]
    assert "It fits" in follows.value
    card.value = 5.0
    assert "It does NOT fit" in follows.value and "on 5 GB" in follows.value
    card.value, group.value, prompt.value, answer.value = 24.0, 4, 512, 1024
    wanted = memory.plan(presets.get("llama-3.1-8b").on_card(15), 24.0, 4, 512, 1024)
    assert follows.value == wanted._repr_html_() and "4 x (512 + 1024) tokens" in follows.value


@pytest.mark.parametrize("name", presets.names())
@pytest.mark.parametrize("gb", [None, 4, 8, 139.8])
def test_every_preset_has_sliders_that_hold_its_own_values(name, gb):
    for slider, control in memory.sliders(name, gb).controls.items():
        assert control.low <= control.value <= control.high, slider
