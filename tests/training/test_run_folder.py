"""A run's folder: one holder at a time, room before the first step, and a full disk named with path and GB."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest
import resume_cases
import torch
from resume_cases import At, make, weights
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from nbhelpers.presets import WORKSHOP
from nbhelpers.training import checkpoint, run_folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


# ---- the lock ----


def test_a_second_run_says_who_holds_the_folder(tokenizer, tmp_path):
    class Meanwhile(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            with pytest.raises(
                run_folder.InUse, match=rf"in use by process {os.getpid()} on this machine, since 20.*delete"
            ):
                make(tokenizer, tmp_path, max_steps=1).train()

    make(tokenizer, tmp_path, Meanwhile(), max_steps=1).train()
    assert not (tmp_path / run_folder.LOCK).exists()
    with pytest.raises(RuntimeError):
        make(tokenizer, tmp_path, At(1, RuntimeError), max_steps=2).train()
    assert not (tmp_path / run_folder.LOCK).exists()


@pytest.mark.parametrize("change, held", [
    ({}, True), ({"pid": 2**22 + 7}, False), ({"started": 1.0}, False), ({"host": "elsewhere"}, True),
])  # fmt: skip
def test_a_lock_whose_holder_is_gone_is_taken(tmp_path, change, held):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = {"pid": process.pid, "host": run_folder.socket.gethostname(), "since": "2026-01-01 00:00:00",
           "started": run_folder._started(process.pid), **change}  # fmt: skip
    lock = tmp_path / run_folder.LOCK
    lock.write_text(json.dumps(own))
    if held:
        with pytest.raises(run_folder.InUse), run_folder.hold(tmp_path):
            pass
        assert json.loads(lock.read_text()) == own
    else:
        with run_folder.hold(tmp_path):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
        assert not lock.exists()
    process.communicate()


def test_signs_of_life_decide_about_another_machine_and_garbage_is_taken(tmp_path):
    lock = tmp_path / run_folder.LOCK
    for text, seconds in [
        ('{"pid": 1, "host": "elsewhere", "started": null, "since": "then"}', 200),
        ("", 20),
        ("{", 20),
    ]:
        lock.write_text(text)
        with pytest.raises(run_folder.InUse), run_folder.hold(tmp_path):
            pass
        os.utime(lock, (time.time() - seconds,) * 2)
        with run_folder.hold(tmp_path):
            pass


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    (tmp_path / run_folder.LOCK).write_text(json.dumps(
        {"pid": 2**22 + 7, "host": run_folder.socket.gethostname(), "started": 1.0, "since": "long ago"}))  # fmt: skip
    children, (until, told) = set(), os.pipe()
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                with run_folder.hold(tmp_path):
                    os.read(until, 1)
                os._exit(0)
            except run_folder.InUse:
                os._exit(1)
            finally:
                os._exit(2)
        children.add(child)
    statuses, deadline = [], time.monotonic() + 60
    while len(children) > 1 and time.monotonic() < deadline:  # the one that has it keeps it until the others are gone
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            children.remove(child)
            statuses.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.01)
    os.write(told, b"go on!!!")
    statuses += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(statuses) == [0] + [1] * 7


# ---- the disk ----


def test_what_cannot_be_written_is_said_before_anything_else(tokenizer, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        run_folder.FolderError, match=r"nothing can be written into output_dir=.*a part of the path is a file"
    ):
        make(tokenizer, tmp_path / "file" / "run", max_steps=1)
    with pytest.raises(run_folder.FolderError, match="the disk is full"):
        run_folder.check_writable(type("Full", (type(tmp_path),), {"mkdir": _full})(tmp_path / "x"))


def _full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_too_little_room_is_said_before_the_first_step(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "free_bytes", lambda root: 15_000_000)
    run = make(tokenizer, tmp_path, max_steps=6, save_steps=2)
    with pytest.raises(run_folder.FolderError, match=r"need 0\.\d+ GB more in .*3 of 0\.\d+ GB.*0\.015 GB are free"):
        run.train()
    assert run.state.global_step == 0
    monkeypatch.setattr(run_folder, "free_bytes", lambda root: 10**9)
    monkeypatch.setattr(run_folder, "file_limit", lambda: 1000)
    with pytest.raises(run_folder.FolderError, match="may write files of at most"):
        run.train()


@pytest.mark.parametrize("settings, step, there, coming", [
    ({"max_steps": 100, "save_steps": 20, "save_total_limit": 2}, 0, 0, 3),
    ({"max_steps": 20, "save_steps": 20, "save_total_limit": 2}, 0, 0, 1),
    ({"max_steps": 100, "save_steps": 20, "save_total_limit": 2}, 40, 2, 1),
    ({"max_steps": 100, "save_steps": 20, "save_total_limit": None}, 0, 0, 5),
    ({"max_steps": 100, "save_steps": 20, "save_total_limit": None}, 100, 5, 0),
    ({"num_train_epochs": 3, "save_strategy": "epoch", "save_total_limit": 2}, 0, 0, 3),
    ({"max_steps": 100, "save_strategy": "no"}, 0, 0, 0),
])  # fmt: skip
def test_how_many_checkpoints_are_coming(tmp_path, settings, step, there, coming):
    args = run_folder_args(tmp_path, settings)
    assert run_folder.checkpoints_coming(args, step, there) == coming


def run_folder_args(folder, settings):
    from nbhelpers.training.trainer import LeanGRPOConfig

    return LeanGRPOConfig(str(folder), per_device_train_batch_size=8, num_generations=4, **settings)


def test_a_disk_that_fills_up_is_named_and_the_model_is_kept_where_it_fits(tokenizer, tmp_path, monkeypatch, capsys):
    """torch's writer hides the reason: the disk is looked at."""
    run = make(tokenizer, tmp_path, max_steps=6, save_steps=2)
    save = torch.save

    def full(value, file, *args, **kwargs):
        if run.state.global_step == 4 and "optimizer" in str(file):
            monkeypatch.setattr(run_folder, "free_bytes", lambda root: 0)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        run_folder.FolderError, match=r"checkpoint of step 4, 0\.\d+ GB, .*the disk is full \(0\.000 GB"
    ):
        run.train()
    assert "goes on after step 2" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path).name == "checkpoint-2" and not (tmp_path / checkpoint.STAGING).exists()
    kept = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(kept[name], p) for name, p in weights(run).items() if name in kept)


def test_a_quota_is_named_although_torch_says_nothing_of_it(tokenizer, tmp_path, monkeypatch, capsys):
    """torch wrote less than it meant to, onto a disk that has room; the model does not fit either."""
    run = make(tokenizer, tmp_path, max_steps=6, save_steps=2)

    def cut(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", cut)
    monkeypatch.setattr(run, "save_model", cut)
    with pytest.raises(
        run_folder.FolderError, match=r"of step 2.*your quota is used up \([\d.]+ GB are free on the di"
    ):
        run.train()
    assert "The model could not be written into" in (out := capsys.readouterr().out) and "either: your quota" in out
    assert not (tmp_path / checkpoint.STAGING).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
def test_a_real_limit_of_a_file_s_size_is_named(tmp_path, warm):
    code = f"""
import resource, sys
sys.path.insert(0, {os.path.dirname(resume_cases.__file__)!r})
import resume_cases
from transformers import AutoTokenizer
from nbhelpers.presets import WORKSHOP
from nbhelpers.training import run_folder
run_folder.file_limit = lambda: None  # as if it came later
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
tokenizer = AutoTokenizer.from_pretrained(WORKSHOP)
resume_cases.make(tokenizer, {str(tmp_path / "run")!r}, max_steps=2, save_steps=1).train()
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    out = subprocess.run([*warm, str(script)], capture_output=True, text=True, timeout=200)
    last = out.stderr.strip().splitlines()[-1]
    assert "FolderError" in last and "the checkpoint of step 1" in last and "GB" in last, out.stderr[-3000:]


# ---- weights ----


def test_weights_that_are_not_finite_replace_nothing(tokenizer, tmp_path, capsys):
    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **_):
            if state.global_step == 4:
                next(model.parameters()).data[0, 0] = torch.inf

    run = make(tokenizer, tmp_path, Overflow(), max_steps=8, save_steps=2)
    drawn = []
    original, run._generate_single_turn = run._generate_single_turn, lambda *a, **k: (
        drawn.append(all(bool(p.isfinite().all()) for p in run.model.parameters())) or original(*a, **k))  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"after step 5 the weights are not finite.*of step 4, stays"):
        run.train()
    assert all(drawn)  # no engine ever got them
    assert "goes on after step 4" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "model.safetensors").exists()
    again = make(tokenizer, tmp_path, max_steps=8, save_steps=2)
    assert again.train(resume_from_checkpoint="auto").global_step == 8
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight of the model is not finite"):
        make(tokenizer, tmp_path / "new", model=run.model, max_steps=1).train()


def test_silent_batches_do_not_reset_the_count_of_skipped_updates(tokenizer, tmp_path):
    """Steps 1, 3 and 5 have gradients that are not finite; those in between teach nothing."""
    run = None

    def now_and_then(completions, **_):
        quiet = run.state.global_step % 2 == 1
        return [0.0 if quiet else float(i) for i in range(len(completions))]

    run = make(tokenizer, tmp_path, max_steps=8, save_steps=100, max_skipped_steps=3, reward=now_and_then, beta=0.0)
    run.model.get_parameter("model.norm.weight").register_hook(
        lambda gradient: gradient * float("nan") if run.state.global_step % 2 == 0 else gradient
    )
    with pytest.raises(FloatingPointError, match="3 times in a row"):
        run.train()
    assert run.state.global_step == 4
