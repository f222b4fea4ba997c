"""The folder that a run writes into: held by one process at a time, and found wanting before the first step.

    output_dir/run.lock     who holds it: process, host, since when; there only while a run trains

What cannot be known in advance (a quota, a drive that goes away) is named when it happens, with path and GB.
"""

import errno
import json
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbhelpers.architecture import GB
from nbhelpers.memory.residents import OPTIMIZER_BYTES
from nbhelpers.models import adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

LOCK = "run.lock"
BEAT = 30.0  # seconds between two signs of life
DEAD = 150.0  # seconds without one, after which a holder on another host counts as gone
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f)",
    errno.EROFS: "it is read-only",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
    errno.ENOENT: "the folder, or the drive that it was on, is gone",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EIO: "the disk reports an error",
}


class FolderError(OSError):
    """A run's folder cannot be written; the message has path, reason and GB."""

    def __str__(self) -> str:
        return str(self.args[-1])  # without "[Errno 28]"


class InUse(RuntimeError):
    """Another run that is alive holds the folder; the message says which."""


# ------------------------------------------------------------------------------------------------------- one holder


@contextmanager
def hold(root: Path) -> Iterator[None]:
    """Hold `root` for this process until the end of the block. Raises InUse if another living process holds it.

    A holder on this host is alive while its process is; one on another host while it gives signs of life, every 30 s.
    """
    path = root / LOCK
    root.mkdir(parents=True, exist_ok=True)
    own = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid()),
                      "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": os.urandom(8).hex()})  # fmt: skip
    _take(path, own)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            with suppress(OSError):
                os.utime(path)

    threading.Thread(target=beat, daemon=True, name="run.lock").start()
    try:
        yield
    finally:
        over.set()
        with suppress(OSError):
            if path.read_text() == own:
                path.unlink()


def _take(path: Path, own: str) -> None:
    """Create the lock; one that nobody holds any more is put out of the way."""
    while True:
        with suppress(FileExistsError):
            with open(path, "x") as file:
                file.write(own)
            return
        try:
            found = path.read_text()
            why = _held(found, time.time() - path.stat().st_mtime)
        except FileNotFoundError:
            continue  # its holder ended just now
        if why is not None:
            raise InUse(f"{path.parent} is in use by {why}. Two runs in one folder would overwrite each other: wait "
                        f"for it, stop it, or take another output_dir. If it is gone, delete {path}")  # fmt: skip
        aside = path.with_name(f"{LOCK}.{os.getpid()}-{threading.get_ident()}")
        with suppress(FileNotFoundError):
            os.replace(path, aside)
            if aside.read_text() == found:
                aside.unlink()
            else:  # somebody else took it in between: give it back
                os.replace(aside, path)


def _held(text: str, age: float) -> str | None:
    """Who holds a lock with this text, last touched `age` seconds ago, in words; None if nobody does any more."""
    try:
        holder: dict[str, Any] = json.loads(text)
        pid, host, started, since = (holder[key] for key in ("pid", "host", "started", "since"))
    except (ValueError, KeyError, TypeError):
        return "a run that is just starting" if age < 10 else None  # cut off while it was written
    if host == socket.gethostname():
        if pid == os.getpid() and not any(thread.name == "run.lock" for thread in threading.enumerate()):
            return None  # this process's own, from before a fork or an end that could not tidy up
        alive = _started(pid)
        same = alive is not None and (started is None or abs(alive - started) < 2)  # a number may be used again
        return f"process {pid} on this machine, since {since}" if same else None
    return f"process {pid} on {host}, since {since}" if age < DEAD else None


def _started(pid: int) -> float | None:
    """When a process started, seconds since 1970; None if there is none of that number."""
    import psutil  # accelerate needs it too

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


# ------------------------------------------------------------------------------------------------- can it be written


def check_writable(root: Path) -> None:
    """Write a few bytes below `root`, which is made if need be. Raises FolderError if that cannot be done."""
    probe = root / f".probe-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
    except OSError as error:
        raise FolderError(error.errno, f"nothing can be written into output_dir={str(root)!r}: {reason(error, root)}. "
                          "Take another folder") from error  # fmt: skip
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def check_room(root: Path, checkpoint: float, largest: float, count: int) -> None:
    """Raises FolderError if the checkpoints of a run do not fit.

    Args:
        root (`Path`): Where they go.
        checkpoint (`float`): Bytes of one.
        largest (`float`): Bytes of the largest file in it.
        count (`int`): How many there will be at a time, one that is being written among them, those already there not.
    """
    free, needed = free_bytes(root), count * checkpoint
    if free is not None and free < needed:
        raise FolderError(errno.ENOSPC, f"the run's checkpoints need {needed / GB:.3f} GB more in {root} ({count} of "
                          f"{checkpoint / GB:.3f} GB, one that is being written among them), and {free / GB:.3f} GB "
                          "are free there. Take another output_dir, a lower save_total_limit or a larger save_steps, "
                          "or train fewer parameters (lora_rank)")  # fmt: skip
    limit = file_limit()
    if limit is not None and limit < largest:
        raise FolderError(errno.EFBIG, f"a checkpoint in {root} has a file of {largest / GB:.3f} GB, and this process "
                          f"may write files of at most {limit / GB:.3f} GB: raise it with ulimit -f, or train fewer "
                          "parameters (lora_rank)")  # fmt: skip


def checkpoint_bytes(model: "PreTrainedModel", args: "TrainingArguments") -> tuple[float, float]:
    """Bytes of one checkpoint at least, weights and the states of an Adam, and of the largest file in it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if adapter.loras(model) else list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in saved)
    name = str(args.optim).lower()  # "optimizernames.adamw_torch"
    kind = "adamw_8bit" if "8bit" in name else "adamw"
    states = 0.0 if args.save_only_model or "adamw" not in name else OPTIMIZER_BYTES[kind]
    optimizer = states * sum(p.numel() for p in trained)
    return weights + optimizer, max(weights, optimizer)


def checkpoints_coming(args: "TrainingArguments", step: int, there: int) -> int:
    """How many checkpoints there will be at most at a time, beyond those that are there.

    Args:
        args (`TrainingArguments`): The run's.
        step (`int`): Updates made so far.
        there (`int`): Checkpoints of this run that are kept already.
    """
    if args.save_strategy == "no":
        return 0
    limit = args.save_total_limit if args.save_total_limit and args.save_total_limit > 0 else None
    known = args.save_strategy == "steps" and args.max_steps > 0 and args.save_steps >= 1
    saves = math.ceil((args.max_steps - step) / args.save_steps) if known else None
    if saves is None:
        return 1 if limit is None else max(1, limit + 1 - there)
    return saves if limit is None else max(min(saves, 1), min(saves, limit + 1 - there))


def free_bytes(root: Path) -> int | None:
    """Bytes that can still be written below `root`; None if the drive does not say."""
    try:
        usage = shutil.disk_usage(root)
    except OSError:
        return None
    return usage.free if usage.total else None


def file_limit() -> int | None:
    """Bytes that a file may have in this process; None for no limit."""
    if sys.platform == "win32":
        return None
    import resource

    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def reason(error: BaseException, root: Path) -> str:
    """Why writing failed, in words. torch and safetensors hide the system's own reason: then the disk is looked at, so
    ask before anything is deleted there."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number is None:
        number = next((code for code in REASONS if os.strerror(code) in text), None)
    free, limit = free_bytes(root), file_limit()
    if number is None and not root.is_dir():
        number = errno.ENOENT
    if number is None and free is not None and free < 2**20:
        number = errno.ENOSPC
    if number is None and "unexpected pos" in text:  # torch wrote less than it meant to
        # a disk with room that takes no more: nobody but a quota does that
        number = errno.EFBIG if limit is not None else errno.ENOSPC if free is None else errno.EDQUOT
    whose = "free on the disk itself" if number == errno.EDQUOT else "free"
    room = "" if free is None else f" ({free / GB:.3f} GB are {whose})"
    return f"{REASONS[number]}{room}" if number in REASONS else f"{type(error).__name__}: {text}{room}"


def names_a_disk(error: BaseException) -> bool:
    """Whether an exception out of a save is about the disk, and not a mistake in a program."""
    kind = type(error).__name__
    return isinstance(error, OSError) or kind == "SafetensorError" or "inline_container" in str(error)
