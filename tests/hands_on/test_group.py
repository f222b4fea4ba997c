"""Lesson 1's sliders: what they show is what the functions of GRPO say."""

import re

import pytest
import torch

from nbhelpers import grpo, hands_on
from nbhelpers.hands_on import group_of_four

FIRST = {"ratio": 1.0, "clip": 0.2, "beta": 0.0}


def rewards(*values: float) -> dict[str, float]:
    return {f"reward_{i}": value for i, value in enumerate(values, start=1)}


def rows(page) -> list[list[float]]:
    return [[float(word) for word in line.split()] for line in str(page).splitlines()[1:5]]


def test_advantages_losses_and_pushes():
    page = group_of_four.draw(**FIRST, **rewards(1, 0.2, 0, 0))
    advantages = grpo.group_advantages(torch.tensor([1, 0.2, 0, 0]), 4)
    assert [row[2] for row in rows(page)] == pytest.approx(advantages.tolist(), abs=0.005)
    assert [row[3] for row in rows(page)] == pytest.approx((-advantages).tolist(), abs=0.005)  # the ratio is 1
    assert [row[4] for row in rows(page)] == pytest.approx(advantages.tolist(), abs=0.005)  # push: up where it is good
    assert "loss of the group 0.00" in str(page)


def test_a_group_without_spread_is_exactly_silent():
    page = group_of_four.draw(**FIRST, **rewards(0.2, 0.2, 0.2, 0.2))
    assert {number for row in rows(page) for number in row[2:]} == {0.0} and "-0.00" not in str(page)
    assert "every advantage is 0" in str(page)
    pulled = group_of_four.draw(**{**FIRST, "ratio": 1.4, "beta": 0.5}, **rewards(0.2, 0.2, 0.2, 0.2))
    assert all(row[4] < 0 for row in rows(pulled)) and "What pushes is beta alone" in str(pulled)


@pytest.mark.parametrize("ratio, still, pushed", [(1.4, 0, 3), (0.6, 3, 0)])
def test_what_went_far_enough_is_pushed_no_further(ratio, still, pushed):
    """Above the clip a good answer, below it a bad one; the others find their way back."""
    page = group_of_four.draw(**{**FIRST, "ratio": ratio}, **rewards(1, 0.5, 0.5, 0))
    pushes = [row[4] for row in rows(page)]
    assert pushes[still] == 0.0 and pushes[pushed] != 0.0 and "beyond the clip" in str(page)


def test_beta_pushes_back_to_the_reference():
    free, held = (group_of_four.draw(**{**FIRST, "ratio": 1.2, "beta": b}, **rewards(1, 0, 0, 0)) for b in (0.0, 1.0))
    assert all(h[4] < f[4] for h, f in zip(rows(held), rows(free), strict=True))


def test_the_drawing_is_told_in_words_and_takes_the_themes_colour():
    page = group_of_four.draw(**{**FIRST, "ratio": 1.3}, **rewards(1, 0, 0, 0))._repr_html_()
    (words,) = re.findall(r"<svg role='img' aria-label='([^']+)'", page)
    assert "0.80 to 1.20" in words and "at the ratio 1.30" in words and f"<p>{words}</p>" in page
    assert "currentColor" in page and not re.search(r"[;'\"]color:#", page)


@pytest.mark.parametrize("end", ["low", "high"])
def test_every_end_of_every_slider_can_be_shown(end):
    sliders = hands_on.group()
    ends = {name: getattr(slider, end) for name, slider in sliders.controls.items()}
    for name in ends:
        page = sliders.show(**{**sliders.examples[0], name: ends[name]})
        assert "nan" not in page._repr_html_() and "inf" not in str(page)
    assert "nan" not in sliders.show(**ends)._repr_html_()


def test_the_static_page_is_small():
    assert len(hands_on.group()._repr_html_()) < 30_000 and len(hands_on.group().examples) == 4
