"""The tables of docs/benchmarks.md about the methods: the quickstart's task, a real 1.5B, and a step of a 1B."""

from statistics import fmean

from nbhelpers import memory

from .tables import Results, number, table

MODEL = "qwen2.5-coder-1.5b"  # what the rows of the real runs call it
METHODS = {"grpo": "GRPO", "rloo": "RLOO", "sft": "SFT", "online_dpo": "Online DPO", "ppo": "PPO"}


def methods() -> str:
    """What each method learned of the quickstart's task, the worst of its seeds, and what it takes."""
    results = Results("methods")
    seeds = {row["what"]: row["of_seeds"] for row in results.document["rows"] if "of_seeds" in row}
    rows, keys = [], []
    for name, title in METHODS.items():
        before, after, seconds, gb = (
            f"workshop/{name}/{what}" for what in ("accuracy_before", "accuracy_after", "seconds", "peak")
        )
        plan = memory.plan(
            "llama-3.2-1b", 8, max_prompt_length=256, max_completion_length=768, rows=8, method=name,
            attention="efficient",
        )  # fmt: skip
        assert plan.fits, name
        planned = max(plan.training_peak, plan.generation_peak)
        count = number(seeds.get(after), 0)
        right = shares(results(before), results(after))
        rows.append([title, right, count, number(results(seconds), 0), number(results(gb)), number(planned)])
        keys += [(what, "ours") for what in (after, seconds, gb)]
    header = ["", "right, before → after", "seeds", "seconds", "GB, all of the process", "Llama-3.2-1B, GB (planned)"]
    return f"{table(header, rows)}\n\n{results.source(*keys)}"


def shares(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{before:.1%} → {after:.1%}"


def real() -> str:
    """What each method taught the real 1.5B. All start from the same model, which README's first table has asked."""
    results, untrained = Results("methods_gpu"), Results("real")
    curves = {row["what"]: row["points"] for row in results.document["rows"] if "points" in row}
    rows, keys = [], []
    for name, title in METHODS.items():
        head = f"{MODEL}/{name}"
        kinds = [
            shares(untrained(f"{MODEL}/7GB/{kind}_before"), results(f"{head}/{kind}_after"))
            for kind in ("numbers", "templates", "decimals")
        ]
        figures = [results(f"{head}/{what}") for what in ("steps", "seconds", "peak_driver")]
        column = 2 if name == "sft" else 1  # of a point: step, reward, loss, right
        curve = quarters([point[column] for point in curves.get(f"{head}/curve", ())])
        rows.append([title, *kinds, curve, *(number(x, digits) for x, digits in zip(figures, (0, 0, 2), strict=True))])
        keys += [(f"{head}/{what}", "ours") for what in ("numbers_after", "seconds", "curve")]
    header = ["", "numbers", "templates", "decimals", "reward by quarter of the run (SFT: loss)", "steps", "seconds",
              "GB by the driver"]  # fmt: skip
    return f"{table(header, rows)}\n\n{results.source(*keys)}"


def cost() -> str:
    """README's: seconds and GB of those runs, a method in each column."""
    results = Results("methods_gpu")
    runs = [[number(results(f"{MODEL}/{name}/{what}"), digits) for what, digits in (("seconds", 0), ("peak_driver", 2))]
            for name in METHODS]  # fmt: skip
    row = ["60 updates of the real 1.5B", *(f"{seconds} s, {gb} GB" for seconds, gb in runs)]
    return table(["", *METHODS.values()], [row])


def quarters(values: list[float | None]) -> str:
    """The mean of each quarter of a curve; a step without a value is left out."""
    known = [value for value in values if value is not None]
    size = len(known) / 4
    parts = [known[round(i * size) : round((i + 1) * size)] for i in range(4)]
    return " ".join(f"{fmean(part):.2f}" for part in parts if part) or "–"


def peaks() -> str:
    """A whole step of the 1B, and what was planned of it."""
    results = Results("step")
    rows, keys = [], []
    for name in ("online_dpo", "ppo"):
        head = f"llama-3.2-1b/{name}"
        driver, peak, seconds = (results(f"{head}/{what}") for what in ("step_peak_driver", "step_peak", "step_time"))
        planned = results(f"{head}/step_peak", "planner")
        part = None if not peak or not planned else planned / peak
        values = number(driver), number(peak), number(planned), number(part), number(seconds)
        rows.append([METHODS[name], *values])
        keys += [(f"{head}/{what}", "ours") for what in ("step_peak_driver", "step_peak", "step_time")]
    header = ["Llama-3.2-1B, 8 x 1K", "GB by the driver", "GB by torch", "planned", "planned / torch", "seconds a step"]
    return f"{table(header, rows)}\n\n{results.source(*keys)}"
