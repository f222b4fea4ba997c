"""What can be set by hand, and what shows what follows: widgets where a person sits, a static page elsewhere."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nbhelpers.html import framed
from nbhelpers.progress import in_notebook

WIDGET = "application/vnd.jupyter.widget-view+json"
_WIDE = {"description_width": "initial"}


class Shown(Protocol):
    """What follows from the values: HTML for a notebook, text for a terminal."""

    def _repr_html_(self) -> str: ...
    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Page:
    """A `Shown` of two texts."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Slider:
    """A number from `low` to `high` in steps of `step`, first `value`; whole numbers if these four are."""

    label: str
    low: float
    high: float
    step: float
    value: float

    def widgets(self) -> tuple[Any, Any]:
        """What holds the value, and what is shown: a field with its name and a slider beside it. ipywidgets gives the
        handle of a slider no name that a screen reader could say."""
        import ipywidgets as w

        whole = all(isinstance(number, int) for number in (self.low, self.high, self.step, self.value))
        fields, sliders = (w.BoundedIntText, w.IntSlider) if whole else (w.BoundedFloatText, w.FloatSlider)
        numbers = {"min": self.low, "max": self.high, "step": self.step, "value": self.value}
        field = fields(description=self.label, style=_WIDE, layout=w.Layout(width="auto"), **numbers)
        slider = sliders(readout=False, layout=w.Layout(width="10em"), **numbers)
        w.link((field, "value"), (slider, "value"))
        return field, w.HBox([field, slider])

    def said(self, value: Any) -> str:
        return f"{self.label}: {value:g}"


@dataclass(frozen=True)
class Text:
    """A text of several lines, first `value`."""

    label: str
    value: str

    def widgets(self) -> tuple[Any, Any]:
        """As `Slider.widgets`: here they are one."""
        import ipywidgets as w

        layout = w.Layout(width="98%", max_width="1000px")
        area = w.Textarea(description=self.label, value=self.value, rows=6, style=_WIDE, layout=layout)
        return area, area

    def said(self, value: Any) -> str:
        return f"{self.label}\n{value or '(nothing)'}"


class HandsOn:
    """Controls, and what follows from their values. The last line of a cell shows it.

    Args:
        show (`Callable[..., Shown]`): Given the values by name, what follows. It is called at every move, so it takes
            less than a tenth of a second. A ValueError is shown in its place.
        controls (`Mapping[str, Slider | Text]`): By the name of the argument of `show`.
        examples (`Sequence[dict]`): For the static page: values that differ from those the controls begin with.
    """

    def __init__(
        self, show: Callable[..., Shown], controls: Mapping[str, Slider | Text], examples: Sequence[dict[str, Any]] = ()
    ):
        self.show, self.controls = show, controls
        first = {name: control.value for name, control in controls.items()}
        self.examples = [first, *({**first, **example} for example in examples)]

    def __str__(self) -> str:
        return "\n\n".join(f"{self._said(values, ' · ')}\n{self._page(values)}" for values in self.examples)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        told = ""
        for values in self.examples:
            said = html.escape(self._said(values, " · "))
            told += f"<p style='white-space:pre-wrap'>{said}</p>{self._page(values)._repr_html_()}<hr>"
        return framed(f"<p>In an open notebook these can be set by hand. Some examples:</p>{told}")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle = {"text/plain": str(self), "text/html": self._repr_html_()}
        return bundle | view(self.widget()) if attended() else bundle

    def widget(self) -> Any:
        """The controls with what follows below them, an `ipywidgets.VBox`."""
        import ipywidgets as w

        made = {name: control.widgets() for name, control in self.controls.items()}
        follows = w.HTML()

        def update(_: Any = None) -> None:
            follows.value = self._page({name: holder.value for name, (holder, _) in made.items()})._repr_html_()

        for holder, _ in made.values():
            holder.observe(update, "value")
        update()
        row = w.Box([shown for _, shown in made.values()], layout=w.Layout(flex_flow="row wrap"))
        return w.VBox([row, follows])

    def _page(self, values: dict[str, Any]) -> Shown:
        try:
            return self.show(**values)
        except ValueError as error:
            return Page(f"<p>{html.escape(str(error))}</p>", str(error))

    def _said(self, values: dict[str, Any], between: str) -> str:
        return between.join(control.said(values[name]) for name, control in self.controls.items())


def attended() -> bool:
    """Whether a person sits at an open notebook, and widgets can be shown: a run without one asks nobody anything."""
    if not in_notebook():
        return False
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        return False
    from IPython import get_ipython

    return bool(get_ipython().get_parent().get("content", {}).get("allow_stdin"))


def view(widget: Any) -> dict[str, Any]:
    """What stands in an output's MIME bundle for a widget; ipywidgets 7 and 8 write the same."""
    return {WIDGET: {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}}
