"""Rows of the torture about disks: full, with a quota, read-only, gone. Linux, and root for the small disks."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torture_bench import Bench, Row, last_line

QUOTA = Path(__file__).with_name("quota.c")


@contextmanager
def mounted(disk: Path, options: str) -> Iterator[None]:
    """A tmpfs at `disk`."""
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", disk], check=True)


def _named(bench: Bench, row: Row, what: str, ended: tuple[int, str], folder: Path, *words: str) -> None:
    """Count a run that a disk ended: its last line names the folder and has these words; it goes on elsewhere."""
    last = (ended[1].strip().splitlines() or [""])[-1]
    named = "FolderError" in last and all(word in last for word in (str(folder), *words))
    fault = None if named else f"not named: {last[:300]}"
    moved = bench.fresh()  # a larger disk
    if folder.is_dir():
        shutil.copytree(folder, moved)
    row.count(what, fault or bench.goes_on(moved))


def disks(bench: Bench) -> Row:
    row = Row("disk full, file too large, read-only, folder gone: named with path and GB, and it goes on")
    disk = bench.root / "disk"
    if os.geteuid() == 0:
        for megabytes, room in ((12, 1), (25, 1), (12, 0), (25, 0), (28, 0)):
            with mounted(disk, f"size={megabytes}m"):
                _named(bench, row, f"tmpfs of {megabytes} MB{'' if room else ', found out in a save'}",
                       bench.run(disk / "run", room=room), disk / "run")  # fmt: skip
        with mounted(disk, "ro"):
            _named(bench, row, "read-only", bench.run(disk / "run"), disk / "run")
    for room in (1, 0):
        folder = bench.fresh()
        ended = bench.run(folder, room=room, before=("bash", "-c", 'ulimit -f 5000; exec "$@"', "bash"))
        _named(bench, row, "files of at most 5 MB", ended, folder)
    ended = bench.run(bench.fresh(), "vanish")
    same = bench.result(ended) == bench.whole
    row.count("folder deleted while it runs", None if same else f"it ended with {last_line(ended[1])}")
    return row


def quotas(bench: Bench) -> Row:
    """A quota cannot be asked for: a run finds it in a save, at any byte of it. Played (quota.c), with no need of root.

    A checkpoint of these runs has 10 MB: the quotas end the first, the second or the third of them.
    """
    row = Row("a quota (EDQUOT in a write): named with path and GB, and it goes on")
    if not (compiler := shutil.which("cc")):
        return row
    library = bench.root / "quota.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, QUOTA, "-ldl"], check=True)
    for kilobytes in (5, 3_000, 6_000, 9_000, 12_000, 14_000, 18_000, 22_000, 25_000, 28_500):
        folder = bench.fresh()
        environment = {**os.environ, "LD_PRELOAD": str(library), "QUOTA_FOLDER": str(folder),
                       "QUOTA_BYTES": str(1000 * kilobytes)}  # fmt: skip
        ended = bench.run(folder, before=("env",), environment=environment)
        _named(bench, row, f"{kilobytes} kB", ended, folder, "quota")
    return row
