"""A small half of `make torture`: a kill, a signal, twins and some flipped bits. The rest: tests/helpers/torture.py."""

import sys

import bad_inputs
import pytest
import torture


@pytest.mark.skipif(sys.platform != "linux", reason="forks and kills")
def test_a_small_half_of_the_torture_holds(tmp_path, warm, monkeypatch):
    bench = torture.Bench(warm, tmp_path, seed=1)
    monkeypatch.setattr(torture, "PHASES", {"save": torture.PHASES["save"]})
    rows = [torture.kills(bench, 1), torture.signals(bench, 1), torture.twins(bench, 1), torture.flips(bench, 26)]
    assert [row.lost for row in rows] == [[], [], [], []]
    assert sum(row.held for row in rows) == 29
    assert "| tried | held | lost |" in torture.table(rows)


def test_what_is_lost_is_counted_and_named():
    row = torture.Row("a row")
    row.count("one", None)
    row.count("two", "other weights")
    assert (row.tried, row.held, row.lost) == (2, 1, ["two: other weights"])
    assert torture.table([row, torture.Row("nothing")]).endswith("| a row | 2 | 1 | 1 |")


def test_bad_inputs_are_those_of_the_tests_and_a_wrong_answer_to_one_is_a_fault(tmp_path):
    cases = dict(bad_inputs.CASES)
    assert len(bad_inputs.CASES) > 100
    assert cases["a missing file is named []"](tmp_path) is None

    def test_of_what_is_taken(tmp_path, name):
        with pytest.raises(ValueError):
            (tmp_path / name).write_text("fine")

    assert bad_inputs.fault(test_of_what_is_taken, {"name": "x"}, tmp_path) == "Failed: DID NOT RAISE ValueError"
