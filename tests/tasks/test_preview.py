"""What a preview shows: the very tokens, special ones, long prompts cut, lengths, and what was left out."""

import html
import re

import pytest
from transformers import AutoTokenizer

from nbhelpers import presets, tasks
from nbhelpers.models import smoke
from nbhelpers.models.chat import prompt_ids
from nbhelpers.tasks.preview import histogram, pieces


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(presets.get("workshop").hub_id)


TEXTS = ["Which is bigger? 9.11 or 9.9?", "é 🙂🙂 漢字, über", " \n\n  two ", "<|im_end|>"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", ["workshop", "bytes", "sentencepiece"])
def test_the_pieces_are_the_prompt(text, make, tokenizer):
    tokenizer = {"workshop": lambda: tokenizer, "bytes": smoke.make_tokenizer, "sentencepiece": spaced}[make]()
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(piece for piece, _ in found) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(piece for piece, _ in found)


def spaced():
    """A tokenizer like Llama 2's: a word carries the space in front of it, and the first word of a text loses it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*{letter for text in TEXTS for letter in text}, "▁", "▁or", "▁is"]
    core = Tokenizer(models.WordLevel({"<unk>": 0} | {word: i for i, word in enumerate(words, 1)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Split("", "isolated")])
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_a_character_of_several_tokens_is_one_piece():
    tokenizer = smoke.make_tokenizer()  # one byte a token
    assert [piece for piece, _ in pieces(tokenizer, tokenizer("a🙂b")["input_ids"])] == ["a", "🙂", "b"]


def test_tokens_and_special_tokens_are_told_apart(tokenizer):
    task = tasks.decimals(20, 5)
    shown = task.preview(tokenizer, 2)
    ids = prompt_ids(tokenizer, task.train[0]["prompt"])
    first, count, answer = shown.prompts[0]
    assert len(shown.prompts) == 2 and count == len(ids) and answer == task.train[0]["answer"]
    assert "".join(text for text, _ in first) == tokenizer.decode(ids)
    special = [text for text, special in first if special]
    assert special[:2] == ["<|im_start|>", "<reasoning>"] and special[-1] == "<|im_start|>"
    text = repr(shown)
    assert "<|im_start|>│" in text and "⏎" in text and f"right answer: {answer}" in text and "left out\nnothing" in text
    assert f"prompt 1: {count} tokens" in text and "20 training prompts" in text


def test_html_and_text_say_the_same(tokenizer):
    shown = tasks.decimals(20, 5).preview(tokenizer)
    page = shown._repr_html_()
    assert html.unescape(re.sub(r"</?(?:pre|b)[^>]*>", "", page)) == repr(shown)
    assert "<b>&lt;|im_start|&gt;</b>" in page and "background:none;color:inherit" in page  # reads on a dark page


def test_hostile_questions_stay_text(tokenizer, tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("question,answer\n<script>alert(1)</script>,<b>1</b>\nb?,2\nc?,3\n,4\n")
    shown = tasks.from_data(path).preview(tokenizer, 3)
    assert "<script>" not in shown._repr_html_() and "<b>1</b>" not in shown._repr_html_()
    assert "left out 1 row (line 5) of q.csv: no question" in repr(shown)


def test_a_long_prompt_is_cut_in_the_middle(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("question,answer\n" + "".join(f"{i} begin {'9' * 700} end,1\n" for i in range(3)))
    shown = tasks.from_data(path).preview(smoke.make_tokenizer(), 1)
    (_, tokens, _), text = shown.prompts[0], repr(shown).replace("│", "")
    assert tokens == shown.lengths[0] > 700
    assert f"\n... {tokens - 400} more ...\n" in text and " begin 99" in text and "99 end<|im_end|>" in text


def test_only_the_first_rows_are_measured(tokenizer):
    shown = tasks.decimals(50, 5).preview(tokenizer, 1, most=20)
    assert len(shown.lengths) == 20 and "50 training prompts, the first 20 measured" in repr(shown)


def test_the_histogram_counts_every_prompt():
    lines = histogram([10] * 30 + [11] * 60 + [25])
    assert lines[-1] == "shortest 10 · median 11 · 95% up to 11 · longest 25"
    assert sum(int(line.split()[-1]) for line in lines[:-1]) == 91
    assert lines[0].count("█") == 40 and lines[-2].endswith("▏  1")
    assert histogram([7]) == [f"7  {'█' * 40}  1", "shortest 7 · median 7 · 95% up to 7 · longest 7"]
    assert histogram([]) == ["none"]
