"""Checkpoints that are complete or not there at all, and what a run needs to go on exactly where it was.

    output_dir/_saving/checkpoint-40/       everything is written here first and synced to the disk,
        manifest.json                       last of all: bytes and SHA-256 of each file, the run's settings, versions
    output_dir/checkpoint-40/               then one rename

A process killed at any time leaves the newest complete checkpoint in place; older ones go only after that rename, and
they too leave by a rename. What is in a folder beside model, optimizer, scheduler, scaler and random generators, which
transformers writes and reads, is `Position`. The hooks are in resume.py.
"""

import hashlib
import json
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nbhelpers import files, host
from nbhelpers.models import adapter

MANIFEST, STAGING = "manifest.json", "_saving"
# Arguments that make it another run: optimizer and data would go on in a way that neither run had alone.
FIXED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations",
    "num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "loss_type", "beta", "epsilon", "epsilon_high", "delta", "scale_rewards",
    "importance_sampling_level", "mask_truncated_completions", "reward_weights", "shuffle_dataset", "seed",
)  # fmt: skip
# Arguments that may change in between; a line says so. Another card means another precision: then the run goes on,
# but not number for number.
FREE = ("max_steps", "num_train_epochs", "bf16", "fp16")
ROWS = 1000  # of a data set that are hashed at most, evenly spaced


# ------------------------------------------------------------------------------------------------- what run it is


def describe(model, args, dataset, rewards: list[str]) -> dict:
    """What a checkpoint says about its run, as plain JSON: `model`, `data`, `rewards`, `fixed` and `free` arguments."""
    trained = sorted((name, list(p.shape)) for name, p in model.named_parameters() if p.requires_grad)
    base = adapter.base_of(model)
    if base is None:  # a model that loader.load did not make
        shapes = {key: model.config.to_dict().get(key) for key in ("model_type", "hidden_size", "num_hidden_layers")}
        base = adapter.Base(str(model.config.name_or_path), _hash(shapes), "", "none")
    keys = ("r", "lora_alpha", "lora_dropout")
    loras = {name: [c.to_dict().get(key) for key in keys] for name, c in adapter.loras(model).items()}
    values = args.to_dict()
    found = {
        "model": {**asdict(base), "trained": _hash(trained), "lora (rank, alpha, dropout)": loras},
        "data": {"rows": len(dataset) if hasattr(dataset, "__len__") else None, "hash": fingerprint(dataset)},
        "rewards": rewards,
        "fixed": {name: values[name] for name in FIXED} | {"processes": args.world_size},
        "free": {name: values[name] for name in FREE},
    }
    return json.loads(json.dumps(found, default=str))


def fingerprint(dataset) -> str | None:
    """A hash of up to 1,000 evenly spaced rows and of their number; None for a stream, which has no number."""
    if not hasattr(dataset, "__len__"):
        return None
    rows = range(0, len(dataset), max(1, -(-len(dataset) // ROWS)))
    return _hash([len(dataset), *(dataset[i] for i in rows)])


def refuse_other(folder: Path, run: dict) -> None:
    """ValueError, naming each difference and the line to change, if the checkpoint is of another run than `run`."""
    saved, wrong = read(folder)["run"], []
    there, here = saved["model"], run["model"]
    if any(there[key] != here[key] for key in there if key != "id"):  # the id may be a folder, which may move
        differ = ", ".join(key for key in there if there[key] != here[key])
        wrong.append(f"the model ({differ}): it was {there['id']} ({there['quantization']}) with the LoRA "
                     f"{there['lora (rank, alpha, dropout)'] or 'none'}; here {here['id']} ({here['quantization']}), "
                     f"{here['lora (rank, alpha, dropout)'] or 'none'}. Load that one with loader.load")  # fmt: skip
    if saved["data"] != run["data"]:
        wrong.append(f"the data set: {saved['data']['rows']} rows ({saved['data']['hash']}) there, "
                     f"{run['data']['rows']} ({run['data']['hash']}) here. Pass the same train_dataset")  # fmt: skip
    if saved["rewards"] != run["rewards"]:
        wrong.append(f"the rewards: reward_funcs=[{', '.join(saved['rewards'])}] there, "
                     f"[{', '.join(run['rewards'])}] here")  # fmt: skip
    for name, value in saved["fixed"].items():
        if value != run["fixed"].get(name):
            wrong.append(f"{name}: {value!r} there, {run['fixed'].get(name)!r} here. Set {name}={value!r}")
    if wrong:
        lines = "".join(f"\n- {line}" for line in wrong)
        raise ValueError(f"{folder} is a checkpoint of another run:{lines}\nor start afresh in another folder, "
                         f"output_dir={str(folder.parent) + '-2'!r}")  # fmt: skip
    for name, value in saved["free"].items():
        if value != run["free"][name]:
            print(f"{name} was {value} and is {run['free'][name]} from here on.")


# ---------------------------------------------------------------------------------------------- complete or absent


def staging(root: Path) -> Path:
    """The empty folder below `root` in which a checkpoint is written before it is published."""
    shutil.rmtree(root / STAGING, ignore_errors=True)
    (root / STAGING).mkdir(parents=True)
    return root / STAGING


def publish(staged: Path, final: Path, run: dict, step: int) -> None:
    """Sync every file of `staged`, write its manifest, and put it in place of `final` by a rename."""
    listed = {}
    for file in sorted(path for path in staged.rglob("*") if path.is_file()):
        files.sync(file)
        listed[file.relative_to(staged).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest = {
        "format": 1,
        "step": step,
        "time": time.time(),
        "versions": host.versions(),
        "run": run,
        "files": listed,
    }
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    files.sync(staged / MANIFEST)
    files.sync(staged)
    _put(staged, final)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file has the size and the hash that were written."""
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST}: saving was cut short, or something else wrote it"
    try:
        files = read(folder)["files"]
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, wanted in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {wanted['bytes']}"
        if _sha256(file) != wanted["sha256"]:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def newest(root: str | Path) -> Path | None:
    """The newest complete checkpoint below `root`, every byte checked; None without one. Says what it skips."""
    root = Path(root)
    found = []
    # One that is complete in the staging folder was killed between its manifest and its rename.
    for folder in (*root.glob("checkpoint-*"), *root.glob(f"{STAGING}/checkpoint-*")):
        when = _time(folder)
        if when is None:
            print(f"{folder} is skipped: {problem(folder)}.")
        else:
            found.append((when, folder))
    for _, folder in sorted(found, reverse=True):  # by time: a run started afresh beside old ones has lower steps
        why = problem(folder)
        if why is None:
            return _put(folder, root / folder.name) if folder.parent.name == STAGING else folder
        print(f"{folder} is skipped: {why}.")
    return None


def rotate(root: Path, limit: int | None, best: str | None = None) -> None:
    """Remove the oldest checkpoints beyond `limit`, but not `best`, nor what has no manifest that can be read.

    limit: None, 0 or below keeps all, as in transformers.
    """
    times = {folder: when for folder in root.glob("checkpoint-*") if (when := _time(folder)) is not None}
    ours = sorted(times, key=times.get)
    for folder in ours[: max(0, len(ours) - limit)] if limit and limit > 0 else []:
        if best is None or folder.resolve() != Path(best).resolve():
            files.remove(folder, _aside(folder))
    shutil.rmtree(root / STAGING, ignore_errors=True)


def read(folder: Path) -> dict:
    """The manifest of a checkpoint."""
    return json.loads((folder / MANIFEST).read_text())


def _time(folder: Path) -> float | None:
    """When a checkpoint was written; None if no manifest says so."""
    try:
        return float(read(folder)["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _put(staged: Path, final: Path) -> Path:
    files.put_in_place(staged, final, _aside(final))  # there may be one of an earlier run in the same folder
    return final


def _aside(folder: Path) -> Path:
    """The name under which a checkpoint is deleted."""
    (folder.parent / STAGING).mkdir(exist_ok=True)
    return folder.parent / STAGING / f"removed-{folder.name}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _hash(found) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ where exactly


@dataclass
class Position:
    """Where a run stands at the end of an update, beyond what transformers saves.

    micro_step: forward-backward passes so far; it decides when completions are written.
    rollout: the newest completions, cut into micro-batches, if updates are still to be made of them.
    counters: skipped updates, tokens seen.
    rng: all random generators at that moment, for a checkpoint written later; not part of the files of `save`, for
        transformers has its own.
    """

    micro_step: int
    rollout: list[dict] | None
    counters: dict[str, int] = field(default_factory=dict)
    rng: tuple | None = None

    def save(self, folder: Path, process: int) -> None:
        """Write position-<process>.json and, mid-rollout, rollout-<process>.safetensors."""
        from safetensors.torch import save_file

        found = {"micro_step": self.micro_step, "counters": self.counters, "parts": None}
        if self.rollout is not None:
            found["parts"] = [list(part) for part in self.rollout]
            tensors = {f"{i}/{name}": value for i, part in enumerate(self.rollout) for name, value in part.items()}
            # cut from one tensor each, and safetensors refuses what shares its memory
            tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items() if value is not None}
            save_file(tensors, folder / f"rollout-{process}.safetensors")
        (folder / f"position-{process}.json").write_text(json.dumps(found) + "\n")

    @classmethod
    def load(cls, folder: Path, process: int, device) -> "Position":
        from safetensors.torch import load_file

        found = json.loads((folder / f"position-{process}.json").read_text())
        rollout = None
        if found["parts"] is not None:
            tensors = load_file(folder / f"rollout-{process}.safetensors")
            tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
            rollout = [
                {name: tensors.get(f"{i}/{name}") for name in names} for i, names in enumerate(found["parts"])
            ]  # fmt: skip
        return cls(found["micro_step"], rollout, found["counters"])


def generators() -> tuple:
    """The states of Python's, numpy's, torch's and this card's random generators."""
    import numpy
    import torch

    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def set_generators(states: tuple) -> None:
    import numpy
    import torch

    python, numbers, cpu, cuda = states
    random.setstate(python)
    numpy.random.set_state(numbers)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
