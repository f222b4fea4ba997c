"""Questions that the panel asks again while a run goes on."""

# ruff: noqa: F811  (fixtures)

import pytest
import torch
from panel_cases import ARGS, clock, logs, newest, run, shown  # noqa: F401
from transformers import TrainerControl, TrainerState

from nbhelpers import evaluate, panel
from nbhelpers.evaluate import Answer, Decoding
from nbhelpers.models import chat


def test_probes_are_asked_in_time_and_their_time_is_no_training(clock, monkeypatch, shown):
    asked = []

    def answer(text):
        return Answer("which?", text, text, 1, True, "u:which?", Decoding(8, 0.0, 0, 4, "hf"), messages=[])

    def ask_again(model, tokenizer, before, engine, progress):
        assert not progress  # it would be a line more below the panel at each asking
        asked.append((model, tokenizer, before, engine))
        clock.now += 50
        return [answer(f"<{len(asked)}>")]

    monkeypatch.setattr(evaluate, "ask_again", ask_again)
    before = [answer("before")]
    live = panel.Live(probes=before, probe_every=2)
    live.engine = "the trainer's"
    state = TrainerState(max_steps=5, global_step=0)
    live.on_train_begin(ARGS, state, TrainerControl())
    for _ in range(5):
        state.global_step += 1
        clock.now += 10
        live.on_step_end(ARGS, state, TrainerControl(), model="M", processing_class="T")
        live.on_log(ARGS, state, TrainerControl(), logs=logs(num_tokens=1000.0 * state.global_step))
    live.on_train_end(ARGS, state, TrainerControl())
    assert asked == [("M", "T", before, "the trainer's")] * 2
    assert {step: [a.completion for a in answers] for step, answers in live.probed.items()} == {
        0: ["before"], 2: ["<1>"], 4: ["<2>"]
    }  # fmt: skip
    assert [row["speed"] for row in live.history] == [pytest.approx(100.0)] * 5
    html = newest(shown, "answers")["text/html"]
    assert "before: <b>before</b><br>step 2: <b>&lt;1&gt;</b><br>step 4: <b>&lt;2&gt;</b>" in html
    assert "step 4, in full" in html


def test_wrong_probes_are_refused():
    with pytest.raises(ValueError, match=r"before = evaluate\.ask"):
        panel.Live(probes=["9.11 or 9.9?"])
    with pytest.raises(ValueError, match="probe_every=0"):
        panel.Live(probe_every=0)


@pytest.mark.parametrize("engine", ["graph", "hf"])
def test_probes_do_not_disturb_the_run(tmp_path, capsys, engine):
    """The same rewards, lengths and weights with probes as without, and they are those that one would get by asking."""
    from transformers import TrainerCallback
    from transformers.models.auto import AutoModelForCausalLM

    from nbhelpers import LeanGRPOConfig, LeanGRPOTrainer, tasks
    from nbhelpers.presets import WORKSHOP
    from nbhelpers.rewards import correctness, tag_count

    tokenizer = chat.load_tokenizer(WORKSHOP)
    task = tasks.decimals(n_train=32, n_test=4)

    def trained(probing: bool):
        model = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
        before = evaluate.ask(
            model, tokenizer, tasks.PROBES, system_prompt=tasks.SYSTEM_PROMPT, max_new_tokens=48, engine=engine
        )
        live = panel.Live(probes=before if probing else (), probe_every=1)
        by_hand = []

        class Asking(TrainerCallback):
            def on_train_end(self, args, state, control, **_):
                by_hand.extend(
                    evaluate.ask(model, tokenizer, tasks.PROBES, system_prompt=tasks.SYSTEM_PROMPT, max_new_tokens=48,
                                 engine=engine)
                )  # fmt: skip

        args = LeanGRPOConfig(
            str(tmp_path), max_steps=3, per_device_train_batch_size=8, num_generations=4, max_completion_length=48,
            learning_rate=5e-3, save_strategy="no", disable_tqdm=True, seed=1,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = LeanGRPOTrainer(
            model, [correctness, tag_count], args, task.train, processing_class=tokenizer, engine=engine,
            callbacks=[live, Asking()],
        )  # fmt: skip
        assert live.engine is trainer.engine
        trainer.train()
        return live, model, before, by_hand

    probed, model, before, after = trained(True)
    plain, other, *_ = trained(False)
    for key in ("reward", "rewards", "within", "length", "tokens"):
        assert [row[key] for row in probed.history] == [row[key] for row in plain.history], key
    assert probed.history[0]["within"]["total"] > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert list(probed.probed) == [0, 1, 2, 3] and plain.probed == {}
    assert probed.probed[0] == before and probed.probed[3] == after
    panel.before_after(before, probed.probed[3])  # comparable: the same prompts, the same decoding
