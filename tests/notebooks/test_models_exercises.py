"""The exercises of the model notebooks work as they are written, and what their answers say is so."""

import re
from pathlib import Path

import jupytext
import pytest
import torch
from datasets import Dataset

from nbhelpers import grpo, presets, rewards, tasks

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = {"taught": "qwen2.5-0.5b", "thinks": "qwen3-1.7b"}  # of each kind one
QUESTION = "How many are 50 and 50?"


def cells(name: str):
    return jupytext.read(NOTEBOOKS / "models" / f"{name}.ipynb").cells


def exercises(name: str) -> list[tuple[str, str]]:
    """Each exercise and its answer."""
    text = "\n\n".join(cell.source for cell in cells(name)[-2:])
    found = re.findall(
        r"^\*\*\d\.\*\* (.*?)\n\n<details><summary>Answer</summary>\n\n(.*?)\n\n</details>", text, re.S | re.M
    )
    assert len(found) == text.count("<details>") == text.count("</details>") == 3
    return found


def code(answer: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", answer, re.S)
    return block


@pytest.fixture(params=NAMES)
def notebook(request):
    """The kind, its exercises, and the names that its cell with the rewards defines."""
    name = NAMES[request.param]
    preset = presets.get(name)
    space = {"rewards": rewards, "preset": preset, "longest": preset.max_completion_length, "task": sums()}
    exec(next(cell.source for cell in cells(name) if "def correct(" in cell.source), space)
    return request.param, exercises(name), space


def sums() -> tasks.Task:
    rows = [{"prompt": tasks.messages(f"How many are {n} and 7?", None), "answer": str(n + 7)} for n in range(20, 26)]
    return tasks.Task("sums", Dataset.from_list(rows), Dataset.from_list(rows))


def group(space, names, texts, answer="100") -> torch.Tensor:
    """The advantages of a group of answers under the rewards of these names."""
    batch = dict(prompts=[QUESTION] * len(texts), completions=texts, answer=[answer] * len(texts),
                 completion_ids=[[0] * len(text) for text in texts])  # fmt: skip
    total = [sum(scores) for scores in zip(*(space[name](**batch) for name in names), strict=True)]
    return grpo.group_advantages(torch.tensor(total), num_generations=len(texts))


def written(tags: rewards.Tags, *answers: str) -> list[str]:
    frames = {rewards.REASONING: "<reasoning>\n50 + 50\n</reasoning>\n<answer>\n{}\n</answer>",
              rewards.THINK: "<think>\n50 + 50\n</think>\n\n\\boxed{{{}}}"}  # fmt: skip
    return [frames[tags].format(answer) for answer in answers]


def test_the_first_exercise(notebook):
    kind, ((asked, answer), *_), space = notebook
    if kind == "taught":
        assert "`reward_funcs=[in_form]`" in asked and "`in_form` rises towards 0.3" in answer
        in_form = written(rewards.REASONING, "100", "7", "98", "12")
        assert space["in_form"](prompts=[QUESTION] * 4, completions=in_form) == pytest.approx([0.3] * 4)
        assert group(space, ["in_form"], in_form).abs().max() == 0, "nothing is paid for what is right"
        assert group(space, ["in_form", "correct"], in_form)[0] > 0
    else:
        assert "Train without `brief`" in asked and "a thought without an end gets nothing" in answer
        short, long = written(rewards.THINK, "100")[0], "<think>\n50 + 50 is 100, or let me see, " + "hm " * 50
        assert group(space, ["correct", "in_form"], [short, long])[0] > 0, "cut off: the shorter one has a reward"
        both = [short, "<think>\n50 + 50 and so on\n</think>\n\n\\boxed{100}"]
        assert group(space, ["correct", "in_form"], both).abs().max() == 0, "both end: nothing pays for fewer words"


def test_the_second_exercise(notebook):
    kind, (_, (asked, answer), _), space = notebook
    before = dict(space)
    exec(code(answer), space)
    if kind == "taught":
        assert "within 10 %" in asked
        texts = written(rewards.REASONING, "98", "12", "no number", "1,000")
        assert group(before, ["correct"], texts).abs().max() == 0 and group(space, ["correct"], texts)[0] > 0
        texts = written(rewards.REASONING, "100", "98", "90", "89", "x")
        assert space["correct"](completions=texts, answer=["100"] * 5) == [1.0, 0.5, 0.5, 0.0, 0.0]
        found = rewards.check([space["correct"]], space["task"], form=space["preset"].tags.frame)
        assert [hole for hole in found.warnings if "it is slow" not in hole] == [], "the table finds no hole in it"
    else:
        assert "`brief` pay wrong answers too" in asked and "`brief` can be gamed" in answer
        found = rewards.check([space["brief"]], space["task"], form=space["preset"].tags.frame)
        assert any("brief: it can be gamed" in hole and "empty" in hole for hole in found.warnings)


def test_the_third_exercise(notebook, tmp_path, monkeypatch):
    _, (*_, (asked, answer)), _ = notebook
    monkeypatch.chdir(tmp_path)
    exec(code(answer))
    assert "set `DATA` to its name" in asked
    task = tasks.from_file("my_questions.csv")
    assert "Line 4, because its question occurs twice, and line 5, which has no answer. Three are left" in answer
    assert [note.partition(" of ")[0] for note in task.dropped] == [
        "left out 1 row (line 4)",
        "left out 1 row (line 5)",
    ]
    assert "occurs twice" in task.dropped[0] and "no answer" in task.dropped[1]
    assert (len(task.train), len(task.test), task.per_step(8)) == (2, 1, 2)
