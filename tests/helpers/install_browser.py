"""Get what tests/browser needs, within a time; without it they are skipped, and this says so.

    python tests/helpers/install_browser.py SECONDS COMMAND...     # COMMAND: what installs a Python package here

A Chromium comes with the system, from Debian for root, or from playwright's own host. Ends with status 1 if none came.
"""

import os
import shutil
import subprocess
import sys
import time


def commands(install: list[str]) -> list[list[str]]:
    """What is tried, in this order, until there is a browser. Only what downloads may be stopped: half a package is a
    broken system."""
    ways = [[*install, "-e", ".[browser,docs]"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        apt = ["apt-get", "install", "-qy", "--no-install-recommends", "chromium"]
        ways += [["apt-get", "update", "-q"], [*apt, "--download-only"], [*apt, "--no-download"]]
    return [*ways, [sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"]]


def found() -> bool:
    """Whether a browser starts, asked of a new process: this one may have looked before playwright was there."""
    code = "import browser, sys\nwith browser.chromium() as it: sys.exit(isinstance(it, str))"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0


def run(seconds: float, ways: list[list[str]]) -> str | None:
    """Try the ways until a browser is there; if none comes, the newest reason, in a line."""
    end, why = time.monotonic() + seconds, "it took too long"
    for way in ways:
        left = None if "--no-download" in way else max(0.1, end - time.monotonic())
        try:
            done = subprocess.run(way, capture_output=True, text=True, timeout=left, stdin=subprocess.DEVNULL)
        except (subprocess.TimeoutExpired, OSError) as error:
            why = str(error)
        else:
            if done.returncode:
                why = (done.stderr.strip() or done.stdout.strip() or f"{way[0]} failed").splitlines()[-1]
        if found():
            return None
    return why


if __name__ == "__main__":
    why = run(float(sys.argv[1]), commands(sys.argv[2:]))
    if why:
        raise SystemExit(f"no browser could be installed, so tests/browser will be skipped: {why}")
