"""Before and after, side by side: the answers to the same questions, and the scores on the same held-out rows."""

import html
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial

from nbhelpers.html import cell, framed, pre, table
from nbhelpers.rewards import right

from .results import Answer, Proportion, Score, check_comparable, paired

MARKS = {True: ("✓ right", "#00664a"), False: ("✗ wrong", "#a84300")}  # white on it has a contrast of 6 at least
MARK = "color:#fff;padding:0 5px;border-radius:3px;background"
CHANGED = "background:rgba(224,135,27,.35);border-radius:2px"  # behind what the other side does not say
MOST_WORDS = 4000  # comparing longer texts takes seconds
PLAIN = frozenset(string.ascii_letters + string.digits + " .,;()=+-/'\"%?")  # means nothing to Markdown within a cell


@dataclass(frozen=True)
class Cell:
    """A text that may hold anything at all, whether it is right, if that is known, and what to mark in it.

    Args:
        text (`str`): As a model wrote it.
        right (`bool`, *optional*): None where nobody knows, or nothing is asked.
        changed (`tuple[tuple[int, int], ...]`): (start, end) of each stretch of the text, in characters, that the text
            beside it does not have, in order.
    """

    text: str
    right: bool | None = None
    changed: tuple[tuple[int, int], ...] = ()

    def plain(self) -> str:
        """The text without what could steer a terminal or break an encoding."""
        return _harmless(self.text).strip("\n")

    def html(self) -> str:
        """The inside of a table's cell; markup in the text is shown, not obeyed."""
        mark, color = MARKS[self.right] if self.right is not None else ("", "")
        mark = mark and f"<b style='{MARK}:{color}'>{mark}</b>"
        inside = "".join(
            f"<span style='{CHANGED}'>{html.escape(part)}</span>" if changed else html.escape(part)
            for part, changed in self._parts()
        )
        return mark + pre(inside)

    def markdown(self) -> str:
        """The inside of a cell in GitHub's Markdown; markup in the text is shown, not obeyed."""

        def escaped(text: str) -> str:
            text = "".join(c if c in PLAIN or ord(c) > 127 else f"&#{ord(c)};" for c in text.replace("\t", " "))
            return text.replace("&#10;", "<br>")

        mark = f"**{MARKS[self.right][0]}**<br>" if self.right is not None else ""
        return mark + "".join(f"<b>{escaped(p)}</b>" if changed else escaped(p) for p, changed in self._parts())

    def __str__(self) -> str:
        return f"{MARKS[self.right][0]}: {self.plain()}" if self.right is not None else self.plain()

    def _parts(self) -> list[tuple[str, bool]]:
        """The text, cut where what is changed begins and ends."""
        text = self.text.rstrip("\n")
        parts: list[tuple[str, bool]] = []
        at = 0
        for start, end in self.changed:
            parts += [(text[at:start], False), (text[start:end], True)]
            at = end
        parts = [(_harmless(part), changed) for part, changed in [*parts, (text[at:], False)] if part]
        if parts:
            parts[0] = (parts[0][0].lstrip("\n"), parts[0][1])
        return parts


def _harmless(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text.replace("\r\n", "\n"))


def differences(old: str, new: str) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """(start, end) of the stretches of each text that the other does not have, word by word.

    Nothing for texts of more than MOST_WORDS words, which would take seconds.
    """
    words = [list(re.finditer(r"\w+(?:\.\w+)*|[^\w\s]", text)) for text in (old, new)]  # 9.11 is one word
    if old == new or max(map(len, words)) > MOST_WORDS:
        return (), ()
    changed: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    matcher = SequenceMatcher(None, [word.group() for word in words[0]], [word.group() for word in words[1]])
    for kind, *ends in matcher.get_opcodes():
        for side, (start, end) in enumerate((ends[:2], ends[2:])):
            if kind != "equal" and end > start:
                changed[side].append((words[side][start].start(), words[side][end - 1].end()))
    return tuple(changed[0]), tuple(changed[1])


@dataclass(frozen=True)
class Table:
    """A table that a notebook shows as HTML, a file takes as Markdown, and a terminal prints as text."""

    header: tuple[str, ...]
    rows: list[list[Cell]]
    note: str = ""

    def _repr_html_(self) -> str:
        head = [cell(html.escape(name), tag="th") for name in self.header]
        note = self.note and f"<p>{html.escape(self.note)}</p>"
        return framed(table(head, [[cell(content.html()) for content in row] for row in self.rows]) + note)

    def markdown(self) -> str:
        """The table in GitHub's Markdown; what is in the cells shows as it is, markup in it has no effect."""
        lines = ["| " + " | ".join(self.header) + " |", "|" + " --- |" * len(self.header)]
        lines += ["| " + " | ".join(content.markdown() for content in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n" + (self.note and f"\n{self.note}\n")

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def __str__(self) -> str:
        texts = [list(self.header), *([str(content) for content in row] for row in self.rows)]
        if any("\n" in text for row in texts for text in row):  # long texts: one below the other
            blocks = []
            for first, *others in texts[1:]:
                parts = [
                    f"  {name}\n    " + text.replace("\n", "\n    ")
                    for name, text in zip(self.header[1:], others, strict=True)
                ]
                blocks.append("\n".join([first, *parts]))
            return "\n\n".join([*blocks, *([self.note] if self.note else [])])
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in texts
        ]
        return "\n".join([*lines, *([self.note] if self.note else [])])

    __repr__ = __str__


def before_after(
    before: Sequence[Answer],
    after: Sequence[Answer],
    gold: str | Sequence[str] | None = None,
    correct: Callable[[str, str], bool] | None = None,
) -> Table:
    """The same questions with their answers before and after training; the words that only one of them has are marked.

    Args:
        before (`Sequence[Answer]`), after (`Sequence[Answer]`): From `evaluate.ask`.
        gold (`str` or `Sequence[str]`, *optional*): The right answer to all questions, or to each: then every answer
            is marked as right or wrong.
        correct (`Callable[[str, str], bool]`, *optional*): Given the completion's text and the right answer, whether it
            is right; `rewards.right` if not given.

    Returns:
        `Table`

    Raises:
        ValueError: If questions, prompts or decoding differ, or there is not one right answer for each question.
    """
    check_comparable(before, after)
    golds = [gold] * len(before) if gold is None or isinstance(gold, str) else list(gold)
    if len(golds) != len(before):
        raise ValueError(f"{len(golds)} right answers for {len(before)} questions")

    def answered(answer: Answer, wanted: str | None, changed: tuple[tuple[int, int], ...]) -> Cell:
        cut = "" if answer.finished else f"\n… (cut off after {answer.tokens} tokens)"
        judge = correct or partial(right, tags=answer.tags)
        return Cell(answer.completion + cut, None if wanted is None else judge(answer.completion, wanted), changed)

    rows = []
    for old, new, wanted in zip(before, after, golds, strict=True):
        marks = differences(old.completion, new.completion)
        rows.append([Cell(old.question), answered(old, wanted, marks[0]), answered(new, wanted, marks[1])])
    moved = sum(old.answer != new.answer for old, new in zip(before, after, strict=True))
    return Table(("question", "before", "after"), rows, note=f"{moved} of {len(before)} answers differ.")


def scores(before: Score, after: Score) -> Table:
    """Accuracy, format and length before and after, and what became of the single questions.

    Args:
        before (`Score`), after (`Score`): From `evaluate.accuracy`, on the same rows with the same settings.

    Returns:
        `Table`

    Raises:
        ValueError: If questions, prompts, right answers or decoding differ.
    """
    changes = paired(before, after)

    def row(name: str, old: Proportion, new: Proportion) -> list[Cell]:
        change = f"{100 * (new.value - old.value):+.1f} points"
        return [Cell(name), Cell(_with_interval(old)), Cell(_with_interval(new)), Cell(change)]

    lengths = before.mean_length, after.mean_length
    return Table(
        ("", "before", "after", "change"),
        [
            row("accuracy", before.accuracy, after.accuracy),
            row("format", before.format, after.format),
            [
                Cell("mean length"),
                *(Cell(f"{tokens:.1f} tokens") for tokens in lengths),
                Cell(f"{lengths[1] - lengths[0]:+.1f}"),
            ],
        ],
        note=f"{before.accuracy.n} held-out questions: {changes}. In brackets: 95 % intervals (Wilson).",
    )


def _with_interval(share: Proportion) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
