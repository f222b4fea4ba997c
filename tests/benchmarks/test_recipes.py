"""The benchmark of the recipe: lesson 6 as a script, in two updates a stage."""

from benchmarks import recipes


def test_the_lesson_runs_as_a_script_and_each_stage_has_its_row(monkeypatch, warm):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    code = recipes.script("SEED = 7")
    assert code.index("SEED = 0") < code.index("SEED = 7") < code.index("learn_texts(")
    short = "from nbhelpers import tasks\nSTEPS, whole = 1, tasks.decimals\n"
    short += "tasks.decimals = lambda n_train, n_test, seed: whole(n_train, 8, seed=seed)"
    rows = recipes.rows_of(3, short, warm)
    names = ("accuracy_before", "accuracy_zero", "accuracy_rl", "accuracy_sft", "accuracy_after", "seconds")
    assert [row["what"] for row in rows] == [f"workshop/r1_recipe/seed-3/{name}" for name in names]
    assert all(0 <= row["value"] <= 1 and row["tokens"] > 20 and row["n"] == 8 for row in rows[:-1])
    (worst,) = (row for row in recipes.worst(rows) if row["what"] == "workshop/r1_recipe/accuracy_after")
    assert worst["of_seeds"] == 1
