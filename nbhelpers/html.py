"""How a table or a text looks in a notebook: the frame around every piece of HTML, the pieces in it and their styles.

The pieces take finished HTML: text that may hold anything goes through `html.escape` first. Styles stand in the
elements themselves, because most viewers of notebooks drop a <style> block.
"""

from collections.abc import Iterable, Mapping, Sequence

# Of a text as a model wrote it, and of a cell of a table. Jupyter breaks words anywhere.
TEXT = "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;text-align:left;margin:2px 0;background:none;"
TEXT += "color:inherit"
BOX = "vertical-align:top;text-align:left;padding:6px 10px;border:1px solid rgba(128,128,128,.4)"
GRID = "border-collapse:collapse"  # of a table whose cells share their borders
# After Okabe and Ito (2008), "Color Universal Design": told apart with any kind of colour vision. Those that are too
# light for a line on white are darker here: each has a contrast of at least 3 to white.
COLORS = ("#0072b2", "#d55e00", "#008f68", "#b4568c", "#333333", "#3d9bd1")
NO_FORMULAS = "mathjax_ignore tex2jax_ignore"  # class: MathJax would set a model's dollar signs as formulas


def framed(inside: str) -> str:
    """`inside` no wider than a page, and safe from MathJax."""
    return f"<div class='{NO_FORMULAS}' style='max-width:1000px'>{inside}</div>"


def pre(inside: str, style: str = TEXT) -> str:
    """Text whose line ends count."""
    return f"<pre style='{style}'>{inside}</pre>"


def cell(inside: str, style: str = BOX, *, tag: str = "td", title: str = "") -> str:
    """One cell of a table; `tag` "th" for a heading, `title` is what a reader sees who points at it."""
    tooltip = f" title='{title}'" if title else ""
    return f"<{tag}{tooltip}{_styled(style)}>{inside}</{tag}>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = GRID) -> str:
    """A table of cells that `cell` made.

    Args:
        head (`Sequence[str]`): The cells of the first row; empty for a table without headings.
        rows (`Iterable[Sequence[str]]`): The cells of each other row.
        style (`str`): CSS of the table as a whole.
    """
    lines = [head, *rows] if head else rows
    body = "".join("<tr>" + "".join(cells) + "</tr>" for cells in lines)
    return f"<table{_styled(style)}>{body}</table>"


def bar(shares: Mapping[str, float]) -> str:
    """A bar 6 pixels high, from 0 to 1: {CSS colour: where it ends}, the longest first, so that all are seen."""
    ends = "".join(
        f"<div style='position:absolute;left:0;top:0;height:6px;border-radius:3px;width:{min(1, share):.1%};"
        f"background:{color}'></div>"
        for color, share in shares.items()
    )
    ground = "position:relative;height:6px;margin:4px 0 8px;border-radius:3px;background:rgba(128,128,128,.25)"
    return f"<div style='{ground}'>{ends}</div>"


def _styled(style: str) -> str:
    return f" style='{style}'" if style else ""
