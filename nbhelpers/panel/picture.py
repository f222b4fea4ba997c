"""A figure that a notebook shows by itself, with what is in it in words, and as a small PNG."""

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


class Picture(Figure):
    """A figure without pyplot, which a notebook would show as a line of text."""

    words = ""  # what is in it, for those who do not see it

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict]:
        return {"image/png": png(self), "text/plain": self.words}, {"image/png": {"alt": self.words}}


def png(figure: Figure) -> bytes:
    """The figure as a PNG of few colours, a third of the bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    out = io.BytesIO()
    image.quantize(64, method=Image.Quantize.FASTOCTREE).save(out, "PNG")
    return out.getvalue()
