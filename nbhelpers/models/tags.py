"""The tags between thought and answer, as different models write them: `<reasoning>` and `<answer>`, or `<think>`."""

import re
from dataclasses import dataclass

# [your answer], <reasoning here>, {answer}: words in brackets that name what should stand there
_PLACEHOLDER = re.compile(
    r"[\[{<(]+[^\d\[\]{}<>()]{0,40}\b(?:your|answer|reasoning|thoughts?|solution|here)\b[^\d\[\]{}<>()]{0,40}[\]}>)]+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Tags:
    """Which tags enclose thought and answer. Without answer tags the answer is all that follows the thought.

    Args:
        think_open, think_close (`str`): Around the thought.
        answer_open, answer_close (`str`): Around the answer; "" for none.
        opened_by_template (`bool`): The chat template may end in `think_open` (DeepSeek-R1, Qwen3). A completion that
            closes the thought without opening it then counts as opened, and one that never closes it has no answer.
    """

    think_open: str
    think_close: str
    answer_open: str = ""
    answer_close: str = ""
    opened_by_template: bool = False

    @property
    def all(self) -> tuple[str, ...]:
        """The tags that there are, in the order of the text."""
        return tuple(tag for tag in (self.think_open, self.think_close, self.answer_open, self.answer_close) if tag)

    @property
    def frame(self) -> str:
        """A text in exactly this form, with `{reasoning}` and `{answer}` where these stand."""
        answer = f"{self.answer_open}\n{{answer}}\n{self.answer_close}\n" if self.answer_open else "\n{answer}"
        return f"{self.think_open}\n{{reasoning}}\n{self.think_close}\n{answer}"

    def completed(self, text: str) -> str:
        """The text with the opening tag in front, if it was the template that wrote it.

        Where `</think>` is none of the tags, without all before the last one: a model that thinks by itself (R1, Qwen3)
        does so before it begins with the form that it was asked for.
        """
        if "</think>" not in self.all:
            _, closed, after = text.rpartition("</think>")
            return after.lstrip() if closed else text
        opened = self.opened_by_template and self.think_close in text and self.think_open not in text
        return f"{self.think_open}\n{text.removeprefix(chr(10))}" if opened else text

    def thinks_on(self, text: str) -> bool:
        """Whether a text that begins within the thought never leaves it: cut off there, it has no answer yet."""
        left = (self.think_close, *filter(None, [self.answer_open]))
        return self.opened_by_template and not any(tag in text for tag in left)

    def extract(self, text: str) -> str | None:
        """The answer without the white space around it; None if it was cut off or never begun.

        With answer tags it is what stands in the last one, which must be closed; without, what follows the last
        `think_close`, and None where that is missing.
        """
        if self.answer_open:
            _, opened, rest = text.rpartition(self.answer_open)
            inside, closed, _ = rest.partition(self.answer_close)
            return inside.strip() if opened and closed else None
        _, closed, rest = text.rpartition(self.think_close)
        return rest.strip() or None if closed else None

    def count(self, text: str) -> float:
        """The share of the tags that occur exactly once, 0.0 to 1.0."""
        text = self.completed(text)
        return sum(text.count(tag) == 1 for tag in self.all) / len(self.all)

    def form(self, text: str, prompt: str | list[dict[str, str]] = "") -> float:
        """How much of the form is there, 0.0 to 1.0: two thirds for the tags one by one, a third for the exact form.

        Nothing for a form without content: where thought or answer holds no letter and no digit, as in the placeholder
        "..." of a system prompt, which small models learn to copy because it is paid, or is one in brackets, as "[your
        answer]"; and where the thought is copied from the prompt word for word, be it the example of a thought there or
        the question.

        Args:
            text (`str`): What the model wrote.
            prompt (`str` or `list[dict[str, str]]`): What it was asked, a text or chat messages, as reward functions
                get it in `prompts`.
        """
        text = self.completed(text)
        _, opened, rest = text.partition(self.think_open)
        thought, closed, _ = rest.partition(self.think_close)
        if opened and closed and (_blank(thought) or _words(thought) in _words(prompt)):
            return 0.0
        answer = self.extract(text)
        if answer is None and not self.answer_open and self.think_close in text:
            answer = ""  # nothing follows the thought
        if answer is not None and _blank(answer):
            return 0.0
        return 2 / 3 * self.count(text) + 1 / 3 * self.in_form(text)

    def in_form(self, text: str) -> bool:
        """Whether a text is exactly the wanted form: each tag once, nothing before, neither thought nor answer blank.

        With answer tags each tag stands on its own line and one line end may follow the last. Without, white space
        around the tags is free: models that think by themselves differ in it.
        """
        text = self.completed(text)
        if any(text.count(tag) != 1 for tag in self.all):
            return False
        if not self.answer_open:
            before, _, rest = text.partition(self.think_open)
            thought, _, answer = rest.partition(self.think_close)
            return bool(not before.strip() and thought.strip() and answer.strip())
        between = f"\n{self.think_close}\n{self.answer_open}\n"
        thought, found, answer = text.removesuffix("\n").partition(between)
        return bool(
            found
            and thought.startswith(f"{self.think_open}\n")
            and answer.endswith(f"\n{self.answer_close}")
            and thought.removeprefix(self.think_open).strip()
            and answer.removesuffix(self.answer_close).strip()
        )


def _blank(text: str) -> bool:
    return not any(map(str.isalnum, text)) or bool(_PLACEHOLDER.fullmatch(text.strip()))


def _words(text: str | list[dict[str, str]]) -> str:
    """A text, or all of a chat, without regard to case and spacing."""
    whole = text if isinstance(text, str) else " ".join(str(message["content"]) for message in text)
    return " ".join(whole.casefold().split())


REASONING = Tags("<reasoning>", "</reasoning>", "<answer>", "</answer>")
THINK = Tags("<think>", "</think>", opened_by_template=True)
