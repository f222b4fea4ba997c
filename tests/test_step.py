"""The lean step against stock TRL: loss, LoRA gradients and metrics on the same rollouts, however the batch is cut."""

from contextlib import nullcontext

import pytest
import tiny_model
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

from nbhelpers import budget, decoder, grpo, packing, patch, step, trainer

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
VOCAB = len(tiny_model.CHARS) + len(tiny_model.SPECIAL)
ROWS = Dataset.from_dict({"prompt": [c * n for c in "abcdefgh" for n in (2, 5, 9)]})


def make_model(family="llama", lora=True, seed=0, **config):
    cls_config, cls = FAMILIES[family]
    settings = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.08, sliding_window=None,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = cls(cls_config(**{**settings, **config}))
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, so that A would get no gradient
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def length_reward(completions, **_):
    return [float(len(set(text)) % 3) for text in completions]


def make_trainer(cls, model, folder, **changes):
    lean = {name: changes.pop(name) for name in ("budget_gb", "max_skipped_steps") if name in changes}
    callbacks = changes.pop("callbacks", None)
    if cls is trainer.LeanGRPOTrainer:
        lean["engine"] = None  # TRL writes the completions of both, so that both draw alike
    settings = dict(
        max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=12, learning_rate=1e-2,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
        report_to="none", logging_steps=1, seed=3,
    )  # fmt: skip
    args = trl.GRPOConfig(str(folder), **(settings | changes))
    return cls(
        model, reward_funcs=[length_reward], args=args, train_dataset=ROWS, callbacks=callbacks,
        processing_class=tiny_model.tokenizer(), **lean,
    )  # fmt: skip


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


def configure(
    one, loss_type="dapo", beta=0.0, accumulation=1, level="token", epsilon=0.2, high=0.28, delta=None, bias=True
):
    """Set what TRL reads when it computes a loss, on a trainer that is there already."""
    one.loss_type = one.args.loss_type = loss_type
    one.beta = one.args.beta = beta
    one.importance_sampling_level = one.args.importance_sampling_level = level
    one.epsilon_low, one.epsilon_high, one.args.delta = epsilon, high, delta
    one.args.use_bias_correction_kl = bias
    one.current_gradient_accumulation_steps = one.args.steps_per_generation = accumulation
    one._metrics["train"].clear()
    one.model.train()
    one.model.zero_grad()


def make_batch(groups=2, size=4, seed=0, old=True, ref=True, zeros=False):
    """A rollout as TRL hands it over: prompts padded on the left, completions on the right, all lengths different."""
    torch.manual_seed(seed)
    rows, p, t = groups * size, 9, 12
    prompt_lengths = torch.randint(2, p + 1, (groups,)).repeat_interleave(size)[:, None]
    lengths = torch.randint(1, t + 1, (rows,))[:, None]
    lengths[0], lengths[-1] = t, 1
    prompts = torch.randint(3, VOCAB, (groups, p)).repeat_interleave(size, 0)
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": (torch.arange(p) >= p - prompt_lengths).long(),
        "completion_ids": torch.randint(3, VOCAB, (rows, t)),
        "completion_mask": (torch.arange(t) < lengths).long(),
        "advantages": torch.randn(rows),
    }
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    near = -torch.rand(rows, t) * 0.8 - 4.2  # around what a random model gives, so that some ratios are clipped
    if old:
        batch["old_per_token_logps"] = near
    if ref:
        batch["ref_per_token_logps"] = near + 0.3 * torch.randn(rows, t)
    if zeros:
        batch["advantages"][:size] = 0.0
    order = torch.randperm(rows)  # TRL shuffles a rollout
    return {name: value[order] if value.dim() else value for name, value in batch.items()}


def chunks(batch, count):
    size = len(batch["advantages"]) // count
    for i in range(count):
        yield {n: v[i * size : (i + 1) * size] if v.dim() else v for n, v in batch.items()}


def gradients(one, batch, accumulation=1):
    """(loss, {parameter: gradient}) of one optimizer step's worth of rows, through the trainer's own hook."""
    losses = []
    for part in chunks(batch, accumulation):
        loss = one.compute_loss(one.model, part)
        losses.append(loss.item())
        one.accelerator.backward(loss)
    return sum(losses), {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}


def difference(got, wanted):
    assert got.keys() == wanted.keys() and wanted
    parts = [((got[n] - wanted[n]).norm().item(), wanted[n].norm().item()) for n in wanted]
    assert all(norm > 0 for _, norm in parts)
    return sum(d**2 for d, _ in parts) ** 0.5 / sum(n**2 for _, n in parts) ** 0.5


def compare(pair, batch, **settings):
    results = []
    for one in pair:
        configure(one, **settings)
        results.append(gradients(one, batch, settings.get("accumulation", 1)))
    (wanted_loss, wanted), (got_loss, got) = results
    assert got_loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-7)
    assert difference(got, wanted) < 1e-5
    return [{name: list(values) for name, values in one._metrics["train"].items()} for one in pair]


# -------------------------------------------------------------------------------------------------- against TRL


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_loss_gradients_and_metrics_are_trls(pairs, loss_type, beta, accumulation):
    stock, ours = compare(
        pairs("llama"), make_batch(groups=2, size=4), loss_type=loss_type, beta=beta, accumulation=accumulation
    )
    assert stock.keys() <= ours.keys()
    for name, wanted in stock.items():
        assert ours[name] == pytest.approx(wanted, rel=1e-4, abs=1e-6, nan_ok=True), name
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
    one = make_trainer(trainer.LeanGRPOTrainer, make_model(), tmp_path, loss_type="cispo", epsilon_high=5.0)
    assert not one.lean
    assert "The loss is TRL's own" in (said := capsys.readouterr().out) and "loss_type='cispo'" in said
    configure(one, loss_type="cispo")
    loss = one.compute_loss(one.model, make_batch(size=2) | {"old_per_token_logps": torch.zeros(4, 12)})
    assert loss.requires_grad and loss.grad_fn is not None


# ------------------------------------------------------------------------------------------- however it is cut


def rollout(**options):
    batch = make_batch(**options)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return packing.unpad(*(batch[name] for name in names)), torch.randn(batch["completion_ids"].shape)


def through(model, rows, weights, **options):
    """(logps [B, T], gradients) of sum(weights * logps)."""
    one, seen = step.LeanStep(model, **options), torch.zeros(weights.shape)
    model.zero_grad()

    def objective(logps, entropies, packed):
        place = packed.number, packed.column
        seen[place] = logps.detach()
        return (logps * weights[place]).sum()

    one.differentiate(rows, objective)
    return seen, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}, one.parts


@pytest.mark.parametrize("family", FAMILIES)
def test_any_cut_gives_the_same(family):
    """Budgets from plenty to the least: all layers kept, some kept, inputs on the card, inputs in the host, tiles."""
    model = make_model(family)
    rows, weights = rollout(groups=3, size=3)
    wanted_logps, wanted, (whole,) = through(model, rows, weights)
    assert whole.kept == 3
    seen = set()
    for share in (True, False):
        for gb in (4e-4, 2e-4, 1.2e-4, 0.9e-4, 0.7e-4):
            logps, got, parts = through(model, rows, weights, budget_gb=gb, share_prompts=share)
            assert difference(got, wanted) < 1e-5
            torch.testing.assert_close(logps, wanted_logps, rtol=1e-5, atol=1e-5)
            assert sorted(i for part in parts for i in part.rows) == list(range(9))
            assert max(part.peak for part in parts) <= gb * 1e9
            for part in parts:
                seen |= {("parts", len(parts) > 1), ("kept", min(part.kept, 1)), ("card", min(part.on_card, 1))}
                seen.add(("host", part.kept + part.on_card < 3))
    assert seen == {("parts", True), ("parts", False), ("kept", 0), ("kept", 1), ("card", 0), ("card", 1),
                    ("host", True), ("host", False)}  # fmt: skip


def test_tiles_of_the_mlp_change_nothing(monkeypatch):
    model = make_model("phi3", intermediate_size=512)
    rows, weights = rollout(groups=2, size=4)
    _, wanted, _ = through(model, rows, weights)
    monkeypatch.setattr(budget, "TILES", (16, 5))
    monkeypatch.setattr(step, "TILES", (16, 5))
    _, got, parts = through(model, rows, weights, budget_gb=2e-4)
    assert {part.tile for part in parts} & {16, 5}, parts
    assert difference(got, wanted) < 1e-5
    logps, _ = step.LeanStep(model).score(rows, weights.shape)
    whole, _, _ = through(model, rows, weights)
    torch.testing.assert_close(logps, whole, rtol=1e-5, atol=1e-5)


def test_a_shared_prompt_is_computed_once():
    rows, _ = rollout(groups=1, size=4)
    length, own = rows.rows[0].prompt_length, [row.completion_length - 1 for row in rows.rows]
    shared = packing.pack(rows, rows.rows, "cpu")
    apart = packing.pack(rows, rows.rows, "cpu", share=False)
    assert shared.ids.shape[1] == length + sum(own) and apart.ids.shape[1] == 4 * length + sum(own)
    assert shared.keys is not None and apart.keys is None
    lengths = [(r.prompt, r.prompt_length, r.completion_length) for r in rows.rows]
    for packed, share in ((shared, True), (apart, False)):
        keys = packed.ids.shape[1] if packed.keys is None else len(packed.keys)
        assert budget.count(lengths, share) == (packed.ids.shape[1], len(packed.source), keys)


def test_a_model_on_the_kernels_already_and_under_autocast():
    model = make_model("qwen2")
    patch.with_kernels(model)
    rows, weights = rollout()
    _, wanted, _ = through(model, rows, weights)
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    _, got, _ = through(model, rows, weights, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert 1e-4 < difference(got, wanted) < 0.05
    with half:  # HF's Trainer has autocast on around the loss
        _, inside, _ = through(model, rows, weights, autocast=nullcontext)
    assert difference(inside, got) < 1e-6


def test_autocasts_cache_does_not_swallow_gradients():
    """A weight cast to bf16 while no gradient was wanted must not serve the part that wants one."""
    model = make_model("llama", lora=False)
    rows, weights = rollout(size=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step.LeanStep(model).score(rows, weights.shape)
        _, got, _ = through(model, rows, weights, budget_gb=0.6e-4)
    assert all(gradient.norm() > 0 for gradient in got.values())


def test_what_cannot_fit_is_refused_with_the_numbers():
    one = step.LeanStep(make_model(), budget_gb=1e-5)
    with pytest.raises(step.CannotFit, match=r"completion of 12 tokens after a prompt of \d+ needs .* GB.*budget_gb"):
        one.plan(rollout()[0].rows)
    with pytest.raises(step.CannotFit):
        one.rehearse(4, 4, 100, 200)


def test_a_rehearsal_leaves_no_trace():
    model = make_model()
    one = step.LeanStep(model, budget_gb=4e-4)
    parts = one.rehearse(4, 2, 6, 10)
    assert sum(len(part.rows) for part in parts) == 4
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("config, why", [
    ({"attention_dropout": 0.1}, "dropout"),
    ({"hidden_act": "gelu"}, "activation is gelu"),
    ({"sliding_window": 8}, "sliding window"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope"),
])  # fmt: skip
def test_models_that_it_refuses(config, why):
    model = make_model("mistral", lora=False, **config)
    assert why in decoder.unsupported(model)
    with pytest.raises(ValueError, match=why):
        step.LeanStep(model)


# -------------------------------------------------------------------------------------------- rows without signal


def test_rows_without_advantage_are_skipped_with_the_same_gradient(pairs):
    stock, ours = pairs("llama")
    batch = make_batch(groups=2, size=4, zeros=True)
    compare((stock, ours), batch, loss_type="dapo")
    assert ours._metrics["train"]["frac_zero_signal_skipped"] == [0.5]
    scored = sum(len(part.rows) for part in ours._step_of(ours.model).parts)
    assert scored == 4
    compare((stock, ours), batch, loss_type="dapo", beta=0.04)  # the KL has a gradient in every row
    assert ours._metrics["train"]["frac_zero_signal_skipped"] == [0.0]


def test_a_batch_without_any_signal_has_gradients_of_zero(pairs):
    ours = pairs("llama")[1]
    configure(ours)
    batch = make_batch() | {"advantages": torch.zeros(8)}
    loss, got = gradients(ours, batch)
    assert loss == 0 and got and all((gradient == 0).all() for gradient in got.values())
    assert ours._metrics["train"]["entropy"] == [0.0]


def test_a_batch_that_runs_out_of_memory_is_computed_again_in_smaller_parts(pairs, monkeypatch, capsys):
    ours, batch = pairs("llama")[1], make_batch(groups=2, size=4)
    one = ours._step_of(ours.model)
    monkeypatch.setattr(one, "budget_gb", 3e-4)
    monkeypatch.setattr(one, "share", 1.0)

    def measure():
        configure(ours)
        found = gradients(ours, batch), {k: v[0] for k, v in ours._metrics["train"].items()}, list(one.parts)
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
    assert max(part.peak for part in smaller) < max(part.peak for part in parts) and one.share == 0.8
    assert "computed again, in smaller parts" in capsys.readouterr().out

    failing = [len(calls) + 4]  # now there are gradients of an earlier batch
    with pytest.raises(torch.OutOfMemoryError):
        ours.compute_loss(ours.model, batch)
    ours.model.zero_grad()
    failing = range(10**6)
    with pytest.raises(torch.OutOfMemoryError):
        ours.compute_loss(ours.model, batch)
    assert 0.4 < one.share < 0.55


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


def test_a_run_that_cannot_fit_stops_before_its_first_step(tmp_path):
    one = make_trainer(trainer.LeanGRPOTrainer, make_model(), tmp_path, budget_gb=1e-5)
    with pytest.raises(step.CannotFit, match="needs"):
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
