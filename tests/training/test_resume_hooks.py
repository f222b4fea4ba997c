"""A run that is cut anywhere goes on as if it had not been, and no moment of saving leaves a half checkpoint behind."""

import inspect
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import resume_cases
import torch
import trl
from datasets import Dataset
from resume_cases import PLAIN, ROWS, At, curve, make, same, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbhelpers import loader, panel
from nbhelpers.models import adapter
from nbhelpers.presets import WORKSHOP
from nbhelpers.training import checkpoint, trainer

REUSED = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 7, "save_steps": 100,
          "per_device_train_batch_size": 4}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """Weights and curve of runs that nobody stopped, by their settings."""
    known = {}

    def get(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            run = make(tokenizer, tmp_path_factory.mktemp("whole"), **settings)
            start = weights(run)
            run.train()
            assert not any(torch.equal(start[name], p) for name, p in weights(run).items() if "norm" not in name)
            known[key] = weights(run), curve(run)
        return known[key]

    return get


@pytest.mark.parametrize("settings, step", [
    (PLAIN, 3), (PLAIN, 5), (REUSED, 5), (REUSED, 6), ({**PLAIN, "gradient_accumulation_steps": 2}, 4),
])  # fmt: skip
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tokenizer, tmp_path, whole, settings, step, capsys):
    """Stopped in the middle of the step after `step`: at the end of an epoch, in the second, mid-rollout."""
    stopped = make(tokenizer, tmp_path, **settings)
    inside = iter(range(100))

    def interrupted(*args, **kwargs):  # after the completions and half of the gradients
        if stopped.state.global_step == step and next(inside) == 0:
            random.random(), numpy.random.rand(), torch.rand(3)
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original, stopped._compute_loss = stopped._compute_loss, interrupted
    assert stopped.train().metrics == {"interrupted": True}
    assert f'resume_from_checkpoint="auto") goes on after step {step}' in capsys.readouterr().out
    random.seed(99), numpy.random.seed(99)
    again = make(tokenizer, tmp_path, **settings)
    assert again.train(resume_from_checkpoint="auto").global_step == 7
    assert f"checkpoint-{step}, after step {step}." in capsys.readouterr().out
    end, log = whole(**settings)
    assert same(weights(again), end)
    assert curve(again) == log


def test_the_same_trainer_goes_on_too(tokenizer, tmp_path, whole):
    """The cell that is run again in a notebook; an error in the middle, and one that is no Exception."""
    settings = {**REUSED, "save_steps": 3}
    run = make(tokenizer, tmp_path, At(5, OSError, "on_step_begin"), **settings)
    with pytest.raises(OSError):
        run.train(resume_from_checkpoint="auto")
    run.remove_callback(At)
    run.add_callback(At(6, SystemExit, "on_step_begin"))  # which a cell may call too
    with pytest.raises(SystemExit):
        run.train(resume_from_checkpoint="auto")
    run.remove_callback(At)
    run.train(resume_from_checkpoint="auto")
    end, log = whole(**REUSED)
    assert same(weights(run), end) and curve(run) == log
    run.train()  # and from the start: what the earlier run left of its rollout does not count
    assert run.state.global_step == 7


def test_a_4_bit_model_with_an_adapter_goes_on(tokenizer, tmp_path, capsys):
    settings = {"lora_rank": 4, "quantization": "nf4", "progress": False}
    run_settings = {**REUSED, "engine": "auto", "optim": "adamw_8bit"}
    ends = []
    for stop in (None, 4):
        torch.manual_seed(0)  # of LoRA's A
        model, _ = loader.load("workshop", **settings)
        stops = [] if stop is None else [At(stop, KeyboardInterrupt, "on_step_begin")]
        run = make(tokenizer, tmp_path / str(stop), *stops, model=model, **run_settings)
        run.train(resume_from_checkpoint="auto")
        if stop is not None:
            model, _ = loader.load("workshop", **settings)
            run = make(tokenizer, tmp_path / str(stop), model=model, **run_settings)
            run.train(resume_from_checkpoint="auto")
        ends.append((weights(run), curve(run)))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
    assert any(p.abs().sum() > 0 for name, p in ends[0][0].items() if "lora_B" in name)
    # what the trainer wrote knows its base: checkpoint and output folder load like save_adapter's
    for folder in (tmp_path / "None" / "checkpoint-7", tmp_path / "4"):
        loaded, _ = loader.load(folder, progress=False)
        assert adapter.read_base(folder).quantization == "nf4"
        if folder.name == "checkpoint-7":
            assert same({n: p for n, p in loaded.named_parameters() if p.requires_grad}, ends[0][0])
    assert not list(tmp_path.glob("*/training_args.bin"))


def test_an_interrupt_within_an_update_does_not_pass_for_a_whole_one(tokenizer, tmp_path, whole):
    """Half of the weights may be new then: the newest checkpoint stays what it was."""
    settings = {**PLAIN, "save_steps": 2}
    run = make(tokenizer, tmp_path, At(3, KeyboardInterrupt, "on_optimizer_step"), **settings)
    run.train()
    assert checkpoint.newest(tmp_path).name == "checkpoint-2"
    again = make(tokenizer, tmp_path, **settings)
    again.train(resume_from_checkpoint="auto")
    assert same(weights(again), whole(**PLAIN)[0])


def test_the_step_that_broke_a_run_off_is_not_counted_twice(tokenizer, tmp_path):
    """Gradients of steps 3 and 4 are not finite, and two in a row end the run: it goes on from the end of step 3."""
    run = make(tokenizer, tmp_path, max_steps=5, save_steps=100, max_skipped_steps=2)
    model = run.model

    def poison(gradient):
        return gradient * float("nan") if run.state.global_step in (2, 3) else gradient

    hook = model.get_parameter("model.norm.weight").register_hook(poison)
    step = run._step_of(model)
    step.cost = replace(step.cost, launches=123)  # as timed on a card
    with pytest.raises(FloatingPointError, match="2 times in a row"):
        run.train()
    counters = checkpoint.Position.load(checkpoint.newest(tmp_path), 0, "cpu").counters
    assert (counters["skipped"], counters["in_a_row"]) == (1, 1)
    hook.remove()
    step.cost = replace(step.cost, launches=7)  # timed anew: the same run goes on with the same cuts
    run.train(resume_from_checkpoint="auto")
    assert run.state.global_step == 5 and run.skipped_steps == 1 and step.cost.launches == 123
    run.train()
    assert run.skipped_steps == 0  # of another run


def test_a_killed_process_loses_nothing_that_was_saved(tokenizer, tmp_path, whole, warm):
    settings = {**PLAIN, "save_steps": 2}
    out = subprocess.run([*warm, resume_cases.__file__, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert out.returncode == -signal.SIGKILL, out.stdout[-2000:] + out.stderr[-2000:]
    again = make(tokenizer, tmp_path, **settings)
    again.train(resume_from_checkpoint="auto")
    assert same(weights(again), whole(**PLAIN)[0])
    # the limit of two holds, and nothing else is left over
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-6", "checkpoint-7"]
    assert not (tmp_path / checkpoint.STAGING).exists()


def test_whenever_saving_is_killed_the_newest_checkpoint_is_whole(tokenizer, tmp_path):
    """A child process dies at each of 14 moments of a save, over a checkpoint of the same name among others."""
    run = make(tokenizer, tmp_path, max_steps=3, save_steps=1, save_total_limit=1)
    run.train()
    (tmp_path / "checkpoint-3").rename(tmp_path / "checkpoint-2")
    run._saved = None
    assert run.state.global_step == 3

    def saved_in_a_child(dies_at: int | None) -> int:
        """The number of calls that a save takes, or, if killed, the signal's number."""
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            count = 0

            def counted(frame, event, arg):
                nonlocal count
                count += event in ("call", "c_call")
                if count == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(counted)
            run._save_checkpoint(run.model, None)
            sys.setprofile(None)
            os.write(there, str(count).encode())
            os._exit(0)
        os.close(there)
        _, status = os.waitpid(child, 0)
        with os.fdopen(here) as pipe:
            return int(pipe.read() or 0) if dies_at is None else os.WTERMSIG(status)

    calls = saved_in_a_child(None)
    assert calls > 1000 and checkpoint.newest(tmp_path).name == "checkpoint-3"
    names = set()
    for i in range(14):
        assert saved_in_a_child(1 + (calls - 1) * i // 14) == signal.SIGKILL
        found = checkpoint.newest(tmp_path)
        assert found is not None and checkpoint.problem(found) is None
        names.add(found.name)
        if i == 8:  # from here on there is none of the same name, only an older one
            for folder in tmp_path.glob("checkpoint-*"):
                folder.rename(tmp_path / "checkpoint-1")
    assert names >= {"checkpoint-1", "checkpoint-3"}


# ---- which run it is ----


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tokenizer, tmp_path):
    make(tokenizer, tmp_path, max_steps=1).train()
    other = Dataset.from_list([*list(ROWS)[:5], {**ROWS[5], "answer": "0"}])

    def zeros(completions, **_):
        return [0.0] * len(completions)

    wider = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
    wider.requires_grad_(False).lm_head.requires_grad_(True)
    adapted, _ = loader.load("workshop", quantization="none", lora_rank=2, progress=False)
    for changes, message in [
        ({"learning_rate": 5e-4}, r"learning_rate: 0\.001 there, 0\.0005 here\. Set learning_rate=0\.001"),
        ({"num_generations": 2, "beta": 0.0}, r"(?s)num_generations: 4 there, 2 here.*beta: 0\.02 there, 0\.0 here"),
        ({"rows": other}, "the data set: 6 rows .* 6 .* Pass the same train_dataset"),
        ({"rows": ROWS.select(range(4))}, "the data set: 6 rows .* 4 "),
        ({"reward": zeros}, r"the rewards: reward_funcs=\[nines\] there, \[zeros\] here"),
        ({"model": wider}, r"the model \(trained\)"),
        ({"model": adapted}, r"the model \(.*lora"),
    ]:
        run = make(tokenizer, tmp_path, **{"max_steps": 2, **changes})
        with pytest.raises(ValueError, match=message):
            run.train(resume_from_checkpoint="auto")
        assert run.state.global_step == 0


def test_a_finished_run_says_so_and_gives_its_weights(tokenizer, tmp_path, capsys):
    first = make(tokenizer, tmp_path, max_steps=2)
    first.train(resume_from_checkpoint="auto")
    assert f"No checkpoint in {tmp_path}: the run starts at step 0" in capsys.readouterr().out
    live = panel.Live()
    again = make(tokenizer, tmp_path, live, max_steps=2)
    assert again.train(resume_from_checkpoint="auto").metrics == {"finished": True}
    assert "This run is finished: step 2 of 2" in capsys.readouterr().out
    assert same(weights(first), weights(again)) and [row["step"] for row in live.history] == [1, 2]
    longer = make(tokenizer, tmp_path, live, max_steps=3)
    assert longer.train(resume_from_checkpoint=True).global_step == 3
    assert "max_steps was 2 and is 3 from here on" in capsys.readouterr().out
    assert [row["step"] for row in live.history] == [1, 2, 3]
    epochs = make(tokenizer, tmp_path, max_steps=-1, num_train_epochs=1)  # three steps
    assert epochs.train(resume_from_checkpoint="auto").metrics == {"finished": True}


def test_what_cannot_go_on_is_refused(tokenizer, tmp_path):
    run = make(tokenizer, tmp_path, max_steps=1)
    with pytest.raises(FileNotFoundError, match="has no complete checkpoint"):
        run.train(resume_from_checkpoint=True)
    run.train()
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"optimizer\.pt has 0 bytes instead of"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(FileNotFoundError, match=r'there is no folder .*checkpoint-9: resume_from_checkpoint="auto"'):
        run.train(resume_from_checkpoint=tmp_path / "checkpoint-9")
    run.args.sync_ref_model = True
    with pytest.raises(ValueError, match="sync_ref_model=True moves the reference model"):
        run.train(resume_from_checkpoint="auto")


def test_without_the_optimizer_it_goes_on_and_says_not_exactly(tokenizer, tmp_path, capsys):
    make(tokenizer, tmp_path, max_steps=1, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    capsys.readouterr()
    again = make(tokenizer, tmp_path, max_steps=2, save_only_model=True)
    assert again.train(resume_from_checkpoint="auto").global_step == 2
    assert "(save_only_model=True) a run goes on, but not exactly" in capsys.readouterr().out


def test_a_run_that_began_in_fp16_goes_on_without_its_scaler(tokenizer, tmp_path):
    run = make(tokenizer, tmp_path, max_steps=1)
    torch.save({"scale": 1.0}, tmp_path / "scaler.pt")
    run._load_scaler(str(tmp_path))  # no error: there is nothing to put it in


def test_the_defaults_save_often_enough(tmp_path):
    args = trainer.LeanGRPOConfig(str(tmp_path))
    assert (args.save_strategy, args.save_steps, args.save_total_limit) == ("steps", 20, 2)


def test_the_private_hooks_are_still_there():
    from transformers import Trainer

    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(trl.GRPOTrainer._save_checkpoint) == ["self", "model", "trial"]
    assert names(trl.GRPOTrainer._get_train_sampler) == ["self", "dataset"]
    assert names(Trainer._get_output_dir) == ["self", "trial"]
    assert names(Trainer._save) == ["self", "output_dir", "state_dict"]
    assert names(Trainer._load_scaler) == ["self", "checkpoint"]
    assert names(Trainer._load_from_checkpoint)[:2] == ["self", "resume_from_checkpoint"]
    assert names(Trainer._evaluate) == ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"]
    assert names(Trainer._determine_best_metric) == ["self", "metrics", "trial"]
    assert names(Trainer._load_rng_state) == ["self", "checkpoint"]
    assert "weights_only=True" in inspect.getsource(Trainer._load_optimizer_and_scheduler)
    assert "weights_only=True" in inspect.getsource(Trainer._load_rng_state)
