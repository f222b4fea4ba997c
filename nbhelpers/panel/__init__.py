"""What a person watches while a model trains: one place with the curves, the numbers and a few answers of the model.

In a notebook it updates in place and needs no widget (see display.py); where a person sits at it, buttons stand beside
it (buttons.py). In a terminal it is one line for each logged step. The data behind it stays on the `Live` object, and
`live.save("run.json")` records it for `replay.run`.
"""

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from nbhelpers import evaluate, hands_on, host
from nbhelpers.evaluate import Answer, Decoding
from nbhelpers.evaluate.compare import before_after as before_after  # what a notebook calls: panel.before_after
from nbhelpers.progress import Ticker
from nbhelpers.rewards import REASONING, Sample, Tags, in_form

from . import display, gaming, history, pieces
from .buttons import Buttons

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from nbhelpers.engines import Engine

WORK = 20  # of this many seconds at most one goes into drawing
LONGEST = 5.0  # seconds between two drawings, if there is a step to draw: longer looks frozen
NEWEST_DRAWINGS = 3  # whose quickest says what one costs: a single slow one must not freeze the panel
ASKED_TOKENS = 256  # of an answer to a person's question, in a run that writes none itself
RECORDED_PAIRS = 12  # of best and worst answers, over a run


class Live(display.View, TrainerCallback):
    """One updating output for a run: pass it to a trainer as `callbacks=[live]`. After a closed tab, `live` in a
    new cell shows all of it there, and goes on there.

    Args:
        total_steps (`int`, *optional*): Length of the run, for the time left; the trainer's own if not given.
        every (`float`): Seconds between two drawings in a notebook, whose clock goes on in between. Where drawing is
            slow it is done less often. A terminal gets a line for each logged step.
        probes (`Sequence[evaluate.Answer]`): What `evaluate.ask` returned before the training. The same questions are
            asked again while it trains, with the same prompts and the same decoding. That changes nothing in the run.
        probe_every (`int`): Steps between two such askings.

    Attributes:
        history (`list[dict]`): One dict a logged step: `step`; `reward` and `reward_std` over all answers; by function
            `rewards`, `stds`, and `within` and `between` groups (standard deviations, "total" among them); `format`;
            `length`, `shortest`, `longest` (tokens); `clipped` (share of answers cut off), `clip_ratio` (share of
            tokens); `zero_signal`; `kl`; `tokens` since the start; `speed` (tokens/s); `memory` (see
            `history.memory_now`); `seconds` since the start; `alike`, and `gaming`, that the reward is gamed and two of
            the answers, as lines of text (see `gaming.why`). What was not logged is None or empty. An update that
            learns again from the answers of an earlier one, as PPO's, has the numbers of those answers. After a
            resume the steps of the earlier session are there too, without seconds. `margin`, `agree`, `kl_answer` and
            `value_loss` are other methods' (see `pieces.HELP`).
        samples (`list[rewards.Sample]`): The newest answers. They come from `state.samples`, which LeanGRPOTrainer
            sets; with TRL's plain trainer there are none, and no format rate and no spread by group either.
        probed (`dict[int, list[evaluate.Answer]]`): The probes' answers by step; 0 is before the training.
        asked (`list[tuple[int, str, str]]`): What a person asked in between: step, question and what the model wrote.
        ended (`float`): Seconds that the run took; None until it ended.

    Example:
    ```python
    live = panel.Live(probes=before)
    trainer = LeanGRPOTrainer(..., callbacks=[live])
    trainer.train()
    live.figure().savefig("reward_curve.png")
    ```
    """

    def __init__(
        self,
        total_steps: int | None = None,
        every: float = 1.0,
        *,
        probes: Sequence[Answer] = (),
        probe_every: int = 20,
    ):
        super().__init__()
        if not all(isinstance(probe, Answer) for probe in probes):
            raise ValueError("probes are what evaluate.ask returned: before = evaluate.ask(...); Live(probes=before)")
        if probe_every < 1:
            raise ValueError(f"probe_every={probe_every} is a number of steps, at least 1")
        self.every, self.probes, self.probe_every = every, list(probes), probe_every
        self.engine: Engine | None = None  # LeanGRPOTrainer's own, which asks the probes
        self.tags: Tags = REASONING  # and its form
        self.kept_however_it_ends = False  # and that it saves what was learned when it is interrupted
        self.buttons: Buttons | None = None
        self._stop = False  # a person wants the run to end after the step that is going on
        self.samples: list[Sample] = []
        self._wanted_steps = total_steps
        self._pairs: dict[int, list[Sample]] = {}
        self._date = date.today()
        self._started = time.monotonic()
        self._draw_again = 0.0  # not before this time
        self._costs: deque[float] = deque(maxlen=NEWEST_DRAWINGS)  # seconds of the newest drawings
        self._ticker: Ticker | None = None
        self._tokens, self._since = 0.0, self._started  # up to where the speed is known

    # ---- what the trainer calls ----

    def on_train_begin(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start afresh, after a resume with the steps that TRL's log still has."""
        if not state.is_world_process_zero:
            return
        self.history = history.rows_of(state.log_history)
        self.samples, self.pair, self._pairs, self.ended, self.handles = [], [], {}, None, []
        self.probed = {0: self.probes} if self.probes else {}
        self.total_steps = self._wanted_steps or state.max_steps
        self.first_step, self._date = state.global_step, date.today()
        self._started = time.monotonic()
        self._tokens, self._since = state.num_input_tokens_seen, self._started
        self._draw_again = 0.0
        self.asked, self._stop, self.why = [], False, ""
        if display.in_notebook():
            self.update()  # at once: a large model's first step takes a while
            self._stop_clock()
            self._ticker = Ticker(self._tick)
            self.attended = hands_on.attended()
            if self.attended and args.world_size == 1:
                self.buttons = Buttons()
                self.buttons.show()

    def on_step_begin(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run as the notebook's stop button does, if the button here was pressed: the last step is logged."""
        if self._stop:
            self._stop = False
            raise KeyboardInterrupt

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,  # a PreTrainedModel, and with it its tokenizer: the trainer passes both
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Ask the probes, every so many steps, and do what the buttons were pressed for."""
        start = time.monotonic()
        if state.is_world_process_zero and self.probes and state.global_step % self.probe_every == 0:
            self.probed[state.global_step] = evaluate.ask_again(
                model, processing_class, self.probes, self.engine, progress=False
            )
        if self.buttons is not None:
            hands_on.listen()
            wishes = self.buttons.take()
            if "save" in wishes:
                control.should_save = True
            if "stop" in wishes and self.kept_however_it_ends:
                self._stop = True
            elif "stop" in wishes:
                control.should_training_stop = control.should_save = True
            if wishes.get("ask"):
                rows = kwargs["train_dataloader"].dataset
                self._ask(wishes["ask"], state.global_step, args, model, processing_class, rows)
        self._since += time.monotonic() - start  # the speed is that of the training, without the questions

    def on_save(self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say so to who pressed a button."""
        if self.buttons is not None and self.buttons.heard:
            self.buttons.say(f"Saved after step {state.global_step}: {args.output_dir}/checkpoint-{state.global_step}")

    def on_log(
        self,
        args: Any,  # a GRPOConfig, which is narrower than what TrainerCallback promises to take
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Take in a logged step, and show it."""
        if not state.is_world_process_zero or logs is None or not history.is_step(logs):
            return  # the last log of a run holds its run time, not a step
        now = time.monotonic()
        logged = history.row_of({**logs, "step": state.global_step})
        row = history.after(logged, self.history[-1] if self.history else None)
        row["seconds"], row["memory"] = now - self._started, history.memory_now()
        if row["tokens"] is not None and now > self._since:
            row["speed"] = (row["tokens"] - self._tokens) / (now - self._since)
            self._tokens, self._since = row["tokens"], now
        self.samples = list(vars(state).get("samples", []))
        if self.samples:
            groups = history.groups_of(self.samples, args.num_generations)
            row["format"] = sum(in_form(sample.completion, self.tags) for sample in self.samples) / len(self.samples)
            row["within"], row["between"] = history.spreads(groups, args.reward_weights)
            if row is logged or not self.pair:  # else the answers are those of an earlier step
                self.pair, self.pair_step = history.best_and_worst(groups, args.reward_weights), state.global_step
            if state.global_step % max(1, self.total_steps // RECORDED_PAIRS) == 0 or not self._pairs:
                self._pairs[self.pair_step] = self.pair
        found = gaming.why(state.log_history, self.samples)
        if found is not None:
            row["gaming"] = [found, *gaming.quoted(self.samples, 2)]
        self.history.append(row)
        if not display.in_notebook():
            print(self.line(), flush=True)
            if row["gaming"] and not (self.history[:-1] and self.history[-2]["gaming"]):
                print(*row["gaming"], sep="\n", flush=True)
        elif time.monotonic() >= self._draw_again:
            self._draw()
        self._since += time.monotonic() - now

    def on_train_end(
        self, args: "TrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the end of the run."""
        if state.is_world_process_zero:
            self._stop_clock()
            if self.buttons is not None:
                self.buttons.close()
                self.buttons = None
            self.ended = time.monotonic() - self._started
            self.why = vars(state).get("stop_reason", "")
            if display.in_notebook():
                self.update()
            else:
                print(self.line(), flush=True)

    # ---- what it keeps ----

    def save(self, path: str | Path, model: str) -> Path:
        """Record the run as a small JSON file, which `replay.run(path)` shows again.

        Args:
            path (`str` or `Path`): Where to write; folders that are missing are made.
            model (`str`): Its name, for people.

        Returns:
            `Path`

        Raises:
            ValueError: Before the first logged step.
        """
        if not self.history:
            raise ValueError("nothing to record: no step was logged yet")
        pairs = {**self._pairs, self.pair_step: self.pair}
        recorded = {
            "recorded_run": 1,
            "model": model,
            "method": self.method,
            "hardware": history.hardware(),
            "date": self._date.isoformat(),
            "versions": host.versions(),
            "total_steps": self.total_steps,
            "seconds": self.ended if self.ended is not None else self.history[-1]["seconds"],
            "history": self.history,
            "pairs": {step: [asdict(sample) for sample in pair] for step, pair in pairs.items()},
            "probed": {step: [asdict(answer) for answer in answers] for step, answers in self.probed.items()},
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(recorded), ensure_ascii=True, separators=(",", ":"), allow_nan=False))
        return path

    def _ask(self, question: str, step: int, args: Any, model: Any, tokenizer: Any, rows: Any) -> None:
        """Put a person's question as the probes are put, or with the system message of the training rows, if they have
        prompts: texts that are learned are token ids by now."""
        prompt = self.probes[0].messages if self.probes else next(iter(rows)).get("prompt", ())
        system = [message for message in prompt if isinstance(message, dict) and message["role"] == "system"]
        messages = [*system, {"role": "user", "content": question}]
        name = "auto" if self.engine is None else self.engine.name
        if self.probes:
            decoding = self.probes[0].decoding
        else:
            decoding = Decoding(vars(args).get("max_completion_length", ASKED_TOKENS), 0.0, 0, 1, name)
        empty = Answer(question, "", None, 0, True, "", decoding, messages=messages, tags=self.tags)
        try:
            (answer,) = evaluate.ask_again(model, tokenizer, [empty], self.engine, progress=False)
            written = answer.completion
        except ValueError as error:  # too long a question, for one: no reason to lose a run
            written = str(error)
        self.asked.append((step, question, written))
        if self.buttons is not None:
            self.buttons.say("Answered:", pieces.asked_html(self.asked[-1:]))
        self._draw_again = 0.0  # with the log of this step

    def _draw(self) -> None:
        first, start = self._figure is None, time.thread_time()  # what others do meanwhile is not its cost
        self.update()
        if not first:  # that one imports matplotlib
            self._costs.append(time.thread_time() - start)
        self._draw_again = time.monotonic() + max(self.every, min(LONGEST, WORK * min(self._costs, default=0.0)))

    def _tick(self) -> None:
        """Every second, so that a step of a minute is seen to go on."""
        with self._showing:
            if self.handles:
                head = {"text/html": self._head_html(time.monotonic() - self._started), "text/plain": self.line()}
                self.handles[0].update(head, raw=True)

    def _stop_clock(self) -> None:
        if self._ticker is not None:
            self._ticker.stop()
            self._ticker = None


def _rounded(value: Any) -> Any:
    """Four digits are enough to look at, and a quarter of the bytes; NaN and infinity are not JSON."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
