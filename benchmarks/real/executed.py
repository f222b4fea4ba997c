"""The model notebook itself, run by Jupyter on real weights: its file then has the outputs of a real run.

Its own cells run as they stand. What `cells.notebook` puts between them runs in cells that are taken out again. The
first output says which weights, card and questions it was; folders of that machine are renamed in all of them.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat

from benchmarks import common, harness

from . import cells

BETWEEN = "between"  # in the metadata of a cell that is taken out again
HOURS = 2.0  # that one cell may take


def run(job: harness.Job, file: Path) -> None:
    """Run the notebook as `job` says and write it to `file`, whole or up to the cell that failed.

    Raises nbclient's CellExecutionError when a cell fails.
    """
    from nbclient import NotebookClient

    notebook = with_cells_between(job)
    client = NotebookClient(notebook, timeout=int(3600 * HOURS), kernel_name="python3",
                            resources={"metadata": {"path": str(common.ROOT)}})  # fmt: skip
    try:
        client.execute()
    finally:
        file.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(as_committed(notebook, job), file)


def with_cells_between(job: harness.Job) -> nbformat.NotebookNode:
    """The committed notebook without outputs, and between its cells those of cells.py."""
    notebook = nbformat.read(cells.NOTEBOOK, as_version=4)
    parts, first = [], True
    for cell in notebook.cells:
        parts.append(cell)
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        behind = [cells.BEHIND[tag] for tag in cell.metadata.get("tags", ()) if tag in cells.BEHIND]
        if first:  # that one installs
            behind, first = [cells.begin(job)], False
        parts += [nbformat.v4.new_code_cell(source, metadata={BETWEEN: True}) for source in behind]
    notebook.cells = parts
    return notebook


def as_committed(notebook: nbformat.NotebookNode, job: harness.Job) -> nbformat.NotebookNode:
    """Without the cells between, cells numbered, folders renamed; no progress bars, no warnings."""
    notebook.cells = [cell for cell in notebook.cells if BETWEEN not in cell.metadata]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    names = {f"{job['folder']}/run": "runs/qwen2.5-1.5b", job["weights"]: Path(job["weights"]).name}
    for count, cell in enumerate(code, 1):
        cell.metadata.pop("execution", None)  # times of its messages
        cell.execution_count = count if cell.execution_count else None
        text = json.dumps([output for output in cell.outputs if not _bar(output)])
        for there, here in names.items():
            text = text.replace(json.dumps(there)[1:-1], here)
        cell.outputs = nbformat.from_dict(json.loads(text))
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
    said = nbformat.v4.new_output("stream", name="stdout", text=about(job))
    code[0].outputs.insert(0, said)
    return notebook


def _bar(output: nbformat.NotebookNode) -> bool:
    """Warnings, and progress bars: on stderr, or as a widget of which no state is kept."""
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def about(job: harness.Job) -> str:
    """What the first output says of the run."""
    host: dict[str, Any] = common.host()
    held = f", held to {job['cap']:g} GB" if job["cap"] else ""
    asked = "the stories of tasks.word_problems" if job["train_on"] == "word_problems" else "questions of a file"
    return (
        f"These outputs are those of a real run on {datetime.now(UTC):%Y-%m-%d}. Weights: {job['about']}. Card: "
        f"{host.get('gpu', 'none')}{held}. Questions: {asked}, in the place of GSM8K. {job['steps']} steps. Folders "
        "were renamed, and progress bars left out.\n"
    )
