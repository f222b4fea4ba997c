"""How a table or a text looks in a notebook: the frame around every piece of HTML, and the styles inside it."""

# Of a text as a model wrote it, and of a cell of a table. Jupyter breaks words anywhere.
TEXT = "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;text-align:left;margin:2px 0;background:none;"
TEXT += "color:inherit"
BOX = "vertical-align:top;text-align:left;padding:6px 10px;border:1px solid rgba(128,128,128,.4)"


def framed(inside: str) -> str:
    """`inside` no wider than a page, and safe from MathJax, which would set a model's dollar signs as formulas."""
    return f"<div class='mathjax_ignore tex2jax_ignore' style='max-width:1000px'>{inside}</div>"
