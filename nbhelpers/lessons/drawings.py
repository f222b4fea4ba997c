"""Two drawings, made by code: a step of GRPO, and what lies on the card during one, with one engine and with two.

A drawing is an SVG on a card of its own, light or dark as the reader's browser is, with what it shows in words.
"""

import base64
import html as escaping
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbhelpers.html import COLORS
from nbhelpers.memory import Plan

BLUE, ORANGE, GREEN, PINK, _, SKY = COLORS
SUMS = (("8 + 5 = 13", 1.0), ("12", 0.2), ("I like sums.", 0.0), ("5 + 8 = 13", 1.0))
PARTS = {  # of the memory, from the bottom to the top
    "CUDA context": "#767676",
    "weights": BLUE,
    "second copy": ORANGE,
    "LoRA, gradients, Adam": GREEN,
    "KV cache": PINK,
    "work": SKY,
}
DARK = "second copy"  # the one colour on which dark letters are easier to read than white ones
WORK = ("dense scratch", "layer work", "logits")  # the planner's names for what is there for a moment
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #222 } .small { font-size: 12px } .head { font-weight: bold }
.card { fill: #fff; stroke: #ccc } .box { fill: #f2f2f2; stroke: #999 } .line { stroke: #555; fill: none }
.tip { fill: #555 } .white { fill: #fff } .dark { fill: #111 } .limit { stroke: #222; stroke-dasharray: 6 4 }
@media (prefers-color-scheme: dark) {
text { fill: #e6e6e6 } .card { fill: #1c1c1c; stroke: #444 } .box { fill: #2b2b2b; stroke: #888 }
.line { stroke: #bbb } .tip { fill: #bbb } .white { fill: #fff } .dark { fill: #111 } .limit { stroke: #e6e6e6 } }
"""


@dataclass(frozen=True)
class Drawing:
    """An SVG that a notebook shows by itself. `words` say what is in it, for those who do not see it."""

    svg: str
    words: str

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        # A picture and not inline SVG: Jupyter and GitHub keep it in a notebook that nobody has run, with its words.
        data = base64.b64encode(self.svg.encode()).decode()
        picture = (
            f'<img alt="{escaping.escape(self.words)}" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'
        )
        return {"text/html": picture, "text/plain": self.words}

    def __repr__(self) -> str:
        return self.words


def grpo_step(prompt: str = "8 + 5 = ?", answers: Sequence[tuple[str, float]] = SUMS) -> Drawing:
    """One step of GRPO: a prompt, a group of answers, their rewards, their advantages, and what becomes of each.

    Args:
        prompt (`str`): The question.
        answers (`Sequence[tuple[str, float]]`): Each answer and its reward; at least two with different rewards.
    """
    rewards = [reward for _, reward in answers]
    mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
    advantages = [(reward - mean) / spread for reward in rewards]
    top, step = 92, 52
    bottom = top + step * len(answers)
    middle = (top + bottom - step) / 2 + 17
    parts = [
        _text(x, 34, head, "head") + _text(x, 52, below, "small")
        for x, head, below in (
            (70, "1 · ask", "one prompt"),
            (250, "2 · write", f"{len(answers)} answers, sampled"),
            (430, "3 · score", "the reward function"),
            (605, "4 · compare", "with the group's mean"),
            (800, "5 · learn", "change the weights"),
        )
    ]
    parts.append(_box(14, middle - 20, 112, 40, prompt))
    for i, ((answer, reward), advantage) in enumerate(zip(answers, advantages, strict=True)):
        y = top + step * i
        good = advantage > 0
        word, colour = ("more likely", BLUE) if good else ("less likely", ORANGE)
        parts += [_arrow(126, middle, 178, y + 17), _box(180, y, 140, 34, answer), _arrow(320, y + 17, 398, y + 17)]
        parts += [_text(430, y + 22, f"{reward:.1f}"), _arrow(462, y + 17, 518, y + 17)]
        width = 38 * abs(advantage)
        left = 605 if good else 605 - width
        parts.append(f'<rect x="{left:.1f}" y="{y + 4}" width="{width:.1f}" height="26" fill="{colour}"/>')
        parts.append(_text(605 - 26 if good else 605 + 26, y + 22, f"{advantage:+.2f}"))
        parts += [_arrow(690, y + 17, 728, y + 17), _box(730, y, 140, 34, f"{'▲' if good else '▼'} {word}")]
    parts.append(_line(605, top - 8, 605, bottom - 6))
    parts.append(_text(605, bottom + 12, f"mean {mean:.2f} · spread {spread:.2f}", "small"))
    parts.append(f'<path class="line" d="M800 {bottom - 14} V{bottom + 34} H70 V{middle + 30}"/>')
    parts.append(f'<path class="tip" d="M64 {middle + 31} L76 {middle + 31} L70 {middle + 21} Z"/>')
    parts.append(_text(340, bottom + 28, "the next step: the changed model writes", "small"))
    told = ", ".join(
        f'"{answer}": reward {reward:.1f}, advantage {advantage:+.2f}, {"more" if advantage > 0 else "less"} likely'
        for (answer, reward), advantage in zip(answers, advantages, strict=True)
    )
    words = (
        f'One step of GRPO. The prompt "{prompt}" is answered {len(answers)} times. A reward function scores each, '
        f"and each reward is compared with the mean of the group, {mean:.2f}, in units of its spread, {spread:.2f}. "
        f"{told}. The weights change, and the changed model writes the answers of the next step."
    )
    return _drawing(885, bottom + 50, "A step of GRPO", words, parts)


def halves(plan: Plan) -> dict[str, dict[str, dict[str, float]]]:
    """{"two engines" or "one engine": {"writing" or "training": {part: GB}}}, all of it planned.

    Two engines are one and, beside it, what a second one holds all the time: another copy of the weights and of the
    LoRA, and a cache for the whole group. The part "kept for backward", which grows into whatever room there is, is
    left out.

    Args:
        plan (`memory.Plan`): Of a run with a LoRA.
    """
    write, train = plan.generation, plan.training
    cache = write["KV cache"] / plan.at_once * plan.setting.num_generations
    both = {"CUDA context": write["CUDA context"], "weights": write["weights"]}
    second = {"second copy": write["weights"] + write["adapters"]}
    learns = {"LoRA, gradients, Adam": train["adapters"] + train["optimizer"]}
    work = {name: {"work": sum(half.get(part, 0.0) for part in WORK)} for name, half in (("w", write), ("t", train))}
    kept = {"KV cache": cache}
    return {
        "two engines": {
            "writing": both | second | learns | kept | work["w"],
            "training": both | second | learns | kept | work["t"],
        },
        "one engine": {"writing": both | learns | kept | work["w"], "training": both | learns | work["t"]},
    }


def memory_of_a_step(plan: Plan) -> Drawing:
    """What lies on the card while a step writes and while it trains, with two engines and with one, to scale.

    Args:
        plan (`memory.Plan`): Of a run with a LoRA.
    """
    found = halves(plan)
    totals = {(setup, half): sum(gb.values()) for setup, both in found.items() for half, gb in both.items()}
    floor, height = 330, 250  # where the stacks stand, and how high the larger of card and stacks is
    scale = height / max(plan.card_gb, *totals.values())
    parts = []
    for setup, left in (("two engines", 60), ("one engine", 400)):
        parts.append(_text(left + 130, 34, setup, "head"))
        for i, (half, gb) in enumerate(found[setup].items()):
            x, y = left + 132 * i, float(floor)
            for name, colour in PARTS.items():
                tall = scale * gb.get(name, 0.0)
                y -= tall
                if tall:
                    parts.append(f'<rect x="{x}" y="{y:.1f}" width="128" height="{tall:.1f}" fill="{colour}"/>')
                if tall > 13:
                    ink = "small dark" if name == DARK else "small white"
                    parts.append(_text(x + 64, y + tall / 2 + 4, f"{name} {gb[name]:.1f}", ink))
            parts.append(_text(x + 64, y - 6, f"{totals[setup, half]:.1f} GB"))
            parts.append(_text(x + 64, floor + 18, half))
    card = floor - scale * plan.card_gb
    parts.append(f'<path class="limit" d="M50 {card:.1f} H680"/>')
    parts.append(_text(725, card + 5, f"card: {plan.card_gb:g} GB", "small"))
    parts.append(_text(370, floor + 42, "one step, from left to right; GB as planned, not measured", "small"))
    x = 60
    for name, colour in PARTS.items():
        parts.append(f'<rect x="{x}" y="{floor + 58}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text class="small" x="{x + 17}" y="{floor + 68}">{name}</text>')
        x += 34 + round(6.4 * len(name))
    told = "; ".join(f"{setup}, {half}: {total:.1f} GB" for (setup, half), total in totals.items())
    copy = found["two engines"]["writing"]["second copy"]
    words = (
        f"Memory of one GRPO step of {plan.preset.title}, planned for a card of {plan.card_gb:g} GB. {told}. "
        f"Two engines hold a second copy of the weights, {copy:.1f} GB, and the KV cache all the time; one engine "
        "hands its cache back before it trains."
    )
    return _drawing(790, floor + 86, "The memory of a step", words, parts)


def _drawing(width: int, height: float, title: str, words: str, parts: list[str]) -> Drawing:
    body = "\n".join(parts)
    return Drawing(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" role="img" '
        f'aria-labelledby="t d">\n<title id="t">{title}</title>\n<desc id="d">{escaping.escape(words)}</desc>\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1:.0f}" rx="8"/>\n{body}\n</svg>\n',
        words,
    )


def _text(x: float, y: float, text: str, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text{named} x="{x:g}" y="{y:.1f}" text-anchor="middle">{escaping.escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, text: str) -> str:
    frame = f'<rect class="box" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
    return frame + _text(x + width / 2, y + height / 2 + 5, text)


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="line" d="M{x1:g} {y1:g} L{x2:g} {y2:g}"/>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a tip at its right end."""
    tip = f'<path class="tip" d="M{x2:g} {y2:g} l-9 -4 v8 Z"/>'
    return _line(x1, y1, x2 - 6, y2) + tip
