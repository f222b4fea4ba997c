"""The one form of a results file (DESIGN, principle 2): what it was measured on, when, by which command, and the rows.

common.write("loader", [common.row("phi-4/nf4/final", "ours", 9.3, "GB")])
"""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# A script puts its own folder on sys.path, where transformers, looking for the hub package `kernels`, would find and
# run kernels.py. What a script needs of this folder it imports before or from here.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "vllm", "liger-kernel",
    "numpy", "nbhelpers",
)  # fmt: skip


def row(what: str, who: str, value: float, unit: str, **more) -> dict:
    """One measurement. what: "<preset>/<setting>/<metric>"; who: "ours", "transformers", "trl", "vllm", "floor", ..."""
    return {"what": what, "who": who, "value": value, "unit": unit, **more}


def host() -> dict:
    """GPU, driver and versions; what is not there is left out."""
    from nbhelpers.host import cpu

    found = {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()}
    found |= {"cpu": cpu(), "cores": os.cpu_count()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        lines = []
    if lines:
        name, driver = (part.strip() for part in lines[0].split(","))
        found |= {"gpu": name, "gpus": len(lines), "driver": driver}
    if "torch" in sys.modules:
        found["cuda"] = sys.modules["torch"].version.cuda
    return found


def write(name: str, rows: list[dict], folder: Path = RESULTS) -> Path:
    """Write benchmarks/results/<name>.json, whole; returns its path. A benchmark calls it as often as it has more."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).parents[1]
    shown = script.relative_to(root) if script.is_relative_to(root) else script.name
    document = {
        "host": host(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", str(shown), *sys.argv[1:]]),
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    return file


def join(name: str, files: list[Path], folder: Path = RESULTS) -> None:
    """Put the rows of `files` into the committed results file, a later file's over an earlier one's, and write it to
    `folder`. Each row says in `run` which call it came from; host, date and command are the last file's."""
    rows = {}
    for file in (RESULTS / f"{name}.json", *files):
        document = json.loads(file.read_text())
        run = f"{document['date']}, {document['command']}"
        rows |= {(row["what"], row["who"]): {"run": run, **row} for row in document["rows"]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**document, "rows": list(rows.values())}, indent=1) + "\n")


def table(rows: list[dict]) -> str:
    """A line a measurement, a column for each `who`."""
    whos = list(dict.fromkeys(r["who"] for r in rows))
    values = {(r["what"], r["who"]): f"{r['value']:.4g}" for r in rows}
    units = {r["what"]: r["unit"] for r in rows}
    wide = max(map(len, units))
    lines = [f"{'':{wide}}  {'unit':>7}" + "".join(f"{who:>14}" for who in whos)]
    for what, unit in units.items():
        lines.append(f"{what:{wide}}  {unit:>7}" + "".join(f"{values.get((what, who), ''):>14}" for who in whos))
    return "\n".join(lines)
