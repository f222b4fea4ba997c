"""What the chat template is given besides the messages reaches whatever counts a prompt's tokens."""

import json

import pytest

from nbhelpers import tasks
from nbhelpers.models import chat, smoke

ROWS = [{"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}", "solution": ""} for i in range(1, 9)]
LONG, SHORT = {"preamble": "x" * 500}, {"preamble": "x"}


@pytest.fixture
def tokenizer():
    made = chat.prepare(smoke.make_tokenizer())  # one byte a token
    made.chat_template = "{{ preamble | default('') }}" + made.chat_template
    return made


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def makers(folder):
    return {
        "gsm8k": lambda **given: tasks.gsm8k(source=folder, **given),
        "from_data": lambda **given: tasks.from_data(folder, **given),
        "from_file": lambda **given: tasks.from_file(folder / "train.jsonl", **given),
        "reasoning": lambda **given: tasks.reasoning("limo", source=folder, **given),
        "word_problems": lambda **given: tasks.word_problems(5, 2, level=1, **given),
    }


@pytest.mark.parametrize("name", makers(None))
def test_length_filters_count_it(name, folder, tokenizer):
    def made(**given):
        return makers(folder)[name](tokenizer=tokenizer, max_prompt_length=500, system_prompt=None, **given)

    whole = made(chat_template_kwargs=SHORT)
    assert len(whole.train) > 1 and not whole.dropped
    with pytest.raises(ValueError, match=r"500 tokens"):
        made(chat_template_kwargs=LONG)
    chat.keep_template_kwargs(tokenizer, LONG)  # as a trainer does
    with pytest.raises(ValueError, match=r"500 tokens"):
        made()
    assert made(chat_template_kwargs={}).train[:] == whole.train[:]


def test_previews_show_it(tokenizer):
    task = tasks.decimals(4, 2)
    plain, given = task.preview(tokenizer, 1), task.preview(tokenizer, 1, chat_template_kwargs=LONG)
    assert given.lengths == tuple(length + 500 for length in plain.lengths)
    assert repr(given).count("x│x") > 100
