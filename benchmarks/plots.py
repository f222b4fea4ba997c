"""The plots of README.md and docs/benchmarks.md, from benchmarks/results; `python -m benchmarks.readme` writes them."""

from .tables import MODELS, ROOT, Results

PLOTS = ROOT / "docs"


def plots() -> None:
    """docs/learning.png: the real 1.5B here and by TRL; docs/step_length.png, docs/step_groups.png: what the training
    half costs against length and group size."""
    from matplotlib.figure import Figure

    from .real import against_trl

    real = Results("real")
    rows = [row for row in real.document["rows"] if row["what"] == "qwen2.5-coder-1.5b/seconds_60_steps"]
    against_trl.plot(rows, PLOTS / "learning.png")

    results = Results("step")
    lengths = {"1K": 1024, "4K": 4096, "20K": 20480}
    groups = (2, 4, 8, 16, 32)
    for file, xs, label, keys in (
        ("step_length", list(lengths.values()), "tokens of one completion and its prompt", list(lengths)),
        ("step_groups", list(groups), "completions of one prompt, 1K tokens each", [f"1K/group-{g}" for g in groups]),
    ):
        figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
        for axes, metric, unit in zip(figure.subplots(1, 2), ("train_peak", "train_time"), ("GB", "s"), strict=True):
            for name, title in MODELS.items():
                points = [(x, results(f"{name}/{key}/{metric}")) for x, key in zip(xs, keys, strict=True)]
                points = [point for point in points if point[1] is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=title)
            axes.set(xscale="log", xticks=xs, xlabel=label, ylabel=f"{metric.replace('_', ' ')}, {unit}", ylim=0)
            axes.set_xticklabels(map(str, xs))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(PLOTS / f"{file}.png", metadata={"Software": None})
