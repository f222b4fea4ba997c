"""Build the sdist and the wheel, look into both, and try the wheel where nothing else is installed.

    python tests/helpers/wheel.py [TAG]     # or `make wheel`; dist/ gets both, or nothing

With a tag, such as v0.2.0, the version must be the tag's.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRIED = """
import nbhelpers, pathlib
from nbhelpers import presets
folder = pathlib.Path(nbhelpers.__file__).parent
assert (folder / "py.typed").exists() and (folder / "workshop" / "model.safetensors").stat().st_size > 1e5
assert "workshop" in presets.names()
print(nbhelpers.__version__)
"""


def wanted() -> set[str]:
    """What a wheel has to hold of the package: every file of it that git knows."""
    files = subprocess.run(["git", "ls-files", "nbhelpers"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(files.stdout.splitlines())


def complaints(wheel: Path, sdist: Path, version: str) -> list[str]:
    """What is wrong with the two files, as sentences."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    info = f"nbhelpers-{version}.dist-info/"
    package = {name for name in inside if not name.startswith(info)}
    found = [f"the wheel lacks {name}" for name in sorted(wanted() - package)]
    found += [f"the wheel holds {name}, which is no file of the package" for name in sorted(package - wanted())]
    found += [f"the sdist lacks {name}" for name in sorted((wanted() | {"requirements.txt", "LICENSE"}) - source)]
    if not any(name.startswith(info) and name.endswith("LICENSE") for name in inside):
        found.append(f"the wheel has no licence, or is not of version {version}")
    return found


def tried(wheel: Path, folder: Path) -> str:
    """The version that the wheel says in an environment of its own, without what it requires."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True, env=env)
    done = subprocess.run([python, "-c", TRIED], check=True, env=env, cwd=folder, capture_output=True, text=True)
    return done.stdout.strip()


def main(tag: str = "") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # from a copy of what git knows: setuptools leaves files of its own in the folder, and takes old ones from there
        tree, built = Path(scratch, "tree"), Path(scratch, "dist")
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, files.stdout.splitlines()):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tree / name)
        # the wheel is built from the sdist, so that one is seen to be whole
        subprocess.run([sys.executable, "-m", "build", "--outdir", built, tree], check=True, stdout=subprocess.DEVNULL)
        (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
        version = tried(wheel, Path(scratch, "venv"))
        wrong = complaints(wheel, sdist, version)
        if tag and tag != f"v{version}":
            wrong.append(f"the tag is {tag} and the version {version}: change nbhelpers/__init__.py or the tag")
        if wrong:
            raise SystemExit("\n".join(wrong))
        (ROOT / "dist").mkdir(exist_ok=True)
        for file in (wheel, sdist):
            shutil.copy(file, ROOT / "dist")
            print(f"dist/{file.name}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
