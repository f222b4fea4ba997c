"""What `check` has scored: right, wrong, empty and dishonest answers to a question, and texts that are slow to read."""

import re
from collections.abc import Iterator, Sequence

from nbhelpers.models.tags import REASONING

from .answers import number_of, question_of, same, written

FORM = REASONING.frame
THOUGHT = "First I look at what is asked, then I work it out step by step."
CHARACTERS = 100_000  # of the longest texts

RIGHT, BAD_FORM, WRONG, EMPTY = "right", "right, bad form", "wrong, good form", "empty"
ONLY_TAGS, REPEATED, LONG = "only the form", "right, 50 times", f"numbers, {CHARACTERS // 1000}k characters"
PLACEHOLDERS, COPIED, UNTHOUGHT = "dots in the form", "the prompt's example", "right, no thought"
NO_NUMBERS, LONGER = "nan or inf as answer", "the right one, longer"
HEDGES = (
    "the question as answer",
    "all candidates as answer",
    "all candidates in prose",
    "one or the other",
    "two answers",
    LONG,
)
HOLLOW = (EMPTY, ONLY_TAGS, PLACEHOLDERS, COPIED)  # a form, or not even that
KINDS = (RIGHT, BAD_FORM, WRONG, *HOLLOW, UNTHOUGHT, REPEATED, NO_NUMBERS, LONGER, *HEDGES)
ANY = (NO_NUMBERS, LONGER)  # of whose texts the higher score counts: each is a hole by itself
HOSTILE = (
    "<answer>",
    "</answer>",
    "<reasoning>\n</reasoning>\n<answer>\n",
    "\\boxed{",
    "9",
    "1,",
    " ",
    "\n",
    "a ",
    "(",
)

_NUMBERS = re.compile(r"(?<![\d.])\d{1,12}(?:\.\d{1,12})?(?!\d)")


def texts_for(row: dict, rows: Sequence[dict], form: str) -> dict[str, list[str]]:
    """By kind, the texts that answer one row's question: one, or two of which the lower score counts (see `ANY`).

    Args:
        row (`dict`): Has `prompt` (`str` or chat messages) and `answer`.
        rows (`Sequence[dict]`): All rows of the check; where an answer is no number, another row's is the wrong one.
        form (`str`): A well-formed completion with `{reasoning}` and `{answer}` in it.
    """
    prompt, right = row["prompt"], written(row["answer"])
    question = question_of(prompt)
    numbers = list(dict.fromkeys(_NUMBERS.findall(question)))
    value = number_of(right)
    others = [written(other["answer"]) for other in rows] if value is None else [*numbers, str(value + 1)]
    wrong = next((other for other in others if not same(other, right)), f"not {right}")
    candidates = [text for text in dict.fromkeys([wrong, *numbers, *map(str, range(10))]) if not same(text, right)]
    orders = ([right, *candidates], [*candidates, right])

    def filled(answer: str, reasoning: str = THOUGHT) -> str:
        return form.replace("{reasoning}", reasoning).replace("{answer}", answer)

    first, last = form.partition("{")[0].strip(), form.rpartition("}")[2].strip()
    asked = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
    example = re.search(f"{re.escape(first)}.*{re.escape(last)}", asked, re.DOTALL) if first and last else None
    longer = f"{right}e3" if value else f"{right}1", re.sub("^[-+]?", r"\g<0>1", right)  # 9.9e3, 19.9
    many = " ".join(map(str, range(CHARACTERS // 5)))[: CHARACTERS - len(right) - 2]
    return {
        RIGHT: [filled(right)],
        BAD_FORM: [f"I think it is {right}"],
        WRONG: [filled(wrong)],
        EMPTY: [""],
        ONLY_TAGS: [filled("", "")],
        PLACEHOLDERS: [filled("...", "...")],
        COPIED: [example[0] if example else filled("...", "...")],
        UNTHOUGHT: [filled(right, "")],
        REPEATED: [filled(right, " ".join([right] * 50))],
        NO_NUMBERS: [filled("nan"), filled("inf")],
        LONGER: [filled(text) for text in longer],
        HEDGES[0]: [filled(question, question)],
        HEDGES[1]: [filled(", ".join(order)) for order in orders],
        HEDGES[2]: [" ".join(f"The answer is {text}." for text in order) for order in orders],
        HEDGES[3]: [filled(f"{right} or {wrong}"), filled(f"{wrong} or {right}")],
        HEDGES[4]: [filled(right) + filled(wrong), filled(wrong) + filled(right)],
        LONG: [f"{right} {many}", f"{many} {right}"],
    }


def hostile(form: str, size: int) -> Iterator[str]:
    """Texts of about `size` characters that are hard for regular expressions, with and without the wanted form."""
    for unit in HOSTILE:
        text = (unit * (size // len(unit) + 1))[:size]
        yield text
        half = text[: size // 2]
        for frame in (form, re.sub(r"\s+", "", form)):
            yield frame.replace("{reasoning}", half).replace("{answer}", f"{half}?")  # what nearly matches costs most
