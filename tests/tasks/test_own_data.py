"""The reader's own questions, from a file, a frame and the hub, with all that can be wrong with them."""

import json
import os
import subprocess
import sys

import numpy
import pandas
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from nbhelpers import presets, tasks


def write(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.csv", "mine.json"])
def test_own_questions(tmp_path, name):
    rows = [{"question": f"What is {i} + {i}, twice?", "answer": str(4 * i)} for i in range(10)]
    text = {
        "mine.jsonl": "\n".join(map(json.dumps, rows)),
        "mine.json": json.dumps(rows),
        "mine.csv": "\ufeffquestion,answer\n" + "".join(f'"{r["question"]}",{r["answer"]}\n' for r in rows),
    }[name]
    task = tasks.from_file(write(tmp_path, name, text))
    assert (len(task.train), len(task.test), task.dropped) == (8, 2, [])
    by_question = {row["prompt"][-1]["content"]: row["answer"] for part in (task.train, task.test) for row in part}
    assert by_question == {r["question"]: r["answer"] for r in rows}
    assert task.train[0]["prompt"][0] == {"role": "system", "content": tasks.SYSTEM_PROMPT}


def test_a_number_as_answer_is_an_answer(tmp_path):
    task = tasks.from_file(
        write(tmp_path, "q.jsonl", '{"question": "a", "answer": 0}\n{"question": "b", "answer": 1.5}')
    )
    assert {row["answer"] for part in (task.train, task.test) for row in part} == {"0", "1.5"}


def test_unusable_rows_are_named(tmp_path):
    lines = [
        {"question": "a?", "answer": "1"},
        {"question": "b?", "answer": ""},
        {"question": "c?", "answer": None},
        {"question": " ", "answer": "4"},
        {"question": "a?", "answer": "5"},
        {"question": "d?", "answer": "6"},
    ]
    task = tasks.from_file(write(tmp_path, "q.jsonl", "\n".join(map(json.dumps, lines))))
    assert len(task.train) + len(task.test) == 2
    assert task.dropped == [
        "left out 2 rows (line 2, 3) of q.jsonl: no answer",
        "left out 1 row (line 4) of q.jsonl: no question",
        "left out 1 row (line 5) of q.jsonl: the question occurs twice",
    ]
    assert "line 2, 3" in str(task)


def test_long_prompts_are_counted_and_dropped(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(presets.get("workshop").hub_id)
    rows = [{"question": q, "answer": "1"} for q in ("short?", "long? " * 600, "brief?")]
    path = write(tmp_path, "q.jsonl", "\n".join(map(json.dumps, rows)))
    assert tasks.from_file(path, tokenizer=tokenizer).dropped == [
        "left out 1 row (line 2) of q.jsonl: the prompt is longer than 512 tokens"
    ]
    with pytest.raises(ValueError, match=r"0 usable questions.*longer than 5 tokens"):
        tasks.from_file(path, tokenizer=tokenizer, max_prompt_length=5)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("q.txt", "a,b", r"not a \.csv, \.jsonl, \.json or \.parquet"),
        ("q.jsonl", "", "is empty"),
        ("q.csv", "", "is empty"),
        ("q.csv", "question,answer\n", "is empty"),
        ("q.csv", "prompt,solution\na,b\n", "no column 'question' and no column 'answer'; it has 'prompt', 'solution'"),
        ("q.jsonl", '{"question": "a", "label": 1}', "no column 'answer'; it has 'label', 'question'"),
        ("q.jsonl", '{"question": "a", "answer": "1"}\n{"question": ', "line 2: not valid JSON"),
        ("q.jsonl", '["a", "b"]', "line 1: an object is wanted"),
        ("q.json", '{"question": "a"}', "a list of objects is wanted"),
        ("q.jsonl", '{"question": "a", "answer": "1"}', "1 usable questions, and at least 2"),
        (
            "q.jsonl",
            '{"question": "a", "answer": ""}\n{"question": "b", "answer": "2"}',
            r"line 1\) of q.jsonl: no answer",
        ),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        tasks.from_file(write(tmp_path, name, text))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere/q\.csv.*check DATA"):
        tasks.from_file("nowhere/q.csv")


# ---- other kinds of source ----

QUESTIONS = [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(10)]


def pairs(task) -> dict:
    return {row["prompt"][-1]["content"]: row["answer"] for part in (task.train, task.test) for row in part}


WANTED = {row["question"]: str(row["answer"]) for row in QUESTIONS}


def test_a_frame_and_a_parquet_file_give_the_same(tmp_path):
    frame = pandas.DataFrame(QUESTIONS)
    frame.to_parquet(tmp_path / "mine.parquet")
    of_frame, of_file = tasks.from_data(frame), tasks.from_data(tmp_path / "mine.parquet")
    assert pairs(of_frame) == pairs(of_file) == WANTED
    assert of_frame.train[:] == of_file.train[:] and (of_frame.name, of_file.name) == ("the frame", "mine")


def test_a_frame_with_holes():
    frame = pandas.DataFrame({"q": ["a?", None, "c?", "d?", "e?"], "a": [1, 2, float("nan"), "four", pandas.NA]})
    task = tasks.from_data(frame, question="q", answer="a")
    assert pairs(task) == {"a?": "1", "d?": "four"}
    assert task.dropped == [
        "left out 1 row (row 2) of the frame: no question",
        "left out 2 rows (row 3, 5) of the frame: no answer",
    ]
    with pytest.raises(ValueError, match=r"the frame has no column 'question'.*it has 'q', 'a'.*question="):
        tasks.from_data(frame, answer="a")
    with pytest.raises(TypeError, match=r"pandas.DataFrame is wanted, not a list"):
        tasks.from_data(QUESTIONS)


def test_a_folder_and_other_columns(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"q": r["question"], "a": r["answer"]}) + "\n" for r in QUESTIONS)
    )
    assert pairs(tasks.from_data(tmp_path, question="q", answer="a")) == WANTED
    with pytest.raises(FileNotFoundError, match=r"no validation\.jsonl.*it has train\.jsonl"):
        tasks.from_data(tmp_path, split="validation")


def test_the_system_prompt_is_the_readers(tmp_path):
    path = write(tmp_path, "q.jsonl", "\n".join(map(json.dumps, QUESTIONS)))
    row = tasks.from_data(path, system_prompt="Be brief.").train[0]
    assert row["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert [m["role"] for m in tasks.from_data(path, system_prompt=None).train[0]["prompt"]] == ["user"]


def test_the_split_stays_when_rows_are_added(tmp_path):
    first = tasks.from_data(pandas.DataFrame(QUESTIONS), test_share=0.3)
    again = tasks.from_data(pandas.DataFrame(QUESTIONS[::-1]), test_share=0.3)
    assert first.train[:] == again.train[:] and len(first.test) == 3


def test_a_comma_without_quotes_is_told(tmp_path):
    task = tasks.from_data(write(tmp_path, "q.csv", 'question,answer\na?,1\nIs 1, 2 or 3 more?,3\n"b, c?",2\n'))
    assert pairs(task) == {"a?": "1", "b, c?": "2"}
    (note,) = task.dropped
    assert "line 3" in note and "more fields than columns" in note and "quotes" in note


LONG_TAIL = "".join(f"{'x' * 200}{i}?,{i}\n" for i in range(1000))  # more than the csv module takes as one text


@pytest.mark.parametrize(
    "bad", ['"b?,2\nc?,3\nd?,4\n', '"b?,2\n' + LONG_TAIL, '"Is "b" it?",2\nc?,3\n'], ids=["short", "long", "inside"]
)
def test_a_quote_that_is_not_closed_is_told_and_swallows_nothing(tmp_path, bad):
    path = write(tmp_path, "q.csv", "question,answer\na?,1\na2?,1\n" + bad)
    with pytest.raises(ValueError, match=r"q\.csv, the row that begins in line 4: .*quote that is not closed"):
        tasks.from_data(path)


def test_spaces_behind_commas_do_no_harm(tmp_path):
    assert pairs(tasks.from_data(write(tmp_path, "q.csv", 'question, answer\n"a, b?", "1"\nc?, 2\n'))) == {
        "a, b?": "1",
        "c?": "2",
    }


def test_nan_is_no_answer(tmp_path):
    lines = '{"question": "a?", "answer": NaN}\n{"question": "b?", "answer": 1}\n{"question": "c?", "answer": 2}\n'
    task = tasks.from_data(write(tmp_path, "q.jsonl", lines))
    assert pairs(task) == {"b?": "1", "c?": "2"}
    assert task.dropped == ["left out 1 row (line 1) of q.jsonl: no answer"]


def test_lines_are_counted_as_an_editor_counts(tmp_path):
    text = json.dumps({"question": "a\u2028b?", "answer": "1"}, ensure_ascii=False)
    path = write(
        tmp_path, "q.jsonl", text + '\r\n\n{"question": "", "answer": "2"}\n{"question": "c?", "answer": "3"}\n'
    )
    task = tasks.from_data(path)
    assert pairs(task) == {"a\u2028b?": "1", "c?": "3"} and "(line 3)" in task.dropped[0]


def test_a_cell_that_is_no_text_is_told(tmp_path):
    path = write(tmp_path, "q.jsonl", "\n".join(map(json.dumps, [*QUESTIONS, {"question": ["x"], "answer": 1}])))
    (note,) = tasks.from_data(path).dropped
    assert note == "left out 1 row (line 11) of q.jsonl: its question is a list, not text"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "q.csv").write_bytes("question,answer\nä?,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 16\)"):
        tasks.from_data(tmp_path / "q.csv")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        tasks.from_data(write(tmp_path, "q.parquet", "question,answer"))


# ---- the hub, which is not there in a test ----


def test_what_the_hub_is_asked(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        found = Dataset.from_list([{**row, "other": 0} for row in QUESTIONS])
        return found.to_iterable_dataset() if kwargs["streaming"] else found

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert pairs(tasks.from_data("me/mine", config="easy", split="all")) == WANTED
    assert len(pairs(tasks.from_data("me/mine", n=4))) == 4
    assert calls == [
        (("me/mine", "easy"), {"split": "all", "streaming": False}),
        (("me/mine", None), {"split": "train", "streaming": True}),
    ]
    with pytest.raises(ValueError, match="me/mine has no column 'problem'; it has 'question', 'answer', 'other'"):
        tasks.from_data("me/mine", question="problem", n=4)


def test_a_stream_that_hides_its_columns_is_checked_at_its_first_row(monkeypatch):
    from datasets import IterableDataset

    hidden = IterableDataset.from_generator(lambda: iter(QUESTIONS))
    assert hidden.column_names is None
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: hidden)
    assert len(pairs(tasks.from_data("me/mine", n=4))) == 4
    with pytest.raises(ValueError, match="no column 'problem'; it has 'question', 'answer'"):
        tasks.from_data("me/mine", question="problem", n=4)


def test_a_hub_out_of_reach_is_told_with_the_remedy(tmp_path):
    code = "from nbhelpers import tasks\ntry: tasks.from_data('me/mine')\nexcept ConnectionError as e: print('told', e)"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline)
    assert out.stdout.startswith("told the hub is out of reach and me/mine is not in this machine's cache"), out
    assert "a folder that holds train.parquet" in out.stdout


def test_a_config_that_is_not_there_is_told(monkeypatch):
    def load_dataset(*_, **__):
        raise ValueError("BuilderConfig 'x' not found. Available: ['main', 'socratic']")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r'load_dataset\("me/mine", "x", split="train"\): .*socratic'):
        tasks.from_data("me/mine", config="x")


def test_the_ending_of_a_file_may_be_in_capitals(tmp_path):
    file = tmp_path / "QUESTIONS.CSV"
    file.write_text("question,answer\n" + "".join(f"What is {i}?,{i}\n" for i in range(20)))
    task = tasks.from_file(file)
    assert len(task.train) + len(task.test) == 20


def test_numbers_are_answers_that_a_person_can_give(tmp_path):
    """JSON has 1e-05 for 0.00001, and a column of 32 bits 9.109999656677246 for 9.11: nobody would answer that."""
    for name, text in {
        "a.jsonl": '{"q": "a?", "a": 0.00001}\n{"q": "b?", "a": 1e16}\n{"q": "c?", "a": 9.109999656677246}\n',
        "b.csv": "q,a\na?,1e-05\nb?,1e+16\nc?,9.11\n",
    }.items():
        (tmp_path / name).write_text(text)
        task = tasks.from_data(tmp_path / name, question="q", answer="a")
        golds = {row["prompt"][-1]["content"]: row["answer"] for row in [*task.train, *task.test]}
        assert golds == {"a?": "0.00001", "b?": "10000000000000000", "c?": "9.11"}, name
    frame = pandas.DataFrame({"q": ["a?", "b?"], "a": numpy.array([9.11, 1e-05], dtype=numpy.float32)})
    frame.to_parquet(tmp_path / "c.parquet")
    for source in (frame, tmp_path / "c.parquet"):
        task = tasks.from_data(source, question="q", answer="a")
        assert {row["answer"] for row in [*task.train, *task.test]} == {"9.11", "0.00001"}
