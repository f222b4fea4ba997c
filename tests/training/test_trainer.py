"""The trainer on the workshop model: defaults, refusals, guarded rewards, interrupts, and TRL's advantages."""

import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from engine_models import by_forward
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from nbhelpers import gpu, grpo, loader, tasks
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.presets import WORKSHOP
from nbhelpers.rewards import correctness, tag_count
from nbhelpers.rewards.guard import RewardError
from nbhelpers.training import config, model_check, rows, trainer

TASK = tasks.decimals(n_train=64, n_test=4)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORKSHOP)


def make(model, tokenizer, folder, reward_funcs, **changes):
    callbacks, engine = changes.pop("callbacks", None), changes.pop("engine", "auto")
    args = trainer.LeanGRPOConfig(
        str(folder), max_steps=changes.pop("max_steps", 3), per_device_train_batch_size=8, num_generations=4,
        max_completion_length=48, learning_rate=1e-4, save_strategy="no",
        disable_tqdm=True, **changes,
    )  # fmt: skip
    return trainer.LeanGRPOTrainer(
        model, reward_funcs, args, TASK.train, processing_class=tokenizer, callbacks=callbacks, engine=engine
    )


class At(TrainerCallback):
    """Does something at the end of one step, and remembers that the run was closed."""

    def __init__(self, step, action):
        self.step, self.action, self.ended = step, action, 0

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()

    def on_train_end(self, args, state, control, **_):
        self.ended += 1


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise OSError("the disk is full")


def test_the_defaults_fit_this_machine(tmp_path):
    args = trainer.LeanGRPOConfig(str(tmp_path))
    assert (args.use_cpu, args.bf16, args.fp16) == (not torch.cuda.is_available(), torch.cuda.is_available(), False)
    assert args.report_to == [] and args.logging_steps == 1
    assert not trainer.LeanGRPOConfig(str(tmp_path), bf16=False).bf16  # what is asked for is left alone


@pytest.mark.parametrize("capability, bf16", [((7, 5), False), ((8, 0), True)])
def test_a_t4_gets_fp16_and_an_a100_bf16(monkeypatch, capability, bf16):
    monkeypatch.setattr(gpu, "cards", lambda: [gpu.Card("a card", 16 * 10**9, capability)])
    assert config.precision() == {"bf16": bf16, "fp16": not bf16, "use_cpu": False}


def test_what_would_fail_late_is_refused_at_once(model):
    for data, message in [
        (None, "is required unless"),
        (TASK.train.select([]), "is empty"),
        (TASK.train.rename_column("prompt", "q"), "no 'prompt'"),
    ]:
        with pytest.raises(ValueError, match=message):
            rows.looked_at(data, None, SimpleNamespace(), owned=False)
    model.half()
    with pytest.raises(ValueError, match=r"fp32 master weights.*model\.embed_tokens\.weight"):
        model_check.check_model(model, SimpleNamespace(fp16=True))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        model_check.check_model(model, SimpleNamespace(fp16=False))


def test_samples_carry_the_rollout_and_its_group_advantages(model, tokenizer, tmp_path):
    run = make(model, tokenizer, tmp_path, [correctness, tag_count])
    assert run.train().global_step == 3
    samples = run.state.samples
    assert len(samples) == 8 and {s.prompt for s in samples} <= {row["prompt"][-1]["content"] for row in TASK.train}
    assert all(set(s.rewards) == {"correctness", "tag_count"} for s in samples)
    total = torch.tensor([sum(s.rewards.values()) for s in samples])
    wanted = grpo.group_advantages(total, 4)
    torch.testing.assert_close(torch.tensor([s.advantage for s in samples]), wanted, atol=1e-4, rtol=1e-4)


def test_one_exception_does_not_end_the_run(model, tokenizer, tmp_path):
    calls = []

    def moody(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("division by zero")
        return [float(i % 2) for i in range(len(completions))]

    with pytest.warns(RuntimeWarning, match="'moody' failed with ZeroDivisionError"):
        assert make(model, tokenizer, tmp_path, [moody, tag_count]).train().global_step == 3
    assert len(calls) == 3


def test_a_wrong_length_is_refused_by_name_and_loses_nothing(model, tokenizer, tmp_path, capsys):
    steps = []

    def short(completions, **_):
        steps.append(1)
        return [1.0] * (len(completions) - (len(steps) == 3))

    with pytest.raises(RewardError, match="'short' returned 7 rewards for 8 completions"):
        make(model, tokenizer, tmp_path, short).train()
    assert "Step 3 failed. What was learned until then is in" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None


def test_an_interrupt_keeps_what_was_learned_and_the_next_cell_works(model, tokenizer, tmp_path, capsys):
    stop = At(2, interrupt)
    run = make(model, tokenizer, tmp_path, [correctness, tag_count], callbacks=[stop])
    result = run.train()
    assert result.metrics == {"interrupted": True} and result.global_step == 2 and stop.ended == 1
    assert "Stopped by you after step 2" in capsys.readouterr().out
    assert len([entry for entry in run.state.log_history if "reward" in entry]) >= 1
    kept = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, kept.state_dict()[name]), name
    assert (tmp_path / "trainer_state.json").exists()
    ids = tokenizer("9.11", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=2).shape == (1, ids.shape[1] + 2)
    stop.step = None
    assert run.train().global_step == 3  # and it can be started again


def test_an_interrupt_before_the_first_step_leaves_an_earlier_runs_model_alone(model, tokenizer, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("learned in an earlier session")

    class Early(At):
        def on_train_begin(self, *_, **__):
            interrupt()

    assert make(model, tokenizer, tmp_path, correctness, callbacks=[Early(0, None)]).train().global_step == 0
    assert "before the first step was done: nothing new was learned" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_text() == "learned in an earlier session" and not model.training


def test_an_error_keeps_what_was_learned_and_is_not_swallowed(model, tokenizer, tmp_path, capsys):
    with pytest.raises(OSError, match="the disk is full"):
        make(model, tokenizer, tmp_path, correctness, callbacks=[At(1, fail)]).train()
    assert "Step 2 failed" in capsys.readouterr().out and (tmp_path / "model.safetensors").exists()


def test_an_untested_trl_is_named(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "version", lambda _: "1.20.0")
    with pytest.warns(UserWarning, match=r"trl 1\.20\.0 is outside the tested range"):
        make(model, tokenizer, tmp_path, correctness)


def test_the_adapter_of_a_4_bit_model_stays_in_fp32(tokenizer, tmp_path):
    model, _ = loader.load("workshop", quantization="nf4", lora_rank=4, progress=False)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    run = make(model, tokenizer, tmp_path, correctness)
    for name, p in run.model.named_parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32 and torch.equal(p, before[name]), name


def test_plain_text_prompts_work_too(model, tokenizer, tmp_path):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    data = Dataset.from_dict({"prompt": ["Which is bigger? 3.4 or 3.41?"] * 8, "answer": ["3.41"] * 8})
    args = trainer.LeanGRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    run = trainer.LeanGRPOTrainer(model, [correctness], args, data, processing_class=tokenizer)
    run.train()
    assert run.state.samples[0].prompt == "Which is bigger? 3.4 or 3.41?"


# ---- the engine ----


def test_the_engine_writes_and_its_logprobs_are_the_policys(model, tokenizer, tmp_path, monkeypatch):
    """Before the first update the policy that trains is the one that wrote, token by token; each prompt enters once."""
    seen = []

    class Watched(GraphEngine):
        def generate(self, prompts, sampling):
            seen.append((prompts, sampling, super().generate(prompts, sampling)))
            return seen[-1][2]

    model.requires_grad_(True)
    run = make(model, tokenizer, tmp_path, [correctness], engine=Watched(model, tokenizer), max_steps=2)
    run.train()
    prompts, sampling, written = seen[0]
    assert len(prompts) == 2 and sampling.num_generations == 4 and len(written) == 8 and len(seen) >= 2
    assert set(sampling.stop_ids) == set(run.eos_token_ids) and sampling.max_tokens == 48
    texts = tokenizer.batch_decode([completion.token_ids for completion in seen[-1][2]], skip_special_tokens=True)
    assert texts == [sample.completion for sample in run.state.samples]
    fresh = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
    for i, completion in enumerate(written):
        wanted = by_forward(fresh, prompts[i // 4], completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", ["graph", "hf", None])
def test_every_engine_trains(model, tokenizer, tmp_path, engine, capsys, monkeypatch):
    grown = []
    monkeypatch.setattr(gpu, "grow_blocks", lambda: grown.append(engine))
    run = make(model, tokenizer, tmp_path, [correctness, tag_count], engine=engine, top_p=0.9, top_k=40, min_p=0.01)
    assert run.train().global_step == 3
    assert (run.engine and run.engine.name) == engine
    assert ("engine: TRL's own" in capsys.readouterr().out) == (engine is None)
    assert bool(grown) == (engine is not None)


def test_vllms_memory_is_not_made_to_grow(model, tokenizer, tmp_path, monkeypatch):
    engine = GraphEngine(model)
    engine.name = "vllm"
    monkeypatch.setattr(gpu, "grow_blocks", lambda: pytest.fail("vLLM's sleep cannot work with it"))
    make(model, tokenizer, tmp_path, correctness, engine=engine)


def test_a_seed_repeats_a_run(tokenizer, tmp_path):
    texts = []
    for _ in range(2):
        policy = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
        run = make(policy, tokenizer, tmp_path, correctness, seed=5)
        run.train()
        texts.append([sample.completion for sample in run.state.samples])
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_what_only_trl_can_generate_is_left_to_it(model, tokenizer, tmp_path, capsys):
    run = make(model, tokenizer, tmp_path, correctness, generation_kwargs={"no_repeat_ngram_size": 3})
    assert run.engine is None and "engine: TRL's own, for generation_kwargs" in capsys.readouterr().out
    run = make(model, tokenizer, tmp_path, correctness, generation_kwargs={"no_repeat_ngram_size": 3}, engine=None)
    assert run.engine is None
    with pytest.raises(ValueError, match="engine='graph' and generation_kwargs exclude each other"):
        make(model, tokenizer, tmp_path, correctness, generation_kwargs={"top_k": 3}, engine="graph")


def test_trls_hook_still_has_the_arguments_that_we_take():
    import inspect

    import trl

    wanted = ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"]
    assert list(inspect.signature(trl.GRPOTrainer._generate_single_turn).parameters) == wanted


def test_every_argument_of_trls_trainer_is_ours_by_name_in_its_place_with_its_default():
    import inspect

    import trl

    theirs = inspect.signature(trl.GRPOTrainer.__init__).parameters
    ours = inspect.signature(trainer.LeanGRPOTrainer.__init__).parameters
    shared = list(ours)[: len(theirs)]
    assert shared == list(theirs)
    assert [(ours[name].kind, ours[name].default) for name in shared] == [(p.kind, p.default) for p in theirs.values()]
    own = {name: parameter for name, parameter in ours.items() if name not in theirs}
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in own.values())
    wanted = {"engine": "auto", "budget_gb": None, "max_skipped_steps": 10, "lean": True}
    assert wanted.items() <= {name: parameter.default for name, parameter in own.items()}.items()
