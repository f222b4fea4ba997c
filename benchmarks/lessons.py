"""Write what lessons show: measured.json in nbhelpers/lessons, rows of benchmarks/results/*.json, and docs' drawings.

python -m benchmarks.lessons           # writes them
python -m benchmarks.lessons --check   # exit status 1 if that would change anything (CI)
"""

import json
import re
import sys
from pathlib import Path

from benchmarks.tables import ROOT, Results
from nbhelpers import memory
from nbhelpers.lessons import drawings

ROWS = {  # results file: what is shown of it, as a pattern of "what who"
    "kernels": r"[^/]+/((rms_norm|rms_norm_add|rope|swiglu)/forward\+backward (eager|compile|liger|ours|floor)"
    r"|decoder_layer/(forward\+backward|saved) (stock|ours))",
    "step": r"[^/]+/1K/train_peak (planner|ours|trl-1)",
    "engines": r"qwen2.5-1.5b/(batch-8/decode (transformers|vllm|graph)|1K/step_(peak_driver|time) (ours|trl))",
}


def measured() -> str:
    """The text of nbhelpers/lessons/measured.json."""
    found = {}
    for name, pattern in ROWS.items():
        results = Results(name)
        rows = [[*key, value] for key, value in results.values.items() if re.fullmatch(pattern, " ".join(key))]
        found[name] = {"gpu": results.document["host"]["gpu"], "date": results.document["date"], "rows": rows}
    return json.dumps(found, separators=(",", ":")).replace("],[", "],\n[") + "\n"


def files() -> dict[Path, str]:
    """What is written, and where."""
    plan = memory.plan("phi-4", card_gb=15, quantization="nf4", lora_rank=16, num_generations=8, max_prompt_length=256,
                       max_completion_length=768, attention="efficient")  # fmt: skip
    return {
        ROOT / "nbhelpers" / "lessons" / "measured.json": measured(),
        ROOT / "docs" / "grpo_step.svg": drawings.grpo_step().svg,
        ROOT / "docs" / "memory_of_a_step.svg": drawings.memory_of_a_step(plan).svg,
    }


def main() -> int:
    if "--check" in sys.argv:
        return int(any(path.read_text() != text for path, text in files().items()))
    for path, text in files().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
