"""The tables of docs/performance.md: how much faster than before, on one card, and keys and values in 8 bits."""

from .tables import Results, number, table

BASE = "f990437"
GOALS = {  # what was aimed at, as a ratio to before: of seconds and launches at most, of tokens/s at least
    "llama-3.1-8b/20K-9.3GB/train_time": 0.8, "qwen2.5-1.5b/4K-roomy/train_time": 0.95,
    "llama-3.1-8b/1K-roomy/train_time": 0.85, "qwen2.5-1.5b/batch-8/decode": 1.4, "llama-3.1-8b/batch-8/decode": 1.3,
    "phi-4/batch-8/decode": 1.25, "llama-3.1-8b/batch-8/launches": 0.69, "llama-3.1-8b/prefill-13K/seconds": 0.55,
    "qwen2.5-1.5b/1K-under-4GB/step_time": 0.75, "llama-3.1-8b/16-bits/seconds": 0.5,
    "llama-3.1-8b/packed/seconds": 0.2, "llama-3.1-8b/20K-kv8/step_time": 0.6, "quickstart/grpo_seconds": 0.5,
}  # fmt: skip


def ratios() -> str:
    """Every row of `python -m benchmarks.ratios`, and the quickstart's: before, now, their ratio, and the goal."""
    files = [Results("ratios"), Results("quickstart_before")]
    if not any(results.values for results in files):
        return f"`python -m benchmarks.ratios`, which measures this tree beside {BASE}, has not been run on a GPU yet."
    rows = []
    for results in files:
        for what in dict.fromkeys(row["what"] for row in results.document["rows"]):
            before, ours = results(what, "before"), results(what)
            unit = next(row["unit"] for row in results.document["rows"] if row["what"] == what)
            share = ours / before if ours and before else None
            rows.append(
                [f"`{what}`, {unit}", number(before, 3), number(ours, 3), number(share), number(GOALS.get(what))]
            )
    header = ["", f"{BASE}", "now", "ratio", "goal"]
    return f"{table(header, rows)}\n\n{' '.join(results.source() for results in files if results.values)}"


def eight_bits() -> str:
    """Keys and values in 16 bits and in 8: how far the sampler is from the model."""
    results, row, keys = Results("engines"), ["mean gap of a token's log-probability, nats"], []
    for head in ("qwen2.5-1.5b", "llama-3.1-8b", "qwen2.5-1.5b/qwen"):
        names = [f"{head}/kv-{bits}/logprob_gap" for bits in (16, 8)]
        row.append(" → ".join(number(results(name, "graph"), 4) for name in names))
        keys += [(name, "graph") for name in names]
    header = ["16 → 8 bits", "Qwen2.5-1.5B", "Llama-3.1-8B", "Qwen2.5-Coder-1.5B, real weights"]
    return f"{table(header, [row])}\n\n{results.source(*keys)}"
