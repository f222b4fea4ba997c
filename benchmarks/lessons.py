"""Write nbhelpers/measured.json: the rows of benchmarks/results/*.json that lessons 3 and 4 show.

python -m benchmarks.lessons           # writes it
python -m benchmarks.lessons --check   # exit status 1 if that would change anything (CI)
"""

import json
import re
import sys
from pathlib import Path

from benchmarks.readme import ROOT, Results

ROWS = {  # results file: what is shown of it, as a pattern of "what who"
    "kernels": r"[^/]+/((rms_norm|rms_norm_add|rope|swiglu)/forward\+backward (eager|compile|liger|ours|floor)"
    r"|decoder_layer/(forward\+backward|saved) (stock|ours))",
    "step": r"[^/]+/1K/train_peak (planner|ours|trl-1)",
    "engines": r"qwen2.5-1.5b/(batch-8/decode (transformers|vllm|graph)|1K/step_(peak_driver|time) (ours|trl))",
}


def measured() -> str:
    """The text of nbhelpers/measured.json."""
    found = {}
    for name, pattern in ROWS.items():
        results = Results(name)
        rows = [[*key, value] for key, value in results.values.items() if re.fullmatch(pattern, " ".join(key))]
        found[name] = {"gpu": results.document["host"]["gpu"], "date": results.document["date"], "rows": rows}
    return json.dumps(found, separators=(",", ":")).replace("],[", "],\n[") + "\n"


def files() -> dict[Path, str]:
    """What is written, and where."""
    return {ROOT / "nbhelpers" / "measured.json": measured()}


def main() -> int:
    if "--check" in sys.argv:
        return int(any(path.read_text() != text for path, text in files().items()))
    for path, text in files().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
