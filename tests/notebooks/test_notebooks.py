"""What is true of every committed notebook, without running it (make test runs them too)."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from nbhelpers import memory, presets, rewards, tasks
from nbhelpers.rewards import THINK

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.rglob("*.ipynb"))
MODELS = [path for path in NOTEBOOKS if path.parent.name == "models"]
LESSONS = [path for path in NOTEBOOKS if path not in MODELS]
THINKING = [path for path in MODELS if presets.get(path.stem).tags == THINK]
TAUGHT = [path for path in MODELS if path not in THINKING]
MACHINE_PATH = re.compile(r"/(?:home|root|work|tmp|opt|Users)/\w+")


def parametrize(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@parametrize(NOTEBOOKS)
def test_it_is_small_and_carries_no_widgets(path):
    text = path.read_text()
    assert len(text.encode()) <= 200_000
    assert "application/vnd.jupyter.widget" not in text and '"widgets"' not in text


@parametrize(NOTEBOOKS)
def test_it_names_no_path_of_the_machine_it_ran_on(path):
    assert not MACHINE_PATH.findall(path.read_text())


@parametrize(NOTEBOOKS)
def test_its_cells_are_short_and_its_outputs_without_errors(path):
    for number, cell in enumerate(cells(path)):
        assert len("".join(cell["source"]).splitlines()) <= 25, f"code cell {number} is too long to read aloud"
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", f"code cell {number}: {output}"


@parametrize(NOTEBOOKS)
def test_every_picture_is_told_in_words(path):
    for number, cell in enumerate(cells(path)):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                alt, text = output["metadata"].get("image/png", {}).get("alt"), "".join(output["data"]["text/plain"])
                assert alt and " " in alt and text and not text.startswith("<"), f"code cell {number}"


@parametrize(LESSONS)
def test_a_lesson_has_at_most_250_lines_of_code(path):
    lines = [line for cell in cells(path) for line in "".join(cell["source"]).splitlines() if line.strip()]
    assert len(lines) <= 250


@parametrize(LESSONS)
def test_a_lesson_keeps_its_outputs(path):
    code = cells(path)
    assert all(cell["execution_count"] for cell in code) and any(cell["outputs"] for cell in code)


@parametrize(LESSONS)
def test_a_lesson_has_the_badges_and_the_install_cell(path, build):
    assert path.read_text() == build.lesson(path), "run `make notebooks`"


# ---- models/*.ipynb, built from one template ----


def test_every_preset_has_its_notebook():
    assert {path.stem for path in MODELS} == {name for name in presets.names() if presets.get(name).notebook}


@parametrize(MODELS)
def test_a_model_notebook_is_what_the_template_makes(path, build, monkeypatch):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    assert path.read_bytes() == build.model(path.stem).encode(), "run `make notebooks` and commit"


@parametrize(MODELS)
def test_a_model_notebook_asks_for_a_t4_and_has_all_outputs_of_a_run_or_none(path, build):
    counts = [cell["execution_count"] for cell in cells(path)]
    if path.stem == build.RECORDED and counts[0] is not None:
        assert None not in counts and any(cell["outputs"] for cell in cells(path))
    else:
        assert set(counts) == {None} and not any(cell["outputs"] for cell in cells(path))
    metadata = json.loads(path.read_text())["metadata"]
    assert metadata["accelerator"] == "GPU" and metadata["colab"] == {"gpuType": "T4", "provenance": []}
    assert metadata["kaggle"]["accelerator"] == "nvidiaTeslaT4" and metadata["kaggle"]["isInternetEnabled"]


def test_outputs_of_a_real_run_stay_until_a_cell_changes_and_the_others_link_to_them(build, tmp_path, monkeypatch):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    (tmp_path / "models").mkdir()
    for name in ("template.py", "exercises.py"):
        (tmp_path / name).write_text((FOLDER / name).read_text())
    monkeypatch.setattr(build, "HERE", tmp_path)
    file, link = tmp_path / "models" / f"{build.RECORDED}.ipynb", f"]({build.RECORDED}.ipynb)"
    other = next(path.stem for path in MODELS if path.stem != build.RECORDED)
    plain = build.model(build.RECORDED)
    assert link not in build.model(other), "no outputs, no link"
    ran = json.loads(plain)
    for count, cell in enumerate((cell for cell in ran["cells"] if cell["cell_type"] == "code"), start=1):
        cell["execution_count"] = count
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": [f"said {count}"]}]
    file.write_text(json.dumps(ran))
    assert [cell["outputs"] for cell in json.loads(build.model(build.RECORDED))["cells"] if "outputs" in cell] == \
        [cell["outputs"] for cell in ran["cells"] if "outputs" in cell]  # fmt: skip
    assert link in build.model(other) and link not in build.model(build.RECORDED)
    template = tmp_path / "template.py"
    template.write_text(template.read_text().replace("SEED = 0", "SEED = 1"))
    assert not any(cell.get("outputs") for cell in json.loads(build.model(build.RECORDED))["cells"])


@parametrize(MODELS)
def test_a_model_notebook_can_be_read_aloud(path):
    install, *code = ["".join(cell["source"]) for cell in cells(path)]
    assert "import_module" in install  # the same everywhere, not about models, and tested in test_install_cell.py
    assert len(code) <= 24 and sum(len(source.splitlines()) for source in code) <= 135
    assert len(cells(path, "markdown")) >= 15


def different_cells(paths: list[Path]) -> set[int]:
    """The numbers of the cells in which any of these notebooks differs from the first, whatever they printed."""
    printed = {"outputs": [], "execution_count": None}
    every = [json.loads(path.read_text())["cells"] for path in paths]
    first, *others = ([cell | printed for cell in cells] for cells in every)
    return {i for cells in others for i, (own, other) in enumerate(zip(cells, first, strict=True)) if own != other}


def test_only_the_title_the_badges_and_the_parameters_differ():
    """No conditionals: two models' notebooks differ in the first cell and in the cell of the parameters.

    Models that think by themselves also have prose and rewards of their own, and are given those where rewards go.
    """
    cells = json.loads(MODELS[0].read_text())["cells"]
    tags = [cell["metadata"].get("tags") for cell in cells]
    everywhere = {0, tags.index(["parameters"])}
    for kind in (THINKING, TAUGHT):
        assert len(kind) > 1 and different_cells(kind) == everywhere
    code = {i for i in different_cells(MODELS) - everywhere if cells[i]["cell_type"] == "code"}
    assert all("[correct, in_form]" in "".join(cells[i]["source"]) or i == reward_cell(cells) for i in code)
    assert len(different_cells(MODELS) - everywhere - code) <= 3, "prose about rewards, about curves, and exercises"


def reward_cell(cells: list[dict]) -> int:
    return next(i for i, cell in enumerate(cells) if "def correct(" in "".join(cell["source"]))


@parametrize([TAUGHT[0], THINKING[0]])  # the others of their kind have the same
def test_the_rewards_of_a_model_notebook_stand_the_check(path):
    """Nothing to warn of; and the hole that a reader is asked to make is found."""
    cells = json.loads(path.read_text())["cells"]
    preset = presets.get(path.stem)
    space = {"rewards": rewards, "preset": preset, "longest": preset.max_completion_length}
    exec("".join(cells[reward_cell(cells)]["source"]), space)
    funcs = [space[name] for name in ("correct", "in_form", "brief") if name in space]
    assert len(funcs) == (3 if path in THINKING else 2)
    rows = [{"prompt": tasks.messages(f"How many are {n} and 7?", None), "answer": str(n + 7)} for n in range(2, 6)]
    task = tasks.Task("sums", Dataset.from_list(rows), Dataset.from_list(rows))
    found = rewards.check(funcs, task, form=preset.tags.frame)
    assert [warning for warning in found.warnings if "it is slow" not in warning] == []  # the machine may be busy
    if path in THINKING:

        def brief(completion_ids, **_):
            return [0.3 * (1 - len(ids) / preset.max_completion_length) for ids in completion_ids]

        holes = rewards.check([brief], task, form=preset.tags.frame).warnings
        assert any("brief: it can be gamed" in hole and "empty" in hole for hole in holes), "exercise 2"


def test_models_that_reason_already_say_so_and_are_asked_without_a_system_message():
    for path in THINKING:
        preset, text = presets.get(path.stem), "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
        assert "reasons already" in text and "Nobody shows it how to reason" not in text and "`brief`" in text
        assert [message["role"] for message in tasks.messages("?", preset.system_prompt)] == ["user"]
        if memory.can_train(preset, 15):
            assert preset.on_card(15).max_completion_length >= 2048
    assert {path.stem for path in THINKING} == {"r1-distill-qwen-7b", "r1-distill-qwen-32b", "qwen3-1.7b", "qwen3-4b"}


@parametrize(MODELS)
def test_a_gated_model_says_where_to_get_access(path):
    title = "".join(cells(path, "markdown")[0]["source"])
    preset = presets.get(path.stem)
    assert (f"https://huggingface.co/{preset.hub_id}" in title and "HF_TOKEN" in title) == preset.gated


@parametrize(NOTEBOOKS)
def test_the_badges_open_this_notebook(path):
    title = "".join(cells(path, "markdown")[0]["source"])
    links = re.findall(r"\[!\[Open in \w+\]\(\S+\)\]\((\S+)\)", title)
    assert len(links) == 2
    for link in links:
        assert link.endswith(f"/blob/main/notebooks/{path.relative_to(FOLDER)}"), link
