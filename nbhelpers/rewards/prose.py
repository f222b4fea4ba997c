"""Rewards for answers in prose: words that are spelt right, and what a judge of yours thinks of an answer.

Both are TRL reward functions like those of penalties.py. They say nothing about whether an answer is right.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unicodedata import normalize

from .answers import question_of, text_of
from .guard import is_async
from .penalties import MARKUP
from .reward import Reward

LONGEST = 64  # characters of a word; what is longer is none
_LETTER = r"[^\W\d_]"
_WORD = re.compile(rf"{_LETTER}[^\W\d_\u0300-\u036f'’]*(?:[\u0300-\u036f'’]+{_LETTER}*)*")
_INLINE = re.compile(r"`[^`\n]*`")
_NO_PROSE = re.compile(r"[\d_@\\=^{}]|://|\w\.\w")  # numbers, names in code, formulas, addresses, names of files
_ENDINGS = ("'s", "'", "n't", "'t", "'re", "'ve", "'ll", "'d", "'m")  # John's, don't, can't, they're


def spelling(words: str | Path | Iterable[str], penalty: float = -0.1) -> Reward:
    """A penalty for misspelt words: `penalty` for each word of an answer that is not in a list of yours.

    Capitals and apostrophes of either shape make no difference, endings as in "John's" and "they're" need not be in the
    list, and of "well-known" each part is looked up. Not looked at are code between backticks, tags, LaTeX, addresses,
    single letters and whatever has a digit in it. A word with a capital letter that is not in the list is taken for a
    name, and a word of the prompt for right. All others count each time, words of another language too.

    Args:
        words (`str`, `Path` or `Iterable[str]`): The words that are right: a text file in UTF-8 with one word a line
            (on many systems /usr/share/dict/words), or the words themselves. Plurals and other forms are words too.
        penalty (`float`): For each misspelt word; negative.

    Returns:
        `Reward`: A reward function, logged as `spelling`: 0.0 without a mistake, and for an empty answer.

    Raises:
        ValueError: If there is no such file, there is no word in it, one is no text, or `penalty` is not below 0.

    Example:
    >>> spelling({"the", "cat", "sat", "on", "mat"})(completions=["The cat sat on Tom's mat.", "cat saat on 2 mats"])
    [0.0, -0.2]
    """
    if not isinstance(penalty, (int, float)) or not -math.inf < penalty < 0:
        raise ValueError(f"penalty={penalty!r}: it is taken off for each misspelt word, so a number below 0, as -0.1")
    known = _listed(words)

    def spelt(word: str, also: frozenset[str] | set[str]) -> bool:
        plain = _plain(word)
        if len(plain) < 2 or plain in known or plain in also:
            return True
        bases = {plain.removesuffix(end) for end in _ENDINGS} - {plain}
        return word != word.lower() or any(len(base) < 2 or base in known for base in bases)

    def score(text: str, also: set[str]) -> float:
        wrong = sum(n * (len(word) > LONGEST or not spelt(word, also)) for word, n in _words(text).items())
        return round(wrong * penalty, 9) + 0.0  # + 0.0: never -0.0

    def spelling(completions: list, prompts: list | None = None, **_: Any) -> list[float]:
        asked: dict[str, set[str]] = {}
        scores = []
        for row, completion in enumerate(completions):
            question = "" if prompts is None else question_of(prompts[row])
            if question not in asked:
                asked[question] = {_plain(word) for word in _words(question) if len(word) <= LONGEST}
            scores.append(score(text_of(completion), asked[question]))
        return scores

    return spelling


def _listed(words: str | Path | Iterable[str]) -> frozenset[str]:
    if isinstance(words, (str, Path)):
        try:
            lines = Path(words).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"words={str(words)!r} cannot be read as a text file in UTF-8 ({error}): give a file with "
                             "one word a line, or a set of words") from None  # fmt: skip
    else:
        lines = list(words)
    if odd := [word for word in lines if not isinstance(word, str)]:
        raise ValueError(f"words has {odd[0]!r}, which is no text: give a file with one word a line, or a set of words")
    known = frozenset(_plain(word.strip()) for word in lines if word.strip())
    if not known:
        raise ValueError("words is empty: every word of every answer would be misspelt. Give a file with one word a "
                         "line, or a set of words")  # fmt: skip
    return known


def _plain(word: str) -> str:
    """A word as it is looked up."""
    return normalize("NFC", word).replace("’", "'").casefold()


def _words(text: str) -> Counter[str]:
    """The words of the prose in a text, as they stand there, and how often. Linear in its length."""
    text = " ".join(text.split("```")[::2])  # what stands between fences is code, and behind one that stays open too
    text = MARKUP.sub(" ", _INLINE.sub(" ", text))
    found: Counter[str] = Counter()
    for chunk, times in Counter(text.split()).items():
        if not _NO_PROSE.search(chunk):
            for word in _WORD.findall(chunk):
                found[word.rstrip("'’")] += times
    return found


def helpfulness(judge: Callable[[str, str], float | None], low: float = 0.0, high: float = 1.0) -> Reward:
    """A reward by a judge of yours: what it says of each answer, held between `low` and `high`.

    An answer without text scores `low` and is not shown to the judge. Where the judge fails, or says something that is
    no finite number, that answer has no score, and a warning names the first such case. A judge that is a model reads
    what another model wrote: "give this a 10" may be in it.

    Args:
        judge (`Callable[[str, str], float | None]`): Given the question and the whole answer, how helpful that is; None
            where it cannot tell. No coroutine.
        low (`float`), high (`float`): What a lower or higher score counts as.

    Returns:
        `Reward`: A reward function, logged as `helpfulness`.

    Raises:
        ValueError: If `judge` is no plain function, or `low` is not below `high`.

    Example:
    >>> def polite(question, answer):
    ...     return answer.count("please") / 2
    >>> helpfulness(polite)(prompts=["How?", "How?"], completions=["So, please.", "please " * 9])
    [0.5, 1.0]
    """
    if not callable(judge) or is_async(judge):
        raise ValueError(f"judge={judge!r}: it must be a plain function, judge(question, answer) -> a number")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low={low!r} must be below high={high!r}, both finite")
    said: list[str] = []  # a list: what a run has said is not part of what it is

    def score(question: str, answer: str) -> float | None:
        if not answer.strip():
            return low
        try:
            value = judge(question, answer)
            if value is None:
                return None
            number = float("nan") if isinstance(value, (str, bytes)) else float(value)
            why = "" if math.isfinite(number) else f"said {value!r}, which is no finite number"
        except Exception as error:  # one answer, not the batch
            number, why = math.nan, f"failed with {type(error).__name__}: {error}"
        if why and not said:
            said.append(why)
            warnings.warn(f"helpfulness: the judge {why}; such answers have no score. This is said once", stacklevel=2)
        return None if why else min(high, max(low, number))

    def helpfulness(prompts: list, completions: list, **_: Any) -> list[float | None]:
        pairs = zip(prompts, completions, strict=True)
        return [score(question_of(prompt), text_of(completion)) for prompt, completion in pairs]

    return helpfulness
