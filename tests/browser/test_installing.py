"""Getting a browser: it ends in time, and without one there is a word and no failure."""

import sys
from concurrent.futures import ThreadPoolExecutor

import browser as a_browser
import install_browser
import pytest

NO_NETWORK = [sys.executable, "-c", "import sys; sys.exit('first line\\nno network')"]
ENDLESS = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_the_first_way_that_brings_a_browser_is_the_last(monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(install_browser, "found", lambda: next(answers))
    assert install_browser.run(30, [NO_NETWORK, NO_NETWORK, NO_NETWORK]) is None
    assert next(answers, "asked twice") == "asked twice"


def test_without_a_browser_it_says_the_reason_in_a_line_and_in_time(monkeypatch):
    monkeypatch.setattr(install_browser, "found", lambda: False)
    assert install_browser.run(30, [NO_NETWORK]) == "no network"
    assert "timed out" in install_browser.run(0.2, [ENDLESS])
    assert "nothing-of-this-name" in install_browser.run(30, [["nothing-of-this-name"]])


def test_only_a_download_is_stopped_half_way(monkeypatch):
    monkeypatch.setattr(install_browser, "found", lambda: False)
    monkeypatch.setattr(install_browser.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(install_browser.os, "geteuid", lambda: 0, raising=False)
    limits = {}

    def ran(way, timeout, **_):
        limits[" ".join(way)] = timeout
        raise OSError("not here")

    monkeypatch.setattr(install_browser.subprocess, "run", ran)
    install_browser.run(9, install_browser.commands(["pip"]))
    assert [way for way, limit in limits.items() if limit is None] == [
        "apt-get install -qy --no-install-recommends chromium --no-download"
    ]


@pytest.mark.parametrize("missing", ["playwright", "chromium"])
def test_where_no_browser_is_there_is_a_word(monkeypatch, missing):
    if missing == "playwright":
        monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    else:
        pytest.importorskip("playwright")
        monkeypatch.setattr(a_browser, "program", lambda playwright: None)

    def look():
        with a_browser.chromium() as browser:
            return browser

    with ThreadPoolExecutor(1) as thread:  # Playwright may be at work in this one
        found = thread.submit(look).result()
    assert isinstance(found, str) and "nothing was looked at in a browser" in found and missing in found.lower()
