"""The code of one run: the notebook's own cells, with weights, questions and steps exchanged, and what is measured."""

import json
from typing import Any

from benchmarks import common

NOTEBOOK = common.ROOT / "notebooks" / "models" / "qwen2.5-1.5b.ipynb"
# a played card: what presets and planner see is the cap, and torch may not take more of the real one
CARD = """
import torch
from dataclasses import replace as _replace
from nbhelpers import gpu
if torch.cuda.is_available() and JOB["cap"]:
    if JOB["mode"] == "t4":
        from benchmarks.harness import play_t4
        play_t4()
    _free, _total = torch.cuda.mem_get_info()
    _context = _total - _free + 0.4e9  # what the driver takes later: modules, graphs, cuBLAS
    torch.cuda.set_per_process_memory_fraction((JOB["cap"] * 1e9 - _context) / _total)
    _cards = gpu.cards
    gpu.cards = lambda: [_replace(card, total=int(JOB["cap"] * 1e9)) for card in _cards()]
"""
BEHIND = {  # tag of a cell -> what runs behind it
    "parameters": """
STEPS, SEED, OUT = JOB["steps"], JOB["seed"], JOB["folder"] + "/run"
""",
    "preset": """
from nbhelpers.panel import replay as _replay
_replay.instead_of = lambda *_: None
from benchmarks.real import measure
preset = _replace(preset, hub_id=JOB["weights"], **measure.changes(JOB))
tasks.gsm8k = lambda *_, **__: measure.problems(JOB, preset.system_prompt)
""",
    "before": """
BEFORE = {} if JOB["after_only"] else measure.scores(JOB, model, tokenizer, preset, decimals, passes=True)
print(*(f"{name}: {share}" for name, share in BEFORE.items()), sep="\\n", flush=True)
if JOB.get("before_only"):
    measure.write(JOB, {"shares": measure.named(BEFORE, "before")})
    raise SystemExit
TIMER = measure.Timer()
""",
    "train": """
TIMER.stop()
""",
    "after": """
AFTER = measure.scores(JOB, model, tokenizer, preset, decimals)
print(*(f"{name}: {share}" for name, share in AFTER.items()), sep="\\n", flush=True)
measure.report(JOB, BEFORE, AFTER, TIMER, trainer, live, before, after, preset)
""",
}


def begin(job: dict[str, Any]) -> str:
    """What the code of a run begins with: its JOB, and the card that it is to see."""
    return f"import json\nJOB = json.loads({json.dumps(json.dumps(job))})\n\n{CARD}"


def notebook(job: dict[str, Any]) -> str:
    """The script of one run."""
    parts = [begin(job)]
    if job.get("method"):
        parts.append('from benchmarks import methods\nmethods.take(JOB["method"], JOB["questions"])')
    seen = set()
    for tags, source in common.code_cells(NOTEBOOK):
        parts.append(source)
        for tag in tags & BEHIND.keys():
            seen.add(tag)
            parts.append(BEHIND[tag])
    if missing := BEHIND.keys() - seen:
        raise ValueError(f"the notebook has no cell tagged {', '.join(sorted(missing))}")
    return "\n\n".join(parts)


def rewards() -> str:
    """The notebook's own cell with its reward functions, `correct` and `in_form`."""
    return next(source for _, source in common.code_cells(NOTEBOOK) if source.startswith("def correct("))


def prompts(job: dict[str, Any]) -> str:
    """The script that measures how often each system prompt is followed, and how often the answers are right."""
    return f"{begin(job)}\n\nfrom benchmarks.real import measure\nmeasure.prompts(JOB)"
