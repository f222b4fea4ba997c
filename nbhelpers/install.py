"""What a notebook's first cell calls: Colab and Kaggle get what they lack, your own machine gets a check.

    from nbhelpers import install
    install.run()

The torch and numpy of the session are never changed. pip is asked first what it would do (a dry run); what would break
is said, and then exactly that is installed. Nothing is imported but the standard library and `packaging`, which every
notebook kernel brings along.
"""

import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from nbhelpers import host, session
from nbhelpers.progress import interruptible

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"  # beside this package where it is a folder, not installed
DATASETS = Path("/kaggle/input")
KEPT = ("torch", "torchvision", "torchaudio", "triton", "numpy")  # a session is built around these
WAYS_OUT = (
    "Ways out: let this session reach a package index, on Kaggle by Settings > Internet; or add a dataset of wheels, "
    "as `pip download -d wheels -r requirements.txt` makes in a session with internet; or begin a new session, in "
    "which nothing else was installed."
)


class Stop(RuntimeError):
    """The notebook cannot go on before the reader has done something; a notebook shows the sentence alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@interruptible("packages were installed", "what pip has put in place stays; run this cell again")
def run() -> None:
    """Install what is missing on Colab and Kaggle, check on any other machine, and say so in a line.

    From here on an error of this package is a sentence in the notebook (session/errors.py).

    Raises Stop when pip finds no way, with its reason, and when the session has to be restarted because it had already
    imported a package that is now another version.
    """
    session.instead_of_tracebacks()
    place, wanted = host.where(), missing()
    if not wanted:
        print(f"{place}: everything is installed")
        return
    if place == "local":
        words = " ".join(f'"{need}"' for need in wanted)
        print(
            f"local: not installed or of another version: {', '.join(map(str, wanted))}. "
            "Run `pip install -e .` in the folder of the repository, or in a cell "
            f"%pip install {words}; then restart the kernel"
        )
        return
    print(f"{place}: installing {', '.join(need.name for need in wanted)} (up to three minutes) ...")
    changes = planned(wanted)
    moved = [f"{name} {old} to {new}" for name, new in changes.items() if (old := installed(name))]
    if moved:
        print(f"this changes {', '.join(moved)}")
    for line in conflicts(changes):
        print(f"warning: {line}")
    stale = loaded([name for name in changes if installed(name)])
    _pip("install", "--no-deps", *(f"{name}=={version}" for name, version in changes.items()))
    importlib.invalidate_caches()
    if stale:
        menu = "Runtime > Restart session" if place == "Colab" else "Run > Restart & clear cell outputs"
        raise Stop(
            f"Please restart once ({menu}) and run on from the top: {', '.join(stale)} had been imported and "
            "is now another version."
        )
    print("ready, no restart needed")


def missing() -> list[Requirement]:
    """What this package requires and the session does not have in the right version.

    A kept package of another version is only warned about: changing it would break the session. Where this package is a
    folder on the path, the requirements.txt beside it says what it requires. Raises Stop where there is none.
    """
    try:
        needs = metadata.requires("nbhelpers") or []
    except metadata.PackageNotFoundError:
        if not REQUIREMENTS.is_file():
            raise Stop(
                "nbhelpers was found as a folder and is not installed, so what it requires is not known. In a notebook "
                "cell: %pip install --no-deps -e path/to/the/repository, then restart the session"
            ) from None
        lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
        needs = [line for line in lines if line]
    lacking = []
    for need in map(Requirement, needs):
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        version = installed(need.name)
        if version and need.specifier.contains(version, prereleases=True):
            continue
        if version and need.name in KEPT:
            print(f"warning: {need.name} {version} is outside the tested range {need.specifier}; it stays as it is")
        else:
            lacking.append(need)
    return lacking


def brought() -> list[str]:
    """Folders of Kaggle's datasets with wheels of what this package requires: for a session without internet."""
    wheels = (file for file in DATASETS.rglob("*.whl") if not file.name.startswith("nbhelpers-"))
    return sorted({str(file.parent) for file in wheels})


def planned(wanted: list[Requirement]) -> dict[str, str]:
    """{package: version} that pip would install for `wanted` beside the kept packages. Raises Stop if it cannot."""
    kept = [f"{name}=={version}" for name in KEPT if (version := installed(name))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(kept))
        report = Path(folder) / "report.json"
        _pip("install", "--dry-run", "--report", str(report), "--constraint", str(constraints), *map(str, wanted))
        items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {canonicalize_name(item["name"]): item["version"] for item in items}


def conflicts(changes: dict[str, str]) -> list[str]:
    """A sentence for each installed package that has the version of another that it asks for, and would lose it."""
    sentences = []
    for package in metadata.distributions():
        if not package.name or canonicalize_name(package.name) in changes:  # no name: what an uninstall left behind
            continue
        for need in _readable(package.requires or ()):
            new, old = changes.get(canonicalize_name(need.name)), installed(need.name)
            if new is None or old is None or (need.marker and not need.marker.evaluate({"extra": ""})):
                continue
            if need.specifier.contains(old, prereleases=True) and not need.specifier.contains(new, prereleases=True):
                sentences.append(
                    f"{package.name} {package.version} asks for {need.name}{need.specifier} and gets {new}"
                )
    return sentences


def _readable(requirements: Iterable[str]) -> Iterator[Requirement]:
    """Those that today's `packaging` can read; some old packages ask for "pytz>dev"."""
    for text in requirements:
        with contextlib.suppress(InvalidRequirement):
            yield Requirement(text)


def loaded(packages: list[str]) -> list[str]:
    """Those of `packages` of which this process has imported something."""
    owners = metadata.packages_distributions()
    used = {canonicalize_name(owner) for module in list(sys.modules) for owner in owners.get(module, ()) if owner}
    return sorted(used & set(packages))


def installed(package: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _pip(*arguments: str) -> None:
    """Run pip. Raises Stop with its own reason, in one line, if it fails."""
    folders = brought()
    offline = ["--no-index", *(f"--find-links={folder}" for folder in folders)] if folders else []
    command = [sys.executable, "-m", "pip", *arguments, *offline, "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    conflict = done.stdout.partition("The conflict is caused by:")[2].partition("\n\n")[0]
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = " ".join(" ".join([*errors[:1], conflict]).split()) or done.stderr.strip()[-300:]
    raise Stop(f"pip cannot install this: {reason} ({WAYS_OUT})")
