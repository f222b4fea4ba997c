"""Checkpoints that are complete or absent, and what a run needs to resume exactly where it was.

    output_dir/_saving/checkpoint-40/       everything is written here first and synced to the disk,
        manifest.json                       last of all: bytes and SHA-256 of each file and of itself, the run, versions
    output_dir/checkpoint-40/               then one rename

A process killed at any time leaves the newest complete checkpoint in place; older ones are removed only after that
rename, each by a rename of its own. transformers writes and reads model, optimizer, scheduler, scaler and random
generators; the rest of a checkpoint is `Position`. What run it is says identity.py; the hooks are in resume_hooks.py.

Which checkpoint is the newest is decided by counting, not by a clock: every run that starts afresh in a folder is the
next start, and within a start the steps count.
"""

import hashlib
import itertools
import json
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbhelpers import files, host
from nbhelpers.models.finite import first_not_finite, stored

if TYPE_CHECKING:
    import torch

MANIFEST, STAGING = "manifest.json", "_saving"
FORMAT = 2  # of the manifest; 1 had no hash of itself
BESIDE = "beside.safetensors"  # parameters that an adapter's own files lack: TRL's reference, what is trained along

# ---------------------------------------------------------------------------------------------- complete or absent


def staging(root: Path) -> Path:
    """The empty folder below `root` in which a checkpoint is written before it is published."""
    shutil.rmtree(root / STAGING, ignore_errors=True)
    (root / STAGING).mkdir(parents=True)
    return root / STAGING


def publish(staged: Path, final: Path, run: dict[str, Any], step: int, start: int = 0) -> None:
    """Sync every file of `staged`, write its manifest, and rename it to `final`.

    Args:
        staged (`Path`): Folder that holds all files of the checkpoint.
        final (`Path`): Its place. What is there already is replaced if it is of the same run; another run's stays,
            under another name.
        run (`dict`): From `identity.describe`.
        step (`int`): Updates made so far.
        start (`int`): From `next_start`, or the one of the checkpoint that the run goes on from.
    """
    listed = {}
    for file in sorted(path for path in staged.rglob("*") if path.is_file()):
        files.sync(file)
        listed[file.relative_to(staged).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "start": start,
        "step": step,
        "time": time.time(),
        "versions": host.versions(),
        "run": run,
        "files": listed,
    }
    manifest["hash"] = hash_of(manifest)
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    files.sync(staged / MANIFEST)
    files.sync(staged)
    _put(staged, final)


def same_run(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two descriptions (`identity.describe`) are of one run, as far as its numbers go."""
    return all(one.get(key) == two.get(key) for key in (one.keys() | two.keys()) - {"free"})


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file has the size and the hash that were written and the
    weights are finite."""
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST}: saving was cut short, or something else wrote it"
    try:
        listed = read(folder)["files"]
    except (OSError, ValueError) as error:
        return str(error)
    for name, wanted in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {wanted['bytes']}"
        if _sha256(file) != wanted["sha256"]:
            return f"{name} is damaged (its SHA-256 differs)"
    for name in listed:
        if name.endswith("model.safetensors") or (name.startswith("model-") and name.endswith(".safetensors")):
            bad = next((key for key, tensor in stored(folder / name) if first_not_finite([(key, tensor)])), None)
            if bad is not None:
                return f"its weights are not finite ({bad} in {name}): the run had gone wrong by then"
    return None


def newest(root: str | Path) -> Path | None:
    """The newest complete checkpoint below `root`, every byte checked; None without one. Prints what it skips."""
    root = Path(root)
    found = []
    # A complete one in the staging folder: the process was killed between its manifest and its rename.
    for folder in (*root.glob("checkpoint-*"), *root.glob(f"{STAGING}/checkpoint-*")):
        manifest = _manifest(folder)
        if manifest is None:
            print(f"{folder} is skipped: {problem(folder)}.")
        else:
            found.append((_order(manifest), folder))
    for _, folder in sorted(found, reverse=True):
        why = problem(folder)
        if why is None:
            return _put(folder, root / folder.name) if folder.parent.name == STAGING else folder
        print(f"{folder} is skipped: {why}.")
    return None


def next_start(root: Path) -> int:
    """The number of a run that starts afresh in `root`: 0 in an empty folder, else one more than any there."""
    return max((manifest["start"] + 1 for manifest in _known(root).values()), default=0)


def others(root: Path, run: dict[str, Any]) -> list[Path]:
    """The checkpoints below `root` that are of another run than `run` (from `identity.describe`)."""
    return sorted(folder for folder, manifest in _known(root).items() if not same_run(manifest["run"], run))


def rotate(root: Path, limit: int | None, best: str | None = None, run: dict[str, Any] | None = None) -> None:
    """Remove a run's oldest checkpoints: not another run's, and not what has no manifest that can be read.

    Args:
        root (`Path`): The run's output folder.
        limit (`int`, *optional*): Checkpoints to keep; None, 0 or below keeps all, as in transformers.
        best (`str`, *optional*): The folder of one that is kept in any case.
        run (`dict`, *optional*): From `identity.describe`: whose checkpoints; all if not given.
    """
    ours = [folder for folder, manifest in _known(root).items() if run is None or same_run(manifest["run"], run)]
    for folder in ours[: max(0, len(ours) - limit)] if limit and limit > 0 else []:
        if best is None or folder.resolve() != Path(best).resolve():
            files.remove(folder, _aside(folder))
    shutil.rmtree(root / STAGING, ignore_errors=True)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError, in words, for one that is damaged or of an older version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        its_format, its_hash = manifest.pop("format"), manifest.pop("hash", None)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"its {MANIFEST} cannot be read") from None
    if its_format == 1:
        raise ValueError("it was written by nbhelpers 0.1: go on with that version, or start afresh")
    manifest["format"] = its_format
    if its_hash != hash_of(manifest):
        raise ValueError(f"its {MANIFEST} is damaged (its SHA-256 differs)")
    return manifest


def _manifest(folder: Path) -> dict[str, Any] | None:
    """`read`; None if it cannot be read."""
    try:
        return read(folder)
    except (OSError, ValueError):
        return None


def _order(manifest: dict[str, Any]) -> tuple[int, int]:
    return manifest["start"], manifest["step"]


def _known(root: Path) -> dict[Path, dict[str, Any]]:
    """The checkpoints below `root` whose manifest can be read, and what it says; the oldest first."""
    found = [(folder, manifest) for folder in root.glob("checkpoint-*") if (manifest := _manifest(folder)) is not None]
    return dict(sorted(found, key=lambda one: _order(one[1])))


def _put(staged: Path, final: Path) -> Path:
    there = _manifest(final)
    if there is not None and not same_run(there["run"], read(staged)["run"]):
        kept = next(name for i in itertools.count(1) if not (name := Path(f"{final}-earlier-{i}")).exists())
        final.rename(kept)
        print(f"{final} of another run is kept as {kept.name}.")
    files.put_in_place(staged, final, _aside(final))  # there may be one of the same run and step
    return final


def _aside(folder: Path) -> Path:
    """The name under which a checkpoint is deleted."""
    (folder.parent / STAGING).mkdir(exist_ok=True)
    return folder.parent / STAGING / f"removed-{folder.name}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """SHA-256 of a value as JSON; what JSON has no word for counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


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
