"""The site, built and walked: every link leads somewhere, every page fits a small window and tells its pictures."""

import contextlib
import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
from browser import ROOT

HOST = "http://site.test"


class Parts(HTMLParser):
    """The links, anchors and pictures of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        own = dict(attrs)
        self.anchors |= {own[name] for name in ("id", "name") if own.get(name)}
        self.links += [own[name] for name in ("href", "src") if own.get(name)]
        if tag == "img":
            self.pictures.append(own)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site, built as `make docs` does, where a warning is an error."""
    pytest.importorskip("mkdocstrings", reason="the site was not built: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Parts]:
    """{address of a page: what is in it}."""
    files = {f"{HOST}/{path.relative_to(site)}".removesuffix("index.html"): path for path in site.rglob("*.html")}
    return {address: Parts(path.read_text(encoding="utf-8")) for address, path in files.items()}


def test_everything_is_there(pages):
    for page in ("", "gallery/", "faq/", "ARCHITECTURE/", "compatibility/", "reliability/", "benchmarks/",
                 "performance/", "api/", "api/training/", "api/rewards/", "contributing/", "changelog/"):  # fmt: skip
        assert f"{HOST}/{page}" in pages
    for notebook in (ROOT / "notebooks").rglob("*.ipynb"):
        assert f"{HOST}/{notebook.relative_to(ROOT).with_suffix('')}/" in pages


def test_no_link_within_the_site_is_broken(site, pages):
    lost = set()
    for address, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(urljoin(address, link))
            if not target.startswith(HOST):
                continue
            if target in pages:
                if anchor and unquote(anchor) not in pages[target].anchors:
                    lost.add(f"{address} -> {link}: no such heading")
            elif not (site / unquote(urlsplit(target).path).strip("/")).exists():
                lost.add(f"{address} -> {link}")
    assert sorted(lost) == []


def test_links_into_the_repository_name_files_that_are_there(pages):
    ours = "https://github.com/nbhelpers/nbhelpers/blob/main/"
    files = {
        link.removeprefix(ours).partition("#")[0] for page in pages.values() for link in page.links if ours in link
    }
    badge = "https://colab.research.google.com/github/nbhelpers/nbhelpers/blob/main/"
    files = {file for file in files if "://" not in file} | {
        link.removeprefix(badge) for page in pages.values() for link in page.links if link.startswith(badge)
    }
    assert files and [file for file in sorted(files) if not (ROOT / file).exists()] == []


def test_every_picture_says_what_it_shows(pages):
    assert [(address, own) for address, page in pages.items() for own in page.pictures if not own.get("alt")] == []


def test_the_api_says_what_the_docstrings_say(site):
    text = (site / "api/rewards/index.html").read_text(encoding="utf-8")
    for name in ("correctness", "check", "math_correctness"):
        assert f'id="nbhelpers.rewards.{name}"' in text
    assert "<strong>Args</strong>" in text and "Args:" not in text


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_page_has_a_title_and_its_pictures_and_fits_800_pixels(browser, address, pages):
    # without scripts, which make nothing wider and take long; what is elsewhere (badges) is not fetched
    tab, wrong = browser.new_page(viewport={"width": 800, "height": 900}, java_script_enabled=False), []
    tab.route("**/*", lambda route: route.continue_() if address in route.request.url else route.abort())
    for page in pages:
        tab.goto(page.replace(HOST, address), wait_until="load")
        look = tab.evaluate(
            "() => ({title: document.title, wider: document.documentElement.scrollWidth - innerWidth,"
            " broken: [...document.images].filter(i => i.src.startsWith(location.origin) && !i.naturalWidth)"
            ".map(i => i.src)})"
        )
        if not look["title"] or look["wider"] > 0 or look["broken"]:
            wrong.append((page, look))
    tab.close()
    assert wrong == []


def test_a_notebooks_page_shows_its_run(browser, address):
    tab = browser.new_page(viewport={"width": 800, "height": 900})
    with contextlib.closing(tab):
        tab.route("**/*", lambda route: route.continue_() if address in route.request.url else route.abort())
        tab.goto(f"{address}/notebooks/00_quickstart/")
        head = tab.get_by_text(re.compile(r"(done|stopped): step")).first.bounding_box()
        picture = tab.locator("img[alt^='Curves of steps']").first.bounding_box()
        assert picture["width"] > 600 and picture["y"] > head["y"]
        assert tab.locator("math").count() == 0
        tab.goto(f"{address}/notebooks/01_grpo_by_hand/")
        assert tab.locator("math").count() >= 5 and tab.get_by_text("$$").count() == 0
