"""A trainer whose checkpoints are complete or absent, and hold weights that are finite: what is written, and when.

The hooks touch these private parts of TRL and transformers:

    _step, _buffered_inputs                 TRL's: where the run is within a rollout
    _save_checkpoint, _get_output_dir       transformers write into a staging folder
    _save                                   an adapter is saved with what it is an adapter of
"""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging as transformers_logging

from nbhelpers import files
from nbhelpers.architecture import GB
from nbhelpers.models import adapter
from nbhelpers.models.finite import first_not_finite
from nbhelpers.rewards.guard import unguarded

from . import checkpoint, identity, run_folder, stops
from .hooks import RunHooks

if TYPE_CHECKING:
    from torch import nn


class SaveHooks(RunHooks):
    """See the module. `trainer.LeanGRPOTrainer` is what people use."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._mark: checkpoint.Position | None = None  # the end of the newest update, while the weights are as then
        self._staging: Path | None = None  # where a checkpoint is being written
        self._saved: int | None = None  # the step of this run's newest checkpoint
        self._start = 0  # which start in this folder it is: checkpoint.next_start
        self._described: dict[str, Any] | None = None  # what run it is
        self._evaluation_due = False  # the evaluation of this step has begun and is not over
        self._logged = 0  # entries of the log before that evaluation

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers' Trainer, without its progress bar, which stays in a notebook as an empty widget."""
        transformers_logging.disable_progress_bar()
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            transformers_logging.enable_progress_bar()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """transformers' hook: the adapter of a model from `loader.load` is saved with what it is an adapter of; TRL's
        reference is saved with the position of the run alone (`_write_checkpoint`)."""
        model, folder = self.accelerator.unwrap_model(self.model), Path(output_dir or self._root)
        loras = adapter.loras(model)
        why = adapter.why_not_saved(adapter.peft_model(model)) if loras else None
        if loras and state_dict is None and why is None:
            if self.args.should_save:
                adapter.write_adapter(adapter.peft_model(model), folder)
                self.processing_class.save_pretrained(folder)
            return
        if why is not None and adapter.base_of(model) is not None and self._staging is None:
            print(f"{self._root} gets peft's files alone: {why}.")
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing reads
            if loras:
                shutil.rmtree(folder / adapter.REFERENCE, ignore_errors=True)

    def _save_all(self, checkpoint_too: bool = True) -> Path | None:
        """Save model or adapter, tokenizer and the log of the run into the output folder, and return it.

        If the run is at the end of an update, a checkpoint too, so that it can be resumed from there. None, with a line
        that says why, if nothing could or should be written. Signals wait until it is done.
        """
        named = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        if (bad := first_not_finite(named)) is not None:
            print(f"The weights are not saved: {bad} is not finite.")
            return None
        one_process = self.accelerator.num_processes == 1  # several would wait for each other
        mark = self._mark
        with stops.held_back(deliver=False):
            if checkpoint_too and mark is not None and self.args.save_strategy != "no" and one_process:
                assert mark.rng is not None  # `_position` sets it
                checkpoint.set_generators(mark.rng)  # as if the step in progress had not begun
                self._restore(mark)
                self.state.num_input_tokens_seen = mark.counters["tokens"]
                if self._evaluation_due:
                    del self.state.log_history[self._logged :]
                try:
                    self._save_checkpoint(self.model, trial=None)
                except run_folder.FolderError as error:
                    print(f"No checkpoint: {error}")
            try:
                self._save_final()
            except run_folder.FolderError as error:  # must not hide why the run ended
                print(f"The model could not be written into {self._root} either: {error}.")
                return None
        return self._root

    def _save_final(self) -> None:
        """Model or adapter, tokenizer and log into the output folder, file by file whole or as it was.

        Raises run_folder.FolderError, with the reason alone, where the disk does not take them."""
        staged = self._root / checkpoint.STAGING / "final"
        try:
            if self.args.should_save:
                checkpoint.staging(self._root)
            self.save_model(str(staged))
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                for path in sorted(staged.iterdir()):
                    if path.is_file():
                        files.sync(path)
                        path.replace(self._root / path.name)
                    else:
                        files.put_in_place(path, self._root / path.name, staged.parent / f"removed-{path.name}")
        except Exception as error:
            if not run_folder.names_a_disk(error):
                raise
            raise run_folder.FolderError(getattr(error, "errno", None), run_folder.reason(error, self._root)) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)

    def _check_weights(self) -> None:
        """FloatingPointError if the newest update left weights that are not finite: nobody must get them."""
        name = first_not_finite((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        if name is not None:
            kept = (
                "nothing was saved yet"
                if self._saved is None
                else f"the newest checkpoint, of step {self._saved}, stays"
            )
            raise FloatingPointError(
                f"after step {self.state.global_step} the weights are not finite (NaN or infinity), first in {name}: "
                f"lower learning_rate={self.args.learning_rate:g}, or look at the rewards of that step. They are not "
                f"saved; {kept}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL; in `state.log_history` a number that is not finite is None, because JSON has none."""
        super().log(logs, start_time)
        history: list[dict[str, Any]] = self.state.log_history
        history[-1] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in history[-1].items()
        }

    @property
    def _root(self) -> Path:
        """The output folder."""
        assert self.args.output_dir is not None  # transformers sets it where it was not given
        return Path(self.args.output_dir)

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

    def _run(self) -> dict:
        """What run it is, found out once: a reward may change what it refers to while it runs."""
        if self._described is None:
            model = self.accelerator.unwrap_model(self.model)
            rewards = [
                (name, unguarded(func)) for name, func in zip(self.reward_func_names, self.reward_funcs, strict=True)
            ]
            template = getattr(self.processing_class, "chat_template", None)  # a processor need not have one
            self._described = identity.describe(
                model, self.args, self.train_dataset, rewards, template, **self._identity()
            )
        return self._described

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: "nn.Module", trial: Any) -> None:
        """transformers' hook: it writes into a staging folder, which then becomes the checkpoint by a rename. A signal
        waits until that is done. Raises run_folder.FolderError where the disk is the reason that it cannot."""
        if self._saved == self.state.global_step:
            return
        self._check_weights()
        root = Path(self._get_output_dir(trial))
        try:
            with stops.held_back():
                self._write_checkpoint(model, trial, root)
        except Exception as error:
            why = run_folder.reason(error, root)
            if self.args.should_save:
                shutil.rmtree(root / checkpoint.STAGING, ignore_errors=True)
            if not run_folder.names_a_disk(error):
                raise
            size, _ = run_folder.checkpoint_bytes(self.accelerator.unwrap_model(self.model), self.args)
            raise run_folder.FolderError(
                error.errno if isinstance(error, OSError) else None,
                f"the checkpoint of step {self.state.global_step}, {size / GB:.3f} GB, could not "
                f"be written into {root}: {why}. Make room there or take another output_dir"
            ) from error  # fmt: skip

    def _write_checkpoint(self, model: "nn.Module", trial: Any, root: Path) -> None:
        name = f"checkpoint-{self.state.global_step}"
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
            checkpoint.publish(staged, root / name, self._run(), self.state.global_step, self._start)
            checkpoint.rotate(root, self.args.save_total_limit, self.state.best_model_checkpoint, self._run())
        self.accelerator.wait_for_everyone()
        self._saved = self.state.global_step
