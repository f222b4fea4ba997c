"""Files that are complete or not there: what is written is on the disk before it gets its name."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or a folder where the file system can do that, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no such thing for a folder
        return
    handle = os.open(path, os.O_RDWR if path.is_file() and os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():
            raise  # of a folder some network drives refuse it; what is in its files is on the disk
    finally:
        os.close(handle)
