"""What a step of two cards is compared with: the same texts, one card after the other, cut alike."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import common
from benchmarks.engines import __main__ as script
from benchmarks.engines import grpo
from nbhelpers.engines import Completion, Sampling


def test_one_card_writes_in_its_turns_what_two_share():
    for most in (8, 768):
        shared = [sorted(grpo.lengths("ragged", turn, 0, 2, most) + grpo.lengths("ragged", turn, 1, 2, most))
                  for turn in (1, 2)]  # fmt: skip
        alone = [n for turn in (1, 2) for n in grpo.lengths("ragged", turn, (turn - 1) % 2, 2, most)]
        assert sorted(alone) == shared[0] == shared[1]
        assert (min(alone), max(alone)) == (most // 4, most)
    parts = [grpo.lengths("ragged", 1, part, 2, 768) for part in range(2)]
    assert sorted(parts[0]) != sorted(parts[1])
    assert grpo.lengths("ragged", 3, 0, 2, 768) != parts[0]
    assert grpo.lengths("equal", 1, 0, 2, 768) == [768] * 8


def test_completions_get_the_lengths_that_were_decided():
    class Engine:
        def generate(self, prompts, sampling):
            assert sampling.min_tokens == sampling.max_tokens  # no end token comes before
            return [Completion([5] * sampling.max_tokens, [-1.0] * sampling.max_tokens) for _ in range(8)]

    alone, shared = Engine(), [Engine(), Engine()]
    grpo.write_lengths(alone, ["ragged", "equal"], 3, None, 2)
    for part, engine in enumerate(shared):
        grpo.write_lengths(engine, ["ragged", "equal"], 3, part, 2)

    def turn(engine):
        completions = engine.generate([[1, 2]], Sampling(64, num_generations=8))
        assert all(len(one.token_ids) == len(one.logprobs) for one in completions)
        return [len(one.token_ids) for one in completions]

    for engine in (alone, *shared):
        turn(engine)  # the first is not timed
    assert turn(alone) + turn(alone) == turn(shared[0]) + turn(shared[1])
    turn(shared[0])
    assert turn(alone) == turn(shared[0]) == [64] * 8  # after three turns of a kind comes the next


def step_row(what, mean_s, cuts, **more):
    took = {"generating_s": mean_s - 2, "training_s": 1.0, "waiting_s": 0.5, "reduce_s": 0.0, "rest_s": 0.5}
    return common.row(what, "ours", 9.0, "s", mean_s=mean_s, steps=5, cuts=cuts, **took | more)


def test_the_share_of_the_time_of_one_card():
    one = step_row("m/1K-1-of-2-gpus/step_time", 6.0, ["a"])
    two = step_row("m/1K-2-gpus/step_time", 8.0, ["a"], alone="m/1K-1-of-2-gpus")
    (share,) = grpo.efficiencies([one, two])
    assert (share["what"], share["value"], share["unit"]) == ("m/1K-2-gpus/efficiency", 0.75, "share")
    lost = share["lost_s"]
    assert share["same_cuts"] and lost["generating_s"] == 2.0 == sum(lost.values())
    assert grpo.efficiencies([two]) == []
    (share,) = grpo.efficiencies([{**one, "cuts": ["b"]}, two])
    assert not share["same_cuts"]


def test_the_parts_of_a_step_add_up():
    one = {"generating": [9.0, 4.0, 2.0], "training": [9.0, 1.5, 1.0], "reduce": [9.0, 0.5, 0.25]}
    two = {"generating": [9.0, 2.0, 2.0], "training": [9.0, 1.5, 1.0], "reduce": [9.0, 0.25, 0.5]}
    found = grpo.parts([one, two], 1, 3, 4.5)
    assert found["generating_s"] == 2.5 and found["reduce_s"] == 0.25 and found["training_s"] == 0.875
    assert found["waiting_s"] == (1.0 + 0.125 + 0.125) / 2  # for the longest text, and for a slower gradient
    assert sum(found.values()) == 4.5


def test_several_cards_come_first_and_one_is_cut_as_they_were(monkeypatch, tmp_path):
    ran = []

    def run(job, folder, seconds):
        ran.append(job)
        alone = {"alone": "one"} if job["gpus"] > 1 else {}
        return [step_row(f"{job['model']}/{job['gpus']}/step_time", 6.0, [], work_gb=len(ran), **alone)]

    monkeypatch.setattr(script, "run", run)
    options = ["--quick", "--only", "grpo", "--gpus", "2", "--models", "phi-4", "llama-3.1-8b"]
    monkeypatch.setattr("sys.argv", ["engines", *options])
    script.main()
    assert [(job["gpus"], job["work_gb"]) for job in ran] == [(2, None), (1, 1), (2, None), (1, 3)]
    assert all(job["lengths"] == ["equal", "ragged"] for job in ran)  # one model for both


def test_no_clock_and_no_earlier_lack_of_memory_decides_a_cut():
    room, timed = SimpleNamespace(share=0.8, for_step=lambda coming=0: 8e9 * room.share - coming), []
    step = SimpleNamespace(room=room, available=lambda: room.for_step(4e8), set_launches=timed.append)
    others = SimpleNamespace(device="cpu", gather=lambda mine: torch.cat([mine, mine + 1]))
    trainer = SimpleNamespace(_step_of=lambda model: step, model=None, accelerator=others, compute_loss=lambda: None)
    agreed = grpo.cut_alike(trainer, None)
    step.set_launches(0.001)
    trainer.compute_loss()
    assert not timed and agreed == pytest.approx([6.0])
    assert room.for_step() == room.for_step(4e8) == step.available() == agreed[0] * 1e9  # not 0.8 of it again


@pytest.mark.skipif(torch.cuda.is_available(), reason="holds this process's memory of the card")
def test_batches_are_cut_for_what_they_are_given_whatever_is_left(monkeypatch):
    def cuts(**more):
        rows = {}
        job = {"model": "llama-3.1-8b", "quick": True, "cap": 1, "context": 1024, "steps": 3, "shared_by": 2,
               "lengths": ["equal", "ragged"], **more}  # fmt: skip
        grpo.steps(job, lambda metric, value, unit, who, **fields: rows.update({metric: fields}))
        times = [rows["1K-1-of-2-gpus/step_time"], rows["1K-1-of-2-gpus-ragged/step_time"]]
        for fields in times:
            assert sum(fields[part] for part in grpo.PARTS) == pytest.approx(fields["mean_s"], abs=1e-3)
        assert [len(fields["cuts"]) for fields in times] == [1, 2]  # batches of other lengths
        return [(fields["work_gb"], fields["cuts"]) for fields in times]

    whole = cuts()
    given = cuts(work_gb=whole[0][0] / 2)
    monkeypatch.setattr(grpo, "QUICK_WORK_GB", grpo.QUICK_WORK_GB / 2)  # as NCCL takes some of a card
    less = cuts()
    assert less == given
    assert all(a != b for (_, a), (_, b) in zip(whole, less, strict=True))
