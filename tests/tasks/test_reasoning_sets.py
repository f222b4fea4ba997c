"""The loaders of the reasoning sets, on rows of the same schemas written here; the real sets are not in a test."""

import pandas
import pytest
from datasets import Dataset

from nbhelpers import rewards, tasks
from nbhelpers.models import smoke
from nbhelpers.tasks.reasoning_sets import SETS


def chat(question, answer, keys=("from", "value")):
    return [dict(zip(keys, turn, strict=True)) for turn in (("user", question), ("assistant", answer))]


STRATOS = r"Return your final response within \boxed{}. "
THOUGHT = "<|begin_of_thought|>\n\\boxed{{1}} first\n<|end_of_thought|>\n\n"
THOUGHT += "<|begin_of_solution|>\n\\boxed{{{}}}\n<|end_of_solution|>"
DEEPSEEK = {
    "domain": "math",
    "source": "olympiads",
    "test_cases": None,
    "starter_code": None,
    "deepseek_reasoning": "Hm.",
}
OPENR1 = {
    "solution": "By symmetry.", "problem_type": "Algebra", "question_type": "math-word-problem", "source": "olympiads",
    "uuid": "0", "is_reasoning_complete": [True], "generations": ["<think>Hm.</think>"], "finish_reasons": ["stop"],
    "correctness_math_verify": [True], "correctness_llama": None, "correctness_count": 1,
}  # fmt: skip
DISTILL = {"id": "a", "source": "numina", "verified": None, "quality_metrics": None}

# Of each set: rows that can be used with the answer that is wanted, and rows that cannot with a word of the reason.
GOOD = {
    "limo": [({"question": "q0", "solution": "Long.", "answer": "12"}, "12"),
             ({"question": "q1", "solution": "Long.", "answer": r"\frac{1}{2}"}, r"\frac{1}{2}")],
    "openr1-math": [({**OPENR1, "problem": "q0", "answer": "3", "messages": chat("q0", "3", ("role", "content"))}, "3"),
                    ({**OPENR1, "problem": "q1", "answer": "x=4", "messages": []}, "x=4")],
    "openthoughts": [
        ({**DEEPSEEK, "problem": "q0", "ground_truth_solution": r"\boxed{7}", "deepseek_solution": r"\boxed{8}"}, "7"),
        ({**DEEPSEEK, "problem": "q1", "ground_truth_solution": None, "deepseek_solution": r"\boxed{8}"}, "8"),
    ],
    "bespoke-stratos": [
        ({"system": "Think.", "conversations": chat(f"{STRATOS}q{i}", THOUGHT.format(i))}, str(i))
        for i in (5, 6)
    ],
    "deepscaler": [({"problem": "q0", "answer": "10", "solution": ""}, "10"),
                   ({"problem": "q1", "answer": r"\pi", "solution": "It is."}, r"\pi")],
    "dolphin-r1": [
        ({"messages": [{"role": "system", "content": "Hi."}, {"role": "user", "content": f"q{i}"}], "reasoning": "Hm.",
          "answer": rf"It is \(\boxed{{{i}}}\).", "model": "r1"}, str(i))
        for i in (0, 1)
    ],
    "r1-distill": [
        ({**DISTILL, "problem": "q0", "solution": r"\boxed{A}", "reannotated_assistant_content": "<think>"}, "A"),
        ({**DISTILL, "problem": "q1", "solution": "C", "reannotated_assistant_content": r"<think>\boxed{C}"}, "C"),
    ],
}  # fmt: skip
BAD = {
    "limo": ({"question": "q2", "solution": "Long.", "answer": " "}, "no answer"),
    "openr1-math": ({**OPENR1, "problem": "q2", "answer": "proof", "messages": []}, "no answer to check"),
    "openthoughts": ({**DEEPSEEK, "problem": "q2", "ground_truth_solution": None, "deepseek_solution": "print(1)"},
                     "ground_truth_solution or deepseek_solution"),
    "bespoke-stratos": ({"system": "Think.", "conversations": chat("Write a program.", "print(1)")}, r"no \boxed{...}"),
    "deepscaler": ({"problem": "q2", "answer": "", "solution": "?"}, "no answer"),
    "dolphin-r1": ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "reasoning": "",
                    "answer": r"\boxed{1}", "model": "r1"}, "2 turns of the user"),
    "r1-distill": ({**DISTILL, "problem": "q2", "solution": "?", "reannotated_assistant_content": "?"}, r"no \boxed"),
}  # fmt: skip


def pairs(task) -> dict:
    return {row["prompt"][-1]["content"]: row["answer"] for part in (task.train, task.test) for row in part}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_set_gives_questions_and_answers(name, kind, tmp_path):
    dataset = Dataset.from_list([*(row for row, _ in GOOD[name]), BAD[name][0]])
    dataset.to_parquet(tmp_path / "train.parquet") if kind == "parquet" else dataset.to_json(tmp_path / "train.jsonl")
    task = tasks.reasoning(name, source=tmp_path)
    assert sorted(pairs(task).values()) == sorted(answer for _, answer in GOOD[name])
    assert all(question in ("q0", "q1", "q5", "q6") for question in pairs(task))
    assert task.train[0]["prompt"][0] == {"role": "system", "content": tasks.SYSTEM_PROMPT}
    (note,) = task.dropped
    assert BAD[name][1] in note and ("row 3" if kind == "parquet" else "line 3") in note


@pytest.mark.parametrize("name", SETS)
def test_a_frame_read_from_parquet_gives_the_same(name, tmp_path):
    Dataset.from_list([row for row, _ in GOOD[name]]).to_parquet(tmp_path / "train.parquet")
    frame = pandas.read_parquet(tmp_path / "train.parquet")  # its lists come as numpy arrays
    assert pairs(tasks.reasoning(name, source=frame)) == pairs(tasks.reasoning(name, source=tmp_path))


@pytest.mark.parametrize("name", SETS)
def test_a_set_from_the_hub(name, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        rows = Dataset.from_list([row for row, _ in GOOD[name]])
        return rows.to_iterable_dataset() if kwargs["streaming"] else rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert sorted(pairs(tasks.reasoning(name)).values()) == sorted(answer for _, answer in GOOD[name])
    assert len(pairs(tasks.reasoning(name, n=None))) == 2
    where = (SETS[name].hub_id, SETS[name].config)
    assert calls == [(where, {"split": "train", "streaming": streaming}) for streaming in (True, False)]


def test_no_more_rows_are_fetched_than_wanted(monkeypatch):
    from datasets import IterableDataset

    fetched = []

    def rows():
        for i in range(100_000):
            fetched.append(i)
            yield {"question": f"q{i}", "solution": "", "answer": str(i)}

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: IterableDataset.from_generator(rows))
    assert len(pairs(tasks.reasoning("limo", n=10))) == 10 and len(fetched) < 20


def test_wrong_columns_and_names_are_told(tmp_path):
    Dataset.from_list([{"prompt": "a", "label": "b"}]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column 'problem' and no column 'answer'; it has 'prompt', 'label'"):
        tasks.reasoning("deepscaler", source=tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no reasoning set 'LIMO'; there are limo, openr1-math, openthoughts"):
        tasks.reasoning("LIMO")


def test_long_prompts_are_left_out(tmp_path):
    rows = [{"question": "long? " * i, "solution": "", "answer": "1"} for i in (1, 2, 200)]
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    task = tasks.reasoning("limo", smoke.make_tokenizer(), source=tmp_path / "x.parquet", max_prompt_length=300)
    assert len(pairs(task)) == 2 and task.dropped == [
        "left out 1 row (row 3) of x.parquet: the prompt is longer than 300 tokens"
    ]


@pytest.mark.parametrize(
    "name, reasoning",
    [
        ("limo", "Long."),
        ("openthoughts", "Hm.\n\n\\boxed{8}"),
        ("bespoke-stratos", "\\boxed{1} first\n\n\\boxed{5}"),
        ("dolphin-r1", "Hm."),
    ],
)
def test_texts_to_learn_from_are_the_sets_reasoning_in_our_form(name, reasoning):
    rows = [row for row, _ in GOOD[name]]
    task = tasks.reasoning(name, source=pandas.DataFrame(rows), texts=True)
    (row,) = (row for part in (task.train, task.test) for row in part if row["prompt"][-1]["content"] in ("q0", "q5"))
    assert row["completion"] == tasks.worked(reasoning, row["answer"])
    assert rewards.formatted(row["completion"][0]["content"])
    assert "completion" not in tasks.reasoning(name, source=pandas.DataFrame(rows)).train.column_names


def test_a_row_without_a_text_is_left_out_where_texts_are_wanted():
    rows = [{"question": f"q{i}", "solution": "Long." if i else "", "answer": "12"} for i in range(3)]
    task = tasks.reasoning("limo", source=pandas.DataFrame(rows), texts=True)
    assert len(task.train) + len(task.test) == 2 and "no text in its solution" in task.dropped[0]
    assert len(pairs(tasks.reasoning("limo", source=pandas.DataFrame(rows)))) == 3
