"""A GRPOTrainer that loses nothing on a stop and resumes exactly where it was: the hooks around checkpoint.py.

They touch these private parts of TRL and transformers:

    _step, _buffered_inputs                 TRL's: where the run is within a rollout
    _metrics                                TRL's: numbers that are not logged yet
    _get_train_sampler                      a resumed run gets the prompts of its own epoch, not the first's
    _save_checkpoint, _get_output_dir       transformers write into a staging folder
    _save                                   an adapter is saved with what it is an adapter of
    _load_from_checkpoint, _load_scaler     weights of a finished run; a run that changed its precision
    _issue_warnings_after_load              no warning for tied weights, which are not stored twice
"""

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from nbhelpers.models import adapter

from . import checkpoint
from .hooks import Hooks

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from torch.utils.data import Sampler
    from transformers import TrainerControl, TrainingArguments
    from trl.trainer.utils import RepeatSampler


class ResumeHooks(Hooks):
    """See the module. `trainer.LeanGRPOTrainer` is what people use."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._mark: checkpoint.Position | None = None  # the end of the newest update, while the weights are as then
        self._staging: Path | None = None  # where a checkpoint is being written
        self._saved: int | None = None  # the step of this run's newest checkpoint
        self._epochs_before = 0  # whole passes over the data that earlier sessions made
        self.callback_handler.callbacks.insert(0, _KeepMark(self))  # first: another callback may raise

    def train(
        self,
        resume_from_checkpoint: "str | Path | bool | None" = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, and keep what was learned however it ends.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*): "auto" resumes from the newest complete
                checkpoint in `args.output_dir` and starts afresh without one; True is the same, and FileNotFoundError
                without one; a folder is that checkpoint. A damaged checkpoint is skipped by name. A finished run loads
                its weights and returns at once. On a CPU the numbers are bit for bit those of a run that was never
                stopped.
            trial, ignore_keys_for_eval (*optional*): As in transformers' Trainer.

        Returns transformers' `TrainOutput`; after an interrupt its metrics are {"interrupted": True}.

        Raises ValueError for a checkpoint of another run (model, data, rewards, arguments), naming what differs, and
        for a folder that is damaged; FileNotFoundError for one that does not exist.
        """
        folder = self._find(resume_from_checkpoint)
        self._start_at(folder)
        if folder is not None and self._finished(folder):
            return TrainOutput(self.state.global_step, float("nan"), {"finished": True})
        try:
            with warnings.catch_warnings():  # of TRL's own, about transformers 5.23
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                return super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)
        except KeyboardInterrupt:
            # before the first step, or before a checkpoint is loaded, the weights must not replace what is saved
            saved_in = self._save_all() if self.state.global_step else None
            self.model.eval()
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            if saved_in is None:
                print("Stopped by you before the first step was done: nothing new was learned, and nothing is written.")
            else:
                print(f"Stopped by you after step {self.state.global_step}. What was learned is kept, here and in "
                      f"{saved_in}: go on with the next cell.")  # fmt: skip
            self._print_how_to_resume()
            return TrainOutput(self.state.global_step, float("nan"), {"interrupted": True})
        except Exception:
            self.model.eval()
            if self.state.global_step:
                print(
                    f"Step {self.state.global_step + 1} failed. What was learned until then is in {self._save_all()}."
                )
                self._print_how_to_resume()
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers' Trainer, without its progress bar, which stays in a notebook as an empty widget."""
        transformers_logging.disable_progress_bar()
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            transformers_logging.enable_progress_bar()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """transformers' hook: the adapter of a model from `loader.load` is saved with what it is an adapter of; TRL's
        reference is saved with the position of the run alone (`_save_checkpoint`)."""
        model, folder = self.accelerator.unwrap_model(self.model), Path(output_dir or self._root)
        loras = adapter.loras(model)
        why = adapter.why_not_saved(adapter.peft_model(model)) if loras else None
        if loras and state_dict is None and why is None:
            if self.args.should_save:
                adapter.save_adapter(model, folder)
                self.processing_class.save_pretrained(folder)
            return
        if why is not None and adapter.base_of(model) is not None and self._staging is None:
            print(f"{folder} gets peft's files alone: {why}.")
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing reads
            if loras:
                shutil.rmtree(folder / adapter.REFERENCE, ignore_errors=True)

    def _save_all(self) -> Path:
        """Save model or adapter, tokenizer and the log of the run into the output folder, and return it.

        If the run is at the end of an update, a checkpoint too, so that it can be resumed from there.
        """
        one_process = self.accelerator.num_processes == 1  # several would wait for each other
        mark = self._mark
        if mark is not None and self.state.global_step and self.args.save_strategy != "no" and one_process:
            assert mark.rng is not None  # `_position` sets it
            checkpoint.set_generators(mark.rng)  # as if the step in progress had not begun
            self._restore(mark)
            self.state.num_input_tokens_seen = mark.counters["tokens"]
            self._save_checkpoint(self.model, trial=None)
        self.save_model()
        self.save_state()
        return self._root

    @property
    def _root(self) -> Path:
        """The output folder."""
        assert self.args.output_dir is not None  # transformers sets it where it was not given
        return Path(self.args.output_dir)

    def _print_how_to_resume(self) -> None:
        if self._saved is not None:
            print(f'trainer.train(resume_from_checkpoint="auto") goes on after step {self._saved}.')

    def _position(self) -> checkpoint.Position:
        """Where the run is now, between two updates."""
        mid_rollout = self._step % (self._steps_per_generation * self.num_iterations) != 0
        position = checkpoint.Position(
            micro_step=self._step,
            rollout=self._buffered_inputs if mid_rollout else None,
            counters={"tokens": self.state.num_input_tokens_seen},
            rng=checkpoint.generators(),
        )
        self._write_state(position)
        return position

    def _restore(self, position: checkpoint.Position) -> None:
        """Be where `position` is; its random generators are not touched."""
        self._step, self._buffered_inputs = position.micro_step, position.rollout
        self._read_state(position)

    def _start_at(self, folder: Path | None) -> None:
        """Be where a checkpoint is, or at the start of a run."""
        self._metrics["train"].clear()  # of a step that an interrupt cut short
        self._mark, self._saved, self._epochs_before = None, None, 0
        if folder is None or not (folder / checkpoint.MANIFEST).exists():
            self._restore(checkpoint.Position(0, None))
            return
        self._restore(checkpoint.Position.load(folder, self.accelerator.process_index, self.args.device))
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        self._saved, self._epochs_before = state.global_step, int(state.epoch)

    def _find(self, wanted: "str | Path | bool | None") -> Path | None:
        """The checkpoint to resume from; None: none. Raises as `train` does."""
        if wanted is None or wanted is False:
            return None
        if self.args.sync_ref_model:
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
                raise ValueError(f'{folder} is damaged: {why}. Take another, or resume_from_checkpoint="auto"')
        checkpoint.refuse_other(folder, self._run())
        if self.args.save_only_model:
            print("Without the optimizer's state (save_only_model=True) a run goes on, but not exactly.")
        print(f"Goes on from {folder}, after step {checkpoint.read(folder)['step']}.")
        return folder

    def _run(self) -> dict:
        model = self.accelerator.unwrap_model(self.model)
        return checkpoint.describe(model, self.args, self.train_dataset, self.reward_func_names)

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
        self.state = state
        self.model.eval()
        for event in (self.callback_handler.on_train_begin, self.callback_handler.on_train_end):
            event(self.args, self.state, self.control)
        print(f"This run is finished: step {state.global_step} of {last}. The model has its weights. To train longer, "
              f"raise max_steps (or num_train_epochs).")  # fmt: skip
        return True

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: "nn.Module", trial: Any) -> None:
        """transformers' hook: it writes into a staging folder, which then becomes the checkpoint by a rename."""
        if self._saved == self.state.global_step:
            return
        root, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoint.staging(root)
        self.accelerator.wait_for_everyone()
        self._staging = root / checkpoint.STAGING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        staged, inner = root / checkpoint.STAGING / name, self.accelerator.unwrap_model(self.model)
        if self.args.should_save and adapter.loras(inner) and (more := adapter.beside(adapter.peft_model(inner))):
            save_file({key: tensor.cpu().contiguous() for key, tensor in more.items()}, staged / checkpoint.BESIDE)
        self._position().save(staged, self.accelerator.process_index)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_global_step:  # transformers looked for it in the staging folder
                self.state.best_model_checkpoint = str(root / f"checkpoint-{self.state.best_global_step}")
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            checkpoint.publish(staged, root / name, self._run(), self.state.global_step)
            checkpoint.rotate(root, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        self._saved = self.state.global_step

    def _load_scaler(self, folder: str | None) -> None:
        if self.accelerator.scaler is not None:  # there is none in bf16: the run began in fp16, on another card
            super()._load_scaler(folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = self.model.all_tied_weights_keys  # tied weights are stored once
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _get_train_sampler(self, dataset: "Dataset | None" = None) -> "Sampler":
        """TRL's hook: every epoch draws the next permutation from one generator; those of earlier sessions count."""
        sampler = cast("RepeatSampler", super()._get_train_sampler(dataset))
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
        self.trainer._mark = self.trainer._position()

    on_evaluate = on_step_end
