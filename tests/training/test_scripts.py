"""What people's scripts do with TRL's trainer, done with ours: it runs, or is refused before anything is computed."""

import logging
from pathlib import Path

import pytest
import tiny_model
import torch
import trl
from datasets import Dataset, DatasetDict, IterableDataset
from engine_models import quantise
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, TrainerCallback

from nbhelpers import engines
from nbhelpers.training import trainer

ROWS = Dataset.from_dict({"prompt": [c * n for c in "abcd" for n in (2, 5)]})
LORA = LoraConfig(r=4, target_modules="all-linear")


def varied(completions, **_):
    return [float(len(set(str(text))) % 3) for text in completions]


def config(folder, cls=trainer.LeanGRPOConfig, **changes):
    settings = dict(
        max_steps=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=6, learning_rate=1e-2,
        save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, report_to="none", logging_steps=1,
    )  # fmt: skip
    return cls(str(folder), **(settings | changes))


def make(model, folder, *args, rows=ROWS, config_cls=trainer.LeanGRPOConfig, rewards=varied, **changes):
    changes = {"processing_class": tiny_model.tokenizer()} | changes
    keywords = {name: changes.pop(name) for name in list(changes) if name not in config_cls.__dataclass_fields__}
    given = config(folder, config_cls, **changes)
    return trainer.LeanGRPOTrainer(model, rewards, given, rows, *args, **keywords)


def trains(run):
    """Runs it; every parameter that is trained is fp32 and moves, unless it is an A whose B was 0 or the like."""
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained and {p.dtype for p in trained.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in trained.items()}
    assert run.train().global_step == 2
    moved = [name for name, p in trained.items() if not torch.equal(p, before[name])]
    assert all(p.isfinite().all() for p in trained.values())
    return moved, trained


def four_bit():
    model = tiny_model.model()
    quantise(model)
    return model


# ---- adapters that the trainer makes ----


def test_a_model_prepared_for_4_bit_training_gets_its_adapter(tmp_path):
    """The script of every QLoRA tutorial: all is frozen, norms are fp32, the embedding has a hook."""
    model = prepare_model_for_kbit_training(four_bit(), use_gradient_checkpointing=True)
    assert not any(p.requires_grad for p in model.parameters())
    run = make(model, tmp_path, peft_config=LORA)
    moved, trained = trains(run)
    assert moved and all("lora_" in name for name in trained) and run.lean and run.engine.name == "graph"


def test_a_4_bit_models_new_adapter_is_fp32(tmp_path):
    moved, trained = trains(make(four_bit(), tmp_path, peft_config=LORA))
    assert moved and len(trained) == 2 * 2 * 7


def test_a_model_by_name_is_quantised_and_its_adapter_is_fp32(tmp_path):
    tiny_model.model().save_pretrained(tmp_path / "base")
    tiny_model.tokenizer().save_pretrained(tmp_path / "base")
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    run = make(str(tmp_path / "base"), tmp_path, peft_config=LORA, quantization_config=asked)
    assert run.model.is_loaded_in_4bit
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}


def test_an_fp16_base_gets_an_adapter_in_fp32(tmp_path):
    run = make(tiny_model.model().half(), tmp_path, peft_config=LORA, fp16=True)
    dtypes = {("lora_" in name, p.dtype) for name, p in run.model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.float16)}


def test_what_the_adapter_leaves_in_fp16_is_still_refused(tmp_path):
    saved = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"fp32 master weights.*modules_to_save"):
        make(tiny_model.model().half(), tmp_path, peft_config=saved, fp16=True)
    frozen = get_peft_model(tiny_model.model(), LORA).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        make(frozen, tmp_path)


# ---- data ----


def test_the_fifth_argument_is_the_data_to_evaluate_on(tmp_path):
    run = make(tiny_model.model(), tmp_path, ROWS.select(range(2)), per_device_eval_batch_size=4)
    assert run.evaluate()["eval_reward"] >= 0


@pytest.mark.parametrize("rows, error, message", [
    (list(ROWS["prompt"]), TypeError, r"must be a `Dataset` or `IterableDataset`, got `list`: .*from_list"),
    (DatasetDict(train=ROWS), TypeError, r'is a DatasetDict of train: .*dataset\["train"\]'),
    (None, ValueError, "`train_dataset` is required"),
    (ROWS.add_column("completions", ["x"] * 8), ValueError, r"column 'completions'.*rename_column"),
    (ROWS.add_column("prompts", ["x"] * 8), ValueError, r"column 'prompts'.*rename_column"),
])  # fmt: skip
def test_data_that_would_fail_in_the_first_step_is_refused(tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        make(tiny_model.model(), tmp_path, rows=rows)
    for given in (rows, {"one": rows}) if isinstance(rows, Dataset) else ():
        with pytest.raises(error, match=f"eval_dataset has a {message}"):
            make(tiny_model.model(), tmp_path, eval_dataset=given)


def test_a_stream_is_read_as_far_as_it_is_needed(tmp_path):
    """The longest prompt is looked for before the first step; TRL's own buffer to shuffle holds 1000 rows."""
    read = []

    def rows():
        for number in range(10**6):
            read.append(number)
            yield {"prompt": "a" * (1 + number % 7)}

    run = make(tiny_model.model(), tmp_path, rows=IterableDataset.from_generator(rows), budget_gb=1.0)
    assert run._longest_prompt() == 7 and len(read) <= 64
    run.train()
    assert len(read) < 1200


def test_questions_are_not_exchanged_in_a_stream(tmp_path):
    with pytest.raises(ValueError, match=r"dynamic_sampling draws other questions.*set dynamic_sampling=0"):
        make(tiny_model.model(), tmp_path, rows=ROWS.to_iterable_dataset(), dynamic_sampling=1)


# ---- settings ----


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(tmp_path, temperature):
    for cls in (trl.GRPOConfig, trainer.LeanGRPOConfig):
        with pytest.raises(ValueError, match=r"temperature=.*0.01 to 100"):
            make(tiny_model.model(), tmp_path, config_cls=cls, temperature=temperature)


def test_a_compiled_model_is_left_to_trls_loss_from_the_start(tmp_path, capsys, monkeypatch):
    for name in ("BACKEND", "MODE"):  # transformers sets them for all that follows in this process
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
    run = make(tiny_model.model(), tmp_path, torch_compile=True, torch_compile_backend="eager")
    assert not run.lean and "The loss is TRL's own" in (said := capsys.readouterr().out)
    assert "torch_compile is asked for" in said
    assert not isinstance(run.model, torch._dynamo.OptimizedModule)  # transformers compiles it later, in train()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    assert make(tiny_model.model(), tmp_path).lean


@pytest.mark.parametrize("engine", ["graph", "hf"])
@pytest.mark.parametrize("limit", [12, 10])
def test_prompts_near_the_models_limit_and_past_it_are_trained_on(tmp_path, capsys, engine, limit):
    """TRL's generate goes on, and so do the engines, with the same greedy tokens; alone they refuse it."""
    model = tiny_model.model(max_position_embeddings=limit)
    rows = Dataset.from_dict({"prompt": ["a" * 10, "b" * 3]})
    run = make(model, tmp_path, rows=rows, engine=engine)
    run.train()
    said = capsys.readouterr().out
    assert (
        said.count("go past the") == 1
        and f"A prompt of 10 tokens and max_completion_length=6 go past the {limit}" in said
    )
    assert run.lean and all(len(sample.completion) > 3 for sample in run.state.samples)
    with pytest.raises(ValueError, match="more than the"):
        run.engine.generate([[5] * 10], engines.Sampling(max_tokens=6))
    model.eval()
    ids = torch.tensor([[5, 9, 7] * 3 + [8]])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                            eos_token_id=None, pad_token_id=0)  # fmt: skip
    greedy = engines.Sampling(max_tokens=6, temperature=0.0, past_limit=True, stop_ids=(1,))
    (written,) = run.engine.generate(ids.tolist(), greedy)
    assert written.token_ids == wanted[0, 10:].tolist()


# ---- environments ----


class Counter:
    """An environment that asks, that has a tool, and that pays."""

    def reset(self, **_):
        self.count = 0
        return "Count."

    def increment(self, step: int) -> int:
        """Add to the count.

        Args:
            step: How much.

        Returns:
            The count.
        """
        self.count += step
        return self.count

    def get_reward(self) -> float:
        return float(self.count)


class Riddle:
    """One that only asks."""

    def reset(self, **_):
        return "Which word?"


def talking():
    """A tokenizer whose template can call tools: TRL's own for Qwen3."""
    tokenizer = tiny_model.tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
@pytest.mark.parametrize("rows", [None, Dataset.from_dict({"prompt": [[{"role": "user", "content": "Go"}]] * 4})])
def test_an_environment_may_own_the_data_and_the_reward(tmp_path, rows):
    run = make(tiny_model.model(), tmp_path, rows=rows, rewards=None, environment_factory=Counter,
               processing_class=talking(), max_completion_length=3)  # fmt: skip
    assert run.reward_func_names == ["Counter"] and run.train().global_step == 2
    assert run.state.log_history[0]["rewards/Counter/mean"] == 0.0


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_an_environment_beside_reward_functions(tmp_path):
    run = make(tiny_model.model(), tmp_path, rows=None, environment_factory=Riddle, processing_class=talking())
    assert run.train().global_step == 2 and run.reward_func_names == ["varied"]
    assert any("Which word?" in sample.prompt for sample in run.state.samples)


def constant(completions, **_):
    return [1.0 for _ in completions]


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
@pytest.mark.parametrize("rounds", [0, 1])
def test_rows_for_several_environments_need_no_prompt(tmp_path, rounds):
    """Which questions are too hard is remembered by all of such a row; a silent one may be exchanged."""
    rows = Dataset.from_dict({"environment": ["a", "b"], "level": [1, 2]})
    run = make(tiny_model.model(), tmp_path, rows=rows, environment_factory={"a": Counter, "b": Riddle}, max_steps=1,
               processing_class=talking(), dynamic_sampling=rounds, rewards=constant)  # fmt: skip
    assert run._longest_prompt() == 1
    assert run.train().global_step == 1 and len(run.difficulty.silent) == 1 + rounds


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_what_trl_refuses_of_environments_it_refuses_here_too(tmp_path):
    with pytest.raises(ValueError, match="No reward source provided"):
        make(tiny_model.model(), tmp_path, rewards=None)
    with pytest.raises(ValueError, match="max_steps"):
        make(
            tiny_model.model(),
            tmp_path,
            rows=None,
            environment_factory=Riddle,
            processing_class=talking(),
            max_steps=-1,
        )
    with pytest.raises(ValueError, match="requires a `train_dataset`"):
        make(tiny_model.model(), tmp_path, rows=None, environment_factory={"a": Riddle, "b": Counter},
             processing_class=talking())  # fmt: skip


# ---- trackers ----


class Tracker(TrainerCallback):
    """What a tracker gets: transformers' callbacks of TensorBoard, trackio and wandb all take their numbers here."""

    def __init__(self):
        self.seen = {}

    def on_log(self, args, state, control, logs, **_):
        self.seen |= logs


@pytest.mark.parametrize("config_cls", [trl.GRPOConfig, trainer.LeanGRPOConfig])
def test_trackers_get_trls_own_names_and_ours(tmp_path, config_cls):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    names = {}
    rows = ROWS.add_column("answer", ["a"] * 8)
    for cls in (trl.GRPOTrainer, trainer.LeanGRPOTrainer):
        tracker, given = Tracker(), config(tmp_path, config_cls, beta=0.04)
        tiny_model.model().save_pretrained(tmp_path / "base")
        run = cls(
            str(tmp_path / "base"), varied, given, rows, processing_class=tiny_model.tokenizer(), callbacks=[tracker]
        )
        run.train()
        names[cls] = set(tracker.seen)
    theirs, ours = names.values()
    assert theirs <= ours
    own = {"right", "in_form", "signal/entropy", "frac_zero_signal_skipped", "tokens_per_second", "skipped_steps"}
    assert own <= ours
