"""`LeanGRPOTrainer`: TRL's GRPOTrainer with defaults that fit the machine, clear errors, and nothing lost on a stop.

The only file that touches TRL's private parts, and these are: `_logs`, the newest rollout, read for what the panel
shows. The lean step and the engines plug in here later.
"""

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import trl
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, PrinterCallback
from transformers.trainer_utils import TrainOutput

from nbhelpers import host, panel
from nbhelpers.guard import guard_all
from nbhelpers.lean import LeanStepTrainer
from nbhelpers.rewards import Sample, text_of

TESTED_TRL = ("1.16", "1.17")  # from, up to but not including


def precision() -> dict[str, bool]:
    """The arguments of a GRPOConfig that decide the arithmetic: bf16 from Ampere on, fp16 on a T4, fp32 on a CPU.

    TRL's own default is bf16 wherever fp16 is not asked for, which a T4 does not have and a CPU refuses.
    """
    dtype = host.compute_dtype()
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "use_cpu": dtype == torch.float32}


@dataclass
class LeanGRPOConfig(trl.GRPOConfig):
    """TRL's GRPOConfig whose unset precision is this machine's, that logs every step and reports to no service."""

    logging_steps: float = 1
    report_to: str | list[str] | None = "none"

    def __post_init__(self):
        if self.bf16 is None and not self.fp16:
            for name, value in precision().items():
                setattr(self, name, value)
        if self.use_cpu:
            self.dataloader_pin_memory = False  # there is no card to pin for, and torch warns at each step
        super().__post_init__()


def check(model, train_dataset, args) -> None:
    """Refuse, before anything is computed, what would fail late or train nothing without a word.

    Raises ValueError: no or empty dataset, no `prompt` column, no trainable parameter, fp16 masters under fp16.
    """
    if train_dataset is None or (hasattr(train_dataset, "__len__") and len(train_dataset) == 0):
        raise ValueError("train_dataset is empty: GRPO would stop at once and call it a success. Check the task's rows")
    if train_dataset.column_names is not None and "prompt" not in train_dataset.column_names:
        raise ValueError(
            f"train_dataset has the columns {', '.join(train_dataset.column_names)} but no 'prompt': "
            "build it with nbhelpers.tasks, or rename your column"
        )
    if isinstance(model, str):
        return
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model is trainable: load it with lora_rank > 0, or with lora_rank=0 and "
                         "quantization='none' to train all of it")  # fmt: skip
    halves = [name for name, p in trained if p.dtype == torch.float16]
    if args is not None and args.fp16 and halves:
        raise ValueError(
            f"fp16 training needs fp32 master weights, but {len(halves)} trainable parameters are fp16, the first is "
            f"{halves[0]}: load the model with nbhelpers.loader.load, or cast them with .float()"
        )


class LeanGRPOTrainer(LeanStepTrainer):
    """TRL's GRPOTrainer, made for one small machine. Takes TRL's arguments; these things differ:

    - the precision is this machine's when `args` is a `LeanGRPOConfig` (or None);
    - reward functions are guarded (`guard.guard_all`): a wrong length is refused by name; one exception or NaN costs
      one batch's rows of that function, not the run;
    - `state.samples` holds the newest rollout as `Sample`s, for callbacks such as `panel.Live`;
    - log-probabilities and gradients come from the lean step (`step.LeanStep`), within `budget_gb` if that is given;
      `max_skipped_steps` updates in a row may be skipped for gradients that are not finite (`lean.LeanStepTrainer`);
    - an interrupt (Ctrl-C, the notebook's stop button) or an error saves what was learned to `args.output_dir`;
      after an interrupt `train()` returns as if the run had ended, so the next cell works.
    """

    def __init__(self, model, reward_funcs, args: trl.GRPOConfig | None = None, train_dataset=None, **kwargs):
        installed = version("trl")
        if not TESTED_TRL[0] <= installed < TESTED_TRL[1]:
            warnings.warn(f"trl {installed} is outside the tested range {TESTED_TRL[0]}.*: pip install 'trl==1.16.*'",
                          stacklevel=2)  # fmt: skip
        check(model, train_dataset, args)
        if args is None:
            args = LeanGRPOConfig("runs/grpo")
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        super().__init__(model, guard_all(funcs), args=args, train_dataset=train_dataset, **kwargs)
        if any(isinstance(callback, panel.Live) for callback in self.callback_handler.callbacks):
            for other in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # one updating output, not two
                self.remove_callback(other)

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train, and keep what was learned however it ends. Arguments and result as in transformers' Trainer."""
        try:
            return super().train(*args, **kwargs)
        except KeyboardInterrupt:
            folder = self._keep()
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            print(
                f"Stopped by you after step {self.state.global_step}. What was learned is kept, here and in {folder}: "
                "go on with the next cell."
            )
            return TrainOutput(self.state.global_step, float("nan"), {"interrupted": True})
        except Exception:
            if self.state.global_step:
                print(f"Step {self.state.global_step + 1} failed. What was learned until then is in {self._keep()}.")
            raise

    def _keep(self) -> Path:
        """Save model or adapter, tokenizer and the log of the run into the output folder, and return it."""
        self.model.eval()  # an interrupt may come while TRL has switched it
        self.save_model()
        self.save_state()
        return Path(self.args.output_dir)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.state.samples = self.samples()
        super().log(logs, start_time)

    def samples(self) -> list[Sample]:
        """The newest rollout of this process: prompt, completion, reward by function and advantage of each row."""
        names = list(self._logs["rewards"])
        columns = (
            self._logs["prompt"],
            self._logs["completion"],
            self._logs["advantages"],
            *self._logs["rewards"].values(),
        )
        return [
            Sample(text_of(prompt), text_of(completion), dict(zip(names, scores, strict=True)), advantage)
            for prompt, completion, advantage, *scores in zip(*columns, strict=False)
        ]
