"""A notebook that Jupyter ran on real weights is committed as itself, with its outputs and nothing of the machine."""

import json

import nbformat

from benchmarks.real import cells, executed

JOB = {"folder": "/a/folder", "weights": "/a/machine/qwen.gguf", "cap": 7.0, "mode": "7GB", "train_on": "word_problems",
       "steps": 90, "about": "a model in 4 bits", "preset": "{}"}  # fmt: skip


def test_what_is_committed_is_the_notebook_with_outputs_and_without_what_ran_between_its_cells():
    own = nbformat.read(cells.NOTEBOOK, as_version=4).cells
    notebook = executed.with_cells_between(JOB)
    assert len(notebook.cells) == len(own) + 1 + len(cells.BEHIND), "the job, and a cell behind each tag"
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        said = f"cell {count}: /a/folder/run/reasoner, {JOB['weights']}\n"
        cell.execution_count, cell.metadata["execution"] = count, {"iopub.status.busy": "now"}
        cell.outputs = [
            nbformat.v4.new_output("stream", name="stderr", text="50%"),
            nbformat.v4.new_output("stream", name="stdout", text=said),
            nbformat.v4.new_output("execute_result", data={"text/plain": "1"}, execution_count=count),
        ]
    kept = executed.as_committed(notebook, JOB)
    nbformat.validate(kept)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.source for cell in kept.cells] == [cell.source for cell in own]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs[-1].execution_count == cell.execution_count for cell in code)
    about = code[0].outputs.pop(0).text
    assert "a model in 4 bits" in about and "held to 7 GB" in about and "tasks.word_problems" in about
    for cell in code:
        assert cell.outputs[0].text.endswith(": runs/qwen2.5-1.5b/reasoner, qwen.gguf\n")
    text = json.dumps([[cell.outputs, cell.metadata] for cell in code])
    assert "/a/" not in text and "stderr" not in text and "iopub" not in text
