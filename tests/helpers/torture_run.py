"""One run of the torture, in a process of its own: it trains, and sends itself a signal where it is told to."""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

# Two epochs and a bit, two updates of each rollout, evaluations, saves in the middle of a rollout.
RUN = {"max_steps": 14, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 4, "num_iterations": 2,
       "steps_per_generation": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}  # fmt: skip
PHASES = {
    "rollout": ("_generate_single_turn", 7),
    "loss": ("_compute_loss", 14),
    "save": ("_save_checkpoint", 5),
    "evaluation": ("_evaluate", 3),
    "update": ("_clip_grad_norm", 14),
}  # fmt: skip  the method, its calls in a run


def child(folder: str, phase: str, call: int, share: float, number: int, room: int) -> None:
    """Train in `folder`, and send itself a signal a `share` into the `call`-th call of a phase."""
    import resume_cases
    import torch
    from transformers import AutoTokenizer

    from nbhelpers import tasks
    from nbhelpers.presets import WORKSHOP
    from nbhelpers.training import run_folder

    if not room:  # a disk that fills up although there was room at the start
        run_folder.check_room = lambda *_: None
    test = tasks.decimals(n_train=6, n_test=2).test
    run = resume_cases.make(AutoTokenizer.from_pretrained(WORKSHOP), folder, eval_rows=test, **RUN)
    if phase in PHASES:
        name, calls, seconds = PHASES[phase][0], 0, 0.1
        original = getattr(run, name)

        def timed(*args, **kwargs):
            nonlocal calls, seconds
            calls, begun = calls + 1, time.monotonic()
            if calls == call:
                kill = threading.Timer(share * seconds, os.kill, (os.getpid(), number))
                kill.daemon = True
                kill.start()
            result = original(*args, **kwargs)
            seconds = time.monotonic() - begun
            return result

        setattr(run, name, timed)
    if phase == "vanish":
        step = run._compute_loss

        def vanish(*args, **kwargs):
            if run.state.global_step == 5:
                shutil.rmtree(folder, ignore_errors=True)
            return step(*args, **kwargs)

        run._compute_loss = vanish
    run.train(resume_from_checkpoint="auto")
    flat = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    evaluations = [(log["step"], log["eval_reward"]) for log in run.state.log_history if "eval_reward" in log]
    result = {"step": run.state.global_step, "weights": hashlib.sha256(flat.numpy().tobytes()).hexdigest(),
              "curve": resume_cases.curve(run), "evaluations": evaluations}  # fmt: skip
    print("RESULT " + json.dumps(result), flush=True)


def long_child(folder: str, steps: int) -> None:
    """What `long_run` measures."""
    import psutil
    import resume_cases
    from transformers import AutoTokenizer, TrainerCallback

    from nbhelpers.presets import WORKSHOP

    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in (max(1, steps // 10), steps):
                me = psutil.Process()
                seen.append({"rss": me.memory_info().rss, "fds": me.num_fds(), "threads": me.num_threads(),
                             "shm": len(os.listdir("/dev/shm"))})  # fmt: skip

    resume_cases.make(
        AutoTokenizer.from_pretrained(WORKSHOP), folder, Look(), max_steps=steps, save_steps=max(1, steps // 10),
        per_device_train_batch_size=2, num_generations=2, max_completion_length=2, logging_steps=10, beta=0.0,
    ).train()  # fmt: skip
    print("RESULT " + json.dumps(seen), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "child":
        where, kind, *numbers = sys.argv[2:]
        child(where, kind, int(numbers[0]), float(numbers[1]), int(numbers[2]), int(numbers[3]))
    else:
        long_child(sys.argv[2], int(sys.argv[3]))
