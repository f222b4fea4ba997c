"""Buttons beside the panel while a model trains: stop and keep, save now, ask it something.

A press is heard at the end of a step (`hands_on.listen`), and some editors keep it back until the cell has ended. They
have a stop button of their own, which keeps the run as well: that is what the line below the buttons says.
"""

import html
from typing import Any

from nbhelpers.hands_on import view

WAITS = (
    "Heard at the end of a step. Does nothing happen after two steps? Then this editor keeps presses back while a cell "
    "runs: press its own stop button, which keeps what was learned, and go on with the next cell."
)
STATIC = "While it trains in an open notebook, buttons stand here: stop and keep · save now · ask it something."


class Buttons:
    """Three wishes of a person, taken down until the run asks for them. Needs ipywidgets 7 or 8.

    Attributes:
        wishes (`dict[str, str]`): "stop", "save" or "ask", each with the question or "".
        heard (`bool`): Whether any press came through so far.
    """

    def __init__(self) -> None:
        import ipywidgets

        self.wishes: dict[str, str] = {}
        self.heard = False
        self._handle: Any = None
        self._line = ipywidgets.HTML(WAITS)
        # sent when the field is left or Enter is pressed, and not at every key: a busy kernel hears of the first alone
        self._question = ipywidgets.Text(
            description="Ask it", placeholder="a question", continuous_update=False,
            style={"description_width": "initial"},
        )  # fmt: skip
        buttons = [
            self._button("stop", "Stop and keep", "Ends the run after this step. What was learned is saved."),
            self._button("save", "Save now", "Writes a complete checkpoint at the end of this step."),
            self._question,
            self._button("ask", "Ask", "The model as it is at the end of this step answers; the panel shows it."),
        ]
        self._question.on_msg(self._entered)
        row = ipywidgets.Box(buttons, layout=ipywidgets.Layout(flex_flow="row wrap"))
        self._all = ipywidgets.VBox([row, self._line])

    def show(self) -> None:
        """Display them here; they vanish with `close`, or at the end of this cell."""
        from IPython import get_ipython
        from IPython.display import display

        bundle = {"text/plain": "", "text/html": STATIC, **view(self._all)}
        self._handle = display(bundle, raw=True, display_id=True)
        get_ipython().events.register("post_run_cell", self.close)

    def take(self) -> dict[str, str]:
        """What was wished since the last time, each once."""
        wishes, self.wishes = self.wishes, {}
        if "ask" in wishes:
            wishes["ask"] = self._question.value.strip()  # now: it may have come after the press
            self._question.value = ""
        return wishes

    def say(self, text: str, more: str = "") -> None:
        """In the line below the buttons; `more` is HTML below it."""
        self._line.value = html.escape(text) + more

    def close(self, *_: Any) -> None:
        """Take them away: nothing that is saved may show a button that nobody hears."""
        from IPython import get_ipython

        if self._handle is not None:
            self._handle.update({"text/plain": "", "text/html": ""}, raw=True)
            get_ipython().events.unregister("post_run_cell", self.close)
            self._handle = None
            self._all.close()

    def _button(self, wish: str, name: str, what: str) -> Any:
        import ipywidgets

        button = ipywidgets.Button(description=name, tooltip=what, layout=ipywidgets.Layout(width="auto"))
        button.on_click(lambda _: self._wish(wish))
        return button

    def _entered(self, _: Any, content: dict, __: Any) -> None:
        if content.get("event") == "submit":  # Enter
            self._wish("ask")

    def _wish(self, wish: str) -> None:
        self.wishes[wish], self.heard = "", True
        self.say(f"{wish.capitalize()}: heard, at the end of this step.")
