"""The cases of what fits: each known to the presets, each run in a process of its own, and a failure costs no other."""

from types import SimpleNamespace

import pytest

from benchmarks import common, harness
from benchmarks.step import sizes
from nbhelpers import memory, presets


def test_every_case_is_planned_to_fit_its_cap(monkeypatch):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)
    for name, case in sizes.CASES.items():
        assert case.preset in presets.names() and case.kind in sizes.KINDS, name
        rows = case.rows or (8 if case.kind == "steps" else 1)
        plan = memory.plan(
            case.preset, card_gb=case.cap, num_generations=rows, max_prompt_length=256, rows=rows,
            max_completion_length=case.tokens - 256, lora_rank=case.rank, quantization="nf4", attention="flash",
            budget_gb=case.cap - 0.55 - harness.RESERVE - harness.POOL, train="all" if case.whole else None,
            swap=case.swap,
        )  # fmt: skip
        assert plan.fits, f"{name}\n{plan}"
        assert max(sum(plan.training.values()), sum(plan.generation.values())) <= case.cap


@pytest.mark.parametrize("name", ["32b", "3b-whole", "8b-swap", "128k-train", "128k-decode", "long-run", "32b-sft"])
def test_a_smoke_run_writes_the_rows_that_are_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    case = sizes.CASES[name]
    job = sizes.Capped(case, str(tmp_path / "rows"), True, 4)
    sizes.KINDS[case.kind](job)
    rows = {row["what"]: row for row in harness.read_rows(tmp_path / "rows")}
    wanted = {"steps": ("step_peak_driver", "step_time"), "train": ("train_peak", "train_time"),
              "decode": ("decode_peak_driver", "decode_step")}[case.kind]  # fmt: skip
    assert {f"{case.preset}/{case.label}/{what}" for what in wanted} <= rows.keys()
    if case.kind == "steps":
        assert rows[f"{case.preset}/{case.label}/step_time"]["steps"] == case.steps
    for row in rows.values():
        assert row.get("finite", True) and (row["unit"] != "GB" or row["planned"] >= 0)


def test_a_case_that_fails_or_hangs_takes_no_other_with_it(tmp_path, monkeypatch, capsys):
    """The second is killed in the middle: what it had written by then counts."""
    limits = []

    def child(module, job, seconds, environment):
        limits.append(seconds)
        harness.append_row(common.row(f"{job['case']}/peak", "ours", 1.0, "GB"), job["file"])
        return {"70b": 1, "3b-whole": "more than 5 s"}.get(job["case"], 0)

    monkeypatch.setattr(harness, "run_child", child)
    asked = ["70b", "3b-whole", "32b"]
    with pytest.raises(SystemExit, match="failed: 70b, 3b-whole"):
        sizes.run_all(SimpleNamespace(only=asked, minutes=1, smoke=False, rows=8, out=tmp_path))
    assert len(limits) == 3 and max(limits) <= 60
    assert "70b/peak" in capsys.readouterr().out
    common.join("sizes", [tmp_path / "sizes.json"], tmp_path / "joined")
    assert (tmp_path / "joined" / "sizes.json").exists()
