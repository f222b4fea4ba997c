"""Model notebooks as a reader runs them, in smoke mode: stopped and gone on with, killed and run again from the top.

And as a script in two processes, as for two GPUs. Kernels and processes are forks of one that has imported what they
import (`warm_python`); nbmake, in `make test`, runs one of each kind in a fresh one.
"""

import json
import re
import signal
import socket
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import PythonExporter

from nbhelpers import presets

pytestmark = pytest.mark.usefixtures("smoke")
MODELS = Path(__file__).parents[2] / "notebooks" / "models"
REPORT = """
import json
print("REPORT", json.dumps({
    "steps": [row["step"] for row in live.history], "reached": result.global_step,
    "type": model.config.model_type, "engine": trainer.engine.name,
    "four_bits": sum(type(weight).__name__ == "Params4bit" for weight in model.parameters()),
    "score": score_after.accuracy.n,
}))
"""


# the stop button of a notebook is a SIGINT to its kernel; here it comes in the middle of the step after `at`
SIGNAL = """
import os

sent, compute_loss = [], trainer.compute_loss

def and_a_signal(*args, **kwargs):
    loss = compute_loss(*args, **kwargs)
    if trainer.state.global_step == {at} and not sent:
        sent.append(True)
        os.kill(os.getpid(), {number})
    return loss

trainer.compute_loss = and_a_signal
"""


def execute(
    name: str, folder: Path, steps: int, *, at=None, number=signal.SIGINT, twice=False, change=()
) -> tuple[str, dict]:
    """Run a notebook for `steps`, with a signal in the step after `at`; `twice` runs the training cell a second time.

    Without what ends a run that learns nothing: a random model does not.

    `change` is what a reader changes: the old text and the new one.

    Returns what the training cell said, both times, and the report of a cell at the end.
    """
    notebook = nbformat.read(MODELS / f"{name}.ipynb", as_version=4)
    folder.mkdir(exist_ok=True)

    def place(tag: str) -> int:
        return next(i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", ()))

    def insert(where: int, source: str) -> None:
        notebook.cells.insert(where, nbformat.v4.new_code_cell(source))

    insert(place("parameters") + 1, f"STEPS, OUT = {steps}, {str(folder / 'out')!r}")
    train = notebook.cells[place("train")]
    if at:
        insert(place("train"), SIGNAL.format(at=at, number=int(number)))
    if twice:
        insert(place("train") + 1, train.source)
    for cell in notebook.cells:
        cell.source = cell.source.replace("stop_when=StopWhen()", "stop_when=None")
        cell.source = cell.source.replace(*change) if change else cell.source
    insert(len(notebook.cells), REPORT)
    NotebookClient(notebook, timeout=240, kernel_name="warm", resources={"metadata": {"path": str(folder)}}).execute()
    trained = [cell for cell in notebook.cells if cell.source == train.source]
    said = "".join(output.get("text", "") for cell in trained for output in cell.outputs)
    last = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)  # a line may come in two pieces
    report = next(line for line in last.splitlines() if line.startswith("REPORT"))
    return said, json.loads(report.removeprefix("REPORT"))


SIZES = {"qwen2.5-14b", "qwen2.5-32b", "llama-3.3-70b", "r1-distill-qwen-32b"}  # of families that are run anyway


@pytest.mark.parametrize("name", sorted({path.stem for path in MODELS.glob("*.ipynb")} - SIZES))
def test_stopped_and_gone_on_with(name, tmp_path):
    said, report = execute(name, tmp_path, steps=6, at=3, twice=True)
    assert "Stopped by you after step 3." in said and re.search(r"Resuming from \S+, after step 3\.", said), said
    assert report["steps"] == [1, 2, 3, 4, 5, 6] and report["reached"] == 6, "each step once, to the end"
    assert report["type"] == presets.get(name).architecture.model_type
    assert report["engine"] == "graph" and report["four_bits"] > 0 and report["score"] > 0


def test_killed_and_run_again_from_the_top(tmp_path):
    with pytest.raises(DeadKernelError):
        execute("qwen2.5-1.5b", tmp_path, steps=24, at=22, number=signal.SIGKILL)
    said, report = execute("qwen2.5-1.5b", tmp_path, steps=24)
    assert re.search(r"Resuming from \S+, after step 20\.", said), said
    assert report["steps"] == list(range(1, 25)) and report["reached"] == 24


def test_the_first_exercise_works_as_it_is_written(tmp_path):
    """`reward_funcs=[in_form]` in a folder of its own; in that of the first run it is refused with what to change."""
    name, change = "qwen2.5-1.5b", ("reward_funcs=[correct, in_form]", "reward_funcs=[in_form]")
    cells = nbformat.read(MODELS / f"{name}.ipynb", as_version=4).cells
    text = next(cell.source for cell in cells if cell.source.startswith("## Your turn"))
    assert f"`{change[1]}` (section 9)" in text and "`OUT" in text.replace("\n", " ") and "restart\nthe kernel" in text
    execute(name, tmp_path / "first", steps=2)
    with pytest.raises(CellExecutionError, match=r"For a new run take a folder of its own.*OUT in a notebook"):
        execute(name, tmp_path / "first", steps=2, change=change)
    _, report = execute(name, tmp_path / "mine", steps=2, change=change)
    assert report["steps"] == [1, 2]


# in several processes transformers 5.15 reads the optimizer onto "cpu:0", a name that torch does not restore to
CPU_0 = """
import torch
torch.serialization.register_package(0, lambda storage: None, lambda storage, at: storage if at == "cpu:0" else None)
"""


def as_script(folder: Path, out: str, steps: int, end: str = "") -> None:
    """The notebook as script.py in `folder`, as nbconvert writes it, for `steps`, with `end` behind it."""
    code, _ = PythonExporter().from_filename(MODELS / "qwen2.5-1.5b.ipynb")
    rewards = "[lambda completions, **_: [len(str(text)) % 3.0 for text in completions]]"  # that differ in a group
    for old, new in (
        ("STEPS = None", f"STEPS = {steps}"), ('OUT = f"runs/{PRESET}"', f"OUT = {out!r}"),
        ("save_steps=20", "save_steps=2"), ("reward_funcs=[correct, in_form]", f"reward_funcs={rewards}"),
    ):  # fmt: skip
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(CPU_0 + code + end)


def two_processes(python: list[str], folder: Path, out: str, steps: int) -> tuple[str, bytes]:
    """Run a notebook as a script in two processes; what the first one said, and the adapter that it exported."""
    as_script(folder, out, steps)
    command = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "--local-ranks-filter=0", "--no-python", *python, "script.py"]  # fmt: skip
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran.stdout, (folder / out / "reasoner" / "adapter_model.safetensors").read_bytes()


def test_a_script_of_two_processes_goes_on_exactly(tmp_path, warm):
    _, begun = two_processes(warm, tmp_path, "stopped", steps=2)
    said, resumed = two_processes(warm, tmp_path, "stopped", steps=4)
    assert said.count("Resuming from stopped/checkpoint-2, after step 2.") == 1, said
    _, whole = two_processes(warm, tmp_path, "whole", steps=4)
    assert begun != resumed == whole


# what each rank holds in the end: docs/outgrow.md promises the same adapters on all of them
ADAPTER = """
import os
from safetensors.torch import save_file
trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
save_file(trained, f"rank-{os.environ['RANK']}.safetensors")
print("PROCESSES", trainer.accelerator.num_processes, trainer.state.global_step)
"""


def launched(python: list[str], folder: Path, *options: str) -> subprocess.Popen:
    """`accelerate launch` of script.py, as docs/outgrow.md has it; without a GPU its processes compute on CPUs."""
    command = [
        *python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--mixed_precision=no",
        "--dynamo_backend=no", "--num_cpu_threads_per_process=1", *options, "--no_python", *python, "script.py",
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def same_adapter_everywhere(processes: list[subprocess.Popen], ranks: list[Path]) -> None:
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(said), "\n".join(text[-3000:] for text in said)
    assert sum(text.count("PROCESSES 2 2") for text in said) == 2, said
    first, second = (file.read_bytes() for file in ranks)
    assert first == second and len(first) > 1000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_script_under_accelerate_launch(tmp_path, warm):
    """Both of Kaggle's T4s, from a cell; here two processes on the CPU."""
    as_script(tmp_path, "out", 2, ADAPTER)
    process = launched(warm, tmp_path, f"--main_process_port={free_port()}")
    same_adapter_everywhere([process], [tmp_path / f"rank-{rank}.safetensors" for rank in range(2)])
    assert (tmp_path / "out" / "reasoner" / "adapter_model.safetensors").exists()


def test_a_script_under_accelerate_launch_on_two_machines(tmp_path, warm):
    """Two launches with a folder each, as without a common disk; what is between them is the loopback."""
    machines, port = [tmp_path / "first", tmp_path / "second"], free_port()
    processes = []
    for rank, folder in enumerate(machines):
        as_script(folder, "out", 2, ADAPTER)
        where = ("--num_machines=2", f"--machine_rank={rank}", "--main_process_ip=127.0.0.1")
        processes.append(launched(warm, folder, *where, f"--main_process_port={port}"))
    files = [folder / f"rank-{rank}.safetensors" for rank, folder in enumerate(machines)]
    same_adapter_everywhere(processes, files)
    assert (machines[0] / "out" / "reasoner" / "adapter_model.safetensors").exists()
    assert not (machines[1] / "out" / "reasoner").exists(), "the first process exports"
