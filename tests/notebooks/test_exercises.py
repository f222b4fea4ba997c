"""Each exercise of a lesson has an answer that folds out, and the answer's code prints what stands below it.

Lessons run as forks of a process that has imported what they import (`warm_python`)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(FOLDER.glob("0*.ipynb"))
ANSWER = re.compile(r"<details>\n<summary>Answer</summary>\n(.*?)</details>", re.DOTALL)
CODE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
MARK = "==== answer"
# Where answers train, a test has not the minute that it takes: what code of lesson and answers becomes here. What such
# an answer prints is not compared then.
SHORT: dict[str, tuple[tuple[str, str], ...]] = {
    "00_quickstart": (
        ("STEPS = None", "STEPS = 2"), ("tasks.decimals()", "tasks.decimals(64, 16)"),
        ("tasks.decimals(tricky_share=0.0)", "tasks.decimals(64, 8, tricky_share=0.0)"),
    ),
    "02_rewards": (("steps=30", "steps=1"), ("range(256)", "range(16)")),
    "05_your_own_data": (
        ("range(400)", "range(100)"), ("max_steps=30", "max_steps=1"),
        ("args.per_device_train_batch_size = 30,", "args.per_device_train_batch_size = 1,"),
    ),
    "06_r1_recipe": (("STEPS = 40", "STEPS = 1"), ("n_test=256", "n_test=16")),
    "08_more_ways": (
        ("preset.max_steps // 5", "1"), ("range(256)", "range(16)"), ('"max_steps": 5', '"max_steps": 1'),
    ),
}  # fmt: skip
# Here answers print the same all the same, and what they print is compared.
SHORT_AND_TOLD = {
    "04_one_set_of_weights": (
        ("range(12)", "range(3)"), ("(0, 1, 11)", "(0, 1, 2)"), ('["a copy"][11]', '["a copy"][2]'),
    ),
}  # fmt: skip


def cells_of(path: Path, kind: str) -> list[str]:
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == kind and cell.get("id") != "install"
    ]


def answers_of(path: Path) -> list[tuple[str, str]]:
    """(code, what it prints) of each answer."""
    return [pair for text in ANSWER.findall(cells_of(path, "markdown")[-1]) for pair in CODE.findall(text)]


def script_of(path: Path) -> str:
    """The lesson and then its answers, each after a line with a mark."""
    parts = ["import matplotlib", 'matplotlib.use("Agg")', *cells_of(path, "code")]
    for code, _ in answers_of(path):
        parts += [f"print({MARK!r})", code]
    text = "\n\n".join(parts)
    for old, new in {**SHORT, **SHORT_AND_TOLD}.get(path.stem, ()):
        assert old in text, old
        text = text.replace(old, new)
    return text


def said_by(path: Path, folder: Path, warm: list[str]) -> list[str]:
    """What each answer prints, run in `folder` below its lesson."""
    script = script_of(path)
    (folder / "lesson.py").write_text(script)  # Triton reads a kernel's source from its file
    python = [sys.executable] if "TRITON_INTERPRET" in script else warm  # wanted before `import triton`
    done = subprocess.run([*python, "lesson.py"], cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [said.removeprefix("\n") for said in done.stdout.split(MARK)[1:]]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_exercise_has_an_answer_that_runs(path, tmp_path, warm):
    text = cells_of(path, "markdown")[-1]
    exercises = re.findall(r"^\d+\. ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    answers = answers_of(path)
    assert len(exercises) == len(ANSWER.findall(text)) == len(answers) > 0
    said = said_by(path, tmp_path, warm)
    assert len(said) == len(answers)
    if path.stem not in SHORT:
        assert said == [told for _, told in answers]
