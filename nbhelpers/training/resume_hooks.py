"""A trainer that loses nothing on a stop and resumes exactly where it was: the hooks around checkpoint.py.

What is written is in save_hooks.py. These touch these private parts of TRL and transformers:

    _metrics                                TRL's: numbers that are not logged yet
    _get_train_sampler                      a resumed run gets the prompts of its own epoch, not the first's
    _load_from_checkpoint, _load_scaler     weights of a finished run; a run that changed its precision
    _evaluate, _load_rng_state,             an evaluation that was cut short is made up for, with the random numbers
    _determine_best_metric                  that it would have drawn
    _issue_warnings_after_load              no warning for tied weights, which are not stored twice
"""

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME
from trl.trainer.utils import RepeatSampler

from nbhelpers.models import adapter, lineage, swap
from nbhelpers.models.finite import first_not_finite
from nbhelpers.progress import interruptible

from . import checkpoint, identity, run_folder, stops
from .save_hooks import SaveHooks

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import Sampler
    from transformers import TrainerControl, TrainingArguments


class ResumeHooks(SaveHooks):
    """See the module. `trainer.LeanGRPOTrainer` is what people use."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._epochs_before = 0  # whole passes over the data that earlier sessions made
        self._rollout_fits = True  # whether the checkpoint's rollout has the shape that this run wants
        self.callback_handler.callbacks.insert(0, _KeepMark(self))  # first: another callback may raise

    def train(
        self,
        resume_from_checkpoint: "str | Path | bool | None" = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        *,
        resume_anyway: bool = False,
    ) -> TrainOutput:
        """Train, and keep what was learned however it ends.

        SIGTERM and SIGHUP do what Ctrl-C does. A second run in the same folder is refused while this one trains.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*): "auto" resumes from the newest complete
                checkpoint in `args.output_dir` and starts afresh without one; True is the same, and FileNotFoundError
                without one; a folder is that checkpoint. A damaged checkpoint is skipped by name. A finished run loads
                its weights and returns at once. On a CPU the numbers are bit for bit those of a run that was never
                stopped. Without it the run starts afresh; checkpoints of another run in the folder stay.
            trial, ignore_keys_for_eval (*optional*): As in transformers' Trainer.
            resume_anyway (`bool`): Go on from a checkpoint although something other than the model has changed since
                (data, rewards, arguments, engine); what has is printed.

        Returns transformers' `TrainOutput`; after an interrupt its metrics are {"interrupted": True}.

        Raises identity.AnotherRun, a ValueError, for a checkpoint of another run (model, data, rewards, arguments),
        naming what differs, and ValueError for a folder that is damaged; FileNotFoundError for one that does not exist;
        run_folder.InUse while another run holds the folder; run_folder.FolderError if it cannot be written or has no
        room; FloatingPointError when the weights are not finite any more, before they replace what is saved.
        """
        run_folder.check_writable(self._root)
        with (
            stops.signals_stop(),
            run_folder.hold(self._root) if self.args.should_save else contextlib.nullcontext(),
        ):
            self._described = None
            try:
                folder = self._find(resume_from_checkpoint, resume_anyway)
                self._start_at(folder)
                if folder is not None and self._finished(folder):
                    return TrainOutput(self.state.global_step, float("nan"), {"finished": True})
                self._check_start()
            except KeyboardInterrupt as stop:  # while data or checkpoints are hashed, which may take minutes
                print(f"Stopped by {stops.sender(stop)} before the training began: nothing is written.")
                return TrainOutput(0, float("nan"), {"interrupted": True})
            try:
                with warnings.catch_warnings():  # of TRL's own, about transformers 5.23
                    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                    return super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)
            except KeyboardInterrupt as stop:
                return self._stopped(stops.sender(stop))
            except BaseException as error:  # SystemExit too: what was learned is kept however it ends
                self.model.eval()
                if self.state.global_step:
                    # where a checkpoint did not fit, another try would not either
                    saved_in = self._save_all(checkpoint_too=not isinstance(error, run_folder.FolderError))
                    if saved_in is not None:
                        print(f"Step {self.state.global_step + 1} failed. What was learned until then is in "
                              f"{saved_in}.")  # fmt: skip
                    self._print_how_to_resume()
                raise

    @interruptible("an evaluation was made", "the model is as it was, and its scores are not kept")
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL's trainer."""
        return super().evaluate(*args, **kwargs)

    def _stopped(self, by: str) -> TrainOutput:
        """What is left to do when somebody ended the run."""
        # before the first step, or before a checkpoint is loaded, the weights must not replace what is saved
        saved_in = self._save_all() if self.state.global_step else None
        self.model.eval()
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        if saved_in is not None:
            print(f"Stopped by {by} after step {self.state.global_step}. What was learned is kept, here and in "
                  f"{saved_in}: go on with the next cell.")  # fmt: skip
        elif not self.state.global_step:
            print(f"Stopped by {by} before the first step was done: nothing new was learned, and nothing is written.")
        self._print_how_to_resume()
        return TrainOutput(self.state.global_step, float("nan"), {"interrupted": True})

    def _check_start(self) -> None:
        """Refuse what would fail later: weights that are not finite, checkpoints for which there is no room."""
        model = self.accelerator.unwrap_model(self.model)
        # what waits on the host was looked at when it was read
        here = [(name, p) for name, p in model.named_parameters() if not swap.waits(p)]
        if self._saved is None and (name := first_not_finite(here)) is not None:
            raise ValueError(f"{name} of the model is not finite (NaN or infinity) before the first step: nothing "
                             "could be learned with it. Load the model again, or another one")  # fmt: skip
        ours = [path for path in self._root.glob("checkpoint-*") if path.is_dir()]
        strangers = checkpoint.others(self._root, self._run())
        if self._saved is None and strangers:
            print(f"{self._root} has checkpoints of another run ({', '.join(path.name for path in strangers)}): they "
                  "stay as they are.")  # fmt: skip
        there = len(ours) - len(strangers)
        count = run_folder.checkpoints_coming(self.args, self._saved or 0, there)
        run_folder.check_room(self._root, *run_folder.checkpoint_bytes(model, self.args), count)

    def _print_how_to_resume(self) -> None:
        if self._saved is not None:
            print(f'trainer.train(resume_from_checkpoint="auto") goes on after step {self._saved}.')

    def _start_at(self, folder: Path | None) -> None:
        """Be where a checkpoint is, or at the start of a run."""
        for mode in ("train", "eval"):
            self._metrics[mode].clear()  # of a step that an interrupt cut short
        self._mark, self._saved, self._epochs_before = None, None, 0
        self._start = checkpoint.next_start(self._root)
        if folder is None or not (folder / checkpoint.MANIFEST).exists():
            self._restore(checkpoint.Position(0, None))
            return
        position = checkpoint.Position.load(folder, self.accelerator.process_index, self.args.device)
        if not self._rollout_fits:
            position.rollout = None  # the completions are written again
        self._restore(position)
        self._start = checkpoint.read(folder)["start"]
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        self._saved, self._epochs_before = state.global_step, int(state.epoch)

    def _find(self, wanted: "str | Path | bool | None", anyway: bool) -> Path | None:
        """The checkpoint to resume from; None: none. Raises as `train` does."""
        self._rollout_fits = True
        if wanted is None or wanted is False:
            return None
        if vars(self.args).get("sync_ref_model"):  # where there is a reference
            raise ValueError("sync_ref_model=True moves the reference model, which no checkpoint holds: such a run "
                             "cannot go on exactly. Set it to False, or leave resume_from_checkpoint out")  # fmt: skip
        if wanted == "auto" or wanted is True:
            with self.accelerator.main_process_first():  # it may have to finish a rename
                folder = checkpoint.newest(self._root)
            if folder is None and wanted is True:
                raise FileNotFoundError(f"{self.args.output_dir} has no complete checkpoint: "
                                        'resume_from_checkpoint="auto" would start afresh')  # fmt: skip
            if folder is None:
                print(f"No checkpoint in {self.args.output_dir}: the run starts at step 0.")
                return None
        else:
            folder = Path(wanted)
            if not folder.is_dir():
                raise FileNotFoundError(f'there is no folder {folder}: resume_from_checkpoint="auto" finds the newest')
            if not (folder / checkpoint.MANIFEST).exists():
                print(f"{folder} has no {checkpoint.MANIFEST}: it goes on as TRL does, unchecked and not exactly.")
                return folder
            if (why := checkpoint.problem(folder)) is not None:
                raise ValueError(f'{folder} is no good: {why}. Take another, or resume_from_checkpoint="auto"')
        self._rollout_fits = identity.refuse_other(folder, self._run(), anyway)
        if self.args.save_only_model:
            print("Without the optimizer's state (save_only_model=True) a run goes on, but not exactly.")
        print(f"Resuming from {folder}, after step {checkpoint.read(folder)['step']}.")
        return folder

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """transformers' hook. Beside the trained adapter there may be more (`checkpoint.BESIDE`). Where peft had saved
        TRL's reference in a subfolder, transformers 5.15 reads that only, and the trained one is read here."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        loaded, folder = self.model if model is None else model, Path(resume_from_checkpoint)
        if len(adapter.loras(loaded)) > 1 and (folder / ADAPTER_SAFE_WEIGHTS_NAME).exists():
            adapter.peft_model(loaded).load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        if (folder / checkpoint.BESIDE).exists():
            for name, tensor in load_file(folder / checkpoint.BESIDE).items():
                loaded.get_parameter(name).data.copy_(tensor)

    def _finished(self, folder: Path) -> bool:
        """Whether nothing is left to do; then the model has the checkpoint's weights and the callbacks its log."""
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        last = self.args.max_steps if self.args.max_steps > 0 else state.max_steps
        if state.global_step < last or (self.args.max_steps <= 0 and self.args.num_train_epochs > state.epoch):
            return False
        self._load_from_checkpoint(str(folder))
        lineage.note(self.model, self._name)
        self.state = state
        if self._evaluation_due:
            self._load_rng_state(str(folder))  # it was stopped in its last evaluation, which is made up for
        self.model.eval()
        for event in (self.callback_handler.on_train_begin, self.callback_handler.on_train_end):
            event(self.args, self.state, self.control)
        print(f"This run is finished: step {state.global_step} of {last}. The model has its weights. To train longer, "
              f"raise max_steps (or num_train_epochs).")  # fmt: skip
        return True

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """transformers' hook: an evaluation that is cut short is due when the run goes on."""
        self._evaluation_due, self._logged = True, len(self.state.log_history)
        self._mark = self._position()
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._evaluation_due = False
        self._mark = self._position()
        return metrics

    def _load_rng_state(self, folder: str | None) -> None:
        """transformers' hook, called where a resumed run goes on: first with the evaluation that is due there."""
        super()._load_rng_state(folder)
        if self._evaluation_due:
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)

    def _write_state(self, position: checkpoint.Position) -> None:
        super()._write_state(position)
        if self._evaluation_due:
            position.extra["evaluation_due"] = True

    def _read_state(self, position: checkpoint.Position) -> None:
        super()._read_state(position)
        self._evaluation_due = position.extra.get("evaluation_due", False)

    def _load_scaler(self, folder: str | None) -> None:
        if self.accelerator.scaler is not None:  # there is none in bf16: the run began in fp16, on another card
            super()._load_scaler(folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = self.model.all_tied_weights_keys  # tied weights are stored once
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _get_train_sampler(self, dataset: "Dataset | None" = None) -> "Sampler":
        """TRL's hook: every epoch draws the next permutation from one generator; those of earlier sessions count."""
        sampler: Any = super()._get_train_sampler(dataset)
        if not isinstance(sampler, RepeatSampler):  # of no rollouts: transformers' own, which counts epochs itself
            return sampler
        for _ in range(self._epochs_before if sampler.shuffle else 0):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler


class _KeepMark(TrainerCallback):
    """Keeps the trainer's `_mark`, from which an interrupted run is saved. None while the optimizer changes weights."""

    def __init__(self, trainer: ResumeHooks):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: "TrainingArguments", state: TrainerState, control: "TrainerControl", **kwargs: Any
    ) -> None:
        self.trainer._mark = None

    def on_step_end(
        self, args: "TrainingArguments", state: TrainerState, control: "TrainerControl", **kwargs: Any
    ) -> None:
        self.trainer._check_weights()
        lineage.note(self.trainer.model, self.trainer._name)
        # transformers decides on logging after this callback, by these numbers; a line that is missing never comes
        logs = args.logging_strategy == "steps" and state.global_step % state.logging_steps == 0
        if not logs and not (args.logging_first_step and state.global_step == 1):
            self.trainer._mark = self.trainer._position()

    def on_log(self, args: "TrainingArguments", state: TrainerState, control: "TrainerControl", **kwargs: Any) -> None:
        if self.trainer._mark is None and state.global_step:  # not before: the step would be missing in the log
            self.trainer._mark = self.trainer._position()
