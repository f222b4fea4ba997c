"""Write the README's tables from benchmarks/results/*.json: no figure in it is typed.

python benchmarks/readme.py           # rewrites what stands between the markers in README.md
python benchmarks/readme.py --check   # exit status 1 if that would change anything (CI)
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {"qwen2.5-1.5b": "Qwen2.5-1.5B", "llama-3.1-8b": "Llama-3.1-8B", "phi-4": "Phi-4 14B"}


class Results:
    """One results file; `results("what", "who")` is a value, None where there is no such row."""

    def __init__(self, name: str):
        self.document = json.loads((RESULTS / f"{name}.json").read_text())
        self.values = {(row["what"], row["who"]): row["value"] for row in self.document["rows"]}

    def __call__(self, what: str, who: str = "ours") -> float | None:
        return self.values.get((what, who))

    def source(self) -> str:
        host = self.document["host"]
        machine = host.get("gpu") or f"{host['cores']} cores of a {host['cpu']}"
        packages = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes")
        versions = ", ".join(f"{name} {host[name]}" for name in packages if name in host)
        return f"Measured on {machine}, {self.document['date'][:10]}; {versions}; `{self.document['command']}`."


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def ratio(ours: float | None, theirs: float | None) -> str:
    return "–" if not ours or not theirs else f"{ours / theirs:.2f}"


def quickstart() -> str:
    results = Results("quickstart")
    names = {"seed-0": "seed 0", "seed-1": "seed 1", "seed-2": "seed 2", "nf4-lora-16": "4-bit, LoRA r=16"}
    rows = []
    for name, title in names.items():
        shares = ("accuracy_before", "accuracy_after", "format_before", "format_after")
        values = [f"{results(f'workshop/{name}/{share}'):.1%}" for share in shares]
        probes = [f"{results(f'workshop/{name}/probe_{when}'):g}" for when in ("before", "after")]
        rows.append([title, *values, " → ".join(probes), number(results(f"workshop/{name}/seconds"), 0, " s")])
    header = ["", "right before", "right after", "in form before", "in form after", "9.11 or 9.9?", "GRPO took"]
    return f"{table(header, rows)}\n\n{results.source()}"


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
    rows = []
    for name, title in MODELS.items():
        key = f"{name}/decoder_layer"
        for metric, unit, digits in (("forward+backward", "ms", 1), ("saved", "GB", 2), ("peak", "GB", 2)):
            ours, stock = results(f"{key}/{metric}"), results(f"{key}/{metric}", "stock")
            values = [number(ours, digits), number(stock, digits), ratio(ours, stock)]
            rows.append([f"{title}, one layer, {metric} ({unit})", *values])
    key = "llama-3.1-8b/linear_logprob 32768x128256/forward+backward"
    for metric, unit, digits in (("", "ms", 1), ("/peak", "GB", 2)):
        ours, trl = results(key + metric), results(key + metric, "trl")
        label = (
            f"log-probabilities of 32,768 tokens x 128,256 words, forward+backward{metric.replace('/', ' ')} ({unit})"
        )
        rows.append([label, number(ours, digits), f"{number(trl, digits)} (TRL)", ratio(ours, trl)])
    return f"{table(['', 'ours', 'stock', 'ratio'], rows)}\n\n{results.source()}"


TABLES = {"quickstart": quickstart, "loader": loader, "kernels": kernels}


def render(text: str) -> str:
    """README text with each `<!-- name -->` ... `<!-- /name -->` filled in. KeyError for a marker without a table."""
    parts = []
    while (start := text.find("<!-- table ")) >= 0:
        name = text[start:].split()[2]
        begin = text.index("-->", start) + len("-->")
        end = text.index(f"<!-- /{name} -->", begin)
        parts.append(f"{text[:begin]}\n{TABLES[name]()}\n")
        text = text[end:]
    return "".join([*parts, text])


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if "--check" in sys.argv:
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
