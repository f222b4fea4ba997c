"""The drawings say what the package computes, in letters that can be read in both themes and in words."""

import base64
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from nbhelpers import grpo, memory
from nbhelpers.lessons import drawings

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
PLAN = memory.plan(
    "phi-4", card_gb=15, quantization="nf4", lora_rank=16, num_generations=8, max_prompt_length=256,
    max_completion_length=768,
)  # fmt: skip
BOTH = {"step": drawings.grpo_step(), "memory": drawings.memory_of_a_step(PLAN)}


def texts(drawing: drawings.Drawing) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawing.svg).iter(f"{SVG}text")]


def luminance(colour: str) -> float:
    """Relative luminance of "#rgb" or "#rrggbb" (WCAG 2.1)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    linear = [
        value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    ]
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", BOTH)
def test_it_is_told_in_words_wherever_it_is_shown(name):
    drawing = BOTH[name]
    root = ElementTree.fromstring(drawing.svg)
    assert root.get("role") == "img" and root.find(f"{SVG}desc").text == drawing.words
    shown = drawing._repr_mimebundle_()
    assert shown["text/plain"] == drawing.words and 'alt="' in shown["text/html"]
    data = re.search(r"base64,([^\"]+)", shown["text/html"])[1]
    assert base64.b64decode(data).decode() == drawing.svg
    assert len(shown["text/html"]) < 12_000, "a notebook has 200 KB for everything"


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_letters_and_lines_have_contrast_in_both_themes(theme):
    rules = drawings.STYLE.split("@media")[theme]
    ink = re.search(r"(?m)^text \{[^}]*fill: (#\w+)", rules)[1]
    card, box = (re.search(rf"\.{name} {{ fill: (#\w+)", rules)[1] for name in ("card", "box"))
    assert contrast(ink, card) >= 7 and contrast(ink, box) >= 7
    assert contrast(re.search(r"\.line \{ stroke: (#\w+)", rules)[1], card) >= 3


def test_letters_on_a_part_have_contrast():
    for name in ("weights", "second copy", "KV cache"):
        assert contrast("#111" if name == drawings.DARK else "#fff", drawings.PARTS[name]) >= 4.5, name


def test_a_step_shows_the_advantages_of_the_package():
    answers = [("<b>", 1.0), ("b & c", 0.0), ("d", 0.0), ("e", 0.0)]
    drawing = drawings.grpo_step("?", answers)
    wanted = grpo.group_advantages(torch.tensor([reward for _, reward in answers]), 4)
    assert [f"{a:+.2f}" for a in wanted] == [text for text in texts(drawing) if text[0] in "+-"]
    assert [text[2:] for text in texts(drawing) if text[0] in "▲▼"] == ["more likely", *["less likely"] * 3]
    assert "<b>" in texts(drawing), "an answer may hold anything"


def test_the_memory_is_that_of_the_plan():
    found = drawings.halves(PLAN)
    one, two = found["one engine"], found["two engines"]
    kept = PLAN.training.get("kept for backward", 0.0)
    assert sum(one["training"].values()) == pytest.approx(sum(PLAN.training.values()) - kept)
    copy = PLAN.generation["weights"] + PLAN.generation["adapters"]
    for half in ("writing", "training"):
        assert two[half]["second copy"] == copy and "second copy" not in one[half]
        assert f"{sum(two[half].values()):.1f} GB" in texts(BOTH["memory"])
    assert "KV cache" in two["training"] and "KV cache" not in one["training"]


def test_the_page_that_shows_the_memory_says_the_same():
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    words = re.search(r"!\[([^\]]+)\]\(memory_of_a_step\.svg\)", page)[1]
    totals = [f"{max(sum(half.values()) for half in both.values()):.1f} GB" for both in drawings.halves(PLAN).values()]
    assert re.findall(r"[\d.]+ GB", words) == totals
