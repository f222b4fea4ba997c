"""Write the tables of README.md and of pages in docs/: no figure in them is typed. They come from
benchmarks/results/*.json, and from the planner where the table says so.

python -m benchmarks.readme           # rewrites what stands between the markers in these pages
python -m benchmarks.readme --check   # exit status 1 if that would change anything (CI)
"""

import json
import sys

from nbhelpers import memory, presets
from notebooks.build import MODELS as NOTEBOOKS
from notebooks.build import badges

from . import performance, recipe_tables
from .fits import sizes, whole_learned
from .method_tables import cost, methods, peaks, real
from .plots import plots
from .tables import MODELS, ROOT, Results, number, table


def ratio(ours: float | None, theirs: float | None) -> str:
    return "–" if not ours or not theirs else f"{ours / theirs:.2f}"


def quickstart() -> str:
    cpu, gpu = Results("quickstart"), Results("quickstart_gpu")
    rows = []
    for results, name, title in (
        (cpu, "seed-0", "CPU, seed 0"), (cpu, "seed-1", "CPU, seed 1"), (cpu, "seed-2", "CPU, seed 2"),
        (cpu, "nf4-lora-16", "CPU, 4-bit, LoRA r=16"), (gpu, "gpu", "GPU"),
        (gpu, "gpu-nf4-lora-16", "GPU, 4-bit, LoRA r=16"),
        (gpu, "gpu-nf4-lora-16-t4", "GPU, 4-bit, LoRA r=16, as a T4 would"),
    ):  # fmt: skip
        shares = ("accuracy_before", "accuracy_after", "format_before", "format_after")
        values = [f"{results(f'workshop/{name}/{share}'):.1%}" for share in shares]
        probes = [f"{results(f'workshop/{name}/probe_{when}'):g}" for when in ("before", "after")]
        generated, seconds = (results(f"workshop/{name}/{what}") for what in ("generated", "seconds"))
        tokens = "–" if generated is None else f"{generated:,.0f}"
        rows.append([title, *values, " → ".join(probes), tokens, number(seconds, 0, " s")])
    header = ["", "right before", "right after", "in form before", "in form after", "9.11 or 9.9?"]
    header += ["tokens generated", "GRPO took"]
    older = "" if gpu("workshop/gpu/generated") else " GPU rows: the recipe before this one, 80 steps of 8 questions."
    return f"{table(header, rows)}\n\nCPU: {cpu.source()} GPU: {gpu.source()}{older}"


def loader() -> str:
    results = Results("loader")
    rows = []
    for name, title in MODELS.items():
        for quantization in ("nf4", "dynamic"):
            key = f"{name}/{quantization}"
            rows.append([
                f"{title}, {quantization}", number(results(f"{key}/final")), number(results(f"{key}/gpu_peak")),
                number(results(f"{key}/host_peak")), number(results(f"{key}/host_peak", "transformers")),
                number(results(f"{key}/seconds"), 1), number(results(f"{key}/seconds", "transformers"), 1),
            ])  # fmt: skip
    header = ["", "GB on the card", "GPU peak", "host peak", "transformers' host peak", "seconds", "transformers'"]
    return f"{table(header, rows)}\n\n{results.source()}"


def kernels() -> str:
    results = Results("kernels")
    rows, keys = [], []
    for name, title in MODELS.items():
        key = f"{name}/decoder_layer"
        for metric, unit, digits in (("forward+backward", "ms of its kernels", 1),
                                     ("forward+backward/wall", "ms by the clock, Python included", 1),
                                     ("saved", "GB", 2), ("peak", "GB", 2)):  # fmt: skip
            ours, stock = results(f"{key}/{metric}"), results(f"{key}/{metric}", "stock")
            keys.append((f"{key}/{metric}", "ours"))
            values = [number(ours, digits), number(stock, digits), ratio(ours, stock)]
            rows.append([f"{title}, one layer, {metric.removesuffix('/wall')} ({unit})", *values])
    key = "llama-3.1-8b/linear_logprob 32768x128256/forward+backward"
    for metric, unit, digits in (("", "ms", 1), ("/peak", "GB", 2)):
        ours, trl = results(key + metric), results(key + metric, "trl")
        label = (
            f"log-probabilities of 32,768 tokens x 128,256 words, forward+backward{metric.replace('/', ' ')} ({unit})"
        )
        rows.append([label, number(ours, digits), f"{number(trl, digits)} (TRL)", ratio(ours, trl)])
    return f"{table(['', 'ours', 'stock', 'ratio'], rows)}\n\n{results.source(*keys)}"


def step() -> str:
    results = Results("step")
    rows, keys = [], []
    for name, title in MODELS.items():
        for length in ("1K", "4K", "20K"):
            peak, time = f"{name}/{length}/train_peak", f"{name}/{length}/train_time"
            cells = [(peak, "ours", 2), (peak, "planner", 2), (peak, "trl-1", 1), (peak, "trl-8", 1)]
            cells += [(time, "ours", 2), (time, "trl-1", 2), (time, "trl-8", 2)]
            rows.append([f"{title}, 8 x {length}", *(number(results(what, who), n) for what, who, n in cells)])
            keys += [(what, who) for what, who, _ in cells]
    header = ["", "ours, GB", "planned, GB", "TRL 1 row, GB", "TRL 8 rows, GB"]
    header += ["ours, s", "TRL 1 row, s", "TRL 8 rows, s"]
    return f"{table(header, rows)}\n\n{results.source(*keys)}"


def engines() -> str:
    results, colocated = Results("engines"), Results("vllm")
    rows, keys, their_keys = [], [], []
    for name, title in MODELS.items():
        for label, metric, digits in (
            *((f"tokens/s, batch {batch}", f"batch-{batch}/decode", 0) for batch in (8, 32, 128)),
            ("seconds to the first token", "ready", 1),
        ):
            key = f"{name}/{metric}"
            if results(key, "graph") is not None:
                values = [results(key, "graph"), results(key, "vllm"), colocated(key, "vllm")]
                values.append(results(key, "transformers"))
                rows.append([f"{title}, {label}", *(number(value, digits) for value in values)])
                keys += [(key, who) for who in ("graph", "vllm", "transformers")]
                their_keys.append((key, "vllm"))
    header = ["", "graph engine", "vLLM", "vLLM on our weights", "transformers"]
    sources = f"{results.source(*keys)} vLLM on our weights: {colocated.source(*their_keys)}"
    return f"{table(header, rows)}\n\n{sources}"


def whole() -> str:
    results = Results("engines")
    rows, keys = [], []
    for setting, who, said in (
        ("1K", "ours", ""), ("1K", "trl", ", TRL with vLLM"), ("1K-t4", "ours", ", as a T4 would"),
        ("1K-t4-2-gpus", "ours", ", as two T4s would, 16 x 1K"), ("20K", "ours", ", 8 x 20K tokens"),
    ):  # fmt: skip
        for name, title in MODELS.items():
            key, time = (f"{name}/{setting}/step_peak_driver", who), (f"{name}/{setting}/step_time", who)
            if results(*key) is not None:
                cap = next(row.get("cap") for row in results.document["rows"] if (row["what"], row["who"]) == key)
                rows.append([title + said, number(cap, 0), number(results(*key)), number(results(*time), 1)])
                keys += [key, time]
    return f"{table(['', 'cap, GB', 'by the driver, GB', 'seconds a step'], rows)}\n\n{results.source(*keys)}"


def two_cards() -> str:
    """A step of one card, and of two that write and learn from twice the texts."""
    results = Results("engines")
    rows, keys = [], []
    for ragged, said in (("", "all of 768 tokens"), ("-ragged", "of 192 to 768 tokens")):
        what = f"llama-3.1-8b/1K-t4-2-gpus{ragged}/efficiency"
        keys.append((what, "ours"))
        row = next((row for row in results.document["rows"] if row["what"] == what), {})
        one, two, share = (row.get(key) for key in ("one_s", "several_s", "value"))
        percent = "–" if share is None else f"{share:.1%}"
        rows.append([f"Llama-3.1-8B, as T4s would, answers {said}", number(one), number(two), percent])
    header = ["", "one card, 8 texts, s", "two cards, 16 texts, s", "share"]
    return f"{table(header, rows)}\n\n{results.source(*keys)}"


def outgrow() -> str:
    """The example for stock TRL with FSDP2 in docs/outgrow.md, as `python -m benchmarks.outgrow` ran it."""
    results, what = Results("outgrow"), "qwen2.5-1.5b/outgrow-fsdp2-2-gpus"
    keys = [(f"{what}/{metric}", "trl") for metric in ("step_time", "peak")]
    rows = [["Qwen2.5-1.5B at its real shape, answers of 64 tokens", *(number(results(*key)) for key in keys)]]
    header = ["two GPUs", "seconds a step", "GB of a card, by torch"]
    return f"{table(header, rows)}\n\n{results.source(*keys)}"


CARDS = (4, 6, 8, 10, 12, 15, 16, 20, 24, 32, 40, 48, 80)  # GB


def lessons() -> str:
    rows = []
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        title = json.loads(path.read_text())["cells"][0]["source"][0].strip("# \n")
        rows.append([f"[{path.stem}](notebooks/{path.name})", title, badges(path.name)])
    return table(["lesson", "what it is about", "open"], rows, words=3)


def card_from(name: str) -> float | None:
    """The smallest common card that the preset fits on, GB, as planned."""
    return next((gb for gb in CARDS if memory.can_train(presets.get(name), gb)), None)


def models() -> str:
    engines = Results("engines")
    rows, keys = [], []
    for name in NOTEBOOKS:
        key = (f"{name}/1K/step_peak_driver", "ours")
        link = f"[{presets.get(name).title}](notebooks/models/{name}.ipynb)"
        gated = "yes" if presets.get(name).gated else "no"
        badge = badges(f"models/{name}.ipynb")
        rows.append([link, badge, gated, number(card_from(name), 0, " GB"), number(engines(*key))])
        keys.append(key)
    header = ["model", "open", "login", "card from (planned)", "step, GB (measured)"]
    return f"{table(header, rows, words=3)}\n\nMeasured on {engines.where(*keys)}."


REAL_RUNS = (
    ("t4", "as a T4: fp16, 15 GB", "t4"), ("7GB", "bf16, 7 GB", "7GB"),
    ("7GB-word_problems", "7 GB, taught with our own stories", "7GB"),
)  # fmt: skip


def learned(model: str = "qwen2.5-coder-1.5b", runs: tuple[tuple[str, str, str], ...] = REAL_RUNS) -> str:
    """What real weights learned from the model notebook: the worst of the seeds of each run. `runs` are (name, title,
    name of the run that scored the untrained model as this one would have)."""
    results = Results("real")
    kinds = (
        ("numbers", "word problems, other numbers"), ("templates", "word problems of other kinds"),
        ("own_templates", "stories of `tasks.word_problems`, held out"), ("decimals", "which decimal is bigger"),
        ("plain", "60 plain questions, for what was lost"),
    )  # fmt: skip
    header = ["right, in whatever form", *(title for _, title, _ in runs)]
    keys = [(f"{model}/{run}/{name}_after", "ours") for run, *_ in runs for name, _ in kinds]
    keys += [(f"{model}/{untrained}/{name}_before", "ours") for *_, untrained in runs for name, _ in kinds]

    def share(key: str) -> str:
        value = results(key)
        return "–" if value is None else f"{100 * value:.1f}"

    rows = [
        [
            title,
            *(
                f"{share(f'{model}/{untrained}/{name}_before')} → {share(f'{model}/{run}/{name}_after')} %"
                for run, _, untrained in runs
            ),
        ]
        for name, title in kinds
    ]
    rows.append(["in form, after", *(f"{share(f'{model}/{run}/in_form_after')} %" for run, *_ in runs)])
    tries = (f"{share(f'{model}/{untrained}/pass_8_before')} %" for *_, untrained in runs)
    rows.append(["right with eight tries, before", *tries])
    rows.append(["steps", *(number(results(f"{model}/{run}/steps"), 0) for run, *_ in runs)])
    rows.append(["minutes of training", *(_minutes(results(f"{model}/{run}/seconds")) for run, *_ in runs)])
    rows.append(["GB by the driver", *(number(results(f"{model}/{run}/peak_driver")) for run, *_ in runs)])
    return f"{table(header, rows)}\n\n{results.source(*keys)}"


def first() -> str:
    """What the first screen says: for whom, what you get, how long."""
    quickstart, real = Results("quickstart"), Results("real")
    seconds = [quickstart(f"workshop/seed-{seed}/seconds") for seed in range(3)]
    before, after = (100 * real(f"qwen2.5-coder-1.5b/t4/templates_{when}") for when in ("before", "after"))
    smallest = min(gb for name in NOTEBOOKS if (gb := card_from(name)))
    whom = f"a free Colab or Kaggle GPU, a gaming card from {smallest} GB (planned), or just a laptop"
    what = "a model that is right more often, and yours to keep (adapter, 16-bit model or GGUF)"
    how_long = f"on two CPU cores the quickstart trains for {min(seconds):.0f} to {max(seconds):.0f} seconds"
    real_one = f"took {_minutes(real('qwen2.5-coder-1.5b/t4/seconds'))} minutes on an H100, in a T4's memory"
    return (
        f"- **For whom:** anyone who knows some Python and has {whom}.\n"
        f"- **What you get:** {what}. A 1.5B went from {before:.1f} to {after:.1f} % right on kinds of word problems "
        "it had not practised.\n"
        f"- **How long:** {how_long}. The 1.5B {real_one}; a real T4 is slower, and we have not timed one."
    )


PEERS = {"transformers": "transformers", "stock": "transformers + peft"}
PEERS |= {"vllm": "vLLM, no adapter", "trl": "TRL + vLLM"}


def peers() -> str:
    """What was measured side by side on one card, the rows where the peer is ahead among them."""
    loading, kernels, engines, real = Results("loader"), Results("kernels"), Results("engines"), Results("real")
    llama, layer, whole = "llama-3.1-8b", "llama-3.1-8b/decoder_layer", "qwen2.5-1.5b/1K"
    rows, days = [], set()
    for results, what, key, us, peer, digits in (
        (loading, "loading: host memory, GB", f"{llama}/nf4/host_peak", "ours", "transformers", 1),
        (loading, "loading: seconds", f"{llama}/nf4/seconds", "ours", "transformers", 1),
        (kernels, "one layer, forward + backward: ms", f"{layer}/forward+backward", "ours", "stock", 1),
        (kernels, "one layer, forward + backward: GB", f"{layer}/peak", "ours", "stock", 2),
        (engines, "generation, batch 8: tokens/s", f"{llama}/batch-8/decode", "graph", "transformers", 0),
        (engines, "generation, batch 8: tokens/s", f"{llama}/batch-8/decode", "graph", "vllm", 0),
        (engines, "generation, batch 128: tokens/s", f"{llama}/batch-128/decode", "graph", "vllm", 0),
        (engines, "start to the first token: seconds", f"{llama}/ready", "graph", "transformers", 1),
        (engines, "start to the first token: seconds", f"{llama}/ready", "graph", "vllm", 1),
        (engines, "whole GRPO step of the 1.5B: GB", f"{whole}/step_peak_driver", "ours", "trl", 1),
        (engines, "whole GRPO step of the 1.5B: seconds", f"{whole}/step_time", "ours", "trl", 1),
        (real, "60 steps of the real 1.5B: seconds", "qwen2.5-coder-1.5b/seconds_60_steps", "ours", "trl", 0),
    ):  # fmt: skip
        rows.append([what, PEERS[peer], number(results(key, us), digits), number(results(key, peer), digits)])
        days.add(results.where((key, us), (key, peer)))
    return f"{table(['', 'peer', 'here', 'peer'], rows, words=2)}\n\nMeasured on {'; '.join(sorted(days))}."


def _minutes(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds / 60:.1f}"


TABLES = {
    "first": first,
    "learned": learned,
    "too_small": lambda: learned("smollm2-135m", (("gpu", "SmolLM2-135M, bf16", "gpu"),)),
    "lessons": lessons,
    "models": models,
    "peers": peers,
    "quickstart": quickstart,
    "loader": loader,
    "kernels": kernels,
    "step": step,
    "engines": engines,
    "whole": whole,
    "two_cards": two_cards,
    "outgrow": outgrow,
    "methods": methods,
    "methods_real": real,
    "methods_cost": cost,
    "method_peaks": peaks,
    "sizes": sizes,
    "whole_learned": whole_learned,
    "planned_recipes": recipe_tables.planned,
    "planned_stages": recipe_tables.stages,
    "measured_recipes": recipe_tables.measured,
    "r1": recipe_tables.r1,
    "r1_real": recipe_tables.r1_real,
    "stages_real": recipe_tables.stages_real,
    "countdown": recipe_tables.countdown,
    "ratios": performance.ratios,
    "eight_bits": performance.eight_bits,
}
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "recipes", "performance", "outgrow")),
)


def render(text: str) -> str:
    """A page's text with each `<!-- name -->` ... `<!-- /name -->` filled in. KeyError for a marker without a table."""
    parts = []
    while (start := text.find("<!-- table ")) >= 0:
        name = text[start:].split()[2]
        begin = text.index("-->", start) + len("-->")
        end = text.index(f"<!-- /{name} -->", begin)
        parts.append(f"{text[:begin]}\n{TABLES[name]()}\n")
        text = text[end:]
    return "".join([*parts, text])


def main() -> int:
    before = [page.read_text() for page in PAGES]
    after = [render(text) for text in before]
    if "--check" in sys.argv:
        return int(before != after)
    for page, text in zip(PAGES, after, strict=True):
        page.write_text(text)
    plots()
    return 0


if __name__ == "__main__":
    sys.exit(main())
