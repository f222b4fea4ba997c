"""Run a notebook from the terminal, with the lines of its live panel streaming by.

    python notebooks/run.py notebooks/00_quickstart.ipynb runs/quickstart --set STEPS=40

The folder gets the executed notebook, an HTML copy, and whatever the notebook itself writes to its parameter OUT.
Ctrl-C once stops the training cell and lets the rest of the notebook go on; twice ends it all.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter


class Runner(NotebookClient):
    """nbclient that prints what a person would watch: printed text, and the plain form of an updating display."""

    last_line = None
    quiet = False

    def process_message(self, msg, cell, cell_index):
        kind, content = msg["header"]["msg_type"], msg["content"]
        if kind == "stream" and content["name"] == "stdout":
            self.show(content["text"].rstrip("\n"))
        elif kind in ("display_data", "update_display_data") and "display_id" in content.get("transient", {}):
            self.show(content["data"].get("text/plain", "").rpartition("\n")[2])  # its newest line
        return super().process_message(msg, cell, cell_index)

    def show(self, text: str) -> None:
        if text and text != self.last_line and not self.quiet:
            print(text, flush=True)
        self.last_line = text

    def take_interrupts(self, **_) -> None:
        """Hand Ctrl-C to the kernel, as the notebook's stop button does. (On Windows nbclient keeps its own way.)"""
        if sys.platform != "win32":
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.interrupt)

    def interrupt(self) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)  # the next Ctrl-C ends it all
        print("stopping the cell that runs; the rest of the notebook goes on (Ctrl-C again ends it all)", flush=True)
        os.kill(self.km.provisioner.pid, signal.SIGINT)


def set_parameters(notebook, values: dict) -> None:
    """Put a cell that sets `values` after the one tagged "parameters", as papermill does."""
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    if not tagged:
        raise SystemExit('this notebook has no cell tagged "parameters", so nothing can be set in it')
    cell = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in values.items()))
    cell.metadata["tags"] = ["injected-parameters"]
    notebook.cells.insert(tagged[0] + 1, cell)


def run(path: Path, out: Path, values: dict, *, quiet: bool = False) -> nbformat.NotebookNode:
    """Execute a notebook and leave it, and an HTML copy, in `out`, also when a cell fails.

    Raises nbclient's CellExecutionError when a cell fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as nbhelpers does, in case a notebook imports torch first
    notebook = nbformat.read(path, as_version=4)
    set_parameters(notebook, {"OUT": str(out.resolve()), **values})
    runner = Runner(notebook, timeout=None, kernel_name="python3", store_widget_state=False)
    runner.on_cell_start, runner.quiet = runner.take_interrupts, quiet
    try:
        runner.execute()
    finally:
        nbformat.write(notebook, out / path.name)
        (out / f"{path.stem}.html").write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    return notebook


def value_of(text: str):
    """A --set value: JSON where it is JSON, a string elsewhere."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def summary(out: Path) -> str:
    """What report.json says, as a short table, and where to look next."""
    report = json.loads((out / "report.json").read_text())
    rows = [("", "before", "after")]
    for name in ("accuracy", "format"):
        before, after = report[f"{name}_before"], report[f"{name}_after"]
        rows.append((name, *(f"{s['value']:.1%} ({s['low']:.1%} to {s['high']:.1%})" for s in (before, after))))
    rows.append(("9.11 or 9.9?", report["probe_before"] or "no answer", report["probe_after"] or "no answer"))
    lines = [f"  {name:<14}{before:<28}{after}" for name, before, after in rows]
    files = ", ".join(sorted(file.name for file in out.iterdir() if file.is_file()))
    return "\n".join(["", *lines, "", f"GRPO took {report['seconds']:.0f} s.", f"{out}: {files}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the notebook")
    args = parser.parse_args()
    values = {name: value_of(text) for name, _, text in (pair.partition("=") for pair in args.set)}
    if values.get("DATA"):
        values["DATA"] = str(Path(values["DATA"]).resolve())  # the notebook runs in another folder
    started = time.time()
    try:
        run(args.notebook, args.out, values)
    except CellExecutionError as error:
        raise SystemExit(
            f"\n{error.ename}: {error.evalue}\n(the whole story: {args.out / args.notebook.name})"
        ) from None
    if (args.out / "report.json").exists():  # the quickstart writes one
        print(summary(args.out))
    print(f"{time.time() - started:.0f} s in all. Open {args.out / args.notebook.stem}.html in a browser; then open "
          f"{args.notebook} in Jupyter and try its exercises.")  # fmt: skip


if __name__ == "__main__":
    main()
