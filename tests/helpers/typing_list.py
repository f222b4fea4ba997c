"""The files of nbhelpers in which mypy still finds errors: tests/not_yet_typed.txt names them, and may only shrink.

    python tests/helpers/typing_list.py            # errors outside the list, files to take off it: status 1 if any
    python tests/helpers/typing_list.py --write    # takes the clean files off the list; it never adds one

What mypy checks stands in pyproject.toml. Its errors depend on the versions of what is installed (transformers and
torch bring types of their own): the list is that of the newest ones.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = ROOT / "tests" / "not_yet_typed.txt"


def errors() -> dict[str, list[str]]:
    """mypy's lines by file, paths from the root with slashes. Raises RuntimeError if mypy could not check them all."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", "--no-color-output"]
    if not (ROOT / ".mypy_cache").exists():  # who calls mypy often has one; writing one takes a fifth of the time
        command += ["--cache-dir", os.devnull]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ran.returncode not in (0, 1):
        raise RuntimeError(f"mypy gave up:\n{ran.stdout}{ran.stderr}")
    return by_file(ran.stdout)


def by_file(output: str) -> dict[str, list[str]]:
    """The error lines of mypy's output under the file that each names; its notes are left out."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        if match := re.match(r"(.+?\.pyi?):(?:\d+:)* error: ", line):
            found.setdefault(match[1].replace("\\", "/"), []).append(line)
    return found


def listed() -> list[str]:
    """The files on the list, as it stands."""
    return LIST.read_text().split()


def complaints(found: dict[str, list[str]], names: list[str]) -> list[str]:
    """What is wrong, a line each: errors of files that are not on the list, and files on it that have none."""
    new = [line for file, lines in sorted(found.items()) if file not in names for line in lines]
    return new + [f"{file} is clean: take it off {LIST.name} (--write does)" for file in names if file not in found]


def main() -> int:
    found, names = errors(), listed()
    if "--write" in sys.argv[1:]:
        names = sorted(set(names) & found.keys())
        LIST.write_text("".join(f"{name}\n" for name in names))
    wrong = complaints(found, names)
    print("\n".join([*wrong, f"{len(names)} files on {LIST.name}"]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
