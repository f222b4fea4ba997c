"""What a run logs: TRL's numbers under TRL's names or none, and valid JSON."""

import json
import math

import pytest
import torch
import trl
from step_cases import configure, difference, gradients, make_batch, make_model, make_trainer

from nbhelpers.training import trainer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return [
        make_trainer(cls, make_model(), tmp_path_factory.mktemp("runs"), epsilon_high=0.28)
        for cls in (trl.GRPOTrainer, trainer.LeanGRPOTrainer)
    ]


def measured(pair, batch, **settings):
    """The metrics of one batch by TRL and by ours."""
    found = []
    for one in pair:
        configure(one, **settings)
        gradients(one, batch)
        found.append({name: values[0] for name, values in one._metrics["train"].items()})
    return found


def test_entropy_is_trls_or_absent(pair):
    theirs, ours = measured(pair, make_batch())
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5) and ours["signal/entropy"] == ours["entropy"]
    some = make_batch(zeros=True)
    theirs, ours = measured(pair, some)
    assert math.isnan(ours["entropy"]) and ours["frac_zero_signal_skipped"] == 0.5
    rows = some["advantages"] != 0  # the entropy of the others, by TRL
    kept = {name: value[rows] if value.dim() else value for name, value in some.items()}
    assert ours["signal/entropy"] == pytest.approx(measured(pair, kept)[0]["entropy"], rel=1e-5)
    theirs, ours = measured(pair, some, beta=0.04)  # every row is computed
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)


def test_a_batch_without_any_signal_tells_nothing_of_what_was_not_computed(pair):
    batch = make_batch(old=False, ref=False) | {"advantages": torch.zeros(8)}
    batch["sampling_per_token_logps"] = -torch.rand(8, 12)
    _, ours = measured(pair, batch)
    unknown = {name for name, value in ours.items() if math.isnan(value)}
    assert unknown == {
        "entropy", "signal/entropy", "sampling/kl", "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/min",
        "sampling/importance_sampling_ratio/mean", "sampling/importance_sampling_ratio/max",
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_the_engines_ratio_is_that_of_the_rows_that_were_computed(pair, mode):
    """A silent row is not computed: its weight is not known, and is no 1 in the mean either."""
    ours, batch = pair[1], make_batch(old=False, ref=False, zeros=True)
    ours.args.vllm_importance_sampling_mode, mask = mode, batch["completion_mask"]
    logps, _, _ = without_gradients(ours, batch)
    sampled = logps - 0.01 - 0.01 * torch.rand(logps.shape)
    rows = batch["advantages"] != 0
    _, found = measured([pair[0], ours], batch | {"sampling_per_token_logps": sampled})
    ratio = ((logps - sampled) * mask)[rows]
    wanted = ratio.sum(1).exp() if mode == "sequence_truncate" else ratio[mask[rows].bool()].exp()
    name = "sampling/importance_sampling_ratio"
    assert found[f"{name}/min"] == pytest.approx(wanted.min().item(), rel=1e-4) and found[f"{name}/min"] > 1.005
    assert found[f"{name}/mean"] == pytest.approx(wanted.mean().item(), rel=1e-4)
    assert found[f"{name}/max"] == pytest.approx(wanted.max().item(), rel=1e-4)


@torch.no_grad()
def without_gradients(one, batch):
    ids, mask = ([batch[f"{part}_{kind}"] for part in ("prompt", "completion")] for kind in ("ids", "mask"))
    return one._get_per_token_logps_and_entropies(one.model, torch.cat(ids, 1), torch.cat(mask, 1), ids[1].shape[1])


def test_nothing_in_a_batch_whose_answers_are_all_masked_out(pair):
    batch = make_batch()
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    theirs, ours = measured(pair, batch)
    for name in ("clip_ratio/low_min", "clip_ratio/high_max"):
        assert math.isnan(theirs[name]) and math.isnan(ours[name])
    assert math.isnan(ours["entropy"]) and all(not math.isinf(value) for value in ours.values())


@pytest.mark.parametrize("cls", [trl.GRPOTrainer, trainer.LeanGRPOTrainer])
def test_the_log_of_a_run_is_json(tmp_path, cls):
    one = make_trainer(cls, make_model(), tmp_path, mask_truncated_completions=True, max_completion_length=2, beta=0.04)
    one.train()
    one.save_state()
    text = (tmp_path / "trainer_state.json").read_text()
    log = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["log_history"]
    assert len(log) == 3 and log[0]["clip_ratio/low_min"] is None
    if cls is trainer.LeanGRPOTrainer:
        assert log[0]["entropy"] is None


def test_an_entropy_without_some_of_a_steps_rows_is_not_logged(tmp_path):
    """TRL averages the micro-batches that it knows: one whose groups are silent would be left out in silence."""
    one = make_trainer(trainer.LeanGRPOTrainer, make_model(), tmp_path)
    one.model.train()
    one._metrics["train"].update(entropy=[2.0, math.nan], reward=[1.0, 3.0])
    one._metrics["train"]["signal/entropy"] = [2.0, math.nan]
    one.log({"grad_norm": math.inf})
    entry = one.state.log_history[-1]
    assert entry["entropy"] is None and entry["signal/entropy"] == 2.0 and entry["reward"] == 2.0
    assert entry["grad_norm"] is None


def test_the_summary_of_a_run_has_its_newest_numbers_too(tmp_path):
    one = make_trainer(trainer.LeanGRPOTrainer, make_model(), tmp_path)
    one.train()
    *_, newest, last = one.state.log_history
    assert newest["step"] == last["step"] == 2 and "train_runtime" in last and "train_runtime" not in newest
    assert newest.items() <= last.items()


# ---- what is trained ----


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_step_knows_what_is_trained_whatever_came_first(tmp_path, evaluated):
    """With beta > 0 the first use is the reference's: TRL's adapter "ref" is the active one then."""
    one = make_trainer(
        trainer.LeanGRPOTrainer, make_model(), tmp_path, beta=0.04, per_device_eval_batch_size=4, eval_dataset=True
    )
    one.evaluate() if evaluated else one.train()
    step, batch = one._step_of(one.model), make_batch()
    named = dict(one.model.named_parameters())
    wanted = {id(p) for name, p in named.items() if ".default." in name}
    assert {id(p) for p in step.trained} == wanted and any(".ref." in name for name in named)

    configure(one, beta=0.04)
    _, right = gradients(one, batch)
    real, plan, calls = step.decoder.differentiate, step.plan, []

    def halves(rows):
        (part,) = plan(rows)
        return [part._replace(rows=part.rows[:4]), part._replace(rows=part.rows[4:])]

    def fails_in_the_middle(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        real(*arguments)

    step.plan, step.decoder.differentiate = halves, fails_in_the_middle
    configure(one, beta=0.04)
    _, again = gradients(one, batch)
    assert len(calls) == 4 and difference(again, right) < 1e-5
