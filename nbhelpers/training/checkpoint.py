"""Checkpoints that are complete or absent, and what a run needs to resume exactly where it was.

    output_dir/_saving/checkpoint-40/       everything is written here first and synced to the disk,
        manifest.json                       last of all: bytes and SHA-256 of each file, the run's settings, versions
    output_dir/checkpoint-40/               then one rename

A process killed at any time leaves the newest complete checkpoint in place; older ones are removed only after that
rename, each by a rename of its own. transformers writes and reads model, optimizer, scheduler, scaler and random
generators; the rest of a checkpoint is `Position`. The hooks are in resume_hooks.py.
"""

import hashlib
import json
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbhelpers import files, host
from nbhelpers.models import adapter

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel
    from trl import GRPOConfig

MANIFEST, STAGING = "manifest.json", "_saving"
BESIDE = "beside.safetensors"  # parameters that an adapter's own files lack: TRL's reference, what is trained along
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


def describe(
    model: "PreTrainedModel", args: "GRPOConfig", dataset: "Dataset | IterableDataset", rewards: list[str]
) -> dict[str, Any]:
    """What a checkpoint says about its run, as plain JSON: `model`, `data`, `rewards`, `fixed` and `free` arguments.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The one that is trained.
        args (`GRPOConfig`): The run's.
        dataset (`Dataset` or `IterableDataset`): The one it trains on.
        rewards (`list[str]`): Names of the reward functions.
    """
    trained = sorted((name, list(p.shape)) for name, p in model.named_parameters() if p.requires_grad)
    base = adapter.base_of(model)
    if base is None:  # a model that loader.load did not make
        shapes = {key: model.config.to_dict().get(key) for key in ("model_type", "hidden_size", "num_hidden_layers")}
        base = adapter.Base(str(model.config.name_or_path), _hash(shapes), "", "none")
    keys = ("r", "lora_alpha", "lora_dropout")
    loras = {name: [c.to_dict().get(key) for key in keys] for name, c in adapter.loras(model).items()}
    values = args.to_dict()
    run = {
        "model": {**asdict(base), "trained": _hash(trained), "lora (rank, alpha, dropout)": loras},
        "data": {"rows": len(dataset) if hasattr(dataset, "__len__") else None, "hash": fingerprint(dataset)},
        "rewards": rewards,
        "fixed": {name: values[name] for name in FIXED} | {"processes": args.world_size},
        "free": {name: values[name] for name in FREE},
    }
    return json.loads(json.dumps(run, default=str))


def fingerprint(dataset: "Dataset | IterableDataset") -> str | None:
    """A hash of up to 1,000 evenly spaced rows and of their number; None for a stream, which has no number."""
    if not hasattr(dataset, "__len__"):
        return None
    rows = range(0, len(dataset), max(1, -(-len(dataset) // ROWS)))
    return _hash([len(dataset), *(dataset[i] for i in rows)])


def refuse_other(folder: Path, run: dict[str, Any]) -> None:
    """Print which of the FREE arguments changed between the run of a checkpoint and `run` (from `describe`).

    Raises ValueError, naming each difference and the line to change, if they are not the same run.
    """
    saved, wrong = read(folder)["run"], []
    old, new = saved["model"], run["model"]
    if any(old[key] != new[key] for key in old if key != "id"):  # the id may be a folder, which may move
        differ = ", ".join(key for key in old if old[key] != new[key])
        wrong.append(f"the model ({differ}): it was {old['id']} ({old['quantization']}) with the LoRA "
                     f"{old['lora (rank, alpha, dropout)'] or 'none'}; here {new['id']} ({new['quantization']}), "
                     f"{new['lora (rank, alpha, dropout)'] or 'none'}. Load that one with loader.load")  # fmt: skip
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


def publish(staged: Path, final: Path, run: dict[str, Any], step: int) -> None:
    """Sync every file of `staged`, write its manifest, and rename it to `final`.

    Args:
        staged (`Path`): Folder that holds all files of the checkpoint.
        final (`Path`): Its place; what is there already is replaced.
        run (`dict`): From `describe`.
        step (`int`): Updates made so far.
    """
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
        listed = read(folder)["files"]
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, wanted in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {wanted['bytes']}"
        if _sha256(file) != wanted["sha256"]:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def newest(root: str | Path) -> Path | None:
    """The newest complete checkpoint below `root`, every byte checked; None without one. Prints what it skips."""
    root = Path(root)
    by_time = []
    # A complete one in the staging folder: the process was killed between its manifest and its rename.
    for folder in (*root.glob("checkpoint-*"), *root.glob(f"{STAGING}/checkpoint-*")):
        when = _time(folder)
        if when is None:
            print(f"{folder} is skipped: {problem(folder)}.")
        else:
            by_time.append((when, folder))
    for _, folder in sorted(by_time, reverse=True):  # by time: a run started afresh beside old ones has lower steps
        why = problem(folder)
        if why is None:
            return _put(folder, root / folder.name) if folder.parent.name == STAGING else folder
        print(f"{folder} is skipped: {why}.")
    return None


def rotate(root: Path, limit: int | None, best: str | None = None) -> None:
    """Remove the oldest checkpoints, but not what has no manifest that can be read.

    Args:
        root (`Path`): The run's output folder.
        limit (`int`, *optional*): Checkpoints to keep; None, 0 or below keeps all, as in transformers.
        best (`str`, *optional*): The folder of one that is kept in any case.
    """
    times = {folder: when for folder in root.glob("checkpoint-*") if (when := _time(folder)) is not None}
    ours = sorted(times, key=lambda folder: times[folder])
    for folder in ours[: max(0, len(ours) - limit)] if limit and limit > 0 else []:
        if best is None or folder.resolve() != Path(best).resolve():
            files.remove(folder, _aside(folder))
    shutil.rmtree(root / STAGING, ignore_errors=True)


def read(folder: Path) -> dict[str, Any]:
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


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ where exactly


@dataclass
class Position:
    """Where a run is at the end of an update, beyond what transformers saves.

    Args:
        micro_step (`int`): Forward-backward passes so far; it decides when completions are written.
        rollout (`list[dict[str, Tensor | None]]`, *optional*): The newest completions, cut as TRL cuts them, if updates
            are still to be made of them.
        counters (`dict[str, int]`): Skipped updates, tokens seen.
        extra (`dict[str, Any]`): State of hooks by name, as JSON has it: it is loaded as it was saved. So keys are
            strings, there are no tuples, and no NaN.
        rng (`tuple`, *optional*): All random generators at that moment, for a checkpoint written later. `save` leaves
            it out: transformers saves its own.
    """

    micro_step: int
    rollout: "list[dict[str, torch.Tensor | None]] | None"
    counters: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    rng: tuple | None = None

    def save(self, folder: Path, process: int) -> None:
        """Write position-<process>.json and, mid-rollout, rollout-<process>.safetensors into `folder`.

        Raises ValueError if `extra` would not be loaded as it is.
        """
        from safetensors.torch import save_file

        state = {"micro_step": self.micro_step, "counters": self.counters, "extra": self.extra, "rollout": None}
        if json.loads(json.dumps(self.extra)) != self.extra:
            raise ValueError(f"the state of the hooks is not JSON: {self.extra!r}")
        if self.rollout is not None:
            state["rollout"] = [list(micro_batch) for micro_batch in self.rollout]
            tensors = {
                f"{i}/{name}": value.detach().clone().contiguous()  # safetensors refuses tensors that share memory
                for i, micro_batch in enumerate(self.rollout)
                for name, value in micro_batch.items()
                if value is not None
            }
            save_file(tensors, folder / f"rollout-{process}.safetensors")
        (folder / f"position-{process}.json").write_text(json.dumps(state) + "\n")

    @classmethod
    def load(cls, folder: Path, process: int, device: "torch.device | str") -> "Position":
        """What `save` wrote, the tensors on `device`."""
        from safetensors.torch import load_file

        state = json.loads((folder / f"position-{process}.json").read_text())
        rollout = None
        if state["rollout"] is not None:
            saved = load_file(folder / f"rollout-{process}.safetensors")
            tensors = {key: tensor.to(device) for key, tensor in saved.items()}
            rollout = [{name: tensors.get(f"{i}/{name}") for name in names} for i, names in enumerate(state["rollout"])]
        return cls(state["micro_step"], rollout, state["counters"], state["extra"])


def generators() -> tuple:
    """The states of Python's, numpy's, torch's and this card's random generators."""
    import numpy
    import torch

    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def set_generators(states: tuple) -> None:
    """Set all of them to what `generators` returned."""
    import numpy
    import torch

    python, numbers, cpu, cuda = states
    random.setstate(python)
    numpy.random.set_state(numbers)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
