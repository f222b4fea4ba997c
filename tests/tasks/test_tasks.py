"""Decimals that keep the held-out numbers out; GSM8K from a folder and from the hub; Countdown as a task."""

import json
import re
from decimal import Decimal

import pytest
from datasets import Dataset

from nbhelpers import presets, tasks
from nbhelpers.models import smoke
from nbhelpers.rewards import countdown_rules
from nbhelpers.workshop import recipe

NUMBER = re.compile(r"\d+\.\d+")


@pytest.fixture(scope="module")
def decimals():
    return tasks.decimals(n_train=600, n_test=200)


def texts(dataset) -> str:
    return "\n".join(row["prompt"][-1]["content"] + row["answer"] for row in dataset)


def test_no_training_text_holds_a_held_out_number(decimals):
    corpus = "\n".join(messages[-1]["content"] + text for messages, text in recipe.make_corpus(4000, seed=3))
    for trained_on in (texts(decimals.train), corpus):
        numbers = set(NUMBER.findall(trained_on))
        assert len(numbers) > 500
        assert not [n for n in numbers if tasks.is_held_out(n)]
    tested = set(NUMBER.findall(texts(decimals.test)))
    assert tested and all(tasks.is_held_out(n) for n in tested)


def test_the_split_goes_by_value():
    for spelling in ("9.11", "9.110", "9.9", "9.90", "09.9"):
        assert tasks.is_held_out(spelling), spelling
    share = sum(tasks.is_held_out(f"{n / 100:.2f}") for n in range(1, 10_000)) / 9999
    assert 0.18 < share < 0.22


def test_every_test_pair_is_one_where_the_version_rule_is_wrong(decimals):
    seen = set()
    for row in decimals.test:
        a, b = NUMBER.findall(row["prompt"][-1]["content"])
        assert row["answer"] == max(a, b, key=Decimal) != tasks.version_rule(a, b)
        seen.add((a, b))
    assert len(seen) == len(decimals.test) == 200


def test_training_pairs_are_mixed_and_answered_right(decimals):
    pairs = [NUMBER.findall(row["prompt"][-1]["content"]) for row in decimals.train]
    assert all(row["answer"] == max(pair, key=Decimal) for row, pair in zip(decimals.train, pairs, strict=True))
    assert 0.7 < sum(tasks.version_rule(a, b) != tasks.place_value(a, b) for a, b in pairs) / len(pairs) < 0.9


def test_decimals_are_repeatable():
    first, again, other = (tasks.decimals(20, 20, seed=seed) for seed in (1, 1, 2))
    assert first.train[:] == again.train[:] and first.test[:] == again.test[:]
    assert first.train[:] != other.train[:]


def test_the_rules_on_the_famous_pair():
    assert tasks.version_rule("9.11", "9.9") == "9.11"
    assert tasks.place_value("9.11", "9.9") == tasks.PROBE_ANSWER
    assert tasks.by_place("9.11", "9.9") == "Place by place: 9 = 9, tenths 1 < 9."
    assert tasks.by_place("3.4", "3.41") == "Place by place: 3 = 3, tenths 4 = 4, hundredths 0 < 1."
    assert recipe.by_version("9.11", "9.9") == "Part by part: 9 = 9, 11 > 9."


# ---- GSM8K ----

ROWS = [
    {"question": "Ann has 2 pens and buys 3. How many?", "answer": "She has 2+3=<<2+3=5>>5.\n#### 5"},
    {"question": "A mill grinds 1,250 sacks. How many?", "answer": "#### 9 is not it.\n#### 1,250"},
    {"question": "Which one has no mark?", "answer": "7"},
    {"question": "Which has nothing behind it?", "answer": "Nothing.\n#### "},
    {"question": "How deep is the well?", "answer": "It is below the ground.\n#### -12"},
]


def save(folder, name, rows):
    folder.mkdir(exist_ok=True)
    if name.endswith("jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        getattr(Dataset.from_list(rows), f"to_{name.rpartition('.')[2]}")(folder / name)
    return folder


def pairs(dataset) -> dict:
    return {row["prompt"][-1]["content"]: row["answer"] for row in dataset}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_gsm8k_from_a_folder(tmp_path, kind):
    save(tmp_path, f"train.{kind}", ROWS)
    task = tasks.gsm8k(source=save(tmp_path, f"test.{kind}", ROWS[:1]))
    assert pairs(task.train) == {ROWS[0]["question"]: "5", ROWS[1]["question"]: "1250", ROWS[4]["question"]: "-12"}
    assert pairs(task.test) == {ROWS[0]["question"]: "5"}
    assert [note.split(" of ")[1].split(":")[0] for note in task.dropped] == ["train"] * 2
    assert "no #### before the final answer" in task.dropped[0] and task.dropped[1].endswith("no answer")
    assert str({"jsonl": 3, "parquet": 3, "csv": 6}[kind]) in task.dropped[0]  # a csv's cells hold line ends


def test_gsm8k_takes_the_first_usable(tmp_path):
    save(tmp_path, "train.jsonl", ROWS[2:] + ROWS[:2])
    task = tasks.gsm8k(source=save(tmp_path, "test.jsonl", ROWS), n_train=2, n_test=1)
    assert list(pairs(task.train).values()) == ["-12", "5"] and len(task.test) == 1


def test_gsm8k_drops_long_prompts(tmp_path):
    long = {"question": "Why? " * 200, "answer": "#### 1"}
    save(tmp_path, "train.jsonl", [long, *ROWS])
    save(tmp_path, "test.jsonl", ROWS)
    task = tasks.gsm8k(smoke.make_tokenizer(), source=tmp_path, max_prompt_length=400)
    assert len(task.train) == 3
    assert "left out 1 row (line 1) of train of" in task.dropped[-3] + task.dropped[0]
    assert any("longer than 400 tokens" in note for note in task.dropped)


def test_gsm8k_says_what_is_wrong_with_a_folder(tmp_path):
    save(tmp_path, "train.jsonl", ROWS)
    with pytest.raises(FileNotFoundError, match=r"has no test\.jsonl.*it has train\.jsonl"):
        tasks.gsm8k(source=tmp_path)
    save(tmp_path, "test.jsonl", [{"problem": "a", "solution": "b"}])
    with pytest.raises(ValueError, match="no column 'question' and no column 'answer'; it has 'problem', 'solution'"):
        tasks.gsm8k(source=tmp_path)
    save(tmp_path, "test.jsonl", ROWS[2:3])
    with pytest.raises(ValueError, match=r"no usable question in test of .*line 1.*no ####"):
        tasks.gsm8k(source=tmp_path)


def test_gsm8k_from_the_hub(monkeypatch):
    """The call that the hub gets; the hub itself is not there in a test."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_list([{**row, "extra": 1} for row in ROWS])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(tasks.gsm8k().train) == 3
    assert calls == [(("openai/gsm8k", "main"), {"split": part, "streaming": False}) for part in ("train", "test")]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list([{"text": "a"}]))
    with pytest.raises(ValueError, match=r"openai/gsm8k has no column 'question' .*it has 'text'"):
        tasks.gsm8k()


def test_a_smoke_preset_brings_its_own_problems(monkeypatch):
    assert presets.get("qwen2.5-1.5b").dataset == "openai/gsm8k"
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    preset = presets.get("qwen2.5-1.5b")
    assert preset.dataset == smoke.DATASET
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    task = tasks.gsm8k(smoke.make_tokenizer(), source=preset.dataset, max_prompt_length=preset.max_prompt_length)
    assert (len(task.train), len(task.test), task.dropped) == (48, 16, [])
    for row in task.train:
        boxes, each, gone = map(int, re.findall(r"\d+", row["prompt"][-1]["content"]))
        assert int(row["answer"]) == boxes * each - gone


# ---- Countdown ----


def test_countdown_rows_can_be_scored():
    task = tasks.countdown(40, 10, numbers=(3, 4, 5), seed=5)
    for row in [*task.train, *task.test]:
        assert countdown_rules.verify(row["answer"], row["numbers"], row["target"])
        question = row["prompt"][-1]["content"]
        assert sorted(map(int, re.findall(r"\d+", question))) == sorted([*row["numbers"], row["target"]])
    assert {len(row["numbers"]) for row in task.train} == {3, 4, 5}
    assert task.train[:] == tasks.countdown(40, 10, numbers=(3, 4, 5), seed=5).train[:]
    system, user = tasks.countdown(1, 1, system_prompt="In this form").train[0]["prompt"]
    assert system["content"] == "In this form" and user["role"] == "user"


def test_countdown_holds_its_test_out():
    task = tasks.countdown(2000, 500, numbers=(2,))
    keys = [{(tuple(sorted(row["numbers"])), row["target"]) for row in part} for part in (task.train, task.test)]
    assert [len(part) for part in keys] == [2000, 500] and not keys[0] & keys[1]


def test_a_step_takes_no_more_questions_than_there_are(capsys):
    task = tasks.decimals(n_train=5, n_test=2)
    assert (task.per_step(4), task.per_step(5)) == (4, 5) and capsys.readouterr().out == ""
    assert task.per_step(8) == 5
    assert "only 5 questions to train on, so a step takes 5 and not 8" in capsys.readouterr().out
