"""The tokens that a model reads, how long the prompts are and what was left out: one block of plain text.

The same text in a terminal, in a notebook (where special tokens are bold) and on GitHub, which strips all styles.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbhelpers.html import NO_FORMULAS

from .texts import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BAR = 40  # characters of the longest bar
_MOST = 400  # pieces of one prompt: of a longer one its start and its end are shown


@dataclass(frozen=True)
class Preview:
    """What `Task.preview` gives.

    Args:
        title (`str`): One line.
        prompts (`tuple`): For each prompt shown its pieces, (text, whether it is special), how many tokens they are,
            and the right answer.
        lengths (`tuple[int, ...]`): Tokens of each prompt that was measured.
        dropped (`tuple[str, ...]`): Why rows were left out.
    """

    title: str
    prompts: tuple[tuple[tuple[tuple[str, bool], ...], int, str], ...]
    lengths: tuple[int, ...]
    dropped: tuple[str, ...]

    @classmethod
    def of(
        cls,
        name: str,
        tokenizer: "PreTrainedTokenizerBase",
        shown: Sequence[tuple[str, list[int]]],
        lengths: Sequence[int],
        rows: int,
        dropped: Sequence[str],
    ) -> "Preview":
        """The preview of a task called `name` that has so many training `rows`.

        Args:
            name (`str`): The task's.
            tokenizer (`transformers.PreTrainedTokenizerBase`): The model's.
            shown (`Sequence[tuple[str, list[int]]]`): The right answer and the token ids of each prompt to show.
            lengths (`Sequence[int]`): Tokens of each prompt that was measured, the first of the rows.
            rows (`int`): How many there are.
            dropped (`Sequence[str]`): Why rows were left out.
        """
        title = f"{name}: {rows} training prompts"
        if len(lengths) < rows:
            title += f", the first {len(lengths)} measured"
        prompts = tuple((tuple(pieces(tokenizer, ids)), len(ids), answer) for answer, ids in shown)
        return cls(title, prompts, tuple(lengths), tuple(dropped))

    def __repr__(self) -> str:
        return self._text(lambda text, special: text)

    def _repr_html_(self) -> str:
        text = self._text(lambda text, special: f"<b>{html.escape(text)}</b>" if special else html.escape(text))
        style = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.35;background:none;color:inherit"
        return f"<pre class='{NO_FORMULAS}' style='{style}'>{text}</pre>"

    def _text(self, show: Callable[[str, bool], str]) -> str:
        """The whole preview; `show` is given each piece of text and whether it is special, a token or a heading."""

        def seen(text: str, special: bool) -> str:
            return show(visible(text), special)

        lines = [seen(self.title, True)]
        for i, (prompt, tokens, answer) in enumerate(self.prompts, 1):
            lines += ["", show(f"prompt {i}: {tokens} tokens, bars between them; ⏎ is a line end", True)]
            cut = len(prompt) - _MOST
            parts = [prompt] if cut <= 0 else [prompt[: _MOST // 2], prompt[-_MOST // 2 :]]
            drawn = ["│".join(seen(text.replace("\n", "⏎\n"), special) for text, special in part) for part in parts]
            lines += [f"\n... {cut} more ...\n".join(drawn), seen(f"right answer: {answer}", False)]
        lines += ["", show("tokens of a prompt", True), *(show(line, False) for line in histogram(self.lengths))]
        lines += ["", show("left out", True), *(seen(note, False) for note in self.dropped or ["nothing"])]
        return "\n".join(lines)


def pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[tuple[str, bool]]:
    """The text of each token and whether it is a special one. Tokens that make up one character stay together."""

    def text_of(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))  # one list of ids: transformers types a batch of lists too

    special = set(tokenizer.added_tokens_decoder)
    texts: list[tuple[str, bool]] = []
    before: list[int] = []
    start = 0
    for end in range(1, len(ids) + 1):
        group = list(ids[start:end])
        # decoded behind its neighbour, because some tokenizers drop the space at the start of a text
        text = text_of([*before, *group])[len(text_of(before)) :]
        if text.endswith("\ufffd") and len(group) < 4 and end < len(ids):
            continue  # a character of several bytes, not complete yet
        texts.append((text, group[0] in special))
        before, start = group, end
    return texts


def histogram(lengths: Sequence[int], bins: int = 10) -> list[str]:
    """Lines of text: a bar for each range of lengths, and the numbers that matter for `max_prompt_length`."""
    if not lengths:
        return ["none"]
    ordered = sorted(lengths)
    low, high = ordered[0], ordered[-1]
    width = max(1, math.ceil((high - low + 1) / bins))
    counts = [0] * ((high - low) // width + 1)
    for length in ordered:
        counts[(length - low) // width] += 1
    digits = len(str(high + width))
    lines = []
    for i, count in enumerate(counts):
        first, last = low + i * width, low + (i + 1) * width - 1
        bar = "█" * round(_BAR * count / max(counts)) or ("▏" if count else "")
        span = f"{first:>{digits}}" + (f" to {last:>{digits}}" if width > 1 else "")
        lines.append("  ".join(filter(None, [span, bar, str(count)])))
    nearly = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return [*lines, f"shortest {low} · median {ordered[len(ordered) // 2]} · 95% up to {nearly} · longest {high}"]
