"""A GRPOTrainer that loses nothing on a stop and goes on exactly where it was: the hooks around checkpoint.py.

With trainer.py and lean.py the only file that touches private parts of TRL and transformers. Here these are:

    _step, _buffered_inputs                 TRL's: where the run stands in a rollout
    _metrics                                TRL's: numbers that are not logged yet
    _get_train_sampler                      in a resumed run the prompts of its own epoch, not of the first
    _save_checkpoint, _get_output_dir       transformers write into a staging folder
    _save                                   an adapter is saved so that it knows its base
    _load_from_checkpoint, _load_scaler     weights of a finished run; a run that changed its precision
    _issue_warnings_after_load              not about a head that is the embedding
"""

import warnings
from pathlib import Path

import torch
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from nbhelpers.models import adapter

from . import checkpoint
from .lean_hooks import LeanStepTrainer


class ResumingTrainer(LeanStepTrainer):
    """See the module. `trainer.LeanGRPOTrainer` is what people use."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._mark: checkpoint.Position | None = None  # the end of the newest update, while the weights are as then
        self._staging: Path | None = None  # where a checkpoint is being written
        self._saved: int | None = None  # the step of this run's newest checkpoint
        self._epochs_before = 0  # whole passes over the data that earlier sessions made
        self.callback_handler.callbacks.insert(0, _Marks(self))  # first: another callback may raise

    def train(self, resume_from_checkpoint: "str | Path | bool | None" = None, **kwargs) -> TrainOutput:
        """Train, and keep what was learned however it ends. Arguments and result as in transformers' Trainer, but

        resume_from_checkpoint: "auto" goes on from the newest complete checkpoint in `args.output_dir` and starts
            afresh without one; True is the same and FileNotFoundError without one; a folder is that checkpoint. A
            damaged checkpoint is skipped by name. A finished run gives its weights and returns at once. On a CPU the
            numbers are bit for bit those of a run that was never stopped.

        Raises ValueError for a checkpoint of another run (model, data, rewards, arguments), naming what differs, and
        for a folder that is damaged; FileNotFoundError for one that is not there.
        """
        folder = self._find(resume_from_checkpoint)
        self._stand_at(folder)
        if folder is not None and self._finished(folder):
            return TrainOutput(self.state.global_step, float("nan"), {"finished": True})
        try:
            with warnings.catch_warnings():  # of TRL's own, about transformers 5.23
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                return super().train(resume_from_checkpoint=None if folder is None else str(folder), **kwargs)
        except KeyboardInterrupt:
            # before the first step, or before a checkpoint is loaded, the weights must not replace what is saved
            kept = self._keep() if self.state.global_step else None
            self.model.eval()
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            if kept is None:
                print("Stopped by you before the first step was done: nothing new was learned, and nothing is written.")
            else:
                print(f"Stopped by you after step {self.state.global_step}. What was learned is kept, here and in "
                      f"{kept}: go on with the next cell.")  # fmt: skip
            self._say_how_to_go_on()
            return TrainOutput(self.state.global_step, float("nan"), {"interrupted": True})
        except Exception:
            self.model.eval()
            if self.state.global_step:
                print(f"Step {self.state.global_step + 1} failed. What was learned until then is in {self._keep()}.")
                self._say_how_to_go_on()
            raise

    def save_model(self, *args, **kwargs) -> None:
        """As in transformers' Trainer, without its progress bar, which stays in a notebook as an empty widget."""
        transformers_logging.disable_progress_bar()
        try:
            super().save_model(*args, **kwargs)
        finally:
            transformers_logging.enable_progress_bar()

    def _save(self, output_dir=None, state_dict=None) -> None:
        """transformers' hook: the adapter of a model from `loader.load` is saved so that it knows its base."""
        model = self.accelerator.unwrap_model(self.model)
        if state_dict is not None or not adapter.loras(model) or adapter.base_of(model) is None:
            super()._save(output_dir, state_dict)
            if self.args.should_save:  # a pickle that nobody reads
                Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            adapter.save_adapter(model, folder)
            self.processing_class.save_pretrained(folder)

    def _keep(self) -> Path:
        """Save model or adapter, tokenizer and the log of the run into the output folder, and return it.

        If the run stands at the end of an update, a checkpoint too, so that it can go on from here.
        """
        one_process = self.accelerator.num_processes == 1  # several would wait for each other
        if self._mark is not None and self.state.global_step and self.args.save_strategy != "no" and one_process:
            checkpoint.set_generators(self._mark.rng)  # as if the step in progress had not begun
            self._take(self._mark)
            self.state.num_input_tokens_seen = self._mark.counters["tokens"]
            self._save_checkpoint(self.model, trial=None)
        self.save_model()
        self.save_state()
        return Path(self.args.output_dir)

    def _say_how_to_go_on(self) -> None:
        if self._saved is not None:
            print(f'trainer.train(resume_from_checkpoint="auto") goes on after step {self._saved}.')

    def _position(self) -> checkpoint.Position:
        """Where the run stands now, between two updates."""
        within = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        counters = {
            "skipped": self.skipped_steps,
            "in_a_row": self._skipped_in_a_row,
            "tokens": self.state.num_input_tokens_seen,
        }
        rollout = self._buffered_inputs if within else None
        return checkpoint.Position(self._step, rollout, counters, checkpoint.generators())

    def _take(self, position: checkpoint.Position) -> None:
        self._step, self._buffered_inputs = position.micro_step, position.rollout
        self.skipped_steps, self._skipped_in_a_row = position.counters["skipped"], position.counters["in_a_row"]

    def _stand_at(self, folder: Path | None) -> None:
        """Take the position of a checkpoint, or of a start."""
        self._metrics["train"].clear()  # of a step that an interrupt cut short
        self._mark, self._saved, self._epochs_before = None, None, 0
        self._take(checkpoint.Position(0, None, {"skipped": 0, "in_a_row": 0}))
        if folder is None or not (folder / checkpoint.MANIFEST).exists():
            return
        self._take(checkpoint.Position.load(folder, self.accelerator.process_index, self.args.device))
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        self._saved, self._epochs_before = state.global_step, int(state.epoch)

    def _find(self, wanted: "str | Path | bool | None") -> Path | None:
        """The checkpoint to go on from; None: none."""
        if wanted is None or wanted is False:
            return None
        if self.args.sync_ref_model:
            raise ValueError("sync_ref_model=True moves the reference model, which no checkpoint holds: such a run "
                             "cannot go on exactly. Set it to False, or leave resume_from_checkpoint out")  # fmt: skip
        if wanted == "auto" or wanted is True:
            with self.accelerator.main_process_first():  # it may have to finish a rename
                folder = checkpoint.newest(self.args.output_dir)
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
        """transformers' hook. Beside the trained adapter TRL keeps a copy for the KL term, "ref", which peft saves in a
        subfolder; transformers 5.15 then reads the subfolders only, and training would go on from a random adapter."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        loaded = self.model if model is None else model
        if len(adapter.loras(loaded)) > 1 and (Path(resume_from_checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME).exists():
            adapter.peft_model(loaded).load_adapter(resume_from_checkpoint, "default", is_trainable=True)

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

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial) -> None:
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
        staged = root / checkpoint.STAGING / name
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

    def _load_scaler(self, folder) -> None:
        if self.accelerator.scaler is not None:  # none: the run began in fp16, on another card
            super()._load_scaler(folder)

    def _issue_warnings_after_load(self, load_result) -> None:
        tied = self.model.all_tied_weights_keys  # a head that is the embedding is not stored twice
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _get_train_sampler(self, dataset=None):
        """TRL's hook: every epoch takes the next permutation of one generator, and those of earlier sessions count."""
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self._epochs_before if sampler.shuffle else 0):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler


class _Marks(TrainerCallback):
    """Keeps the trainer's `_mark`: where the run can be cut. There is none while the optimizer changes the weights."""

    def __init__(self, trainer: ResumingTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.trainer._mark = None

    def on_step_end(self, args, state, control, **_):
        self.trainer._mark = self.trainer._position()

    on_evaluate = on_step_end
