r"""The answer in a completion, whatever its form: in the tags, in a box, after "the answer is", or the last number.

`right` is for scores that shall not depend on the form (`is_correct` asks for the tags). It reads as a person would who
is careful: `$18`, `18.00`, `**18**`, `x = 18` and "18 apples" are 18; "18 or 19", "not 18" and "at least 18" are not.
Model text is hostile: nothing here takes more than linear time in it.
"""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from nbhelpers.models.tags import REASONING, Tags

from .answers import extract_boxed, grouped, same, written

_WORDS = 1000  # characters of a sentence that can be an answer
_LONGEST = 100  # characters of a number that is read: no answer has more, and int() refuses thousands of digits

# ---- text: one spelling for what looks the same ----

_SUPERSCRIPTS = {ord(sign): f"^{digit}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}  # NFKC makes 18² to 182
_HALVES = {ord(sign): " " + unicodedata.normalize("NFKC", sign) for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}  # and 1½ to 11/2
_SIGNS = str.maketrans({"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "⁄": "/", "×": "*", "·": "*", "÷": "/"})
_FIRST = (
    (re.compile(r"\\[,;:!]|\{,\}"), "\u2009"),  # LaTeX's thin spaces and its comma between thousands
    (re.compile(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d\d\d(?!\d))"), ","),  # thin spaces between thousands
)
_THEN = (
    (re.compile(r"\\[dt]?frac ?\{ ?(-?\d{1,40}) ?\} ?\{ ?(\d{1,40}) ?\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac ?(\d) ?(\d)"), r" \1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname) ?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:times|cdot|ast)\b"), "*"),
    (re.compile(r"\\div\b"), "/"),
    (re.compile(r"\^ ?\{? ?\\circ ?\}?|°"), " degrees "),
    (re.compile(r"\\(?:left|right|q?quad|displaystyle)\b|\\[()\[\]]|\\(?=[$%&#_ \n])|~"), " "),
    (re.compile(r"- ?(?:US)?[$€£¥₹] ?(?=[\d.])"), "-"),  # -$5
    (re.compile(r"(?:\bUS)?[$€£¥₹]|\*\*|__|`"), " "),
    (re.compile(r"(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w| ?\d)"), " "),  # *18*, but not 3 * 6
)
_POWER_OF_TEN = re.compile(  # 1.6 * 10^{-3}, 1e-3
    r"(?<![\w.,^])(\d{1,20}(?:\.\d{1,20})?)(?: ?\* ?10 ?\^ ?\{? ?([-+]?\d{1,2}) ?\}?|[eE]([-+]?\d{1,2}))(?![\w^])",
    re.ASCII,
)


def plain(text: str) -> str:
    """A text as far as it matters for its answer: NFKC, ASCII minus, thousands with commas, no LaTeX or markdown."""
    text = text.translate(_SUPERSCRIPTS | _HALVES)
    for pattern, new in _FIRST:
        text = pattern.sub(new, text)
    # Each character on its own: a whole text takes quadratic time where a thousand accents stand on one letter. What
    # stands for whole words (U+FDFA: 18 characters) is left as it is, or a short text would grow long.
    single = {ord(char): unicodedata.normalize("NFKC", char) for char in set(text) if not char.isascii()}
    text = text.translate({char: new for char, new in single.items() if len(new) <= 3}).translate(_SIGNS)
    for pattern, new in _THEN:
        text = pattern.sub(new, text)
    return _POWER_OF_TEN.sub(lambda match: f"{Decimal(f'{match[1]}e{match[2] or match[3]}'):f}", text)


# ---- one number out of a few words ----

_PIECE = r"(?:\d+(?:,\d+)*(?:\.\d+)?|\.\d+)"
_ONE_NUMBER = re.compile(rf"[-+]?\s*{_PIECE}(?:\s+\d+)?(?:/{_PIECE})?\s*%?", re.ASCII)  # and nothing else
_NUMBER = re.compile(rf"({_PIECE})(?:\s*/\s*({_PIECE}))?", re.ASCII)
_MIXED = re.compile(r"(?<![\d.,/])(\d{1,20}) (\d{1,20})/(\d{1,20})(?![\d.,/])")
_POWER = re.compile(r"(?<=[A-Za-z])(?: ?\^\{?[23]\}?|[23])(?![\w.])")  # m^2, cm3
_EXPLAINED = re.compile(  # but "is not" denies
    r"(?<! is)(?<! are)(?<! was)[,;:]? (?:not|rather than|instead of|because|since|as|which|so|for|i\.e\.) .*| ?\(.*"
)
_REASON = re.compile(r"[,;:]? (?:because|since)\b")  # what stands behind is never the answer
_HEDGE = re.compile(
    r"\b(?:or|either|neither|nor|between|not|never|cannot|at least|at most|more than|less than|fewer than|greater than"
    r"|up to|over|under|minimum|maximum|except)\b|n['’]t\b|[<>≠≤≥±]|!="
    r"|\\(?:[gl]eq?|[gl]t|neq?|pm)\b"
)
# "9.9 is bigger than 9.11" and "9.9 > 9.11": the first number is the answer, if both are there and nothing else is. Not
# of "9.9 is smaller than 9.11": mostly the larger is asked for, and that is what a model says that gets it wrong.
_LESS = "small|low|few|short|light|young|old|cheap|slow|less"
_COMPARISON = re.compile(
    r"(?!(?:since|if|because|as|when)\b)"
    rf"(\D{{0,40}}{_PIECE}) ?(?:(?:is|are) (?!{_LESS})(?:[a-z]{{2,12}}er|more) than|>)"
    rf"(?! or\b) ?\D{{0,40}}{_PIECE}(?: [a-z]{{1,20}})?\W{{0,3}}",
    re.ASCII | re.IGNORECASE,
)
# what a number is compared with is not what was asked for
_COMPARED = re.compile(r"\b(?:(?!rath|oth)[a-z]{2,12}er than|exceeds?|beats?|compared (?:to|with)|versus|vs)\W*$")
_UNREAD = re.compile(r"[\\^√]")  # a formula
_JOINED = re.compile(r"\b(?:and|to|plus|minus|times|divided|multiplied|of)\b|[-+*/:,;&]\s*\d")
_AND_PART = re.compile(r"\s*and a (?:half|third|quarter)")
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12, "k": 10**3}
_UNIT = re.compile(r"\s*(%|percent\b|[A-Za-z]+)")
_NO_UNIT = re.compile(r"st|nd|rd|th|[xyzn]{1,2}|[eEM]")  # 18th, 18x, 1e3, 18M: not 18


def value(words: str, *, leading: bool = False) -> str | None:
    """The one number that a few words of `plain` text state, as "-1800", "12.50", "1/2" or "50%"; None without one.

    Units, what stands before a sign of equality and an explanation behind are left out. Several numbers are no answer.

    Args:
        words (`str`): An answer, or the sentence behind "the answer is".
        leading (`bool`): Other numbers may follow, as in "18 apples in 3 boxes", if nothing joins them to the first.
    """
    if len(words) > _WORDS:
        return None
    words = " ".join(words.split()).strip("\"' ")
    if words[:1] + words[-1:] in ("()", "{}", "[]"):
        words = words[1:-1]
    explained = _EXPLAINED.search(words)
    if explained and (_NUMBER.search(words, 0, explained.start()) or _REASON.match(words, explained.start())):
        words = words[: explained.start()]
    if compared := _COMPARISON.fullmatch(words):
        words = compared[1]
    if _HEDGE.search(words):
        return None
    if "=" in words:
        left, right_side = words.split("=")[0], words.rpartition("=")[2]
        number = _single(right_side, leading)
        return _single(left, False) if number is None and words.count("=") == 1 else number  # 18 = 3 * 6
    return _single(words, leading)


def _single(words: str, leading: bool) -> str | None:
    words = _POWER.sub("", _MIXED.sub(_improper, words)).strip()
    numbers = list(_NUMBER.finditer(words))
    if not numbers or _UNREAD.search(words):
        return None
    first = numbers[0]
    if len(numbers) > 1:
        behind = words[: first.start()].strip(" -")
        if not leading or behind or _JOINED.search(words, first.end()):
            return None
    return _number_at(words, first)


def _improper(match: re.Match) -> str:
    whole, above, below = map(int, match.groups())
    return f"{whole * below + above}/{below}"


def _number_at(words: str, match: re.Match) -> str | None:
    """The number at a match with its sign, scale and percent sign; None if what is around it makes it another thing."""
    before, after = words[: match.start()], words[match.end() :].partition("\n")[0]
    sign = before.rstrip()[-1:]
    left = before.rstrip()[:-1]  # of the sign
    minus = sign == "-" and (before.endswith("-") or not left.strip())  # after a word and before a space it is a dash
    # x18, ...18, 18 and a half; a root or a box cut off; 3 * 18
    if before[-1:].isalnum() or before[-1:] == "." or _AND_PART.match(after) or _COMPARED.search(before):
        return None
    if sign in tuple("{√") or (sign in tuple("*/+^") and left.strip()):
        return None
    if sign == "-" and (left[-1:].isalnum() or left.rstrip()[-1:] in tuple("0123456789)]-+*/")):  # x-18, 20 - 18
        return None
    behind = _UNIT.match(after)
    unit = behind[1] if behind else None
    if unit and _NO_UNIT.fullmatch(unit) and (after.startswith(unit) or len(unit) == 1):
        return None
    rest = after.lstrip()
    if rest[:1] in tuple("*/+-^") and not rest[1:2].isalpha():
        return None
    parts = [_digits(part) for part in match.groups() if part]
    if None in parts:
        return None
    number = "/".join(map(str, parts))
    if len(parts) == 2 and Fraction(str(parts[1])) == 0:
        return None
    if (scale := _SCALES.get((unit or "").lower())) is not None:
        number = str(fraction(number) * scale)
    return ("-" if minus else "") + number + ("%" if unit in ("%", "percent") else "")


def _digits(text: str) -> str | None:
    """Digits without their thousands commas, or None where the commas stand wrong or there are too many digits."""
    return text.replace(",", "") if grouped(text.partition(".")[0]) and len(text) <= _LONGEST else None


def fraction(number: str) -> Fraction:
    """The value of what `value` gives; a percent sign counts for nothing."""
    above, _, below = number.rstrip("%").partition("/")
    return Fraction(above) / Fraction(below or 1)


# ---- where the answer stands ----

_PHRASE = re.compile(
    r"(?<!to )\banswer\b(?:[^\n.:=?]{0,60}?\b(?:is|are|be|was)\b ?:?|(?: in)?(?: \w{1,20})? ?[:=])"
    r"|\bfinal answer\b ?(?=\n|[-\d])",
    re.IGNORECASE,
)
_MARK = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S[^\n]*)$", re.MULTILINE)
_SENTENCE_END = re.compile(r"\n|[.!?]\s")
_BEGINS = re.compile(rf"[-+]?\s*{_PIECE}")
_PUNCTUATION = " .,;:!?\"'()"
_TAG = re.compile(r"</?(?:answer|reasoning|think)>")


def read(text: str) -> str | None:
    r"""The answer of a completion: a number as "1800", "12.50", "1/2" or "50%", otherwise its words; None without one.

    It is what stands in the last closed `<answer>` tag, else in the last `\boxed{...}`, else after the last "####",
    "answer:" or "the answer is", else behind the last "=" of the last line, else the last number. What is found first
    counts: nothing outside a tag rescues a wrong or double answer in it. After `</think>` only what follows is read.

    Args:
        text (`str`): What the model wrote.

    Example:
    >>> read("<answer>**$1,800.**</answer>"), read(r"so \boxed{\frac{1}{2}}"), read("It is Rome. The answer is Paris.")
    ('1800', '1/2', 'Paris')
    >>> read("17 or 18") is None
    True
    """
    words, number = _found(text)
    if number is not None or words is None:
        return number
    words = _bare(words)
    return words if words and not _NUMBER.search(words) else None


def right(text: str, answer: str, tags: Tags = REASONING) -> bool:
    """Whether the answer of a completion is the right one, whatever its form.

    Numbers are compared by value: "18.00" is 18, "1/2" is 0.5, "1e3" is 1000; a percent sign counts for nothing
    ("50 %" is 50, and 0.5 is not). Anything else is compared as text, as `same` does.

    Args:
        text (`str`): What the model wrote.
        answer (`str`): The right answer; a number is read as `answers.written` has it. "3.14159265…" is one whose
            digits go on, see `is_correct`.
        tags (`Tags`): Those that the model was asked for. Where a template opens the thought (`THINK`), a text that
            never closes it was cut off in its thought: whatever number comes last there is no answer.

    Example:
    >>> right("The answer is 18 apples.", "18"), right("17 or 18.", "18"), right("<answer>paris</answer>", "Paris")
    (True, False, True)
    """
    words, number = _found(text, tags)
    gold = plain(written(answer)).strip()
    wanted = one_number(gold)
    if wanted is not None:
        return number is not None and fraction(number) == fraction(wanted)
    if gold.endswith("...") and number is not None:
        return same(number, gold)
    return words is not None and bool(_bare(gold)) and same(_bare(words), _bare(gold))


def one_number(words: str) -> str | None:
    """As `value`, for words that are one number and nothing else: no unit, no name, no sign of equality."""
    return value(words) if _ONE_NUMBER.fullmatch(words) else None


def _bare(words: str) -> str:
    """Words without the punctuation around them and without an explanation after them; "" for a very long text."""
    words = unicodedata.normalize("NFC", " ".join(words.split())) if len(words) <= _WORDS else ""
    return _EXPLAINED.sub("", words.strip(_PUNCTUATION)).strip(_PUNCTUATION)


def _found(text: str, tags: Tags = REASONING) -> tuple[str | None, str | None]:
    """The words that are the answer, and the number that they state; None where there is none."""
    if tags.thinks_on(text):
        return None, None
    _, closed, after = text.rpartition("</think>" if tags.answer_open else tags.think_close)
    text = after if closed and after.strip() else text
    opening, closing = tags.answer_open or "<answer>", tags.answer_close or "</answer>"
    head, closed, _ = text.rpartition(closing)
    _, opened, inside = head.rpartition(opening)
    if closed and opened:
        return _in_words(inside.partition(closing)[0])
    boxed = extract_boxed(text)
    if boxed is not None:
        return _stated(plain(boxed))
    text = plain(_TAG.sub("\n", text)).strip()
    lines = text.splitlines()
    marks = [mark[1] for mark in _MARK.finditer(text)]
    if marks and (_BEGINS.match(marks[-1].lstrip()) or lines[-1].lstrip().startswith("####")):
        return _stated(marks[-1])
    phrase = _after_phrase(text)
    if phrase is not None:
        return phrase, value(phrase, leading=True)
    last = lines[-1] if lines else ""
    if "=" in last and (number := value(last.rpartition("=")[2].rstrip(" .!"), leading=True)) is not None:
        return last, number
    return (last or None), _last_number(text)


def _in_words(inside: str) -> tuple[str | None, str | None]:
    """The content of an answer tag: a box or a phrase in it says what counts, otherwise all of it."""
    boxed = extract_boxed(inside)
    words = plain(inside if boxed is None else boxed).strip()
    phrase = _after_phrase(words)
    return _stated(words) if phrase is None else (phrase, value(phrase, leading=True))


def _stated(words: str) -> tuple[str, str | None]:
    words = words.strip().rstrip(".!")
    return words, value(words)


def _after_phrase(text: str) -> str | None:
    """The sentence behind the last "answer is" or "answer:", on its line or on the next that is not blank."""
    found = None
    for found in _PHRASE.finditer(text):  # noqa: B007  the last one counts
        pass
    if found is None:
        return None
    rest = text[found.end() :].lstrip()
    end = _SENTENCE_END.search(rest)
    return rest[: end.start()] if end else rest


def _last_number(text: str) -> str | None:
    """The number of the last sentence that has any, or its last, unless it is denied or a part of a formula."""
    text = _POWER.sub("", text[-2 * _WORDS :])
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    sentence = _SENTENCE_END.split(text[: last.start()])[-1]
    behind = _SENTENCE_END.split(text[last.start() :])[0]
    if len(sentence) < last.start():  # not the first: "- 18 pears" is an item of a list
        sentence = re.sub(r"^\s*- ", "", sentence)
    if (number := value(sentence + behind)) is not None:
        return number
    near = max(last.start() - len(sentence), last.start() - 30, numbers[-2].end() if len(numbers) > 1 else 0)
    between = text[near : last.start()]
    if _HEDGE.search(between) or ("between" in sentence and "and" in between.split()):
        return None
    sentence += behind
    return _number_at(sentence, list(_NUMBER.finditer(sentence))[-1])
