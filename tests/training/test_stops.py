"""However a run is told to stop, what was learned is kept, and it goes on as if nothing had happened."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from resume_cases import PLAIN, At, curve, make, same, undisturbed, weights
from transformers import AutoTokenizer, TrainerCallback

from nbhelpers import tasks
from nbhelpers.presets import WORKSHOP
from nbhelpers.training import checkpoint, identity, stops, trainer

TASK = tasks.decimals(n_train=6, n_test=2)
EVALUATED = {**PLAIN, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    return undisturbed(tokenizer, tmp_path_factory.mktemp("whole"), **PLAIN)


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_saves_as_ctrl_c_does(tokenizer, tmp_path, whole, name, capsys):
    class Send(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 4:
                os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(getattr(signal, name))
    assert make(tokenizer, tmp_path, Send(), **PLAIN).train().metrics == {"interrupted": True}
    assert signal.getsignal(getattr(signal, name)) == before
    assert f"Stopped by {name} after step 4. What was learned is kept" in capsys.readouterr().out
    again = make(tokenizer, tmp_path, **PLAIN)
    again.train(resume_from_checkpoint="auto")
    assert same(weights(again), whole[0]) and curve(again) == whole[1]


@posix
def test_a_signal_in_a_save_waits_until_it_is_complete(tokenizer, tmp_path, whole, monkeypatch):
    publish = checkpoint.publish

    def interrupted(*args, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        publish(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "publish", interrupted)
    run = make(tokenizer, tmp_path, **{**PLAIN, "save_steps": 2})
    assert run.train().metrics == {"interrupted": True}
    assert checkpoint.newest(tmp_path).name == "checkpoint-2" and not (tmp_path / checkpoint.STAGING).exists()
    monkeypatch.undo()
    again = make(tokenizer, tmp_path, **PLAIN)
    again.train(resume_from_checkpoint="auto")
    assert same(weights(again), whole[0])


@posix
def test_signals_wait_and_the_third_gets_in():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = []
        with pytest.raises(stops.Stopped, match="SIGTERM"), stops.held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            with stops.held_back():  # within another one it does nothing
                os.kill(os.getpid(), signal.SIGINT)
            done.append("written")
        assert done == ["written"]
        with stops.held_back(deliver=False):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), stops.held_back():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
            done.append("not reached")
        assert done == ["written"]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with stops.signals_stop():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_in_another_thread_no_handler_is_touched():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with stops.signals_stop(), stops.held_back():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def evaluated(tokenizer, folder, **changes):
    return make(tokenizer, folder, eval_rows=TASK.test, **{**EVALUATED, **changes})


@pytest.mark.parametrize("step", [3, 6, 7])
def test_an_evaluation_that_was_cut_short_is_made_up_for(tokenizer, tmp_path, step):
    """In the second epoch and at its end; and the last one of a run, which is finished otherwise."""
    settings = {"eval_steps": step}
    first = evaluated(tokenizer, tmp_path / "whole", **settings)
    first.train()
    cut = evaluated(tokenizer, tmp_path / "cut", **settings)
    original = cut._generate_single_turn

    def interrupted(*args, **kwargs):
        if not cut.model.training:
            torch.rand(3)
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    cut._generate_single_turn = interrupted
    cut.train()
    again = evaluated(tokenizer, tmp_path / "cut", **settings)
    again.train(resume_from_checkpoint="auto")
    assert same(weights(again), weights(first)) and curve(again) == curve(first)

    def evaluations(run):
        return [(log["step"], log["eval_reward"]) for log in run.state.log_history if "eval_reward" in log]

    assert evaluations(again) == evaluations(first) and len(evaluations(first)) >= 1


@pytest.mark.parametrize("event", ["on_step_end", "on_log"])
def test_a_step_that_is_not_logged_yet_is_not_saved_as_done(tokenizer, tmp_path, whole, event):
    """Behind the trainer's own callback: between the end of an update and its line in the log, and after that."""
    run = make(tokenizer, tmp_path, **{**PLAIN, "save_steps": 2})
    run.add_callback(At(3, KeyboardInterrupt, event))
    run.train()
    again = make(tokenizer, tmp_path, **{**PLAIN, "save_steps": 2})
    again.train(resume_from_checkpoint="auto")
    assert same(weights(again), whole[0]) and curve(again) == whole[1]


@pytest.mark.parametrize("what", [SystemExit, GeneratorExit, RuntimeError])
def test_whatever_ends_a_run_what_was_learned_is_kept(tokenizer, tmp_path, whole, what, capsys):
    with pytest.raises(what):
        make(tokenizer, tmp_path, At(4, what, "on_step_begin"), **PLAIN).train()
    assert "Step 5 failed. What was learned until then is in" in capsys.readouterr().out
    again = make(tokenizer, tmp_path, **PLAIN)
    again.train(resume_from_checkpoint="auto")
    assert same(weights(again), whole[0]) and curve(again) == whole[1]


def test_a_reward_that_exits_or_hangs_costs_rows_not_the_run(tokenizer, tmp_path):
    calls = []

    def odd(completions, **_):
        calls.append(1)
        if len(calls) == 1:
            raise SystemExit
        if len(calls) == 2:
            time.sleep(3600)
        return [float(len(completion[0]["content"])) for completion in completions]

    run = make(tokenizer, tmp_path, max_steps=3, reward=odd, reward_seconds=0.5)
    with pytest.warns(RuntimeWarning, match="'odd' failed with (SystemExit|no answer within)"):
        assert run.train().global_step == 3
    logs = [log["reward_seconds/odd"] for log in run.state.log_history if "train_runtime" not in log]
    assert len(logs) == 3 and logs[1] >= 0.5
    assert trainer.LeanGRPOConfig(str(tmp_path)).reward_seconds == 300


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module, function", [(identity, "describe"), (checkpoint, "newest")])
def test_a_signal_before_the_training_begins_is_one_line(
    tokenizer, tmp_path, monkeypatch, capsys, name, module, function
):
    """Data and checkpoints are hashed then, which takes minutes where there are many."""
    run = make(tokenizer, tmp_path, **PLAIN)
    with monkeypatch.context() as patched:
        patched.setattr(module, function, lambda *_, **__: os.kill(os.getpid(), getattr(signal, name)))
        capsys.readouterr()
        assert run.train(resume_from_checkpoint="auto").metrics == {"interrupted": True}
    by = "you" if name == "SIGINT" else name
    assert capsys.readouterr().out.splitlines()[-1] == f"Stopped by {by} before the training began: nothing is written."
    assert run.state.global_step == 0 and not list(tmp_path.glob("checkpoint-*"))
    assert run.train(resume_from_checkpoint="auto").global_step == PLAIN["max_steps"]  # the folder is free again
