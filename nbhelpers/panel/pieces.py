"""The pieces of the panel as HTML: what the numbers mean, tables of rewards, gauges of memory, answers of the model.

Model text is escaped: it may hold anything.
"""

import html
from collections.abc import Callable, Iterable

from nbhelpers.evaluate import Answer
from nbhelpers.html import BOX, COLORS, GRID, TEXT, bar, cell, pre, table
from nbhelpers.rewards import Sample

HELP = {
    "reward": "mean over the answers of a step, all reward functions together",
    "right": "share of answers that are right in whatever form, paid or not",
    "alike": "share of the other answers that have three words of one in a row: near 100 % all are the same",
    "replaced": "share of groups without a signal in whose place other questions were asked",
    "loss": "near 0 by construction when each rollout serves one update",
    "gradient": "the length of the gradient before it is cut to max_grad_norm",
    "format": "share of answers that have exactly the wanted form",
    "length": "mean number of tokens of an answer",
    "cut off": "share of answers that did not end within max_completion_length",
    "no signal": "share of groups whose answers all got the same reward: they teach nothing",
    "clipped": "share of tokens whose probability moved too far since they were drawn to count fully",
    "KL": "distance from the model before training",
    "tokens/s": "tokens of prompts and answers, by the time of the whole step: writing, scoring, learning",
    "in rewards": "of the time elapsed: what the reward functions took",
    "spread in a group": "standard deviation among the answers to one question: what is learned from",
    "between groups": "standard deviation of the mean rewards of the questions: how unequally hard they are",
    "margin": "implicit reward of the chosen answer less that of the rejected one: beta times what the model has moved "
    "towards the one, against the reference, more than towards the other",
    "agree": "share of pairs in which the implicit reward is larger for the chosen answer",
    "KL an answer": "distance from the base without its adapter, summed over an answer; an estimate may be below 0",
    "implicit reward": "beta times the log of an answer's probability over that under the reference",
    "value": "what the value head expected of an answer to the question",
    "advantage of the first token": "what came beyond the value, by GAE, not whitened yet; each token has its own",
    "value loss": "vf_coef times half the square of how far the values are from what came, a mean over tokens",
}
OF_METHOD = {  # what a number means with another method than GRPO
    "SFT": {"loss": "of the texts, nats a token", "tokens/s": "tokens of texts, by the time of the whole step"},
    "Online DPO": {
        "loss": "mean over the pairs, of a tie 0; 0.69 where the model has moved towards neither answer",
        "no signal": "share of pairs whose answers got the same reward: a tie teaches nothing",
        "spread in a group": "standard deviation in a pair: only which answer has more is learned from",
    },
    "PPO": {
        "loss": "the policy's, near 0 where a rollout is new, and the value loss",
        "spread in a group": "standard deviation among the answers to one question; PPO compares each with its value",
    },
}
BEST_AND_WORST = ("best answer of a group", "worst answer of the same group", "in each group all have the same reward")
PAIR = {  # what the shown answers are
    "Online DPO": ("chosen answer of a pair", "rejected answer of the same pair", "all pairs are ties"),
    "PPO": ("best answer to a question", "worst answer to the same question", "answers to a question are paid alike"),
}

CELL = "text-align:left;padding:2px 14px 2px 0;border:0;background:none"
_FULL_WIDTH = f"{GRID};width:100%;table-layout:fixed"


def meaning(name: str, method: str) -> str:
    """What a number means in a run of `method`; empty if it says so itself."""
    return OF_METHOD.get(method, {}).get(name) or HELP.get(name, "")


def head(names: Iterable[str], method: str) -> list[str]:
    return [cell(name, CELL, tag="th", title=meaning(name, method)) for name in names]


def gaming_html(lines: list[str]) -> str:
    """That the reward is gamed, with the answers that show it, above all the rest."""
    if not lines:
        return ""
    why, *answers = (shortened(line) for line in lines)
    shown = "".join(pre(answer) for answer in answers)
    return f"<div style='border-left:4px solid {COLORS[1]};padding-left:8px;margin:0 0 8px'><b>{why}</b>{shown}</div>"


def rewards_html(row: dict, said: Callable[[Callable[[dict], float | None]], str], method: str) -> str:
    """Each reward function with its mean and its spread.

    Args:
        row (`dict`): The newest step.
        said (`Callable`): Given what a row has of a number, the text of that number: now, or from start to end.
        method (`str`): That learns, in TRL's words.
    """
    if not row["rewards"]:
        return ""
    names = [*row["rewards"], *(["total"] if len(row["rewards"]) > 1 else [])]
    columns = {"mean": ("rewards", "reward")}
    if row["within"]:
        columns |= {"spread in a group": ("within", ""), "between groups": ("between", "")}
    else:
        columns |= {"spread, all answers": ("stds", "reward_std")}

    def value(kind: str, total: str, name: str) -> Callable[[dict], float | None]:
        return (lambda row: row[total]) if total and name == "total" else (lambda row: row[kind].get(name))

    rows = [[html.escape(name), *(said(value(*column, name)) for column in columns.values())] for name in names]
    cells = [[cell(text, CELL) for text in texts] for texts in rows]
    return table(head(["reward function", *columns], method), cells, f"{GRID};margin-top:8px")


def memory_text(memory: dict[str, float]) -> str:
    return f"{memory['used']:.1f}/{memory['total']:.1f} GB"


def memory_html(memory: dict[str, float] | None) -> str:
    """A gauge: on a card the most that torch allocated, what it has reserved and what everyone uses, of its memory."""
    if not memory:
        return ""
    share = {name: memory[name] / memory["total"] for name in memory if name != "total"}
    if "peak" in memory:
        parts = {
            "peak": f"{memory['peak']:.1f} GB allocated at most",
            "reserved": f"{memory['reserved']:.1f} reserved by torch",
            "used": f"{memory['used']:.1f} used by all, of {memory['total']:.1f} GB",
        }
        color = {"peak": COLORS[0], "reserved": COLORS[1], "used": COLORS[5]}
        text = " · ".join(f"<span style='color:{color[name]}'>■</span> {words}" for name, words in parts.items())
        bars = {color[name]: share[name] for name in ("used", "reserved", "peak")}
        text = f"card memory: {text}"
    else:
        text = f"memory of this process: {memory['used']:.1f} of {memory['total']:.1f} GB"
        bars = {COLORS[0]: share["used"]}
    return f"<div style='margin-top:8px'><small>{text}</small>{bar(bars)}</div>"


def meanings_html(names: Iterable[str], method: str) -> str:
    """What the numbers mean, for those who have no mouse to point at them."""
    told = "".join(f"<li><b>{name}</b>: {told}</li>" for name in names if (told := meaning(name, method)))
    return f"<details style='margin-top:6px'><summary>What do these numbers mean?</summary><ul>{told}</ul></details>"


def probes_html(probed: dict[int, list[Answer]]) -> str:
    """The same questions, asked again and again: what was answered at each step, and the newest answer in full."""
    if not probed:
        return ""
    newest = max(probed)
    when = {step: "before" if step == 0 else f"step {step}" for step in sorted(probed)}
    rows = []
    for i, answer in enumerate(probed[newest]):
        said = [(when[step], probed[step][i].answer) for step in when]
        changes = [pair for j, pair in enumerate(said) if j == 0 or pair[1] != said[j - 1][1] or j == len(said) - 1]
        told = "<br>".join(
            f"{name}: <b>{shortened('(no answer)' if text is None else text, 60)}</b>" for name, text in changes
        )
        rows.append([cell(shortened(answer.question, 300)), cell(told), cell(pre(shortened(answer.completion)))])
    widths = {"always the same questions": 25, "answer, where it changed": 22, f"{when[newest]}, in full": 53}
    head = [cell(name, f"{BOX};width:{width}%", tag="th") for name, width in widths.items()]
    return table(head, rows, f"{_FULL_WIDTH};margin-bottom:10px")


def asked_html(asked: list[tuple[int, str, str]]) -> str:
    """What a person asked while it trained, the newest first: step, question, and what the model wrote."""
    if not asked:
        return ""
    rows = [
        [cell(f"step {step}"), cell(shortened(question, 300)), cell(pre(shortened(written)))]
        for step, question, written in reversed(asked)
    ]
    head = [cell(name, tag="th") for name in ("asked after", "question", "answer")]
    return table(head, rows, f"{GRID};margin-bottom:10px")


def pair_html(pair: list[Sample], step: int, method: str) -> str:
    """The best and the worst answer of one group, side by side, with their rewards and what `method` learns from."""
    if not pair:
        return ""
    best, worst, alike = PAIR.get(method, BEST_AND_WORST)
    shown = [(f"step {step}: {best}", pair[0]), (worst, pair[-1])]
    if len(pair) == 1:
        shown = [(f"step {step}: an answer ({alike})", pair[0])]
    cells = []
    for title, sample in shown:
        used = sample.used if sample.advantage is None else {"advantage": sample.advantage}
        given = " · ".join(
            [*(f"{name} {number(value)}" for name, value in sample.rewards.items()),
             *(f"{name} {value:{'+.2f' if name == 'advantage' else '+.3g'}}" for name, value in used.items())]
        )  # fmt: skip
        inside = (
            f"<b>{title}</b><br><small>{html.escape(given)}</small>"
            f"{pre(shortened(sample.prompt), f'{TEXT};opacity:.75')}{pre(shortened(sample.completion))}"
        )
        cells.append(cell(inside, f"{BOX};width:50%"))
    return table((), [cells], _FULL_WIDTH)


def shortened(text: str, limit: int = 700) -> str:
    """Escaped for HTML; of a long text the two ends, since the answer comes last."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return html.escape(text.encode("utf-8", "replace").decode())


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def percent(value: float) -> str:
    return f"{value:.0%}"
