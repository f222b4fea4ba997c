"""What the pages and notebooks point to is there, and the README says the first things first."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").rglob("*.ipynb")]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\]\([^)]*\))*)\]\(([^()\s]+)\)")
OURS = re.compile(r"github(?:\.com)?/nbhelpers/nbhelpers/(?:blob|tree)/main/")


def text_of(page: Path) -> str:
    """What a reader sees of a page: without code."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def links(text: str) -> list[tuple[bool, str, str]]:
    """(is it a picture, its words, its target) of each link, pictures within links included."""
    found = [(bool(mark), words, target) for mark, words, target in LINK.findall(text)]
    return found + [inner for _, words, _ in found for inner in links(words)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(page: Path, text: str) -> list[str]:
    """The targets in `text`, as it stands in `page`, that are not there."""
    lost = []
    for _, _, target in links(text):
        path, _, anchor = target.partition("#")
        if ours := OURS.search(path):
            file = ROOT / path[ours.end() :]
        elif ":" in path:
            continue  # elsewhere in the world
        else:
            file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert missing(page, text_of(page)) == []


def test_a_dead_link_is_found():
    badge = "[![b](docs/no.png)](https://colab.research.google.com/github/nbhelpers/nbhelpers/blob/main/no.ipynb)"
    lost = missing(ROOT / "README.md", f"[a](no.md) [c](README.md#no) [d](#no) [e](README.md#notebooks) {badge}")
    assert sorted(target.rpartition("/")[2] for target in lost) == [
        "#no",
        "README.md#no",
        "no.ipynb",
        "no.md",
        "no.png",
    ]


def test_every_picture_says_what_it_shows():
    for page in PAGES:
        assert all(words for picture, words, _ in links(text_of(page)) if picture), page


def test_the_readme_is_short_and_says_first_what_a_newcomer_asks():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    start = text[: text.index("\n## ")]
    pictures = [target for picture, _, target in links(start) if picture]
    assert sorted("badge" in target for target in pictures) == [False, True]  # one picture, one badge
    for question in ("For whom", "What you get", "How long"):
        assert f"- **{question}:**" in start
