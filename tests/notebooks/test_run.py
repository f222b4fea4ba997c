"""The quickstart as `make run` runs it: the reader's own questions, a mistake in them, and Ctrl-C."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
COMMAND = ["notebooks/run.py", "notebooks/00_quickstart.ipynb"]


def finish(process, seconds=240) -> str:
    out, _ = process.communicate(timeout=seconds)
    return out


def start(python, out, *sets):
    sets = [word for pair in sets for word in ("--set", pair)]
    return subprocess.Popen(
        [*python, *COMMAND, str(out), *sets], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_own_questions_that_this_model_cannot_learn(tmp_path, warm, kernel):
    kernel("python3")
    questions = [{"question": f"How many legs have {n} cats?", "answer": str(4 * n)} for n in range(2, 22)]
    questions.append({"question": "And a snake?", "answer": ""})
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, questions)))
    process = start(warm, tmp_path / "out", f"DATA={tmp_path / 'mine.jsonl'}", "STEPS=2")
    text = finish(process)
    assert process.returncode == 0, text
    assert "left out 1 row (line 21) of mine.jsonl: no answer" in text
    assert "This small model did not learn your questions" in text
    assert "step 2/2" in text and "GRPO took" in text
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["accuracy_before"]["n"] == 4 and len(report["reward"]) == 2 and report["probe_before"] == "9.11"
    for name in ("seconds", "accuracy_after", "format_before", "format_after", "probe_after", "versions"):
        assert name in report
    assert (tmp_path / "out/00_quickstart.html").stat().st_size > 10_000
    assert "cats" in (tmp_path / "out/before_after.md").read_text()
    assert (tmp_path / "out/reward_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/model/model.safetensors").exists()
    executed = nbformat.read(tmp_path / "out/00_quickstart.ipynb", as_version=4)
    assert "widgets" not in executed.metadata


def test_a_mistake_in_the_file_is_one_clear_line(tmp_path, warm, kernel):
    kernel("python3")
    (tmp_path / "mine.csv").write_text("prompt,answer\nHow many?,4\n")
    process = start(warm, tmp_path / "out", f"DATA={tmp_path / 'mine.csv'}")
    text = finish(process)
    assert process.returncode == 1
    assert "ValueError" in text and "no column 'question'; it has 'prompt', 'answer'" in text
    assert "Traceback" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to hand on")
def test_ctrl_c_keeps_what_was_learned_and_goes_on(tmp_path):
    process = start([sys.executable], tmp_path / "out", "STEPS=5000")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step ") and "reward" in line:
            break
    process.send_signal(signal.SIGINT)
    began = time.time()
    text = "".join(lines) + finish(process)
    assert process.returncode == 0, text
    assert "Stopped by you after step" in text and time.time() - began < 120
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert 1 <= report["steps"] < 5000 and report["accuracy_after"]["n"] == 512
    assert (tmp_path / "out/model/model.safetensors").exists()
