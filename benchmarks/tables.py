"""What the pages that show measured figures share: a results file, read, and tables in Markdown."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]  # where this copy of it stands: a test puts it beside another README
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {"qwen2.5-1.5b": "Qwen2.5-1.5B", "llama-3.1-8b": "Llama-3.1-8B", "phi-4": "Phi-4 14B"}


class Results:
    """One results file; `results("what", "who")` is a value, None where there is no such row."""

    def __init__(self, name: str):
        file = RESULTS / f"{name}.json"
        self.document = json.loads(file.read_text()) if file.exists() else {"rows": []}
        self.values = {(row["what"], row["who"]): row["value"] for row in self.document["rows"]}

    def __call__(self, what: str, who: str = "ours") -> float | None:
        return self.values.get((what, who))

    def runs(self, *keys: tuple[str, str]) -> list[str]:
        """The runs, "date, command", that rows (what, who) came from; without keys the file's own."""
        return sorted({run for _, run in self._runs(*keys)})

    def where(self, *keys: tuple[str, str]) -> str:
        """The machines, and the day of the first of those runs on each."""
        first: dict[str, str] = {}
        for machine, run in sorted(self._runs(*keys)):
            first.setdefault(machine, run[:10])
        return "; ".join(f"{machine}, {day}" for machine, day in first.items())

    def _runs(self, *keys: tuple[str, str]) -> set[tuple[str, str]]:
        """Machine and run of those rows."""
        host = self.document["host"]
        machine = host.get("gpu") or f"{host['cores']} cores ({host['cpu']})"
        own = f"{self.document['date']}, {self.document['command']}"
        rows = [row for row in self.document["rows"] if (row["what"], row["who"]) in keys]
        return {(row.get("gpu", machine), row.get("run", own)) for row in rows} or {(machine, own)}

    def source(self, *keys: tuple[str, str]) -> str:
        """On what it was measured, with which versions, and by which calls; that it was not, if no row is there."""
        if not self.document["rows"] or (keys and not any(key in self.values for key in keys)):
            return "Not measured yet."
        host = self.document["host"]
        packages = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "vllm")
        versions = ", ".join(f"{name} {host[name]}" for name in packages if name in host)
        calls = ", ".join(f"`{run.partition(', ')[2]}`" for run in self.runs(*keys))
        return f"Measured on {self.where(*keys)}; {versions}; {calls}."


def table(header: list[str], rows: list[list[str]], words: int = 1) -> str:
    """The first `words` columns hold words, the others numbers."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"
