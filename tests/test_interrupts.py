"""Ctrl-C in a public call that takes long: one sentence that says what is left, and nothing half-written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nbhelpers import evaluate, export, files, install, loader, presets, progress, rewards, tasks
from nbhelpers.loader import hub
from nbhelpers.models import smoke
from nbhelpers.panel import replay
from nbhelpers.training import stops
from nbhelpers.training.trainer import LeanGRPOConfig, LeanGRPOTrainer


def ctrl_c(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_SMOKE", "1")  # the shapes of a small model
        shape = presets.get("qwen2.5-1.5b").architecture
    return smoke.write(shape, tmp_path_factory.mktemp("model") / "base", seed=1)


@pytest.fixture(scope="module")
def model(folder):
    return loader.load(folder, quantization="nf4", lora_rank=2, dtype=torch.float32, progress=False)


TASK = tasks.decimals(n_train=2, n_test=2)
CALLS = {  # what is interrupted where: the call, of a model, its tokenizer, its folder and a folder to write into
    "load": ("nbhelpers.models.quantize", "pack", lambda m, t, base, out: loader.load(base, progress=False)),
    "find": ("nbhelpers.loader.hub", "identify", lambda m, t, base, out: hub.find(base)),
    "keep": ("nbhelpers.models.model_folder", "write_shards", lambda m, t, base, out: loader.keep(m, t, out / "x")),
    "save": ("nbhelpers.export", "_card", lambda m, t, base, out: export.save(m, t, out / "x")),
    "merged": ("nbhelpers.export", "_card", lambda m, t, base, out: export.merged(m, t, out / "x")),
    "gguf": ("nbhelpers.export.gguf_file", "write", lambda m, t, base, out: export.gguf(m, t, out / "x.gguf")),
    "push": ("huggingface_hub.HfApi", "create_repo", lambda m, t, base, out: export.push(base, "me/x", token="hf_x")),
    "save_adapter": ("nbhelpers.models.adapter", "base_of", lambda m, t, base, out: loader.save_adapter(m, out / "x")),
    "load_adapter": ("nbhelpers.models.adapter", "base_of", lambda m, t, base, out: loader.load_adapter(m, out)),
    "ask": ("nbhelpers.models.chat", "prompt_ids", lambda m, t, base, out: evaluate.ask(m, t, ["Hi"])),
    "accuracy": ("nbhelpers.models.chat", "prompt_ids", lambda m, t, base, out: evaluate.accuracy(m, t, TASK.test)),
    "pass_at_k": ("nbhelpers.models.chat", "prompt_ids",
                  lambda m, t, base, out: evaluate.pass_at_k(m, t, TASK.test, k=(2,))),
    "check_signal": ("nbhelpers.models.chat", "prompt_ids",
                     lambda m, t, base, out: evaluate.check_signal(m, t, TASK, [rewards.correctness])),
    "rewards": ("nbhelpers.rewards.checking", "by_name", lambda m, t, base, out: rewards.check([ctrl_c], TASK)),
    "from_data": ("nbhelpers.tasks.own_data", "open_source", lambda m, t, base, out: tasks.from_file(out / "x.csv")),
    "gsm8k": ("nbhelpers.tasks.grade_school", "open_source", lambda m, t, base, out: tasks.gsm8k(source=out)),
    "reasoning": ("nbhelpers.tasks.reasoning_sets", "open_source", lambda m, t, base, out: tasks.reasoning("limo")),
    "replay": ("nbhelpers.panel.replay.Replay", "show_at", lambda m, t, base, out: replay.run(seconds=0)),
    "install": ("nbhelpers.install", "missing", lambda m, t, base, out: install.run()),
    "trainer": ("nbhelpers.training.step_hooks", "check_model", lambda m, t, base, out: LeanGRPOTrainer(
        m, [rewards.correctness], LeanGRPOConfig(str(out / "run"), num_generations=2, per_device_train_batch_size=2),
        TASK.train, None, t)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_one_sentence_is_said_and_nothing_is_left(name, model, folder, tmp_path, monkeypatch):
    where, what, call = CALLS[name]
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setenv("NBHELPERS_SMOKE", "")
    monkeypatch.setattr(f"{where}.{what}", ctrl_c)
    with pytest.raises(progress.Interrupted, match=r"^Stopped by you while [\w ]+: [\w ,;-]+\.$") as stopped:
        call(*model, folder, tmp_path)
    assert stopped.value._render_traceback_() == [str(stopped.value)] and isinstance(stopped.value, KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == [], "something is left"


def test_an_evaluation_within_a_training_passes_other_signals_on():
    with pytest.raises(stops.Stopped, match="SIGTERM"), progress.interruptible("a", "b"):
        raise stops.Stopped("SIGTERM")
    inner = progress.interruptible("c", "d")
    with pytest.raises(progress.Interrupted, match="while c: d"), progress.interruptible("a", "b"), inner:
        raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_script_fails_and_shows_the_sentence_alone(tmp_path):
    code = """
import os, signal
from nbhelpers import progress

with progress.interruptible("the model was loaded", "nothing is left"):
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        pass
"""
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": root})  # fmt: skip
    assert (
        done.returncode != 0
        and done.stderr == "\nStopped by you while the model was loaded: nothing is left.\n"
        and not done.stdout
    )
    other = code.replace("os.kill(os.getpid(), signal.SIGINT)", "raise ValueError('x')")
    assert "Traceback" in subprocess.run([sys.executable, "-c", other], capture_output=True, text=True,
                                         env={**os.environ, "PYTHONPATH": root}).stderr  # fmt: skip


def test_what_a_folder_held_is_there_after_an_interrupt_between_the_two_renames(tmp_path, monkeypatch):
    old, new = tmp_path / "model", tmp_path / "new"
    for one in (old, new):
        one.mkdir()
        (one / "name").write_text(one.name)
    replace = os.replace

    def second(source, target):
        if Path(source) == new:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", second)
    with pytest.raises(KeyboardInterrupt):
        files.put_in_place(new, old, tmp_path / "aside")
    assert (old / "name").read_text() == "model"


def test_an_adapter_s_files_replace_those_of_their_names_at_the_end_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes").write_text("mine")
    (tmp_path / "a" / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.whole_files(tmp_path / "a") as new:
        (new / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a" / "weights").read_text() == "old"
    with files.whole_files(tmp_path / "a") as new:
        (new / "weights").write_text("new")
    assert {file.name: file.read_text() for file in (tmp_path / "a").iterdir()} == {"notes": "mine", "weights": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_folder_of_this_process_can_be_written_into_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with files.whole_files(Path(".")) as new:
        (new / "one").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["one"] and (tmp_path / "one").read_text() == "1"
