"""Does a real model learn Countdown? Lesson 7 from its first cell to its last, as a script, on a GPU of 7 GB or more.

    python -m benchmarks.countdown --weights qwen.gguf --out runs/a      qwen2.5-coder-1.5b/countdown/solved_100, ...
    python -m benchmarks.countdown --join runs/a/countdown.json          its rows into benchmarks/results/countdown.json
    NBHELPERS_SMOKE=1 python -m benchmarks.countdown --steps 2 --every 1 --n 8 --out runs/smoke     the parts, on a CPU

The lesson's own cells, with the weights (a GGUF file or a folder; they are for measuring, none is shipped), the steps
and the card exchanged: presets and planner see one of --gb, and torch may not take more of the real one; 0 for all.

After --minutes of training the run stops, and its last point is taken. The same call again goes on from there: what it
needs is in --folder. At every look at the held-out puzzles the rows (countdown.json) and the recorded run
(countdown-run.json, which the lesson replays as nbhelpers/panel/runs/countdown.json) are written to --out and $OUT, so
what was measured outlives a run that is cut off.

`solved` is in whatever form, `form` between the tags, solved or not; `three` and `four` are the solved of so
many numbers. All are shares of held-out puzzles, one answer each at temperature 1, with their 95 % interval (Wilson).
`seconds` is training alone.
"""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from benchmarks import common, harness
from benchmarks.real import cells, measure
from benchmarks.real.__main__ import worst

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from nbhelpers import LeanGRPOTrainer
    from nbhelpers.panel import Live

RESULT = "countdown"
NOTEBOOK = common.ROOT / "notebooks" / "07_countdown.ipynb"
BEHIND = {  # tag of a cell -> what runs behind it
    "parameters": "STEPS, EVERY, HELD_OUT, SEED, OUT = (JOB[key] for key in ('steps', 'every', 'n', 'seed', 'folder'))",
    "preset": "preset = _replace(preset, **JOB['preset'])",
    "trainer": "from benchmarks import countdown\nWATCH = countdown.Watch(JOB, live, held_out, trainer)",
    "train": "WATCH.report()",
}


def script(job: dict[str, Any]) -> str:
    """The lesson's code without its install cell, and behind its cells what is exchanged and measured."""
    parts = [cells.begin(job)]
    for tags, source in common.code_cells(NOTEBOOK):
        parts += [source, *(BEHIND[tag] for tag in tags & BEHIND.keys())]
    return "\n\n".join(parts)


class Watch(TrainerCallback):
    """Takes the time of a run, ends it when the time is over, and writes what is known at each look.

    Args:
        job (`dict`): The call's arguments.
        live (`panel.Live`), held_out (`HeldOut`, the lesson's own), trainer (`LeanGRPOTrainer`): Of the lesson.
    """

    def __init__(self, job: dict[str, Any], live: "Live", held_out: Any, trainer: "LeanGRPOTrainer") -> None:
        self.job, self.live, self.held_out, self.trainer = job, live, held_out, trainer
        self._peak = harness.peak_driver()
        self._seen = self._peak.__enter__()
        self._before = held_out.points[-1]["seconds"] if held_out.points else 0.0  # in earlier calls
        self._began, self._looking = time.monotonic(), 0.0
        self._look, held_out.look = held_out.look, self.look
        trainer.add_callback(self)

    @property
    def seconds(self) -> float:
        """Of training, in this call and those before it, without the looks."""
        return self._before + time.monotonic() - self._began - self._looking

    def look(self, step: int) -> None:
        """The lesson's own look, whose point gets the seconds until then."""
        start, seconds, known = time.monotonic(), self.seconds, len(self.held_out.points)
        self._look(step)
        if len(self.held_out.points) > known:
            self.held_out.points[-1]["seconds"] = round(seconds, 1)
            self.held_out.file.write_text(json.dumps(self.held_out.points))
            print("held out:", self.held_out.points[-1], flush=True)
            self.report()
        if step == 0:
            self._began, self._looking = time.monotonic(), 0.0
        else:
            self._looking += time.monotonic() - start

    def on_step_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        """End the run when its time is over."""
        if time.monotonic() - self._began > 60 * self.job["minutes"]:
            control.should_training_stop = control.should_save = True

    def report(self) -> None:
        """Write rows and the recorded run, as far as they are known."""
        folder, points = Path(self.job["out"]), self.held_out.points
        common.publish(RESULT, worst(self.rows()), folder)
        if self.live.history:
            file = self.live.save(folder / f"{RESULT}-run.json", self.job["preset"]["title"])
            run = json.loads(file.read_text()) | {"held_out": points, "seconds": points[-1]["seconds"]}
            for place in common.places(folder):
                (place / file.name).write_text(json.dumps(run, separators=(",", ":")))

    def rows(self) -> list[common.Row]:
        """What is known by now, as rows of a results file."""
        job, args, points = self.job, self.trainer.args, self.held_out.points
        label, rows = f"{job['model']}/countdown/seed-{job['seed']}", []
        for point in points:
            when = point["step"] or "before"
            for name in ("solved", "three", "four", "form"):
                rows.append(common.share(f"{label}/{name}_{when}", point[name]))
        settings = {
            "learning_rate": args.learning_rate, "num_generations": args.num_generations, "max_steps": args.max_steps,
            "answers_per_step": args.per_device_train_batch_size, "max_completion_length": args.max_completion_length,
        }  # fmt: skip
        rows += [
            common.row(f"{label}/seconds", "ours", points[-1]["seconds"], "s", steps=points[-1]["step"], **settings),
            common.row(f"{label}/peak_driver", "ours", round(self._seen[0], 3), "GB"),
            common.row(f"{label}/curve", "ours", points[-1]["step"], "steps", points=measure.curve(self.live.history)),
        ]
        return rows


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--weights", help="a GGUF file, or a folder with safetensors; the preset's own if not given")
    parser.add_argument("--model", default="qwen2.5-coder-1.5b", help="what the rows call the model")
    parser.add_argument(
        "--title", default="Qwen2.5-Coder-1.5B-Instruct (GGUF, Q4_K_M) on Countdown", help="the recorded run's name"
    )
    parser.add_argument("--gb", type=float, default=7.0, help="of the card that is played, by the driver; 0: as it is")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50, help="steps between two looks at the held-out puzzles")
    parser.add_argument("--n", type=int, default=256, help="held-out puzzles")
    parser.add_argument("--minutes", type=float, default=60.0, help="of this call's training, looks included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where checkpoints are; runs/countdown-seed-0 if not given")
    args = parser.parse_args()
    if args.join:
        common.join(RESULT, args.join, args.out or common.RESULTS, worst)
        return
    job = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    job |= {"mode": RESULT, "cap": args.gb, "out": str(args.out or common.RESULTS)}
    job["folder"] = args.folder or f"runs/countdown-seed-{args.seed}"
    job["preset"] = {"title": args.title} | ({"hub_id": args.weights} if args.weights else {})
    os.environ.setdefault("MPLBACKEND", "Agg")
    exec(compile(script(job), NOTEBOOK.name, "exec"), {"__name__": "lesson"})
    file = Path(job["out"], f"{RESULT}.json")
    print(common.table(json.loads(file.read_text())["rows"]))


if __name__ == "__main__":
    main()
