"""Published runs as commands: their numbers, their plans, and each of them run from its first row to its adapter."""

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.step import sizes
from nbhelpers import host, loader, memory, presets, recipes
from nbhelpers.models import lineage

SCRIPT = Path(__file__).parents[2] / "notebooks/recipes.py"


@pytest.fixture(scope="module")
def command():
    """notebooks/recipes.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("published_recipes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def real(monkeypatch):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)


@pytest.fixture
def smoke(monkeypatch):
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")


def test_the_long_run_is_the_published_one_and_planned_for_its_card(real):
    recipe, plan = recipes.get("long-run"), memory.plan(**recipes.get("long-run").takes)
    preset = recipe.preset
    assert preset.max_steps == 22_419 == recipe.epochs * recipes.GSM8K // preset.questions_per_step
    assert preset.architecture == presets.get("qwen2.5-3b").architecture
    assert plan.fits and plan.speed_of == "RTX 4090" and plan.card_gb == 24 and plan.setting.rows == 6
    assert (plan.setting.max_prompt_length, plan.setting.max_completion_length) == (256, 200)
    assert max(sum(plan.training.values()), sum(plan.generation.values())) < 18.1  # GB, as published
    assert plan.hours == pytest.approx(plan.step_seconds * 22_419 / 3600)
    assert preset.on_card(24) == preset.on_card(8) == preset  # published numbers do not change with the card


def test_the_benchmark_measures_what_the_recipes_say(real):
    """20 steps of the long run, DeepScaleR's last stage, and a text of the 32B."""
    recipe, case = recipes.get("long-run"), sizes.CASES["long-run"]
    preset = recipe.preset
    assert (case.preset, case.rows, case.rank) == ("qwen2.5-3b", preset.num_generations, preset.lora_rank)
    assert case.tokens == preset.max_prompt_length + preset.max_completion_length and case.steps == 20
    last = {name: case for name, case in sizes.CASES.items() if name.startswith("24k")}
    assert {case.kind for case in last.values()} == {"train", "decode"}
    assert all(case.tokens - sizes.PROMPT == 24_576 and case.cap == 24 for case in last.values())
    recipe, case = recipes.get("32b-lora"), sizes.CASES["32b-sft"]
    preset = recipe.preset
    assert (case.preset, case.rank, case.cap) == (preset.name, preset.lora_rank, 24)
    assert case.tokens == preset.max_prompt_length + preset.max_completion_length


@pytest.mark.parametrize("name", recipes.NAMES)
def test_every_recipe_fits_its_card_by_its_own_method(name, real):
    recipe = recipes.get(name)
    plan = memory.plan(**recipe.takes)
    assert plan.fits, plan
    assert plan.setting.method == recipe.method and plan.setting.rows == recipe.rows and plan.speed_of == recipe.card
    assert plan.preset == recipe.preset and plan.hours > 0
    assert (recipe.method == "sft") == (not plan.generation)
    other = memory.plan(**recipe.takes | {"card": "H100"})
    assert other.fits and other.card_gb == 80 and other.speed_of == "H100"


def test_a_32b_needs_more_than_a_card_of_16_gb(real):
    assert not memory.plan(**recipes.get("32b-lora").takes | {"card": "RTX 4080"}).fits


# ---- from the terminal ----


def test_the_command_lists_plans_and_refuses_in_a_sentence(command, real, capsys, monkeypatch, tmp_path):
    command.main([])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(recipes.NAMES)
    command.main(["limo", "--plan"])
    assert capsys.readouterr().out == f"{memory.plan(**recipes.get('limo').takes)}\n"
    command.main(["limo", "--card", "T4"])
    assert "like the T4" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="card='Voodoo' is not known"):
        command.main(["limo", "--card", "Voodoo"])
    monkeypatch.setattr(host, "card_gb", lambda: None)
    with pytest.raises(SystemExit, match="limo needs a GPU, and there is none here"):
        command.main(["limo", "--out", str(tmp_path / "x")])
    monkeypatch.setattr(host, "card_gb", lambda: 8.0)
    with pytest.raises(SystemExit, match="It does NOT fit"):
        command.main(["32b-lora", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
    for few in ("0", "-1"):  # neither all of them nor TRL's three epochs
        with pytest.raises(SystemExit):
            command.main(["limo", "--plan", "--steps", few])
        assert f"--steps {few}: 1 or more" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no recipe 'lima'; there are long-run, limo, 32b-lora"):
        recipes.get("lima")


@pytest.mark.parametrize(("name", "method"), [("long-run", "GRPO"), ("limo", "SFT"), ("32b-lora", "SFT")])
def test_a_recipe_runs_to_its_adapter_and_goes_on_where_it_was(command, name, method, smoke, tmp_path, capsys):
    command.main([name, "--out", str(tmp_path), "--steps", "1"])
    assert "the run starts at step 0" in capsys.readouterr().out
    command.main([name, "--out", str(tmp_path), "--steps", "2"])
    said = capsys.readouterr().out
    assert "checkpoint-1" in said and "step 2/2" in said and said.rstrip().endswith("reasoner")
    assert ("Calculate pi." in said) == ("9.919 or 9.92?" in said) == (name == "long-run")
    model, _ = loader.load(tmp_path / "reasoner")
    assert lineage.methods(model) == [method]


# ---- the rows of LIMO ----


def limo(count, words=3):
    return [
        {"question": f"Made up, number {i}?", "solution": " ".join(["Because."] * words), "answer": str(i)}
        for i in range(count)
    ]


def test_a_file_with_limos_columns_becomes_texts_in_the_form_and_none_is_cut_off(command, smoke, tmp_path, capsys):
    preset = recipes.get("limo").preset
    _, tokenizer = loader.load(preset)
    rows = [*limo(5), {"question": "A long one?", "solution": "On and on. " * 300, "answer": "7"},
            {"question": "One without an answer?", "solution": "Hm.", "answer": ""}]  # fmt: skip
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    texts = command.texts(preset, tokenizer, file, 400)
    assert sorted(row["answer"] for row in texts) == list("01234")
    (said,) = {row["completion"][0]["content"] for row in texts if row["answer"] == "3"}
    assert said == "<reasoning>\nBecause. Because. Because.\n</reasoning>\n<answer>\n3\n</answer>"
    assert texts[0]["prompt"][0] == {"role": "system", "content": preset.system_prompt}
    out = capsys.readouterr().out
    assert "5 texts, and 1 longer than 400 tokens are left out" in out
    assert "left out 1 row (line 7) of mine.jsonl: no answer to check" in out


def test_rows_that_cannot_be_texts_are_refused_before_a_step(command, smoke, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"question": row["question"], "answer": "1"}) for row in limo(3)))
    with pytest.raises(SystemExit, match="no column 'solution'"):
        command.main(["limo", "--out", str(tmp_path / "x"), "--data", str(file)])
    preset = recipes.get("limo").preset
    _, tokenizer = loader.load(preset)
    file.write_text("\n".join(map(json.dumps, limo(3, words=400))))
    with pytest.raises(ValueError, match="0 of 3 texts have at most 500 tokens, and at least 2 are needed"):
        command.texts(preset, tokenizer, file, 500)


def test_the_made_up_rows_are_right(command):
    frame = command.made_up()
    assert list(frame.columns) == ["question", "solution", "answer"] and len(frame) == 20
    for row in frame.to_dict("records"):
        assert row["solution"].endswith(f"= {row['answer']}.")
