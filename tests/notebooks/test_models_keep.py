"""What a model notebook does with what was learned: asked anything, kept in every form, uploaded, used tomorrow."""

import stat
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

pytestmark = pytest.mark.usefixtures("smoke")
MODELS = Path(__file__).parents[2] / "notebooks" / "models"
CSV = "question,answer\n" + "".join(f"How many are {n} and 7?,{n + 7}\n" for n in range(12)) + "How many?,\n"
# what is not here: llama.cpp's tool, and the hub
BEFORE = f"""
import huggingface_hub
from types import SimpleNamespace

open("mine.csv", "w").write({CSV!r})
pushed = []
huggingface_hub.HfApi = lambda token: SimpleNamespace(
    create_repo=lambda name, **_: type("Address", (str,), {{"repo_id": name}})("https://hub/" + name),
    upload_folder=lambda **what: pushed.append(what["folder_path"]),
)
"""
TOOL = f"#!{sys.executable}\nimport shutil, sys\nshutil.copy(sys.argv[1], sys.argv[2])\n"
SHORT = {  # of any notebook, so that a run takes seconds
    "STEPS = None": "STEPS = 1", "stop_when=StopWhen()": "stop_when=None", "HELD_OUT = 100": "HELD_OUT = 2",
}  # fmt: skip


def run(name: str, folder: Path, changes: dict[str, str], before: str = "", only=()) -> dict[str, str]:
    """{tag: what the cell says} of a notebook with `changes` in it; `only` the cells with these tags are run.

    Raises CellExecutionError.
    """
    notebook = nbformat.read(MODELS / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if only:
        code = [cell for cell in code if set(only) & set(cell.metadata.get("tags", ()))]
    for old, new in {**SHORT, **changes}.items():
        assert only or any(old in cell.source for cell in code), old
        for cell in code:
            cell.source = cell.source.replace(old, new)
    notebook.cells = [nbformat.v4.new_code_cell(before), *code]
    folder.mkdir(exist_ok=True)
    try:
        NotebookClient(
            notebook, timeout=240, kernel_name="warm", resources={"metadata": {"path": str(folder)}}
        ).execute()
    finally:
        said = {
            cell.metadata["tags"][0]: "".join(
                output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs
            )
            for cell in code
            if "tags" in cell.metadata
        }
    return said


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A llama-quantize that copies."""
    file = tmp_path / "bin" / "llama-quantize"
    file.parent.mkdir()
    file.write_text(TOOL)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(file.parent), prepend=":")
    monkeypatch.setenv("HF_TOKEN", "hf_write")


WANTED = {
    "WRITE = []": 'WRITE = ["merged", "q8_0", "q4_k_m"]',
    'HUB = ""': 'HUB = "me/mine"',
    'DATA = ""': 'DATA = "mine.csv"',
    "A baker fills 3 trays with 12 rolls each and sells 20 of them. How many are left?": "How many are 2 and 2?",
    "TOMORROW = False": "TOMORROW = True",
}  # fmt: skip


def test_everything_that_can_be_asked_for(tmp_path, tool):
    said = run("qwen2.5-0.5b", tmp_path / "run", WANTED, BEFORE)
    folder = tmp_path / "run" / "runs" / "qwen2.5-0.5b"
    assert "mine: 10 questions to train on, 2 held out" in said["task"]
    assert "(line 14)" in said["doctor"] and "no answer" in said["doctor"] and "tokens of a prompt" in said["doctor"]
    assert "How many are 2 and 2?" in said["chat"] and "before" in said["chat"] and "after" in said["chat"]
    assert "GB of disk free" in said["keep"] and (folder / "reasoner" / "adapter_model.safetensors").exists()
    assert "reasoner-16bit" in said["merged"] and (folder / "reasoner-16bit" / "model.safetensors").exists()
    for kind in ("q8_0", "q4_k_m"):
        assert f"reasoner-{kind}.gguf" in said["gguf"]
        assert (folder / f"reasoner-{kind}.gguf").read_bytes()[:4] == b"GGUF"
    assert "https://hub/me/mine" in said["push"] and "hf_write" not in "".join(said.values())
    new_session = ("install", "parameters", "drive", "kaggle", "preset", "tomorrow")
    again = run("qwen2.5-0.5b", tmp_path / "run", WANTED, only=new_session)
    answers = [text["tomorrow"].partition(" s\n")[2] for text in (said, again)]  # behind the line of the loader
    assert answers[0] == answers[1] != ""


def test_what_does_not_apply_is_a_word(tmp_path, monkeypatch):
    """In a notebook of a model that thinks, as it is; without llama.cpp's tool q4_k_m is a sentence, not an end."""
    monkeypatch.setenv("PATH", str(tmp_path))
    said = run("qwen3-1.7b", tmp_path / "run", {"WRITE = []": 'WRITE = ["q4_k_m"]'})
    assert said["drive"].startswith("not on Colab") and said["kaggle"].startswith("not on Kaggle")
    assert said["merged"] == "merged not written: it is not in WRITE\n"
    assert said["gguf"].startswith("q8_0 not written") and "llama-quantize, which is not on" in said["gguf"]
    assert said["push"] == "not uploaded: HUB is empty\n" and said["tomorrow"].startswith("for a new session")
    assert "A baker fills 3 trays" in said["chat"]
    written = {path.name for path in (tmp_path / "run" / "runs" / "qwen3-1.7b").glob("reasoner*")}
    assert written == {"reasoner"}


def test_a_mistake_of_the_reader_is_a_sentence_without_a_traceback(tmp_path):
    changes = {'DATA = ""': 'DATA = "not_there.csv"'}
    with pytest.raises(CellExecutionError) as failed:
        run("qwen2.5-0.5b", tmp_path / "run", changes)
    assert "not_there.csv" in str(failed.value) and "%tb shows where" in str(failed.value)
    assert "Traceback" not in str(failed.value).partition("------------------\n")[2].partition("not_there")[2]
