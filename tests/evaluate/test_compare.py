import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nbhelpers import panel
from nbhelpers.evaluate import Answer, Decoding, Proportion, Row, Score, compare
from nbhelpers.evaluate.compare import CHANGED, before_after, differences, scores
from nbhelpers.rewards import extract_answer

HOSTILE = (
    "</td></table><script>alert(1)</script>| a | `b` **c** [d](e) $f$ \\g\r\n\n# h\n```\n\x1b[31mred\ud800 &amp; <!--"
)


def answer(question: str, text: str, finished: bool = True, **changes) -> Answer:
    made = Answer(question, text, extract_answer(text), len(text), finished, f"u:{question}", Decoding(48, 0.0, 0, 64))
    return replace(made, **changes)


def tagged(text: str) -> str:
    return f"<reasoning>\nwhy\n</reasoning>\n<answer>\n{text}\n</answer>\n"


BEFORE = [answer("9.11 or 9.9?", tagged("9.11")), answer("3.8 or 3.24?", tagged("3.8"), finished=False)]
AFTER = [answer("9.11 or 9.9?", tagged("9.9")), answer("3.8 or 3.24?", tagged("3.24"))]


class Cells(HTMLParser):
    """The texts of the table's cells as a browser would show them, and every element on the way."""

    def __init__(self, text: str):
        super().__init__()
        self.cells, self.elements, self.inside = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


def test_html_shows_each_text_in_its_cell():
    shown = Cells(before_after(BEFORE, AFTER)._repr_html_())
    assert shown.cells[:3] == ["question", "before", "after"]
    assert shown.cells[3] == "9.11 or 9.9?"
    assert shown.cells[4] == tagged("9.11").rstrip("\n") and shown.cells[5] == tagged("9.9").rstrip("\n")
    assert shown.cells[7].endswith(f"\n… (cut off after {BEFORE[1].tokens} tokens)")
    assert "cut off" not in shown.cells[8]


def test_marks_follow_the_right_answer():
    html = Cells(before_after(BEFORE, AFTER, ["9.9", "3.8"])._repr_html_()).cells
    assert [cell[:7] for cell in (html[4], html[5], html[7], html[8])] == ["✗ wrong", "✓ right", "✓ right", "✗ wrong"]
    assert str(before_after(BEFORE[:1], AFTER[:1], "9.90")).count("✓ right") == 1
    assert "✓" not in str(before_after(BEFORE, AFTER)) and "✗" not in str(before_after(BEFORE, AFTER))
    own_rule = before_after(BEFORE, AFTER, "x", correct=lambda text, gold: gold == "x")
    assert str(own_rule).count("✓ right") == 4


def marked(html: str) -> list[str]:
    return re.findall(f"<span style='{re.escape(CHANGED)}'>(.*?)</span>", html, flags=re.S)


def test_the_difference_is_marked_on_both_sides():
    old = answer("9.11 or 9.9?", "Part by part: 9 = 9, 11 > 9. So 9.11 is bigger.\n")
    new = answer("9.11 or 9.9?", "Place by place: 9 = 9, tenths 1 < 9. So 9.9 is bigger.\n")
    table = before_after([old], [new])
    html = table._repr_html_()
    assert marked(html) == ["Part", "part", "11 &gt;", "9.11", "Place", "place", "tenths 1 &lt;", "9.9"]
    assert Cells(html).cells[4:6] == [old.completion.rstrip(), new.completion.rstrip()]  # nothing is lost
    assert "So <b>9.11</b> is bigger." in table.markdown().replace("&#46;", ".")
    same = before_after([old], [old])
    assert marked(same._repr_html_()) == [] and "<b>" not in same.markdown()


def test_the_answers_that_differ_are_counted():
    assert before_after(BEFORE, AFTER).note == "2 of 2 answers differ."
    assert before_after(BEFORE, [AFTER[0], BEFORE[1]]).note == "1 of 2 answers differ."
    assert "2 of 2 answers differ." in str(before_after(BEFORE, AFTER))


def test_the_panel_has_it_under_its_own_name():
    assert panel.before_after is compare.before_after


def test_marks_at_the_edges_and_between_line_ends():
    table = before_after([answer("q", "\n\na b\r\nc\n\n")], [answer("q", "\n\nx b\r\nd\n\n")])
    cells = Cells(table._repr_html_()).cells
    assert cells[4:6] == ["a b\nc", "x b\nd"]
    assert marked(table._repr_html_()) == ["a", "c", "x", "d"]
    empty = before_after([answer("q", "")], [answer("q", "new words")])
    assert marked(empty._repr_html_()) == ["new words"] and Cells(empty._repr_html_()).cells[4] == ""


def test_marking_takes_no_time_on_long_texts():
    for old, new in (("a " * 4000, "a b " * 2000), ("x" * 50_000, "y " * 5000), ("a b c d " * 900, "d c b a " * 900)):
        start = time.monotonic()
        differences(old, new)
        assert time.monotonic() - start < 5
    assert differences("a " * 5000, "b") == ((), ())


def test_hostile_text_breaks_no_form():
    table = before_after([answer(HOSTILE, HOSTILE)], [answer(HOSTILE, HOSTILE)], "9")
    html = table._repr_html_()
    html.encode()
    shown = Cells(html)
    assert len(shown.cells) == 6 and "script" not in shown.elements
    assert shown.elements.count("table") == 1 and shown.elements.count("tr") == 2
    assert "<script>alert(1)</script>| a | `b`" in shown.cells[4]  # and the reader sees it as it was

    markdown = table.markdown()
    assert markdown == table._repr_markdown_() and markdown.encode()
    header, rule, row, _, note, end = markdown.split("\n")
    assert header == "| question | before | after |" and rule == "| --- | --- | --- |" and end == ""
    assert note == "0 of 1 answers differ."
    assert row.count("|") == 4  # only the table's own
    assert not set("`[]<>$\\#") & set(row.replace("<br>", "").replace("&#", "")) and row.count("**") == 4

    assert "\x1b" not in str(table) and "\x1b" not in html and "\x1b" not in markdown


def test_markdown_renders_as_it_was_written():
    mistune = pytest.importorskip("mistune")  # comes with nbconvert
    table = before_after([answer("q`|", HOSTILE)], [answer("q`|", tagged("9.9"))])
    shown = Cells(mistune.create_markdown(escape=False, plugins=["table"])(table.markdown()))
    assert shown.cells[:4] == ["question", "before", "after", "q`|"]
    assert shown.cells[4].startswith("</td></table><script>alert(1)</script>| a | `b` **c** [d](e) $f$ \\g")
    assert shown.cells[5] == tagged("9.9").replace("\n", "") and "script" not in shown.elements


def test_plain_text_is_one_below_the_other():
    lines = str(before_after(BEFORE[:1], AFTER[:1], "9.9")).split("\n")
    assert lines[0] == "9.11 or 9.9?"
    assert lines[1] == "  before" and lines[2] == "    ✗ wrong: <reasoning>"
    assert "  after" in lines and lines.index("  after") == 8


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (AFTER[:1], "2 answers before and 1 after"),
        (AFTER[::-1], "question 0 differs"),
        ([replace(AFTER[0], prompt="s:hint u:q"), AFTER[1]], "its prompt is not"),
        ([replace(AFTER[0], decoding=Decoding(48, 1.0, 0, 64)), AFTER[1]], "the decoding differs"),
    ],
)
def test_unequal_conditions_are_refused(after, message):
    with pytest.raises(ValueError, match=message):
        before_after(BEFORE, after)


def test_one_right_answer_for_each_question():
    with pytest.raises(ValueError, match="3 right answers for 2 questions"):
        before_after(BEFORE, AFTER, ["1", "2", "3"])


def made_score(correct: list[bool], form: list[bool]) -> Score:
    rows = [
        Row(**vars(answer(f"q{i}", "text")), gold="1", correct=right, formatted=neat)
        for i, (right, neat) in enumerate(zip(correct, form, strict=True))
    ]
    shares = (Proportion.of(sum(of), len(of)) for of in (correct, form))
    return Score(*shares, mean_length=10.0 * (1 + sum(correct)), rows=rows)


def test_scores():
    table = scores(
        made_score([True, False, False, False], [True] * 4), made_score([True, True, True, False], [True] * 4)
    )
    cells = Cells(table._repr_html_()).cells
    assert cells[:4] == ["", "before", "after", "change"]
    assert cells[4:8] == ["accuracy", "25.0% (4.6% to 69.9%)", "75.0% (30.1% to 95.4%)", "+50.0 points"]
    assert cells[8:12] == ["format", "100.0% (51.0% to 100.0%)", "100.0% (51.0% to 100.0%)", "+0.0 points"]
    assert cells[12:16] == ["mean length", "20.0 tokens", "40.0 tokens", "+20.0"]
    note = "4 held-out questions: both right 1 · gained 2 · lost 0 · both wrong 1."
    assert note in str(table) and note in table.markdown() and note in table._repr_html_()
    first, second = str(table).split("\n")[1:3]
    assert first.index("25.0%") == second.index("100.0%")  # columns are aligned


def test_scores_of_other_questions_are_refused():
    with pytest.raises(ValueError, match="4 answers before and 2 after"):
        scores(made_score([True] * 4, [True] * 4), made_score([True] * 2, [True] * 2))
