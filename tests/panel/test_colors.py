"""Colours: told apart with any kind of colour vision, and with enough contrast in light themes and dark ones."""

# ruff: noqa: F811  (fixtures)

from itertools import combinations

from panel_cases import logs, newest, picture, run, shown  # noqa: F401

from nbhelpers import panel
from nbhelpers.evaluate import compare
from nbhelpers.panel import curves


def contrast(one, other) -> float:
    """Of two sRGB colours, by WCAG 2.2."""

    def luminance(color):
        parts = [c / 255 for c in color]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted([luminance(one), luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:])) if len(color) == 7 else tuple(17 * int(c, 16) for c in color[1:])


def test_the_picture_is_legible_in_both_themes(shown):
    """It brings its own ground, so the notebook's does not matter: text by AA (4.5), lines by AA (3)."""
    run(panel.Live(), [logs()] * 5)
    image = picture(newest(shown, "curves"))
    assert image.convert("RGBA").getextrema()[3] == (255, 255) and min(image.convert("RGB").getpixel((1, 1))) > 250
    assert contrast(rgb(curves.INK), (255, 255, 255)) >= 4.5
    assert all(contrast(rgb(color), (255, 255, 255)) >= 3 for color in curves.COLORS)


def test_colors_are_told_apart_with_any_colour_vision():
    """Machado et al. 2009, doi 10.1109/TVCG.2009.113, at full strength; CIE 1976 differences in Lab."""
    import numpy as np

    kinds = {
        "usual": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }  # fmt: skip
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(color, seen):
        c = np.array(rgb(color)) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        xyz = to_xyz @ np.clip(np.array(seen) @ linear, 0, 1) / [0.9505, 1, 1.089]
        x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    for kind, seen in kinds.items():
        for one, other in combinations(curves.COLORS, 2):
            assert np.linalg.norm(lab(one, seen) - lab(other, seen)) > 12, (kind, one, other)
    assert len(set(curves.DASHES)) == len(curves.COLORS)  # and by their dashes


def test_marks_of_right_and_wrong_bring_their_own_ground():
    """Written in one colour on the notebook's, no text is legible on white and on black by AA."""
    assert "color:#fff" in compare.MARK
    assert all(contrast(rgb(ground), (255, 255, 255)) >= 4.5 for _, ground in compare.MARKS.values())
    html = compare.Cell("9.9", True).html()
    assert (
        f"<b style='color:#fff;padding:0 5px;border-radius:3px;background:{compare.MARKS[True][1]}'>✓ right</b>" in html
    )


def test_a_note_is_written_in_the_themes_own_colour(shown):
    live = panel.Live()
    live.note = "REPLAY of a run"
    run(live, [logs()])
    html = newest(shown, "head")["text/html"]
    assert "<p style='border-left:4px solid" in html and ";color:" not in html
