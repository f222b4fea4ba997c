"""Kinds of hooks are put together without knowing each other, and a resumed run gives each its state back."""

import pytest
from step_cases import make_model, make_trainer

from nbhelpers.training import trainer
from nbhelpers.training.hooks import Hooks


class Counting(Hooks):
    seen = 0

    def training_step(self, *args, **kwargs):
        self.seen += 1
        return super().training_step(*args, **kwargs)

    def _write_state(self, position):
        super()._write_state(position)
        position.extra["counting"] = {"seen": self.seen}

    def _read_state(self, position):
        super()._read_state(position)
        self.seen = position.extra.get("counting", {"seen": 0})["seen"]


class First(Counting, trainer.LeanGRPOTrainer):
    pass


class Last(trainer.LeanGRPOTrainer, Counting):
    pass


@pytest.mark.parametrize("before, after", [(First, Last), (Last, First)])
def test_hooks_of_another_kind_find_their_state_again_whatever_their_order(tmp_path, before, after):
    make_trainer(before, make_model(), tmp_path, max_steps=2, save_steps=2, save_strategy="steps").train()
    again = make_trainer(after, make_model(), tmp_path, max_steps=3)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 3 and again.seen == 3 and again.skipped_steps == 0
    again.train()
    assert again.seen == 3  # a run of its own counts from 0
