"""A real browser for tests: Chromium where there is one, JupyterLab to open notebooks in, and what a person would look
at in a page, asked of its elements: which text is where, how large, in which colours. No picture is compared."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Playwright

ROOT = Path(__file__).parents[2]
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (  # as root there is no sandbox; the rest keeps Chromium from looking for its makers' hosts
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
SETTINGS = {  # of JupyterLab: every cell is in the page, also those out of sight; no questions, no news
    "notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
    "apputils-extension/themes.jupyterlab-settings": {"theme": "JupyterLab Light"},
}
# Roles, boxes and colours of what is in an element, as its reader gets them.
LOOK = """
element => {
  const shown = node => node.checkVisibility({opacityProperty: true, visibilityProperty: true})
    && (node.closest("summary") || !node.closest("details:not([open])"));
  const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = node => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = colour => colour.slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const box = rect => ({left: rect.left, top: rect.top, right: rect.right, bottom: rect.bottom,
                        width: rect.width, height: rect.height});
  const texts = [], walk = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const words = node.textContent.trim(), parent = node.parentElement;
    if (!words || !shown(parent)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const back = behind(parent), style = getComputedStyle(parent);
    const lights = [light(over(rgba(style.color), back)), light(back)].sort((a, b) => b - a);
    texts.push({words, box: box(range.getBoundingClientRect()), size: parseFloat(style.fontSize),
                contrast: (lights[0] + 0.05) / (lights[1] + 0.05)});
  }
  const pictures = [...element.querySelectorAll("img")].map(img => ({
    box: box(img.getBoundingClientRect()), alt: img.alt, natural: img.naturalWidth, loaded: img.complete}));
  return {texts, pictures, box: box(element.getBoundingClientRect()),
          wider: element.scrollWidth - element.clientWidth};
}
"""


def program(playwright: "Playwright") -> str | None:
    """The Chromium of this machine: playwright's own, or the system's; None where there is none."""
    own = playwright.chromium.executable_path
    return own if Path(own).exists() else next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextlib.contextmanager
def chromium() -> Iterator["Browser | str"]:
    """A headless browser; where there is none, the sentence that says what is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        yield "playwright is not installed (pip install -e '.[browser]'), so nothing was looked at in a browser"
        return
    with sync_playwright() as playwright:
        path = program(playwright)
        if path is None:
            yield "no Chromium on this machine (`playwright install chromium`), so nothing was looked at in a browser"
            return
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(command: list[str], url: str, log: Path, **options: Any) -> Iterator[str]:
    """`command` runs until the block is left; entered when `url` answers. Raises RuntimeError with its last words."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
            if process.poll() is not None:
                break
            time.sleep(0.2)
        else:
            process.kill()
        if process.poll() is not None:
            raise RuntimeError(f"{command[:4]} did not start: {log.read_text()[-2000:]}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """JupyterLab on `folder`/notebooks: the address of its page. Its settings and kernels are its own."""
    settings = folder / "settings" / "@jupyterlab"
    for name, values in SETTINGS.items():
        file = settings / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    port = free_port()
    own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env = {**os.environ, **own, "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
           "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "PYTHONPATH": str(ROOT), "NBHELPERS_SMOKE": "1",
           "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython")}  # fmt: skip
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
        "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder / 'notebooks'}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with served(command, f"{address}/api", folder / "jupyterlab.log", env=env, cwd=folder):
        yield address


def fresh_copy(source: Path, target: Path, values: dict[str, Any]) -> None:
    """Write `source` to `target` without outputs, with `values` for its parameters."""
    import nbformat

    sys.path.insert(0, str(ROOT / "notebooks"))
    from run import set_parameters

    notebook = nbformat.read(source, as_version=4)
    set_parameters(notebook, values)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    target.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, target)


# whether a cell waits for the kernel, or runs
WAITING = "() => [...document.querySelectorAll('.jp-InputPrompt')].some(it => it.textContent.includes('*'))"


class Notebook:
    """A notebook in a tab of JupyterLab, and what a person does with it.

    Args:
        browser (`Browser`): From `chromium`.
        address (`str`): From `jupyterlab`.
        name (`str`): The file's name.
    """

    def __init__(self, browser: "Browser", address: str, name: str):
        self.address = address
        self.page: Page = browser.new_page(viewport={"width": 1400, "height": 900})
        self.page.set_default_timeout(120_000)
        self.page.goto(f"{address}/lab/tree/{name}?reset")
        self.page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel")
        self.page.wait_for_selector(".jp-CodeCell")
        if self.page.locator("#jp-left-stack").is_visible():
            self.command("application:toggle-left-area")

    def command(self, name: str, **arguments: Any) -> None:
        """A command of JupyterLab's menus."""
        run = "([name, arguments]) => { window.jupyterapp.commands.execute(name, arguments); }"  # some end with the run
        self.page.evaluate(run, [name, arguments])

    def code_cell(self, text: str | re.Pattern[str]) -> "Locator":
        """The code cell with `text` in its source."""
        return self.page.locator(".jp-CodeCell", has=self.page.locator(".cm-content", has_text=text))

    def output(self, text: str | re.Pattern[str]) -> "Locator":
        """All that the code cell with `text` in its source has shown."""
        return self.code_cell(text).locator(".jp-Cell-outputWrapper")

    def press_stop(self) -> None:
        """The button with the square."""
        self.page.locator('jp-button[data-command="notebook:interrupt-kernel"]').click()

    def new_cell(self, source: str) -> None:
        """Write a cell below all others, and run it."""
        self.page.evaluate(
            "() => { const it = window.jupyterapp.shell.currentWidget.content; "
            "it.activeCellIndex = it.widgets.length - 1; }"
        )
        self.command("notebook:insert-cell-below")
        self.page.locator(".jp-CodeCell.jp-mod-active .cm-content").click()
        self.page.keyboard.type(source)
        self.page.keyboard.press("Shift+Enter")

    def run_below(self, text: str) -> None:
        """Run the cells that come after the one with `text` in its source."""
        self.code_cell(text).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("ArrowDown")
        self.command("notebook:run-all-below")

    def wait(self, seconds: float) -> None:
        """Until the kernel has nothing to do. Raises TimeoutError."""
        from playwright.sync_api import TimeoutError as NothingYet

        end = time.monotonic() + seconds
        quiet = 0
        with contextlib.suppress(NothingYet):  # a busy page asks the kernel late: it is idle until then
            self.page.wait_for_function(WAITING, timeout=3000)
        while quiet < 3:  # between two cells it is idle for a moment
            if time.monotonic() > end:
                raise TimeoutError(f"the kernel still works after {seconds} s")
            self.page.wait_for_timeout(200)
            with urllib.request.urlopen(f"{self.address}/api/kernels", timeout=10) as answer:
                states = [kernel["execution_state"] for kernel in json.load(answer)]
            quiet = quiet + 1 if states == ["idle"] and not self.page.evaluate(WAITING) else 0

    def errors(self) -> list[str]:
        """What cells say on red: tracebacks, and what was printed as an error."""
        return self.page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()

    def not_run(self) -> list[str]:
        """The code cells that have not come to an end, as their source."""
        cells = self.page.locator(".jp-CodeCell").all()
        ended = re.compile(r"\[\d+\]:?")
        return [
            source
            for cell in cells
            if (source := cell.locator(".cm-content").inner_text().strip())
            and not ended.fullmatch(cell.locator(".jp-InputPrompt").inner_text().strip())
        ]
