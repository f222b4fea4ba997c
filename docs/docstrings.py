"""The docstrings of this package as Markdown, for the API pages: "Args:" and its like become headed lists.

An extension of griffe, which reads the sources and runs none of them.
"""

import re
import textwrap
from typing import Any

from griffe import Extension, Object

SESSION = re.compile(r"^>>> .*\n(?:.+\n)*", re.M)  # of Python, until an empty line
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):\n((?:[ \t]+.*\n?|\n)+)", re.M)


class Docstrings(Extension):
    """Rewrites each docstring as it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = SECTION.sub(_listed, f"{obj.docstring.value}\n")
            obj.docstring.value = SESSION.sub(lambda found: f"\n```pycon\n{found[0]}```\n", text)


def _listed(found: re.Match) -> str:
    """A section as a list: an item begins where the indent is the section's own, what is deeper goes on with it."""
    name, body = found.groups()
    lines = body.rstrip().splitlines()
    if name == "Example":
        return f"**{name}**\n\n{textwrap.dedent(body)}\n"
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    items = [("- " if line[indent : indent + 1].strip() else "  ") + line.strip() for line in lines]
    return f"**{name}**\n\n" + "\n".join(items) + "\n\n"
