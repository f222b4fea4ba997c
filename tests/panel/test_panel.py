"""The panel: what it keeps of a run, what a terminal gets, and a real run."""

# ruff: noqa: F811  (fixtures)

import json
import math

import pytest
import tiny_model
from panel_cases import ARGS, SAMPLES, clock, logs, run, shown  # noqa: F401
from transformers import TrainerControl, TrainerState

from nbhelpers import panel
from nbhelpers.rewards import Sample
from nbhelpers.training.stop_when import Stopper, StopWhen

# ---- data ----


def test_history_holds_what_trl_logs(clock):
    live = panel.Live()
    clock.step = 1.0
    run(live, [logs(), logs(2.0, kl=0.5, num_tokens=1600.0)])
    first, second = live.history
    memory = first.pop("memory")
    assert 0 < memory["used"] < memory["total"]
    assert first == {
        "step": 1, "reward": 1.5, "reward_std": 0.25, "rewards": {"correct": 1.25, "form": 0.25},
        "stds": {"correct": 9.0}, "within": {"total": pytest.approx(1.2583, abs=1e-4), "correct": 1.0,
        "form": pytest.approx(0.3536, abs=1e-4)}, "between": {"total": None, "correct": None, "form": None},
        "length": 41.4, "shortest": 11.0, "longest": 60.0, "clipped": 0.02, "clip_ratio": 0.0, "zero_signal": 0.31,
        "kl": None, "tokens": 1000.0, "speed": 1000.0, "format": pytest.approx(1 / 3), "seconds": 1.0,
        "right": None, "alike": None, "gaming": [], "replaced": None, "loss": 0.0, "grad_norm": None,
            "kl_answer": None, "margin": None, "agree": None, "value_loss": None,
    }  # fmt: skip
    assert [(row["step"], row["reward"], row["kl"]) for row in live.history] == [(1, 1.5, None), (2, 2.0, 0.5)]
    assert second["speed"] == pytest.approx(600.0)  # what drawing took since is not counted
    assert live.samples == SAMPLES
    json.dumps(live.history)


def test_other_logs_are_no_steps():
    live = run(panel.Live(), [{"train_runtime": 9.0}, {"eval_reward": 1.0}, None])
    assert live.history == []


def test_none_and_nan_are_gaps():
    live = run(panel.Live(), [logs(None), logs(math.nan, **{"rewards/form/mean": math.nan})], samples=None)
    assert [row["reward"] for row in live.history] == [None, None]
    assert live.history[1]["rewards"] == {"correct": 1.25, "form": None}
    assert live.history[0]["format"] is None and live.samples == []
    assert "reward none (correct 1.25, form 0.25)" in live.line() and "format" not in live.line()
    live.ended = None  # as before the end, when the newest step is told
    assert "reward none (correct 1.25, form none)" in live.line()
    live.figure()


def test_infinity_ends_no_run_and_can_be_saved(shown, tmp_path):
    boundless = Sample("q", "", {"correct": math.inf})
    live = run(panel.Live(), [logs(kl=math.inf), logs(kl=0.5)], samples=[boundless] * 4)
    assert [row["kl"] for row in live.history] == [None, 0.5]
    live.figure()
    assert "Infinity" not in live.save(tmp_path / "run.json", "a model").read_text()


def test_a_resumed_run_goes_on_where_it_was_and_a_new_one_starts_empty(clock):
    clock.step = 1.0
    before = [{**logs(), "step": step} for step in (1, 2)] + [{"train_runtime": 1.0, "step": 2}]
    live = run(panel.Live(), [logs()], start=2, history=before)
    assert [row["step"] for row in live.history] == [1, 2, 3]
    assert [row["seconds"] for row in live.history] == [None, None, 1.0]
    run(live, [logs()])
    assert [row["step"] for row in live.history] == [1]


def test_other_processes_show_nothing(capsys, monkeypatch):
    live, state = panel.Live(), TrainerState(max_steps=2, is_world_process_zero=False)
    live.on_train_begin(None, state, TrainerControl())
    live.on_log(ARGS, state, TrainerControl(), logs=logs())
    live.on_train_end(ARGS, state, TrainerControl())
    assert capsys.readouterr().out == "" and live.history == []


# ---- a terminal ----


def test_a_terminal_gets_a_line_for_each_step(capsys, clock, monkeypatch):
    clock.step = 0.5
    monkeypatch.setattr("nbhelpers.panel.history.memory_now", lambda: {"used": 1.26, "total": 15.0})
    run(panel.Live(), [logs(), logs(2.0, kl=0.5)], total=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "step 1/4 · reward 1.50 (correct 1.25, form 0.25) · format 33% · length 41 tokens · cut off 2% · "
        "no signal 31% · loss 0 · tokens/s 2,000 · memory 1.3/15.0 GB · elapsed 0:00 · left 0:01"
    )
    assert lines[1].startswith("step 2/4 · reward 2.00") and "KL 0.5" in lines[1]
    assert lines[2].startswith("stopped: step 2/4") and "took 0:02" in lines[2] and len(lines) == 3


def test_the_end_is_told_from_a_stop(capsys):
    run(panel.Live(), [logs()] * 2, total=2)
    assert capsys.readouterr().out.splitlines()[-1].startswith("done: step 2/2")


def test_a_run_that_stop_when_ended_says_why_beside_stopped(capsys):
    live, control = run(panel.Live(), [logs()], total=4, end=False), TrainerControl()
    rule = Stopper(StopWhen(solved_steps=2))
    solved = {"reward": 1.0, "right": 1.0, "frac_reward_zero_std": 0.9}
    state = TrainerState(max_steps=4, global_step=2, log_history=[solved] * 2)
    rule.on_log(ARGS, state, control)
    live.on_train_end(ARGS, state, control)
    assert control.should_training_stop and "The task is solved" in live.outputs()[0][0]["text/html"]
    rule.on_train_begin(ARGS, state, control)
    live.on_train_end(ARGS, state, control)
    assert "solved" not in live.outputs()[0][0]["text/html"]


def test_time_left_counts_this_sessions_steps(clock):
    live = run(panel.Live(), [], start=50, history=[{**logs(), "step": 50}], end=False)
    assert "left" not in live.line()  # nothing to go by yet
    clock.now += 7200
    state = TrainerState(max_steps=60, global_step=54)
    live.on_log(ARGS, state, TrainerControl(), logs=logs())
    assert live.line().endswith("elapsed 2:00:00 · left 3:00:00")
    live = run(panel.Live(total_steps=100), [logs()], end=False)
    assert live.line().startswith("step 1/100")


def test_time_left_is_that_of_the_last_steps_and_not_of_the_one_that_compiled(clock):
    live = run(panel.Live(), [], total=100, end=False)
    for step, seconds in enumerate([300, *[10] * 15, 60, *[10] * 3], start=1):  # the 17th with probes
        clock.now += seconds
        live.on_log(ARGS, TrainerState(max_steps=100, global_step=step), TrainerControl(), logs=logs())
    assert live.line().endswith("elapsed 9:00 · left 13:20")  # 80 steps of 10 s; in the mean it would be 36:00
    for step in range(21, 41):
        clock.now += 20
        live.on_log(ARGS, TrainerState(max_steps=100, global_step=step), TrainerControl(), logs=logs())
    assert live.line().endswith("left 20:00")


def test_it_says_when_the_session_ends_before_the_run(clock, monkeypatch):
    monkeypatch.setattr("nbhelpers.host.session_left", lambda: 3600.0)
    monkeypatch.setattr("nbhelpers.host.where", lambda: "Kaggle")
    clock.step = 100.0
    assert "Kaggle" not in run(panel.Live(), [logs()], total=30, end=False).line()
    live = run(panel.Live(), [logs()], total=100, end=False)
    assert "left 2:45:00, and Kaggle ends this session in 1:00:00 at the latest" in live.line()


def test_after_the_end_it_tells_the_change_and_not_the_last_step():
    rewards = [0.0, 0.2, *[0.5] * 16, 1.0, 1.2]
    steps = [logs(reward, frac_reward_zero_std=float(i == 19)) for i, reward in enumerate(rewards)]
    live = run(panel.Live(), steps, total=20)
    assert live.line().startswith("done: step 20/20 · reward 0.10 → 1.10 (correct 1.25, form 0.25)")
    assert "no signal 0% → 50%" in live.line() and "cut off 2% · " in live.line()


# ---- with TRL's own trainer ----


def test_a_real_run(tmp_path, capsys):
    """TRL's plain trainer: its log keys are those that the panel reads, and it lives with guarded functions."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from nbhelpers.rewards.guard import RewardError, guard_all

    calls = []

    def length(completions, completion_ids, answer, **_):
        calls.append(answer)
        if len(calls) == 2:
            raise OSError("a hiccup")
        return [float(len(ids)) for ids in completion_ids]

    def some(completions, **_):
        return [None if row % 2 else 1.0 for row in range(len(completions))]

    def trainer(funcs, steps):
        args = GRPOConfig(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, num_generations=2, beta=0.1,
            max_completion_length=8, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
            disable_tqdm=True,
        )  # fmt: skip
        rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": str(i)} for i in range(8)]
        live = panel.Live()
        made = GRPOTrainer(
            tiny_model.model(), args=args, reward_funcs=guard_all(funcs), train_dataset=Dataset.from_list(rows),
            processing_class=tiny_model.tokenizer(), callbacks=[live],
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        return made, live

    run_one, live = trainer([length, some], 3)
    capsys.readouterr()
    with pytest.warns(RuntimeWarning, match="'length' failed with OSError: a hiccup"):
        run_one.train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3", "done: step 3/3"]
    assert [row["step"] for row in live.history] == [1, 2, 3] and live.samples == []
    for row in live.history:
        for key in (
            "reward", "reward_std", "length", "shortest", "longest", "clipped", "clip_ratio", "zero_signal", "kl",
            "tokens", "speed", "seconds",
        ):  # fmt: skip
            assert isinstance(row[key], float) and math.isfinite(row[key]), key
        assert set(row["rewards"]) == {"length", "some"} and row["rewards"]["some"] == 1.0
        assert row["stds"].keys() == row["rewards"].keys() and row["within"] == {}
    assert [row["rewards"]["length"] is None for row in live.history] == [False, True, False]
    assert all(parameter.isfinite().all() for parameter in run_one.model.parameters())

    def nothing(completions, **_):
        return [None] * len(completions)

    with pytest.raises(RewardError, match=r"no reward function \(nothing\) scored any completion"):
        trainer([nothing], 5)[0].train()


def test_tokens_per_second_are_those_of_all_updates_with_a_rollout(clock):
    """TRL logs the tokens with the rollout; the updates that follow it take time too."""
    live = panel.Live()
    clock.step = 1.0
    again = {"loss": 0.1}
    run(live, [logs(), again, again, logs(num_tokens=5000.0)])
    first, *_, last = (row["speed"] for row in live.history)
    assert [row["speed"] for row in live.history[1:3]] == [first, first]
    assert last == pytest.approx(4000 / 3)
