"""Builds notebooks/models/<preset>.ipynb from one template and the preset table; lessons get the same install cell.

    python notebooks/build.py     # or `make notebooks`

The template is jupytext's percent format, and exercises.py holds its last cells. Between models of one kind only the
fields in {braces} differ. There are two kinds: models that are taught to reason, and models that think by themselves
(`rewards.THINK`), which practise brevity. A cell tagged "taught" or "thinks" is for one kind alone. The address of the
repository comes from pyproject.toml. The same input gives the same bytes, so a test can compare.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat

from nbhelpers import presets
from nbhelpers.rewards import THINK

HERE = Path(__file__).parent
REPOSITORY = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
# The newest release's tag and the commit that it stood on, written here in the commit after it; both empty before the
# first one. Notebooks install that very commit.
RELEASE, COMMIT = "", ""
# Whether that release is on the package index as well; until then the name there may be anybody's.
ON_INDEX = False
# Its committed notebook keeps the outputs of a real run, until one of its code cells changes; the others link to it.
RECORDED = "qwen2.5-1.5b"
MODELS = tuple(name for name in presets.names() if presets.get(name).notebook)
ACCESS = {
    False: "It is open: no account, no login.",
    True: "It is gated: accept its licence at <https://huggingface.co/{hub_id}>, make a token at "
    "<https://huggingface.co/settings/tokens>, and keep it as a secret named `HF_TOKEN` (Colab: the key symbol on the "
    "left; Kaggle: *Add-ons > Secrets*). It is never shown.",
}
ORIGIN = {  # the beginning of a preset's name -> how such a model came to think
    "r1-distill": "it was *distilled*, which is to say trained on texts in which DeepSeek-R1 thinks before it answers. "
    "Its chat template opens its `<think>` for it. Its makers advise against a system message, so what is asked of "
    "it stands behind the question.",
    "qwen3": "it was trained to think between `<think>` and `</think>` before it answers, and does so unless its chat "
    "template is told otherwise (`enable_thinking=False`). What is asked of it stands behind the question.",
}
PLANNED = {  # what a preset's numbers were chosen for, and nobody has timed yet
    "qwen2.5-0.5b": " With this preset all of it is planned to take a T4 20 to 30 minutes; that is a plan, nobody has "
    "timed it yet.",
}
SEE = f" What a run looks like from the first cell to the last: [{presets.get(RECORDED).title}]({RECORDED}.ipynb)."
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kaggle": {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def badges(path: str) -> str:
    """The two badges that open `path` (inside notebooks/), in Markdown."""
    github = f"{REPOSITORY}/blob/main/notebooks/{path}"
    colab = f"https://colab.research.google.com/github/{github.removeprefix('https://github.com/')}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
        f"(https://kaggle.com/kernels/welcome?src={github})"
    )


def _recorded() -> list:
    """The code cells of RECORDED's committed notebook if it has outputs, else none."""
    file = HERE / "models" / f"{RECORDED}.ipynb"
    cells = nbformat.read(file, as_version=4).cells if file.exists() else []
    code = [cell for cell in cells if cell.cell_type == "code"]
    return code if any(cell.outputs for cell in code) else []


def model(name: str) -> str:
    """The notebook of a preset, as the text of its file."""
    preset, ran = presets.get(name), _recorded()
    kind, other = ("thinks", "taught") if preset.tags == THINK else ("taught", "thinks")
    fields = {
        "title": preset.title, "preset": name, "hub_id": preset.hub_id, "repository": REPOSITORY,
        "release": RELEASE, "commit": COMMIT,
        "access": ACCESS[preset.gated].replace("{hub_id}", preset.hub_id),
        "more": PLANNED.get(name, "") + (SEE if ran and name != RECORDED else ""),
        "badges": badges(f"models/{name}.ipynb"),
        "origin": next((text for start, text in ORIGIN.items() if name.startswith(start)), ""),
    }  # fmt: skip
    source = "\n".join((HERE / part).read_text() for part in ("template.py", "exercises.py"))
    notebook = jupytext.reads(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.cells = [cell for cell in notebook.cells if other not in cell.metadata.get("tags", ())]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"c{number:02}"
        if kind in cell.metadata.get("tags", ()):
            del cell.metadata["tags"]
        if kind == "thinks":
            cell.source = cell.source.replace("[correct, in_form]", "[correct, in_form, brief]")
        if ON_INDEX:
            cell.source = cell.source.replace('[f"git+', f'["nbhelpers=={RELEASE[1:]}", f"git+')
        for field, value in fields.items():
            cell.source = cell.source.replace("{" + field + "}", value)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if name == RECORDED and [cell.source for cell in ran] == [cell.source for cell in code]:
        for cell, with_outputs in zip(code, ran, strict=True):
            cell.outputs, cell.execution_count = with_outputs.outputs, with_outputs.execution_count
    return nbformat.writes(notebook, version=4) + "\n"


def _install_cells(notebook) -> list:
    return [cell for cell in notebook.cells if "install" in cell.metadata.get("tags", ())]


def lesson(path: Path) -> str:
    """A lesson with today's badges below its title and today's install cell as its first code; the rest as it is."""
    notebook = nbformat.read(path, as_version=4)
    title, *rest = (line for line in notebook.cells[0].source.split("\n") if not line.startswith("[![Open in Colab]"))
    text = "\n".join(rest).strip("\n")
    notebook.cells[0].source = f"{title}\n\n{badges(path.name)}\n\n{text}"
    source = _install_cells(nbformat.reads(model(MODELS[0]), as_version=4))[0].source
    if own := _install_cells(notebook):
        own[0].source = source
    else:  # a new one is run on the spot, for a lesson keeps its outputs
        said = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
        output = nbformat.v4.new_output("stream", name="stdout", text=said)
        cell = nbformat.v4.new_code_cell(source, id="install", metadata={"tags": ["install"]}, outputs=[output])
        notebook.cells.insert(1, cell)
        for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
            cell.execution_count = count
    return nbformat.writes(notebook, version=4) + "\n"


def main() -> None:
    for name in sorted(
        MODELS, key=lambda name: name != RECORDED
    ):  # that one first: the others say whether it has outputs
        (HERE / "models" / f"{name}.ipynb").write_text(model(name))
    for path in sorted(HERE.glob("0*.ipynb")):
        path.write_text(lesson(path))


if __name__ == "__main__":
    main()
