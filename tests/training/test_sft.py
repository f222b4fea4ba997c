"""Supervised fine-tuning on the lean step: TRL's loss, gradients and runs, exact resume, and what is refused."""

import pytest
import tiny_model
import torch
import trl
from datasets import Dataset
from resume_cases import At, same, weights
from step_cases import difference, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbhelpers import LeanSFTConfig, LeanSFTTrainer, evaluate, panel, tasks
from nbhelpers.models import lineage
from nbhelpers.presets import WORKSHOP

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = Dataset.from_dict({"text": [LETTERS[i:] * (1 + i % 3) for i in range(12)]})
PAIRS = Dataset.from_list([{"prompt": LETTERS[: 2 + i], "completion": LETTERS[i:]} for i in range(12)])
CHATS = tasks.decimals(n_train=24, n_test=4, texts=True).train
SETTINGS = dict(
    max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, gradient_checkpointing=False, save_strategy="no",
    disable_tqdm=True, use_cpu=True, bf16=False, report_to="none", logging_steps=1, seed=3,
)  # fmt: skip


def make(cls, folder, data=TEXTS, model=None, tokenizer=None, lean=None, **changes):
    args = trl.SFTConfig(str(folder), **(SETTINGS | changes))
    more = {} if lean is None else lean
    return cls(
        make_model() if model is None else model, args=args, train_dataset=data, eval_dataset=data.select(range(5)),
        processing_class=tokenizer or tiny_model.tokenizer(), **more,
    )  # fmt: skip


def batch_of(trainer, rows=4):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(min(rows, len(trainer.train_dataset)))])


def gradients(trainer, items=None):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch_of(trainer), num_items_in_batch=items)
    trainer.accelerator.backward(loss)
    entropy = trainer._metrics["train"]["entropy"][-1]
    return loss.item(), entropy, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "data, changes",
    [
        (TEXTS, {}),
        (TEXTS, {"loss_type": "dft"}),
        (TEXTS, {"max_length": 20}),
        (TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
        (PAIRS, {}),
        (PAIRS, {"completion_only_loss": False}),
    ],
)
@pytest.mark.parametrize("items", [None, torch.tensor(77)])
def test_loss_and_gradients_are_trls(tmp_path, data, changes, items):
    wanted, got = (gradients(make(cls, tmp_path, data, **changes), items) for cls in (trl.SFTTrainer, LeanSFTTrainer))
    assert got[0] == pytest.approx(wanted[0], rel=1e-5) and got[1] == pytest.approx(wanted[1], rel=1e-4)
    assert difference(got[2], wanted[2]) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"packing": True, "packing_strategy": "wrapped", "max_length": 24}])
def test_of_a_chat_only_what_the_assistant_says_is_learned_as_trl_learns_it(tmp_path, changes):
    tokenizer, roles = tiny_model.tokenizer(), ("user", "assistant", "user", "assistant")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}a:{% generation %}{{ m['content'] + '<|turn|>' }}"
        "{% endgeneration %}{% else %}{{ 'u:' + m['content'] + '<|turn|>' }}{% endif %}{% endfor %}"
    )
    chats = Dataset.from_list([
        {"messages": [{"role": role, "content": LETTERS[i + n : 2 * i + n + 3]} for n, role in enumerate(roles)]}
        for i in range(8)
    ])  # fmt: skip
    made = [
        make(cls, tmp_path, chats, tokenizer=tokenizer, assistant_only_loss=True, **changes)
        for cls in (trl.SFTTrainer, LeanSFTTrainer)
    ]
    (loss, entropy, wanted), got = map(gradients, made)
    assert got[0] == pytest.approx(loss, rel=1e-5) and got[1] == pytest.approx(entropy, rel=1e-4)
    assert difference(got[2], wanted) < 1e-5
    labels = [label for label in batch_of(made[1], 8)["labels"].flatten().tolist() if label != -100]
    learned = tokenizer.decode(labels)
    assert "bcd<|turn|>" in learned and ":" not in learned  # which stands behind each role


@pytest.mark.parametrize("accumulation", [1, 2])
def test_whole_runs_and_evaluations_end_where_trls_end(tmp_path, accumulation):
    ends = []
    for cls in (trl.SFTTrainer, LeanSFTTrainer):
        one = make(cls, tmp_path, PAIRS, optim="sgd", gradient_accumulation_steps=accumulation)
        start = weights(one)
        one.train()
        moved = {name: end - start[name] for name, end in weights(one).items()}
        losses = [log["loss"] for log in one.state.log_history if "loss" in log]
        ends.append((moved, losses, one.evaluate()["eval_loss"], one._total_train_tokens))
    (wanted, losses, evaluated, tokens), (got, ours, ours_evaluated, our_tokens) = ends
    assert difference(got, wanted) < 1e-5 and ours == pytest.approx(losses, rel=1e-4)
    assert ours_evaluated == pytest.approx(evaluated, rel=1e-4) and our_tokens == tokens


def test_packed_texts_do_not_see_each_other(tmp_path):
    """TRL does that with flash attention alone; here each packed text must give what it gives by itself."""
    packed = make(LeanSFTTrainer, tmp_path, packing=True, max_length=80)
    assert len(packed.train_dataset) < len(TEXTS)  # several in a row
    alone = make(LeanSFTTrainer, tmp_path)
    everything = [[data[i] for i in range(len(data))] for data in (packed.train_dataset, alone.train_dataset)]
    sums = []
    for one, rows in zip((packed, alone), everything, strict=True):
        one.model.train()
        loss = one.compute_loss(one.model, one.data_collator(rows), num_items_in_batch=1)
        sums.append((loss.item(), {n: p.grad for n, p in one.model.named_parameters() if p.grad is not None}))
    assert sums[0][0] == pytest.approx(sums[1][0], rel=1e-5) and difference(sums[0][1], sums[1][1]) < 1e-5


def test_chats_are_learned_where_the_assistant_speaks(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(WORKSHOP)
    model = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
    one = make(LeanSFTTrainer, tmp_path, CHATS, model, tokenizer)
    row = one.train_dataset[0]
    learned = tokenizer.decode([token for token in row["labels"] if token != -100])
    assert learned.startswith(CHATS[0]["completion"][0]["content"]) and tokenizer.eos_token in learned


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
    whole = make(LeanSFTTrainer, tmp_path / "whole", **changes)
    whole.train()
    broken = make(
        LeanSFTTrainer, tmp_path / "broken", lean={"callbacks": [At(5, KeyboardInterrupt, "on_step_begin")]}, **changes
    )
    assert broken.train().metrics == {"interrupted": True}  # after step 5 of 8, in the second pass over the texts
    again = make(LeanSFTTrainer, tmp_path / "broken", **changes)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 8 and same(weights(whole), weights(again))
    assert lineage.methods(again.model) == ["SFT"]
    logs = [[log.get("loss"), log.get("num_tokens")] for log in whole.state.log_history if "loss" in log]
    assert logs == [[log.get("loss"), log.get("num_tokens")] for log in again.state.log_history if "loss" in log]
    other = make(LeanSFTTrainer, tmp_path / "broken", PAIRS, **changes)
    with pytest.raises(ValueError, match="the data set: 12 rows"):
        other.train(resume_from_checkpoint="auto")


def test_what_cannot_be_learned_is_refused(tmp_path):
    for data, message in [
        (tasks.decimals(n_train=4, n_test=1).train, "answer, prompt, and no text to learn.*texts=True"),
        (TEXTS.select([]), "train_dataset is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            LeanSFTTrainer(make_model(), LeanSFTConfig(str(tmp_path)), train_dataset=data)
    with pytest.raises(ValueError, match="no text has a token to learn within max_length=3"):
        make(LeanSFTTrainer, tmp_path, PAIRS.select(range(3, 9)), max_length=3)
    for name, value in (("learning_rate", 0), ("loss_type", "grpo"), ("max_length", 0)):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            LeanSFTConfig(str(tmp_path), **{name: value})
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        make(LeanSFTTrainer, tmp_path, model=make_model(lora=False).requires_grad_(False))


def test_what_only_trl_does_is_left_to_trl_and_said(tmp_path, capsys):
    with pytest.warns(FutureWarning):
        one = make(LeanSFTTrainer, tmp_path, label_smoothing_factor=0.1)
    assert not one.lean and "label_smoothing_factor is asked for" in capsys.readouterr().out
    make(LeanSFTTrainer, tmp_path, max_length=20)
    assert "11 of 12 texts reach max_length=20 tokens" in capsys.readouterr().out


def test_the_panel_shows_the_loss_and_asks_its_probes(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(WORKSHOP)
    model = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
    before = evaluate.ask(model, tokenizer, tasks.PROBES[:1], max_new_tokens=8)
    live = panel.Live(probes=before, probe_every=2)
    one = make(LeanSFTTrainer, tmp_path, CHATS, model, tokenizer, lean={"callbacks": [live]}, learning_rate=1e-3)
    assert "the model reads its first texts" in live.line()
    one.train()
    assert [row["step"] for row in live.history] == [1, 2, 3] and list(live.probed) == [0, 2]
    assert live.history[-1]["loss"] < live.history[0]["loss"]
    assert "reward" not in live.line() and "loss" in live.line() and "reward" not in capsys.readouterr().out
    words = panel.curves.words(live.history)
    assert "loss" in words and "reward" not in words
    live.figure()
    live.save(tmp_path / "run.json", "the workshop model")


class Pressed(panel.Live):
    """Asks a question in the second step, and stops after it, without a kernel to hear of it."""

    def on_train_begin(self, *args, **kwargs):
        super().on_train_begin(*args, **kwargs)
        self.buttons = panel.Buttons()

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        if state.global_step == 1:
            self.buttons._question.value = "9.11 or 9.9?"
            self.buttons._wish("ask")
            self.buttons._wish("stop")


def test_a_press_of_ask_and_of_stop_is_served(tmp_path):
    """Its rows have no prompt, and its config no length of answers."""
    tokenizer, live = AutoTokenizer.from_pretrained(WORKSHOP), Pressed()
    model = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
    one = make(LeanSFTTrainer, tmp_path, CHATS, model, tokenizer, lean={"callbacks": [live]})
    assert one.train().metrics == {"interrupted": True} and one.state.global_step == 2
    ((step, question, written),) = live.asked
    assert step == 2 and question == "9.11 or 9.9?" and written


def test_a_budget_cuts_the_batch_and_changes_nothing(tmp_path):
    whole = make(LeanSFTTrainer, tmp_path)
    step = whole._step_of(whole.model)
    longest = [(0, 1, max(map(len, whole.train_dataset["input_ids"])) - 1)]
    tight = make(LeanSFTTrainer, tmp_path, lean={"budget_gb": 1.5 * step.cost.least(longest) / 1e9})
    tight.rehearse()
    wanted, got = gradients(whole), gradients(tight)
    assert len(tight._step_of(tight.model).micro_batches) > 1
    assert difference(got[2], wanted[2]) < 1e-5
    with pytest.raises(ValueError, match="GB are left"):
        make(LeanSFTTrainer, tmp_path, lean={"budget_gb": 1e-6}).train()
