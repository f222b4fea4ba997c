"""What the site is made of, as hooks of mkdocs: the pages of docs/ and the root, every notebook with its outputs, a
gallery of them, and a page for each public room of the package. Nothing of it is written beside the sources.

A link keeps its target: to a page of the site if there is one, else to the file in the repository.
"""

import ast
import base64
import json
import os
import posixpath
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import nbhelpers  # noqa: E402  (this checkout's, whatever is installed)

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODELS = sorted((ROOT / "notebooks/models").glob("*.ipynb"))
# file in the repository -> page of the site, where the two are not called the same
PAGES = {"README.md": "index.md"} | {
    f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")
}
PAGES |= {f"docs/{file.name}": file.name for file in (ROOT / "docs").iterdir() if file.suffix in (".md", ".png")}
PAGES |= {str(path.relative_to(ROOT)): str(path.relative_to(ROOT).with_suffix(".md")) for path in LESSONS + MODELS}
SOURCES = {page: file for file, page in PAGES.items()}
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)
CSS = """
.output { overflow-x: auto; margin: 0 0 1em; font-size: .7rem; }
.output > pre { margin: 0; padding: .6em 1em; background: var(--md-code-bg-color); overflow-x: auto; }
.md-typeset .grid.cards img { width: 100%; background: #fff; }
.md-typeset math[display="block"] { overflow-x: auto; margin: 1em 0; }
"""
outputs: dict[str, list[str]] = {}  # page -> the HTML of its cells' outputs, which Markdown is not to touch


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, and the address of the repository."""
    config.repo_url, config.repo_name = REPOSITORY, "GitHub"
    config.nav = [
        {"Home": "index.md"},
        {
            "Notebooks": [
                {"Gallery": "gallery.md"},
                {"Lessons": [{_title(path): PAGES[str(path.relative_to(ROOT))]} for path in LESSONS]},
                {"Models": [{_title(path): PAGES[str(path.relative_to(ROOT))]} for path in MODELS]},
            ]
        },
        {"FAQ": "faq.md"},
        {"Recipes": "recipes.md"},
        {"More than one card": "outgrow.md"},
        {"How well, how fast": [{"Benchmarks": "benchmarks.md"}, {"Performance": "performance.md"},
                                {"Reliability": "reliability.md"}, {"Compatibility": "compatibility.md"}]},
        {"API": [{"Overview": "api/index.md"}, *({name: f"api/{name}.md"} for name in _modules())]},
        {"Inside": [{"Architecture": "ARCHITECTURE.md"}, {"Contributing": "contributing.md"},
                    {"Security": "security.md"}, {"Changelog": "changelog.md"}]},
    ]  # fmt: skip
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/."""
    made: dict[str, str | bytes] = {"site.css": CSS, "gallery.md": _gallery(), "api/index.md": _overview()}
    for file, page in list(PAGES.items()):
        if file.endswith(".ipynb"):
            made |= _notebook(ROOT / file, page)
        elif not file.startswith("docs/"):
            made[page] = (ROOT / file).read_text(encoding="utf-8")
    made |= {f"api/{name}.md": _reference(name, module) for name, module in _modules().items()}
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """GitHub's Markdown as Python's: lists after a paragraph, comments beside tables, formulas; links of the site."""
    parts = CODE.split(markdown)  # every second one is code
    for i in range(0, len(parts), 2):
        text = re.sub(r"^<!--.*?-->$", "", parts[i], flags=re.M)
        text = re.sub(r"^((?![-*|#>]|\d+\. ).*\S.*)\n(?=(?:[-*]|\d+\.) )", r"\1\n\n", text, flags=re.M)
        if page.file.src_uri.startswith("notebooks/"):
            text = re.sub(r"\$\$(.+?)\$\$", lambda found: convert(found[1].strip(), display="block"), text, flags=re.S)
            text = re.sub(r"\$([^$\n]+)\$", lambda found: convert(found[1].strip()), text)
        parts[i] = text
    return _relinked("".join(parts), page.file.src_uri)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Put the outputs in their places."""
    own = outputs.get(page.file.src_uri, [])
    return re.sub(r"<p>@output (\d+)@</p>", lambda found: f'<div class="output">{own[int(found[1])]}</div>', html)


def _relinked(text: str, page: str) -> str:
    """`text` with links as they are on `page`."""
    source = SOURCES.get(page, page)

    def target(found: re.Match) -> str:
        path, mark, anchor = found[1].partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if ":" in path or not path or source == page:
            return found[0]
        if file in PAGES:
            return f"]({os.path.relpath(PAGES[file], posixpath.dirname(page) or '.')}{mark}{anchor})"
        if not (ROOT / file).exists():
            return found[0]  # mkdocs will complain of it
        return f"]({REPOSITORY}/blob/main/{file}{mark}{anchor})"

    return re.sub(r"\]\(([^()\s]+)\)", target, text)


# ---- notebooks ----


def _cells(path: Path) -> list[dict[str, Any]]:
    return [
        cell | {"source": "".join(cell["source"])} for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]


def _title(path: Path) -> str:
    """Its first line, without what all have in common."""
    return re.sub(
        r"^# |: (a reasoning model|right in fewer words) by GRPO$", "", _cells(path)[0]["source"].partition("\n")[0]
    )


def _notebook(path: Path, page: str) -> dict[str, str | bytes]:
    """The page of a notebook with its outputs as they are committed, and its pictures."""
    text, made, own = [], {}, outputs.setdefault(page, [])
    own.clear()
    for cell in _cells(path):
        if cell["cell_type"] == "markdown":
            text.append(cell["source"])
            continue
        text.append(f"```python\n{cell['source']}\n```")
        for output in cell["outputs"]:
            data = {
                kind: "".join(value) for kind, value in output.get("data", {}).items() if not isinstance(value, dict)
            }
            if "image/png" in data:
                picture = f"{page.removesuffix('.md')}_{len(made)}.png"
                PAGES[picture] = picture
                made[picture] = base64.b64decode(data["image/png"])
                alt = output["metadata"].get("image/png", {}).get("alt") or _about(text)
                text.append(f"![{alt}]({posixpath.basename(picture)})".replace("\n", " "))
                continue
            own.append(
                data.get("text/html") or f"<pre>{_escaped(data.get('text/plain') or ''.join(output['text']))}</pre>"
            )
            text.append(f"@output {len(own) - 1}@")
    return {page: "\n\n".join(text), **made}


def _about(text: list[str]) -> str:
    """What a picture without words of its own shows: the heading that it stands below."""
    headings = re.findall(r"^#+ (.+)$", "\n".join(part for part in text if not part.startswith("```")), re.M)
    return f"Figure of the section “{headings[-1]}”" if headings else "Figure"


def _escaped(text: str) -> str:
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _gallery() -> str:
    """A card for each notebook: its first picture, its title, its first sentences."""
    text = ["# Gallery", "Every notebook as it was committed, with the outputs of its last run where it has any."]
    for heading, paths in (("Lessons: run on any CPU", LESSONS), ("Models: need a GPU", MODELS)):
        text += [f"## {heading}", '<div class="grid cards" markdown>']
        for path in paths:
            page = PAGES[str(path.relative_to(ROOT))]
            pictures = [
                output
                for cell in _cells(path)
                for output in cell.get("outputs", ())
                if "image/png" in output.get("data", {})
            ]
            card = [f"**[{_title(path)}]({page})**", _first_words(path)]
            if pictures:
                card.insert(0, f"[![The first figure of {path.stem}]({page.removesuffix('.md')}_0.png)]({page})")
            text.append("- " + "\n\n    ".join(card))
        text.append("</div>")
    return "\n\n".join(text)


def _first_words(path: Path) -> str:
    """The first paragraph of prose, its whole sentences, without links."""
    paragraphs = (part for part in _cells(path)[0]["source"].split("\n\n")[1:] if not part.startswith("[!["))
    words = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", next(paragraphs, "")).replace("\n", " ")
    return words[: max(words.rfind(end) for end in ".?!") + 1]


# ---- the package ----


def _modules() -> dict[str, str]:
    """{public name: module} of what a notebook imports."""
    rooms = {name: f"nbhelpers.{module}" for name, module in sorted(nbhelpers._MODULES.items())}
    return {"training": "nbhelpers.training", **rooms}


def _file(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _members(module: str) -> list[str]:
    """The public names of a module: its `__all__`, or what it defines and what it passes on (`import x as x`)."""
    if module == "nbhelpers.training":
        return []
    names: list[str] = []
    for node in ast.parse(_file(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name]
    return sorted({name for name in names if not name.startswith("_")}, key=names.index)


def _reference(name: str, module: str) -> str:
    """The page of a room, or of the trainer and what goes with it."""
    blocks = [f"# {name}"]
    if name == "training":
        blocks += [f"::: nbhelpers.{place}.{public}" for public, place in nbhelpers._NAMES.items()]
    else:
        blocks.append(f"::: {module}\n    options:\n      show_root_heading: false\n      members: {_members(module)}")
    return "\n\n".join(blocks)


def _overview() -> str:
    rows = ["# API", "What a notebook imports: `from nbhelpers import panel, rewards, tasks`.", "| | |\n| --- | --- |"]
    for name, module in _modules().items():
        about = ast.get_docstring(ast.parse(_file(module).read_text(encoding="utf-8"))) if name != "training" else None
        first = (
            about or "`LeanGRPOConfig`, `LeanGRPOTrainer` and `StopWhen`: TRL's trainer within a memory budget"
        ).partition("\n")[0]
        rows[-1] += f"\n| [{name}]({name}.md) | {first} |"
    return "\n\n".join(rows)
