"""Rewards that shape how an answer is written: in one language, not too long, without repeating itself.

Each `get_...` takes its settings and returns a reward function with TRL's signature. They say nothing about whether an
answer is right; add them to a reward that does, with a small weight (`reward_weights` in TRL's config).
"""

import re

from .answers import text_of
from .reward import Reward

# The letters of a script, as a character class: its main Unicode blocks.
SCRIPTS = {
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "cyrillic": "\u0400-\u052f",
    "hebrew": "\u0590-\u05ff",
    "arabic": "\u0600-\u06ff\u0750-\u077f",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
    "han": "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
    "kana": "\u3041-\u30ff\u31f0-\u31ff",
    "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
}
REASONING_ENDS = ("</reasoning>", "</think>", "<answer>")
_LETTERS = re.compile(r"[^\W\d_]+")
MARKUP = re.compile(r"\\[A-Za-z]+|</?[a-z]+>")  # \frac, <think>: letters, but of no language
_SPACELESS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"  # Thai, kana, han: written without spaces
_WORDS = re.compile(rf"[^\s{_SPACELESS}]+|[{_SPACELESS}]")


def get_language_consistency(*scripts: str) -> Reward:
    """A reward for reasoning in one language: the share of its letters that are of the wanted script, 0.0 to 1.0.

    As in DeepSeek-R1 (arXiv:2501.12948, section 2.3.2), against models that change the language in the middle of a
    thought; but by script, not by word: it tells Chinese from English, and cannot tell French from English. Japanese
    is written in two, "han" and "kana". Digits, signs, tags and LaTeX commands do not count; reasoning without any
    letter scores 0.0. The reasoning is what stands before `</reasoning>`, `</think>` or `<answer>`, or everything.

    Args:
        scripts (`str`): Of `penalties.SCRIPTS`; one or more.

    Returns:
        `Reward`: A reward function, logged as `language_consistency`.

    Raises:
        ValueError: For a script that is not known, or none at all.

    Example:
    >>> get_language_consistency("latin")(completions=["nine, 九, is 9</think>"])
    [0.8571428571428571]
    """
    if not scripts or not set(scripts) <= set(SCRIPTS):
        raise ValueError(f"scripts are among {', '.join(SCRIPTS)}, not {', '.join(scripts) or 'none'}")
    wanted = re.compile("[" + "".join(SCRIPTS[script] for script in scripts) + "]+")

    def score(text: str) -> float:
        for end in REASONING_ENDS:
            text = text.partition(end)[0]
        letters = "".join(_LETTERS.findall(MARKUP.sub(" ", text)))
        return sum(map(len, wanted.findall(letters))) / len(letters) if letters else 0.0

    def language_consistency(completions: list, **_) -> list[float]:
        return [score(text_of(completion)) for completion in completions]

    return language_consistency


def get_length_penalty(max_completion_length: int, cache: int) -> Reward:
    """A penalty for nearing the limit of tokens: DAPO's soft overlong punishment (arXiv:2503.14476, equation 13).

    0.0 up to `max_completion_length - cache` tokens, then falling linearly to -1.0 at `max_completion_length`.

    Args:
        max_completion_length (`int`): In tokens, as in the trainer's config.
        cache (`int`): Over how many tokens the penalty grows.

    Returns:
        `Reward`: A reward function, logged as `length_penalty`.

    Raises:
        ValueError: Unless 0 < cache <= max_completion_length.

    Example:
    >>> get_length_penalty(100, cache=20)(completion_ids=[[7] * 80, [7] * 90, [7] * 100])
    [0.0, -0.5, -1.0]
    """
    if not 0 < cache <= max_completion_length:
        raise ValueError(f"cache={cache} must be from 1 to max_completion_length={max_completion_length}")
    free = max_completion_length - cache

    def length_penalty(completion_ids: list[list[int]], **_) -> list[float]:
        return [-min(1.0, max(0, len(ids) - free) / cache) + 0.0 for ids in completion_ids]  # + 0.0: never -0.0

    return length_penalty


def get_repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> Reward:
    """A penalty for saying things twice: `max_penalty` times the share of n-grams that occurred before.

    0.0 for a text that repeats nothing or is shorter than `ngram_size` words, towards `max_penalty` for one that goes
    round in circles (arXiv:2502.03373, appendix C.2, for the whole completion). Words are compared without regard to
    case, as they stand between white space; in Thai, kana and han each character is one. TRL's own
    `get_repetition_penalty_reward` counts tokens.

    Args:
        ngram_size (`int`): In words.
        max_penalty (`float`): 0 or negative.

    Returns:
        `Reward`: A reward function, logged as `repetition_penalty`.

    Raises:
        ValueError: If `ngram_size` is below 1 or `max_penalty` positive.

    Example:
    >>> get_repetition_penalty(ngram_size=2)(completions=["a b c d", "a b a b a"])
    [0.0, -0.5]
    """
    if ngram_size < 1 or max_penalty > 0:
        raise ValueError(f"ngram_size={ngram_size} must be 1 or more, and max_penalty={max_penalty} not positive")

    def score(text: str) -> float:
        words = _WORDS.findall(text.casefold())
        total = len(words) - ngram_size + 1
        if total < 1:
            return 0.0
        unique = len(set(zip(*(words[start:] for start in range(ngram_size)), strict=False)))
        return max_penalty * (1 - unique / total) + 0.0

    def repetition_penalty(completions: list, **_) -> list[float]:
        return [score(text_of(completion)) for completion in completions]

    return repetition_penalty
