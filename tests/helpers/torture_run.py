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

    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        # in several processes transformers reads the optimizer onto "cpu:0", a name that torch does not restore to
        torch.serialization.register_package(0, lambda _: None, lambda storage, at: storage if at == "cpu:0" else None)
    if not room:  # a disk that fills up although there was room at the start
        run_folder.check_room = lambda *_: None
    test = tasks.decimals(n_train=6, n_test=2).test
    run = resume_cases.make(AutoTokenizer.from_pretrained(WORKSHOP), folder, eval_rows=test, **RUN)
    if phase in PHASES and str(rank) in os.environ.get("TORTURE_RANKS", str(rank)):
        name, calls, seconds = PHASES[phase][0], 0, 0.1
        original = getattr(run, name)

        def signalled():
            if "RANK" in os.environ:
                os.write(1, f"rank {rank} is killed in {phase} {call}\n".encode())
            os.kill(os.getpid(), number)

        def timed(*args, **kwargs):
            nonlocal calls, seconds
            calls, begun = calls + 1, time.monotonic()
            if calls == call:
                kill = threading.Timer(share * seconds, signalled)
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
    if "RANK" in os.environ:
        result["rank"] = rank
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()  # else gloo's threads now and then end the process with an abort
    os.write(1, f"RESULT {json.dumps(result)}\n".encode())  # at once: two processes share the pipe


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


LEAKS = ("list", "cache", "default", "tensors", "closure")  # where a reward keeps what it should not


def leak_child(folder: str, kind: str) -> None:
    """A run of a few steps with a reward that keeps 30 MB a call, and one that needs as much and keeps nothing."""
    import functools

    import resume_cases
    import torch
    from transformers import AutoTokenizer

    from nbhelpers.presets import WORKSHOP

    kept: list = []

    @functools.cache
    def cached(number: int) -> bytearray:
        return bytearray(b"1" * 30_000_000)

    def closure(seen: list):
        return lambda: seen.append(bytearray(b"1" * 30_000_000))

    add = closure([])

    def keeps(completions, default=[], **_):  # noqa: B006 the fault that is looked for
        if kind == "list":
            kept.append("1" * 30_000_000)
        elif kind == "cache":
            cached(len(kept))
            kept.append(1)
        elif kind == "default":
            default.append(bytearray(b"1" * 30_000_000))
        elif kind == "tensors":
            kept.append(torch.ones(7_500_000))
        else:
            add()
        return [float(len(completion[0]["content"])) for completion in completions]

    def keeps_nothing(completions, **_):
        return [float(sum(bytearray(b"1" * 30_000_000)[:5])) for _ in completions]

    keeps.__name__ = f"keeps_{kind}"
    resume_cases.make(
        AutoTokenizer.from_pretrained(WORKSHOP), folder, reward=[keeps, keeps_nothing], max_steps=16,
        save_strategy="no", per_device_train_batch_size=2, num_generations=2, max_completion_length=2, beta=0.0,
    ).train()  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "leak":
        leak_child(sys.argv[2], sys.argv[3])
    elif sys.argv[1] == "child":
        where, kind, *numbers = sys.argv[2:]
        child(where, kind, int(numbers[0]), float(numbers[1]), int(numbers[2]), int(numbers[3]))
    else:
        long_child(sys.argv[2], int(sys.argv[3]))
