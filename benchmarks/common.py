"""The one form of a results file: what it was measured on, when, by which command, and the rows.

common.write("loader", [common.row("phi-4/nf4/final", "ours", 9.3, "GB")])
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "vllm", "liger-kernel",
    "numpy", "nbhelpers",
)  # fmt: skip

Row = dict[str, Any]


def row(what: str, who: str, value: float, unit: str, **more: Any) -> Row:
    """One measurement. what: "<preset>/<setting>/<metric>"; who: "ours", "transformers", "trl", "vllm", "floor", ..."""
    return {"what": what, "who": who, "value": value, "unit": unit, **more}


def share(what: str, of: dict[str, float], **more: Any) -> Row:
    """Ours of a share as an evaluation reports it: `value`, `n`, and its interval from `low` to `high`."""
    interval = {key: round(of[key], 4) for key in ("low", "high")}
    return row(what, "ours", round(of["value"], 4), "share", n=of["n"], **interval, **more)


def host() -> dict[str, Any]:
    """GPU, driver and versions; what is not there, or was kept from this process, is left out."""
    from nbhelpers.host import cpu

    about: dict[str, Any] = {
        "machine": platform.machine(), "system": platform.system(), "python": platform.python_version(),
        "cpu": cpu(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }  # fmt: skip
    for package in PACKAGES:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        lines = []
    if lines and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        name, driver = (part.strip() for part in lines[0].split(","))
        about |= {"gpu": name, "gpus": len(lines), "driver": driver}
        if "torch" in sys.modules:
            about["cuda"] = sys.modules["torch"].version.cuda
    return about


def command() -> str:
    """How this process was called: `python -m benchmarks.engines --first`, or a script's path from the root."""
    script = Path(sys.argv[0]).resolve()
    called = script.name
    if script.is_relative_to(ROOT) and script.suffix == ".py":
        parts = script.relative_to(ROOT).with_suffix("").parts
        called = f"-m {'.'.join(part for part in parts if part != '__main__')}"
    return " ".join(["python", called, *sys.argv[1:]])


def write(name: str, rows: list[Row], folder: Path = RESULTS) -> Path:
    """Write <folder>/<name>.json, whole; returns its path. A benchmark calls it as often as it has more."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    document = {"host": host(), "date": date, "command": command(), "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    return file


def publish(name: str, rows: list[Row], folder: Path | None = None) -> Path:
    """`write` to all `places`. Returns the first path."""
    files = [write(name, rows, place) for place in places(folder)]
    return files[0]


def places(folder: Path | None) -> list[Path]:
    """Where results go: `folder`, or the committed ones' where none is given, and below $OUT, where that is set: what a
    lent machine hands back."""
    here = [folder or RESULTS]
    if out := os.environ.get("OUT"):  # by the folder's own name there too: parallel calls may share $OUT
        here.append(Path(out, folder.name) if folder else Path(out))
    return here


def _told(document: dict[str, Any]) -> list[Row]:
    """A file's rows, each with its `run`, "date, command", and its `gpu`, which need not be those of the file they go
    to."""
    own = {"run": f"{document['date']}, {document['command']}"}
    if "gpu" in document["host"]:
        own["gpu"] = document["host"]["gpu"]
    return [{**own, **row} for row in document["rows"]]


def join(
    name: str, files: list[Path], folder: Path = RESULTS, summed_up: Callable[[list[Row]], list[Row]] = list
) -> None:
    """Put the rows of `files` into the committed results file, a later file's over an earlier one's, and write it to
    `folder`. Each row says in `run` which call it came from, and in `gpu` on what; host, date and command are the last
    file's. `summed_up` makes what is written of all rows."""
    rows: dict[tuple[str, str], Row] = {}
    before = RESULTS / f"{name}.json"
    for file in (before, *files) if before.exists() else files:
        document = json.loads(file.read_text())
        rows |= {(row["what"], row["who"]): row for row in _told(document)}
    folder.mkdir(parents=True, exist_ok=True)
    joined = {**document, "rows": summed_up(list(rows.values()))}
    (folder / f"{name}.json").write_text(json.dumps(joined, indent=1) + "\n")


def merged(name: str, rows: list[Row], summed_up: Callable[[list[Row]], list[Row]]) -> list[Row]:
    """`rows` and those of the committed results file that they do not replace, which say in `run` and `gpu` when, by
    which call and on what they came about; `summed_up` makes what is written of all of them."""
    file, known = RESULTS / f"{name}.json", {}
    if file.exists():
        known = {row["what"]: row for row in _told(json.loads(file.read_text()))}
    return summed_up(list((known | {row["what"]: row for row in rows}).values()))


def code_cells(notebook: Path) -> Iterator[tuple[set[str], str]]:
    """Tags and source of each code cell of a notebook, but for the one that installs."""
    for cell in json.loads(notebook.read_text())["cells"]:
        tags = set(cell["metadata"].get("tags", ()))
        if cell["cell_type"] == "code" and "install" not in tags:
            yield tags, "".join(cell["source"])


def table(rows: list[Row]) -> str:
    """A line a measurement, a column for each `who`."""
    whos = list(dict.fromkeys(r["who"] for r in rows))
    values = {(r["what"], r["who"]): f"{r['value']:.4g}" for r in rows}
    units = {r["what"]: r["unit"] for r in rows}
    wide = max(map(len, units))
    lines = [f"{'':{wide}}  {'unit':>7}" + "".join(f"{who:>14}" for who in whos)]
    for what, unit in units.items():
        lines.append(f"{what:{wide}}  {unit:>7}" + "".join(f"{values.get((what, who), ''):>14}" for who in whos))
    return "\n".join(lines)
