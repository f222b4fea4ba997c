"""Files and folders that are complete or not there: written under another name, synced to the disk, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file, or a folder where the file system can do that, is on the disk. Raises OSError for a file that
    cannot be written."""
    if path.is_dir() and os.name == "nt":  # Windows has no such call for a folder
        return
    handle = os.open(path, os.O_RDWR if path.is_file() and os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():
            raise  # for a folder some network drives refuse it; the files in it are on the disk
    finally:
        os.close(handle)


def remove(folder: Path, aside: Path) -> None:
    """Delete a folder under another name, `aside`, so that none that is half deleted has its own."""
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def put_in_place(new: Path, folder: Path, aside: Path) -> None:
    """Rename a complete folder `new` to `folder`; what had that name is renamed to `aside` and deleted at the end."""
    shutil.rmtree(aside, ignore_errors=True)
    try:
        if folder.exists():
            os.replace(folder, aside)
        os.replace(new, folder)
    except BaseException:  # Ctrl-C between the two
        if aside.exists() and not folder.exists():
            os.replace(aside, folder)
        raise
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, with the file's name, for what is none; OSError as reading does."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{file} is damaged, it is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, and a JSON object is wanted: download it again")
    return value


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write in; at the end of the `with` block it replaces `folder`, which need not be there. After
    an error in the block `folder` is as it was."""
    new, old = (folder.with_name(f".{folder.name}-{which}") for which in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in new.rglob("*"):
            sync(path)
        put_in_place(new, folder, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """The same, but each file that was written replaces the one of its name in `folder`, and others there stay."""
    folder = folder.absolute()  # "." has no name
    new = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        written = list(new.iterdir())
        for path in written:
            sync(path)
        folder.mkdir(exist_ok=True)
        for path in written:
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """The same for one file: a path to write it under."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}-new")
    try:
        yield new
        sync(new)
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
