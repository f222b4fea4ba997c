"""What rewards, ratio, clip and beta do to the advantages and the loss of a group of four answers of one token each."""

import torch

from nbhelpers import grpo
from nbhelpers.html import COLORS, cell, table

from .controls import HandsOn, Page, Slider

ANSWERS = 4
WIDTH, HEIGHT = 420, 170  # of the drawing, pixels
POINTS = 29  # of a curve
HALF = 60  # of the width of a bar's column, pixels
SPACED = "border-collapse:separate;border-spacing:14px 2px;text-align:left"
LONGEST = 1.6  # advantage, or push, of a bar of full length; four rewards cannot give more than 1.5


def sliders() -> HandsOn:
    controls = {
        f"reward_{i}": Slider(f"reward {i}", 0.0, 1.0, 0.1, value)
        for i, value in enumerate((1.0, 0.2, 0.0, 0.0), start=1)
    }
    controls["ratio"] = Slider("ratio", 0.4, 1.6, 0.05, 1.0)
    controls["clip"] = Slider("clip (epsilon)", 0.0, 0.5, 0.05, 0.2)
    controls["beta"] = Slider("beta", 0.0, 1.0, 0.05, 0.0)
    alike = {f"reward_{i}": 0.2 for i in range(1, ANSWERS + 1)}
    return HandsOn(draw, controls, [alike, {"ratio": 1.4}, {"ratio": 1.4, "beta": 1.0}])


def draw(ratio: float, clip: float, beta: float, **rewards: float) -> Page:
    """The table of the four answers, and the loss of the best and the worst as curves over the ratio.

    Args:
        ratio (`float`): Probability of each answer now, by that when it was written; above 0. The model that wrote it
            is the reference, too.
        clip (`float`): Epsilon.
        beta (`float`): Weight of the KL term.
        rewards (`float`): `reward_1` to `reward_4`.
    """
    given = torch.tensor([float(rewards[f"reward_{i}"]) for i in range(1, ANSWERS + 1)])  # [B]
    advantages = grpo.group_advantages(given, ANSWERS)  # [B]
    if grpo.silent_groups(given, ANSWERS).item():
        advantages = torch.zeros(ANSWERS)  # exactly: rounding aside
    losses, pushes = _losses(torch.full((ANSWERS,), ratio), advantages, clip, beta)
    total = f"loss of the group {_said(losses.mean().item())}"
    why = _why(advantages, pushes, ratio, clip, beta)
    columns = list(zip(given.tolist(), advantages.tolist(), losses.tolist(), pushes.tolist(), strict=True))
    rows = [
        [cell(text, "") for text in (str(i), f"{r:.1f}", _bar(a), _said(loss), _bar(push))]
        for i, (r, a, loss, push) in enumerate(columns, start=1)
    ]
    head = [cell(name, "", tag="th") for name in ("answer", "reward", "advantage", "loss", "push")]
    text = [f"{'answer':>6} {'reward':>7} {'advantage':>10} {'loss':>6} {'push':>6}"]
    text += [f"{i:>6} {r:7.1f} {_said(a, '+'):>10} {_said(loss):>6} {_said(push, '+'):>6}"
             for i, (r, a, loss, push) in enumerate(columns, start=1)]  # fmt: skip
    picture = _curves(ratio, clip, beta, advantages)
    shown = f"{table(head, rows, SPACED)}<p><b>{total}</b>. {why}</p>{picture}"
    return Page(shown, "\n".join([*text, f"{total}. {why}"]))


def _losses(
    ratio: torch.Tensor, advantages: torch.Tensor, clip: float, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """float [B], [B] -> the loss of each answer, and how hard its log-probability is pushed up: [B] each."""
    logps = ratio.log()[:, None].requires_grad_()  # [B, 1]
    written, mask = torch.zeros_like(logps), torch.ones_like(logps)
    losses = grpo.token_loss(
        logps, advantages, mask, old_logps=written, ref_logps=written, epsilon=clip, beta=beta
    )  # [B, 1]
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    return losses.detach()[:, 0], -gradient[:, 0]


def _why(advantages: torch.Tensor, pushes: torch.Tensor, ratio: float, clip: float, beta: float) -> str:
    """What there is to see, in a sentence or two."""
    if not advantages.any():
        said = "All rewards are equal, so every advantage is 0: no answer is better than another."
        return said + (" What pushes is beta alone, back to the reference." if pushes.abs().max() > 1e-6 else "")
    inside = 1 - clip <= ratio <= 1 + clip
    if inside:
        said = "Above average is pushed up, below average down."
    else:
        more, side = ("more", "good") if ratio > 1 else ("less", "bad")
        said = f"The ratio is beyond the clip: what became {more} likely and is {side} has gone far enough."
    return said + (" Beta pushes all of them back to the reference." if beta and ratio != 1 else "")


def _said(value: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}" if abs(value) >= 5e-3 else "0.00"  # no -0.00


def _bar(value: float) -> str:
    """A number with a bar below it from the middle, to the right above 0."""
    wide = round(min(1.0, abs(value) / LONGEST) * HALF)
    left, color = (HALF, COLORS[0]) if value > 0 else (HALF - wide, COLORS[1])
    bar = f"margin-left:{left}px;width:{wide}px;height:8px;background:{color}"
    return f"{_said(value, '+')}<div style='width:{2 * HALF}px'><div style='{bar}'></div></div>"


def _curves(ratio: float, clip: float, beta: float, advantages: torch.Tensor) -> str:
    """An SVG in the theme's own colour of text: the loss of the best and of the worst answer, if the ratio were..."""
    ratios = torch.linspace(0.3, 1.7, POINTS)
    best, worst = advantages.max(), advantages.min()
    curves = [_losses(ratios, advantage.expand(POINTS), clip, beta)[0] for advantage in (best, worst)]
    low, high = min(-2.6, *(c.min().item() for c in curves)), max(2.6, *(c.max().item() for c in curves))

    def x(at: float) -> float:
        return WIDTH * (at - 0.3) / 1.4

    def y(loss: float) -> float:
        return HEIGHT * (high - loss) / (high - low)

    band = max(0.0, x(1 + clip) - x(1 - clip))
    parts = [
        f"<rect x='{x(1 - clip):.0f}' y='0' width='{band:.0f}' height='{HEIGHT}' fill='rgba(128,128,128,.25)'/>",
        f"<path d='M0 {y(0):.0f}H{WIDTH}' stroke='currentColor' stroke-width='.6'/>",
        f"<path d='M{x(ratio):.0f} 0V{HEIGHT}' stroke='currentColor' stroke-dasharray='2 3'/>",
    ]
    for curve, color, dash in zip(curves, COLORS, ("", " stroke-dasharray='7 4'"), strict=False):
        points = " ".join(f"{x(r):.0f},{y(v):.1f}" for r, v in zip(ratios.tolist(), curve.tolist(), strict=True))
        parts.append(f"<polyline points='{points}' fill='none' stroke='{color}' stroke-width='2.5'{dash}/>")
    words = (
        f"The loss over the ratio from 0.3 to 1.7, of the best answer as a line, of the worst one dashed; a band from "
        f"{1 - clip:.2f} to {1 + clip:.2f} where nothing is clipped, and a dotted line at the ratio {ratio:.2f}."
    )
    return (
        f"<svg role='img' aria-label='{words}' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' "
        f"style='max-width:100%;color:inherit'>{''.join(parts)}</svg><p>{words}</p>"
    )
