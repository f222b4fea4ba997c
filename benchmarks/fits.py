"""The tables of docs/benchmarks.md that say what fits: large models, models trained whole, long texts."""

from .tables import Results, number, table


def sizes() -> str:
    """What fits: large models, models trained whole, layers on the host, and 128K tokens."""
    results = Results("sizes")
    cap = {row["what"]: row.get("cap") for row in results.document["rows"]}
    rows, keys = [], []
    for what, key, time in (
        ("Qwen2.5-32B, 8 x 1K", "qwen2.5-32b/1K/step", "time"),
        ("Llama-3.3-70B, 8 x 1K", "llama-3.3-70b/1K/step", "time"),
        ("Qwen2.5-3B, every weight trained, 8 x 1K", "qwen2.5-3b/whole/step", "time"),
        ("Qwen2.5-1.5B, every weight trained, 8 x 1K", "qwen2.5-1.5b/whole/step", "time"),
        ("Llama-3.1-8B, layers waiting on the host, 8 x 1K", "llama-3.1-8b/swap/step", "time"),
        ("Llama-3.1-8B, 1 x 128K, training half", "llama-3.1-8b/128K/train", "time"),
        ("Llama-3.1-8B, a token at the end of 128K", "llama-3.1-8b/128K/decode", "step"),
    ):
        peak, time = f"{key}_peak_driver", f"{key}_{time}"
        planned = next((row["planned"] for row in results.document["rows"] if row["what"] == peak), None)
        took = results(time)
        seconds = number(took and took / 1000, 3) if time.endswith("step") else number(took, 1)  # ms of a token
        values = number(cap.get(peak), 0), number(results(peak)), number(planned), seconds
        rows.append([what, *values])
        keys += [(peak, "ours"), (time, "ours")]
    header = ["", "cap, GB", "by the driver, GB", "planned, GB", "seconds"]
    return f"{table(header, rows)}\n\n{results.source(*keys)}"


def whole_learned() -> str:
    """What the small model learned with every weight in 16 bits, and in fp32."""
    results = Results("whole")
    (row,) = (row for row in results.document["rows"] if row["what"] == "workshop/whole/accuracy_after")
    shares = [f"{100 * row[key]:.1f} %" for key in ("value", "fp32")]
    return f"{table(['', 'bf16', 'fp32'], [['right, after', *shares]])}\n\n{results.source()}"
