"""The lean step against stock TRL: loss, LoRA gradients and metrics on the same rollouts."""

import math
from types import SimpleNamespace

import pytest
import torch
import trl
from step_cases import (
    FAMILIES,
    compare,
    configure,
    difference,
    gradients,
    make_batch,
    make_model,
    make_trainer,
    through,
)
from transformers import Qwen2ForCausalLM

from nbhelpers import grpo
from nbhelpers.architecture import GB
from nbhelpers.memory.micro_batches import StepCost, Tokens
from nbhelpers.models import families
from nbhelpers.training import lean_step, losses, packing, trainer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{family: (stock TRL, ours)}, each with its own copy of one model; made when asked for, used again."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            stock = make_trainer(trl.GRPOTrainer, make_model(family), folder)
            ours = make_trainer(trainer.LeanGRPOTrainer, make_model(family), folder)
            assert ours.lean
            made[family] = stock, ours
        return made[family]

    return get


# -------------------------------------------------------------------------------------------------- against TRL


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", losses.LOSS_TYPES)
def test_loss_gradients_and_metrics_are_trls(pairs, loss_type, beta, accumulation):
    stock, ours = compare(
        pairs("llama"), make_batch(groups=2, size=4), loss_type=loss_type, beta=beta, accumulation=accumulation
    )
    assert stock.keys() <= ours.keys()
    for name, wanted in stock.items():
        assert ours[name] == pytest.approx(wanted, rel=1e-4, abs=1e-6, nan_ok=True), name
    if loss_type in losses.CLIPPED:
        assert any(stock["clip_ratio/region_mean"]), "no ratio was clipped: the batch shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture(pairs, family):
    compare(pairs(family), make_batch(groups=3, size=3), beta=0.04)


@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_groups_of_any_size(pairs, size):
    compare(pairs("qwen2"), make_batch(groups=2, size=size), loss_type="grpo")


@pytest.mark.parametrize(
    "settings",
    [
        {"level": "sequence", "high": 0.001, "epsilon": 0.001},
        {"level": "sequence", "beta": 0.04},
        {"delta": 1.1},
        {"delta": 1.1, "beta": 0.04, "bias": False},
    ],
    ids=str,
)
def test_variants(pairs, settings):
    stock, ours = compare(pairs("phi3"), make_batch(), loss_type="grpo", **settings)
    for name in stock:
        assert ours[name] == pytest.approx(stock[name], rel=1e-4, abs=1e-6, nan_ok=True), name


def test_one_update_a_rollout_needs_no_old_pass(pairs):
    batch = make_batch(old=False, ref=False)
    compare(pairs("mistral"), batch, loss_type="dr_grpo")


def test_the_difference_would_be_seen(pairs):
    """The comparison can fail: another beta, or a token more in one row's mask, is far beyond the tolerance."""
    batch = make_batch()
    stock, ours = pairs("llama")
    configure(stock, beta=0.04)
    configure(ours, beta=0.041)
    wanted = gradients(stock, batch)[1]
    assert difference(gradients(ours, batch)[1], wanted) > 1e-4
    configure(ours, beta=0.04)
    batch["completion_mask"] = batch["completion_mask"].clone()
    row = batch["completion_mask"].sum(1).argmin()
    batch["completion_mask"][row, batch["completion_mask"][row].sum()] = 1
    assert difference(gradients(ours, batch)[1], wanted) > 1e-3


@pytest.mark.parametrize("changes", [
    {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4, "beta": 0.04},
    {"num_iterations": 2, "per_device_train_batch_size": 8, "loss_type": "grpo"},
], ids=["accumulation", "iterations"])  # fmt: skip
def test_whole_runs_end_at_the_same_weights(tmp_path, changes):
    """Generation, rewards, old and reference passes included: two updates with a large learning rate."""
    ends = []
    for cls in (trl.GRPOTrainer, trainer.LeanGRPOTrainer):
        model = make_model("qwen2")
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        one = make_trainer(cls, model, tmp_path, optim="sgd", **changes)
        one.train()
        ends.append({n: p.detach() - start[n] for n, p in one.model.named_parameters() if p.requires_grad})
    assert difference(ends[1], ends[0]) < 1e-4  # of the updates, not of the weights


def test_a_model_trained_whole(tmp_path):
    """No adapter: the embedding, which is the head too, and the norms learn; the reference is a model of its own."""
    batch, found = make_batch(groups=2, size=2), []
    make_model("qwen2", lora=False, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    for cls in (trl.GRPOTrainer, trainer.LeanGRPOTrainer):
        model = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        one = make_trainer(cls, model, tmp_path, beta=0.04)  # reads the reference from where the model came
        configure(one, beta=0.04)
        found.append(gradients(one, batch))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert difference(found[1][1], found[0][1]) < 1e-5


def test_what_the_lean_step_cannot_do_goes_trls_way(tmp_path, capsys):
    one = make_trainer(trainer.LeanGRPOTrainer, make_model(), tmp_path, cast_lm_head_to_fp32=True)
    assert not one.lean
    assert "The loss is TRL's own" in (said := capsys.readouterr().out) and "cast_lm_head_to_fp32" in said
    tokens, step = Tokens(96, 96, 96), StepCost(families.architecture(one.model.config.to_dict()), 4)  # 8 rows of 12
    whole, inputs = step.peak(tokens, 3, 0, 96) / GB, step.peak(tokens, 0, 3, 96) / GB
    assert f"8 rows of a batch at once, padded: for completions of 12 tokens that is at least {whole:.2g} GB" in said
    assert f"({inputs:.2g} GB with gradient_checkpointing=True)" in said and inputs < whole
    configure(one)
    loss = one.compute_loss(one.model, make_batch(size=2) | {"old_per_token_logps": torch.zeros(4, 12)})
    assert loss.requires_grad and loss.grad_fn is not None


# -------------------------------------------------------------------------------------------- rows without signal


def test_rows_without_advantage_are_skipped_with_the_same_gradient(pairs):
    stock, ours = pairs("llama")
    batch = make_batch(groups=2, size=4, zeros=True)
    compare((stock, ours), batch, loss_type="dapo")
    assert ours._metrics["train"]["frac_zero_signal_skipped"] == [0.5]
    scored = sum(len(part.rows) for part in ours._step_of(ours.model).micro_batches)
    assert scored == 4
    compare((stock, ours), batch, loss_type="dapo", beta=0.04)  # the KL has a gradient in every row
    assert ours._metrics["train"]["frac_zero_signal_skipped"] == [0.0]


def test_a_batch_without_any_signal_has_gradients_of_zero(pairs):
    ours = pairs("llama")[1]
    configure(ours)
    batch = make_batch() | {"advantages": torch.zeros(8)}
    loss, got = gradients(ours, batch)
    assert loss == 0 and got and all((gradient == 0).all() for gradient in got.values())
    assert all(math.isnan(ours._metrics["train"][name][0]) for name in ("entropy", "signal/entropy"))


def test_a_batch_that_runs_out_of_memory_is_computed_again_in_smaller_parts(pairs, monkeypatch, capsys):
    ours, batch = pairs("llama")[1], make_batch(groups=2, size=4)
    one = ours._step_of(ours.model)
    monkeypatch.setattr(one.room, "budget_gb", 3e-4)
    monkeypatch.setattr(one.room, "share", 1.0)

    def measure():
        configure(ours)
        found = gradients(ours, batch), {k: v[0] for k, v in ours._metrics["train"].items()}, list(one.micro_batches)
        found[1].pop("tokens_per_second")
        return found

    (wanted_loss, wanted), metrics, parts = measure()
    backward, calls = one.decoder._differentiate, []

    def short_of_memory(*arguments):
        calls.append(arguments)
        if len(calls) in failing:
            raise torch.OutOfMemoryError
        backward(*arguments)

    monkeypatch.setattr(one.decoder, "_differentiate", short_of_memory)
    failing = [2]  # the gradients of the last layer are there already
    (loss, got), again, smaller = measure()
    assert loss == pytest.approx(wanted_loss, rel=1e-5) and difference(got, wanted) < 1e-5
    assert again == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert max(part.peak for part in smaller) < max(part.peak for part in parts) and one.room.share == 0.8
    assert "computed again, in smaller parts" in capsys.readouterr().out

    failing = [len(calls) + 4]  # now there are gradients of an earlier batch
    with pytest.raises(torch.OutOfMemoryError):
        ours.compute_loss(ours.model, batch)
    ours.model.zero_grad()
    failing = range(10**6)
    with pytest.raises(torch.OutOfMemoryError):
        ours.compute_loss(ours.model, batch)
    assert 0.4 < one.room.share < 0.55


def test_rows_that_trl_masks_out_are_left_alone(pairs):
    """mask_truncated_completions zeroes the masks of unfinished completions."""
    batch = make_batch()
    batch["completion_mask"] = batch["completion_mask"].clone()
    batch["completion_mask"][2] = 0
    compare(pairs("llama"), batch, loss_type="grpo")


# ------------------------------------------------------------------------- the engine's own log-probabilities


def test_the_engines_logps_correct_the_loss_without_another_pass(pairs):
    """One forward gives both: the weight of each token is exp(trainer - engine), truncated, without a gradient."""
    ours = pairs("llama")[1]
    configure(ours, loss_type="grpo")
    ours.args.vllm_importance_sampling_mode, ours.args.vllm_importance_sampling_clip_max = "token_truncate", 1.2
    batch = make_batch(old=False, ref=False)
    rows = packing.unpad(*(batch[n] for n in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")))
    logps, _ = ours._step_of(ours.model).score(rows, batch["completion_ids"].shape)
    sampled = logps + 0.3 * torch.randn(logps.shape)
    _, got = gradients(ours, batch | {"sampling_per_token_logps": sampled})
    metrics = dict(ours._metrics["train"])

    mask = batch["completion_mask"]
    weight = (logps - sampled).exp().clamp(max=1.2)
    by_hand = grpo.token_weights(mask, "grpo") * weight * -batch["advantages"][:, None]
    ours.model.zero_grad()
    _, wanted, _ = through(ours.model, rows, by_hand)
    assert difference(got, wanted) < 1e-5
    assert metrics["sampling/kl"] == [pytest.approx(grpo.kl(sampled, logps)[mask.bool()].mean().item(), rel=1e-4)]
    assert metrics["sampling/importance_sampling_ratio/max"][0] == pytest.approx(1.2)
    ours.args.vllm_importance_sampling_mode = "sequence_mask"


# ----------------------------------------------------------------------------------------- gradients gone wrong


def test_the_first_gradient_that_is_not_finite_is_the_backwards_first():
    named = [(name, torch.nn.Parameter(torch.zeros(2))) for name in ("first", "middle", "last", "frozen")]
    assert lean_step.first_non_finite(named) is None
    for _, parameter in named[:3]:
        parameter.grad = torch.ones(2)
    assert lean_step.first_non_finite(named) is None
    named[0][1].grad[0], named[1][1].grad[1] = float("inf"), float("nan")
    assert lean_step.first_non_finite(named) == "middle"


def test_a_gradient_that_is_not_finite_skips_the_update_and_names_the_layer(tmp_path, capsys):
    model = make_model()
    one = make_trainer(trainer.LeanGRPOTrainer, model, tmp_path, max_steps=4, max_skipped_steps=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    poisoned = model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight")
    poisoned.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match=r"2 times in a row.*layers\.1\.mlp\.up_proj\.lora_A"):
        one.train()
    assert "Step 1 is skipped: the gradient of base_model.model.model.layers.1.mlp.up_proj" in capsys.readouterr().out
    assert one.skipped_steps == 2
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)


def halved(tmp_path, scale=None, **changes):
    """A trainer of a model whose base is in fp16, as on a T4, with a loss scaler, which accelerate sets up on cards
    only; without a scale one of the same numbers in fp32. One at a time: accelerate keeps the precision in a global."""
    model = make_model()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.half() if scale else parameter.data.half().float()
    one = make_trainer(trainer.LeanGRPOTrainer, model, tmp_path, fp16=scale is not None, **changes)
    if scale:
        one.accelerator.native_amp, one.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
    return one


def test_fp16_gradients_are_fp32s_times_the_scale(tmp_path):
    batch, found = make_batch(), []
    for scale in (1024.0, None):
        one = halved(tmp_path, scale)
        configure(one)
        found.append(gradients(one, batch))
    (loss, got), (wanted_loss, wanted) = found
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    assert loss == pytest.approx(wanted_loss, abs=1e-3)
    assert 1e-5 < difference({name: gradient / 1024 for name, gradient in got.items()}, wanted) < 0.01


def test_a_run_in_fp16_trains_and_one_whose_loss_is_scaled_too_far_skips_and_says_so(tmp_path, capsys):
    one = halved(tmp_path, 1024.0, max_steps=3)
    before = {n: p.detach().clone() for n, p in one.model.named_parameters() if p.requires_grad}
    one.train()
    assert one.skipped_steps == 0 and one.accelerator.scaler.get_scale() == 1024.0
    after = {n: p for n, p in one.model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and p.isfinite().all() and not torch.equal(p, before[n])
               for n, p in after.items())  # fmt: skip

    one = halved(tmp_path, 2.0**40, max_steps=3, max_skipped_steps=2)
    with pytest.raises(FloatingPointError, match="2 times in a row"):
        one.train()
    assert f"fp16's loss scale is {2.0**40:g} and will be halved" in capsys.readouterr().out
    assert one.accelerator.scaler.get_scale() == 2.0**39


def test_the_room_knows_what_others_take(tmp_path):
    """The optimizer's moments until its first update has made them, and what a sleeping engine has handed back."""
    ours = make_trainer(trainer.LeanGRPOTrainer, make_model("qwen2"), tmp_path, max_steps=1, optim="adamw_torch")
    numbers = sum(p.numel() for p in ours.model.parameters() if p.requires_grad)
    room = ours._step_of(ours.model).room
    assert room.reserved() == (0, 8 * numbers)
    ours.engine = SimpleNamespace(asleep=7)
    assert room.reserved() == (7, 8 * numbers)
    ours.engine = None
    ours.train()
    assert room.reserved() == (0, 0)


def test_a_run_that_cannot_fit_stops_before_its_first_step(tmp_path):
    one = make_trainer(trainer.LeanGRPOTrainer, make_model(), tmp_path, budget_gb=1e-5)
    with pytest.raises(lean_step.CannotFit, match="needs"):
        one.train()
    assert one.state.global_step == 0


def test_the_adapter_of_a_4_bit_model_stays_in_fp32(tmp_path):
    """TRL casts it to bf16, where an update of 1e-5 is rounded away."""
    for cls, dtype in ((trl.GRPOTrainer, torch.bfloat16), (trainer.LeanGRPOTrainer, torch.float32)):
        model = make_model()
        model.is_loaded_in_4bit = True  # what TRL looks at
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        one = make_trainer(cls, model, tmp_path)
        after = {n: p for n, p in one.model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in after.values()} == {dtype}
        if dtype == torch.float32:
            assert all(torch.equal(after[n], before[n]) for n in before)
