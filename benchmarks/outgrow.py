"""Does docs/outgrow.md's example for stock TRL run with a model that is split? Its own script and command, on two GPUs.

    python -m benchmarks.outgrow            # two GPUs, about a minute, 4 GB of disk, no network
    python -m benchmarks.outgrow --smoke    # a CPU, one process, a small shape: proves the script, writes nothing

The page's lines run as they stand. What they would fetch from the hub is local: random bf16 weights at MODEL's real
shape, a tokenizer of bytes, and the smoke mode's questions; chance says which answer is right, as a random model never
is. Three steps of 64 new tokens: the seconds say that it works, not how fast it is.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, harness, random_model
from nbhelpers import presets

MODEL, STEPS, TOKENS = "qwen2.5-1.5b", 3, 64
PAGE = common.ROOT / "docs" / "outgrow.md"
BEFORE = """import random
import time
from dataclasses import replace

from trl import GRPOTrainer

from nbhelpers import presets, rewards

rewards.right = lambda *_: random.random() < 0.5
local = replace(presets.get(MODEL), hub_id=FOLDER, max_steps=STEPS, max_completion_length=TOKENS)
presets.get = lambda name: local
step, seen = GRPOTrainer.training_step, []


def timed(self, *args, **options):
    start = time.perf_counter()
    loss = float(step(self, *args, **options))
    seen.append({"seconds": time.perf_counter() - start, "loss": loss})
    return torch.tensor(loss, device=self.accelerator.device)


GRPOTrainer.training_step = timed

"""
AFTER = """
import json

on_gpu = torch.cuda.is_available()
peak = torch.tensor([torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0], device=trainer.accelerator.device)
peaks = trainer.accelerator.gather(peak).tolist()
if trainer.accelerator.is_main_process:
    with open("seen.json", "w") as file:
        json.dump({"steps": seen, "peaks": peaks, "kind": str(trainer.accelerator.distributed_type)}, file)
"""


def script(folder: Path) -> str:
    """The page's split.py on the checkpoint in `folder`."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert found is not None
    names = {"MODEL": MODEL, "FOLDER": str(folder), "STEPS": STEPS, "TOKENS": TOKENS}
    return "".join(f"{name} = {value!r}\n" for name, value in names.items()) + BEFORE + found[1] + AFTER


def command(smoke: bool) -> list[str]:
    """The page's own command; one process of Python where there are no GPUs."""
    if smoke:
        return [sys.executable, "split.py"]
    found = re.search(r"^accelerate launch --use_fsdp .*$", PAGE.read_text(), re.M)
    assert found is not None
    return [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(found[0])[2:]]


def checkpoint(folder: Path, smoke: bool) -> None:
    """Random weights, with the name of the class, by which TRL loads them."""
    shape = presets.get(MODEL).architecture
    random_model.write_checkpoint(harness.small(shape) if smoke else shape, folder, 4e9)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["Qwen2ForCausalLM"]}))


def adapted(folder: Path, adapter: Path) -> int:
    """Load what was saved; how many of its matrices B have moved from zero. ValueError for numbers that are none."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter))
    trained = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    if not all(bool(parameter.isfinite().all()) for parameter in trained):
        raise ValueError(f"{adapter} holds NaN or infinity")
    return sum(bool(parameter.any()) for parameter in trained)


def run(smoke: bool) -> list[common.Row]:
    """One run; its rows."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "model")
        checkpoint(folder, smoke)
        Path(work, "split.py").write_text(script(folder))
        paths = os.pathsep.join([str(common.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        offline = {"NBHELPERS_SMOKE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        subprocess.run(command(smoke), cwd=work, env=os.environ | offline, check=True)
        seen: dict[str, Any] = json.loads(Path(work, "seen.json").read_text())
        moved = adapted(folder, Path(work, "runs/split/adapter"))
    losses = [step["loss"] for step in seen["steps"]]
    more = {"steps": len(losses), "loss": [round(loss, 5) for loss in losses], "kind": seen["kind"], "moved": moved}
    if not all(loss == loss and abs(loss) < float("inf") for loss in losses) or not moved:
        raise SystemExit(f"it ran and did not learn: {more}")
    setting = f"{MODEL}/outgrow-fsdp2-{len(seen['peaks'])}-gpus"
    return [
        common.row(f"{setting}/step_time", "trl", round(seen["steps"][-1]["seconds"], 3), "s", **more),
        common.row(f"{setting}/peak", "trl", round(max(seen["peaks"]), 3), "GB", each=seen["peaks"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results file, instead of benchmarks/results")
    args = parser.parse_args()
    if not args.smoke and torch.cuda.device_count() < 2:
        parser.error("two GPUs are needed: --smoke runs the script on a CPU, in one process")
    rows = run(args.smoke)
    if not args.smoke:
        common.publish("outgrow", rows, args.out)
    print(common.table(rows))


if __name__ == "__main__":
    main()
