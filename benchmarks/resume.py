"""Does a run that is killed go on bit for bit? Trains in one go, and killed in the middle and resumed, and compares.

    python -m benchmarks.resume                   # one process: a GPU in about a minute, or a CPU
    python -m benchmarks.resume --processes 2     # two: two GPUs (nccl) where there are two, else the CPU (gloo)

Two models: the workshop model, every weight trained, and a small Llama of random weights in NF4 with LoRA and 8-bit
Adam, whose completions the graph engine writes. Each run writes down, step by step, hashes of what was generated, of
each gradient, weight and optimizer state; the log is compared too, but for times and a mean over one session. The
killed run gets SIGKILL after the gradients of a step are there and before they are used, between two checkpoints and
inside a rollout.

Writes benchmarks/results/resume.json, on a GPU resume_gpu.json; `who` is the device: "different", how many of all that
was written down differ from the undisturbed run's, 0 if all is well, with the first of them and both values. What
differs *before* the kill was no fault of the resume: that run would not have repeated itself. After a difference
everything is done again with `full_determinism=True`, in rows of its own. The exit status is 1 if the run as it stands
differs.
"""

import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, harness

MODELS = ("workshop", "nf4-lora")
STEPS, SAVE, KILL = 10, 3, 8  # in update 8 it is killed, so that it goes on after 6; a rollout is of 4 updates
ORDER = ("generated", "gradient", "weight", "optimizer", "log")  # in which they come about within a step
KINDS = {"eval_": "evaluation ", "train_": "summary "}  # of an entry in the log, by how a name in it begins
# words in names of logged numbers that may differ; train_loss is transformers' mean over one call of `train`
MAY_DIFFER = ("time", "second", "flos", "gb", "memory", "train_loss")


# ---- a run, in a process of its own ----


def nines(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs within a group even where the model is sure of its answer."""
    return [float(sum(map(ord, completion[0]["content"])) % 7) for completion in completions]


def model_of(name: str) -> Any:
    """One of MODELS, on this process's device; the same numbers in every process."""
    from transformers import AutoModelForCausalLM

    from benchmarks import random_model
    from nbhelpers import gpu, presets
    from nbhelpers.presets import WORKSHOP

    if name == "workshop":
        return AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32).to(gpu.device())
    real, device = presets.get("llama-3.1-8b").architecture, gpu.device()
    shape = replace(real, num_hidden_layers=4, hidden_size=512, intermediate_size=1024, num_attention_heads=8,
                    num_key_value_heads=2, head_dim=64) if device.type == "cuda" else harness.small(real)  # fmt: skip
    return random_model.make(replace(shape, vocab_size=512), device, gpu.compute_dtype())


def fingerprint(value: Any) -> list[Any]:
    """[hash, sum] of a tensor, so that it shows how far apart two are; of anything else [hash of its text, text]."""
    if not isinstance(value, torch.Tensor):
        return [hashlib.sha256(repr(value).encode()).hexdigest()[:16], repr(value)[:80]]
    flat = value.detach().cpu().contiguous()
    digest = hashlib.sha256(flat.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return [digest, flat.double().sum().item()]


def child(job: harness.Job) -> None:
    """Train in `job["folder"]` and write down what happens, a line a step and process; die in `job["kill"]`."""
    from transformers import AutoTokenizer, TrainerCallback

    from nbhelpers import LeanGRPOConfig, LeanGRPOTrainer, tasks
    from nbhelpers.presets import WORKSHOP

    rank, several = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not torch.cuda.is_available():
        # there transformers reads the optimizer onto "cpu:0", a name that torch does not restore to
        torch.serialization.register_package(0, lambda _: None, lambda storage, at: storage if at == "cpu:0" else None)
    trace = Path(job["folder"], f"trace-{rank}.jsonl")

    class Look(TrainerCallback):
        def __init__(self) -> None:
            self.seen: dict[str, list[Any]] = {}

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for name, p in run.model.named_parameters():
                if p.grad is not None:
                    self.seen[f"gradient {name}"] = fingerprint(p.grad)
            if state.global_step + 1 == job["kill"]:
                self.write(state.global_step + 1)  # what led to this step counts as well
                os.kill(os.getpid(), signal.SIGKILL)

        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            names = {p: name for name, p in run.model.named_parameters() if p.requires_grad}
            self.seen |= {f"weight {name}": fingerprint(p) for p, name in names.items()}
            for p, states in getattr(optimizer, "optimizer", optimizer).state.items():
                self.seen |= {f"optimizer {names[p]} {key}": fingerprint(value) for key, value in states.items()}
            self.write(state.global_step)

        def write(self, step: int) -> None:
            with open(trace, "a") as file:
                file.write(json.dumps({"step": step, "killed": bool(job["kill"]), "seen": self.seen}) + "\n")
            self.seen.clear()

    look, generate = Look(), LeanGRPOTrainer._generate_single_turn

    def generated(self: LeanGRPOTrainer, *args: Any, **kwargs: Any) -> Any:
        ids, logprobs = generate(self, *args, **kwargs)
        number = sum(name.startswith("generated") for name in look.seen)  # an evaluation's come on top
        look.seen |= {f"generated {number} token ids": fingerprint(ids),
                      f"generated {number} log-probabilities": fingerprint(logprobs)}  # fmt: skip
        return ids, logprobs

    LeanGRPOTrainer._generate_single_turn = generated  # type: ignore[method-assign]
    # three rollouts in two and a half epochs of the data, which are as many as the processes
    data = tasks.decimals(n_train=6 * int(os.environ.get("WORLD_SIZE", "1")), n_test=2)
    args = LeanGRPOConfig(
        str(Path(job["folder"], "run")), max_steps=STEPS, save_steps=SAVE, eval_strategy="steps", eval_steps=4,
        num_iterations=2, steps_per_generation=2, per_device_train_batch_size=8, per_device_eval_batch_size=4,
        num_generations=4, max_completion_length=12, learning_rate=1e-3, beta=0.02, disable_tqdm=True,
        optim="adamw_torch" if job["model"] == "workshop" else "adamw_8bit", full_determinism=job["deterministic"],
    )  # fmt: skip
    run = LeanGRPOTrainer(
        model_of(job["model"]), [nines], args, data.train, data.test, AutoTokenizer.from_pretrained(WORKSHOP),
        callbacks=[look], engine="graph",
    )  # fmt: skip
    run.train(resume_from_checkpoint="auto")
    logs = [{name: fingerprint(value) for name, value in log.items()} for log in run.state.log_history]
    Path(job["folder"], f"log-{rank}.json").write_text(json.dumps(logs))
    if several:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()  # else gloo's threads now and then end the process with an abort


# ---- two runs, compared ----


@dataclass(order=True)
class Difference:
    """Where two runs differ; they sort as they came about."""

    step: int
    resumed: bool  # or in the session that was killed
    kind: int  # of ORDER
    rank: int
    name: str
    whole: str
    other: str

    def __str__(self) -> str:
        session = "after it was resumed" if self.resumed else "before it was killed"
        return f"step {self.step}, {session}, rank {self.rank}, {self.name}: {self.other} instead of {self.whole}"


def lines_of(folder: Path, rank: int) -> Iterator[tuple[int, bool, dict[str, Any]]]:
    """(step, whether the session was not killed, what was seen in it) of a run's trace and log."""
    for line in (folder / f"trace-{rank}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        yield entry["step"], not entry["killed"], entry["seen"]
    for log in json.loads((folder / f"log-{rank}.json").read_text()):
        kind = next((kind for word, kind in KINDS.items() if any(name.startswith(word) for name in log)), "")
        named = {f"log {kind}{name}": value for name, value in log.items()}
        yield int(log["step"][1]), True, {n: v for n, v in named.items() if not any(word in n for word in MAY_DIFFER)}


def differences(whole: Path, other: Path, processes: int) -> list[Difference]:
    """What of `other`, a run that was killed and resumed, is not as in `whole`, the first one first."""
    found = []
    for rank in range(processes):
        wanted: dict[tuple[int, str], list[Any]] = {}
        for step, _, seen in lines_of(whole, rank):
            wanted |= {(step, name): value for name, value in seen.items()}
        got = [(step, resumed, name, value) for step, resumed, seen in lines_of(other, rank)
               for name, value in seen.items()]  # fmt: skip
        absent = wanted.keys() - {(step, name) for step, _, name, _ in got}
        for step, resumed, name, value in [*got, *((step, True, name, ["", "nothing"]) for step, name in absent)]:
            one = wanted.get((step, name), ["", "nothing"])
            if one[0] != value[0]:
                kind = ORDER.index(name.split()[0])
                found.append(Difference(step, resumed, kind, rank, name, str(one[1]), str(value[1])))
    return sorted(found)


# ---- all of it ----


def measure(model: str, processes: int, deterministic: bool, root: Path) -> list[common.Row]:
    """The rows of one model. Raises RuntimeError with the end of a run's output if one does not end as it should."""
    cards = torch.cuda.device_count() >= processes
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # transformers would take all that it sees
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if processes == 1 or not cards:
        environment["CUDA_VISIBLE_DEVICES"] = first if cards else ""
    if deterministic:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

    def run(name: str, kill: int = 0) -> int | str:
        folder = root / f"{model}-{deterministic}" / name
        folder.mkdir(parents=True, exist_ok=True)
        job = {"model": model, "folder": str(folder), "kill": kill, "deterministic": deterministic}
        with open(folder / "output.txt", "a") as log:
            return harness.run_child("benchmarks.resume", job, 550, environment, processes, log)

    def asked(name: str, kill: int = 0) -> Path:
        ended, folder = run(name, kill), root / f"{model}-{deterministic}" / name
        fine = ended != 0 if kill else ended == 0
        if not fine or not (folder / "run").is_dir():
            raise RuntimeError(
                f"{model}, {name}: it ended with {ended}:\n{(folder / 'output.txt').read_text()[-4000:]}"
            )
        return folder

    def killed() -> Path:
        asked("killed", KILL)
        return asked("killed")

    with ThreadPoolExecutor() as pool:  # they share a card: a sum must not depend on that either
        both = pool.submit(asked, "whole"), pool.submit(killed)
        whole, other = (one.result() for one in both)
    if "Resuming from" not in (other / "output.txt").read_text():
        raise RuntimeError(f"{model}: it did not go on from a checkpoint")
    found = differences(whole, other, processes)
    count = sum(len(seen) for rank in range(processes) for _, _, seen in lines_of(other, rank))
    what = f"{model}/processes-{processes}{'/full_determinism' if deterministic else ''}/different"
    more = {"of": count, "steps": STEPS, "killed_in": KILL, "saved_every": SAVE}
    if found:
        firsts = {(d.kind, d.resumed): str(d) for d in reversed(found)}
        more |= {"first": str(found[0]), "first_of_each_kind": list(reversed(firsts.values()))}
    return [common.row(what, "cuda" if cards else "cpu", len(found), "values", **more)]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--deterministic", action="store_true", help="with full_determinism=True from the start")
    asked = parser.parse_args()
    if asked.child:
        child(json.loads(asked.child))
        return
    rows: list[common.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for deterministic in (True,) if asked.deterministic else (False, True):
            with ThreadPoolExecutor() as pool:
                parts = [pool.submit(measure, model, asked.processes, deterministic, Path(folder))
                         for model in asked.models]  # fmt: skip
                rows += [row for part in parts for row in part.result()]
            if not any(row["value"] for row in rows):
                break
    name = "resume" if asked.processes == 1 else "resume_two"
    name += "_gpu" if torch.cuda.is_available() else ""
    print(f"written: {common.publish(name, rows, asked.out)}")
    for row in rows:
        print(f"{row['what']} ({row['who']}): {row['value']} of {row['of']} differ")
        for line in row.get("first_of_each_kind", ()):
            print(f"    {line}")
    sys.exit(any(row["value"] for row in rows if asked.deterministic or "full_determinism" not in row["what"]))


if __name__ == "__main__":
    main()
