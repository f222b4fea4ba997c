"""docs/performance.md: its tables come from results files, and what was not run is said to be not run."""

import json

from benchmarks import performance, tables


def test_what_was_not_run_is_said_to_be_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "has not been run" in performance.ratios()


def test_a_ratio_stands_beside_its_goal(tmp_path, monkeypatch):
    host = {"cores": 2, "cpu": "any", "gpu": "NVIDIA H100", "torch": "2.11.0"}
    rows = [
        {"what": what, "who": who, "value": value, "unit": unit}
        for what, unit, values in (
            ("llama-3.1-8b/batch-8/decode", "tokens/s", (2000.0, 2600.0)), ("llama-3.1-8b/batch-8/step", "ms", (4, 3)),
            ("llama-3.1-8b/packed/seconds", "s", (6.0, None)),
        )
        for who, value in zip(("before", "ours"), values, strict=True) if value
    ]  # fmt: skip
    document = {"host": host, "date": "2026-11-26 21:05 UTC", "command": "call", "rows": rows}
    (tmp_path / "ratios.json").write_text(json.dumps(document))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = performance.ratios().splitlines()
    assert "| `llama-3.1-8b/batch-8/decode`, tokens/s | 2000.000 | 2600.000 | 1.30 | 1.30 |" in lines
    assert "| `llama-3.1-8b/packed/seconds`, s | 6.000 | – | – | 0.20 |" in lines
    assert "| `llama-3.1-8b/batch-8/step`, ms | 4.000 | 3.000 | 0.75 | – |" in lines
    assert "NVIDIA H100, 2026-11-26" in lines[-1]


def test_eight_bits_stand_behind_sixteen(tmp_path, monkeypatch):
    rows = [
        {"what": f"llama-3.1-8b/kv-{bits}/logprob_gap", "who": "graph", "value": gap, "unit": ""}
        for bits, gap in ((16, 0.026), (8, 0.033))
    ]
    document = {"host": {"gpu": "a card"}, "date": "day", "command": "call", "rows": rows}
    (tmp_path / "engines.json").write_text(json.dumps(document))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    made = performance.eight_bits()
    assert "nats | – → – | 0.0260 → 0.0330 | – → – |" in made
