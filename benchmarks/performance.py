"""The tables of docs/performance.md: what a profile showed, and how much faster than before on one card."""

from .tables import RESULTS, Results, number, table

BASE = "f990437"
GOALS = {  # what was aimed at, as a ratio to before: of seconds and launches at most, of tokens/s at least
    "llama-3.1-8b/20K-9.3GB/train_time": 0.8, "qwen2.5-1.5b/4K-roomy/train_time": 0.95,
    "llama-3.1-8b/1K-roomy/train_time": 0.85, "qwen2.5-1.5b/batch-8/decode": 1.4, "llama-3.1-8b/batch-8/decode": 1.3,
    "phi-4/batch-8/decode": 1.25, "llama-3.1-8b/batch-8/launches": 0.69, "llama-3.1-8b/prefill-13K/seconds": 0.55,
    "qwen2.5-1.5b/1K-under-4GB/step_time": 0.75, "llama-3.1-8b/16-bits/seconds": 0.5,
    "llama-3.1-8b/packed/seconds": 0.2,
}  # fmt: skip
LEFT_OUT = "/step"  # its milliseconds are in the tokens/s already


def ratios() -> str:
    """Every row of `python -m benchmarks.ratios`: before, now, their ratio, and the goal where there is one."""
    if not (RESULTS / "ratios.json").exists():
        return f"`python -m benchmarks.ratios`, which measures this tree beside {BASE}, has not been run on a GPU yet."
    results = Results("ratios")
    rows = []
    for what in dict.fromkeys(row["what"] for row in results.document["rows"] if not row["what"].endswith(LEFT_OUT)):
        before, ours = results(what, "before"), results(what)
        unit = next(row["unit"] for row in results.document["rows"] if row["what"] == what)
        share = ours / before if ours and before else None
        rows.append([f"`{what}`, {unit}", number(before, 3), number(ours, 3), number(share), number(GOALS.get(what))])
    header = ["", f"{BASE}", "now", "ratio", "goal"]
    return f"{table(header, rows)}\n\n{results.source()}"


PROFILE = (  # (what, its rows as (label, row, who)), in the order of the page
    ("Qwen2.5-1.5B, training 8 x 4K by budget", [
        (gb, f"qwen2.5-1.5b/4K-{gb.replace(' ', '')}/train_time", "before")
        for gb in ("2.1 GB", "3 GB", "4 GB", "6 GB", "8 GB", "15 GB", "roomy")]),
    ("Llama-3.1-8B, training one row of 20K in 9.3 GB", [
        ("packed operator", "llama-3.1-8b/20K-9.3GB/train_time, one row", "varlen"),
        ("SDPA", "llama-3.1-8b/20K-9.3GB/train_time, one row", "sdpa"),
        ("TRL", "llama-3.1-8b/20K/train_time, one row", "trl")]),
    ("attention alone, forward and backward, 20K and 4K tokens", [
        (f"{way}, {length}", f"llama-3.1-8b/attention-{length}/forward+backward", who)
        for length in ("20K", "4K") for way, who in (("packed operator", "varlen"), ("SDPA", "sdpa"))]),
    ("Llama-3.1-8B, a decoding step", [
        *((f"batch {n}", f"llama-3.1-8b/batch-{n}/step", "before") for n in (1, 8, 32, 128)),
        ("the weights once", "llama-3.1-8b/weights once", "before"),
        ("batch 8", "llama-3.1-8b/batch-8/launches", "before")]),
    ("the same in dynamic 4-bit, batch 8", [
        ("all NF4", "llama-3.1-8b/batch-8-dynamic/step", "nf4"),
        ("each v_proj in 16 bits", "llama-3.1-8b/batch-8-dynamic/step", "v_proj"),
        ("a quarter of up_proj too", "llama-3.1-8b/batch-8-dynamic/step", "v_proj+up_proj")]),
    ("a prompt of 13,000 tokens", [
        ("a mask for each key head", "llama-3.1-8b/prefill-13K/seconds", "before"),
        ("FlashAttention over the cache", "llama-3.1-8b/prefill-13K/seconds", "flash")]),
    ("loading 6.1 GB of bf16", [
        ("read, copy, quantise in turn", "6.1 GB of bf16/loading", "before"),
        ("read ahead", "6.1 GB of bf16/loading", "read ahead")]),
)  # fmt: skip


def profile() -> str:
    """What the profile of f990437 showed."""
    results = Results("profile")
    units = {row["what"]: row["unit"] for row in results.document["rows"]}
    rows = []
    for what, parts in PROFILE:
        said = [f"{label} {results(key, who):g} {units[key]}" for label, key, who in parts]
        rows.append([what, "; ".join(said)])
    return f"{table(['', 'seen'], rows, words=2)}\n\n{results.source()}"
