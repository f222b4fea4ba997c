"""What the panel shows of each method: what it learns from, and nothing of GRPO's that it does not use."""

import re

import method_cases
import pytest
import torch
from method_cases import SCORES, tiny, workshop
from panel_cases import newest, picture, shown  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbhelpers import LeanSFTConfig, LeanSFTTrainer, panel, tasks
from nbhelpers.panel import replay
from nbhelpers.presets import WORKSHOP


def text(html):
    """What a person reads of it."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def seen(live):
    """All that a notebook shows of a run, as text."""
    return text("".join(bundle.get("text/html", "") for bundle, _ in live.outputs()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(trainer, its panel, a recording) after seven steps of PPO and of Online DPO, and what a terminal was shown."""
    ends = {}
    for kind in method_cases.KINDS:
        folder, live = tmp_path_factory.mktemp(kind), panel.Live()
        one = workshop(kind, folder, live)
        one.train()
        ends[kind] = one, live, live.save(folder / "run.json", "the workshop model")
    return ends


def test_an_update_with_the_answers_of_an_earlier_one_has_their_numbers(runs):
    """PPO's rollout serves four updates here, and TRL logs its numbers with the first."""
    one, live, _ = runs["ppo"]
    logged = [log.get("reward") for log in one.state.log_history[:7]]
    assert [value is None for value in logged] == [False, True, True, True, False, True, True]
    assert [row["reward"] for row in live.history] == [logged[0]] * 4 + [logged[4]] * 3
    assert all(row["rewards"] == {"nines": row["reward"]} and row["length"] for row in live.history)
    losses = [row["loss"] for row in live.history]
    assert len(set(losses)) == 7, "the loss is each update's own"
    speeds = [row["speed"] for row in live.history]
    assert speeds[0] == speeds[3] > 0 and speeds[4] == speeds[6] > 0
    assert live.pair_step == 5 and "step 5: best answer" in seen(live)
    assert "none" not in live.line() and "reward none" not in seen(live)
    again = panel.history.rows_of(one.state.log_history[:7])  # as after a resume
    assert [row["reward"] for row in again] == [row["reward"] for row in live.history]


def test_ppo_shows_the_value_and_no_advantage_over_a_group(runs, tmp_path):
    one, live, recorded = runs["ppo"]
    assert all(sample.advantage is None and len(sample.used) == 2 for sample in one.samples())
    said = seen(live)
    assert "best answer to a question" in said and "worst answer to the same question" in said
    assert "value +" in said and "advantage of the first token" in said and "value loss" in said
    for word in ("GRPO", "no signal", "of a group", "chosen"):
        assert word not in said
    assert "no signal" not in live.line() and "no signal" not in panel.curves.words(live.history)
    shown_again = replay.Replay(recorded)
    shown_again.show_at(7)
    assert "best answer to a question" in seen(shown_again) and "value +" in seen(shown_again)


def test_ppos_numbers_of_an_answer_are_its_value_and_its_first_advantage(tmp_path):
    """The values begin at 0, and with lam=1 and no KL an advantage is then the score."""
    one = tiny("ppo", tmp_path, lam=1.0, kl_coef=0.0)
    method_cases.rollout(one)
    used = [sample.used for sample in one.samples()]
    assert [row["value"] for row in used] == [0.0] * 6
    assert [row["advantage of the first token"] for row in used] == pytest.approx(SCORES)
    with torch.no_grad():
        one._value_head.bias.fill_(0.5)
    method_cases.rollout(one)
    assert [s.used["advantage of the first token"] for s in one.samples()] == pytest.approx([x - 0.5 for x in SCORES])


def test_an_answer_that_nobody_scored_has_nothing_to_show(tmp_path):
    def some(completion_ids, **_):
        return [None if score == 2.0 else score for score in method_cases.scored(completion_ids)]

    one = tiny("ppo", tmp_path, reward=some)
    method_cases.rollout(one)
    assert [bool(sample.used) for sample in one.samples()] == [True, True, True, True, False, True]


def test_equal_rewards_are_no_silence_for_ppo(tmp_path, capsys):
    """Each answer is compared with its value: a run is not told that it learns nothing, nor ended for it."""

    def flat(completion_ids, **_):
        return [1.0] * len(completion_ids)

    one = tiny("ppo", tmp_path, reward=flat, max_steps=17, num_ppo_epochs=1)
    one.train()
    assert not any("frac_reward_zero_std" in log for log in one.state.log_history)
    assert "nothing was learned" not in capsys.readouterr().out
    pairs = tiny("dpo", tmp_path / "dpo", reward=flat, max_steps=17)
    pairs.train()
    assert "so nothing was learned" in capsys.readouterr().out


def test_online_dpo_shows_which_answer_was_chosen_and_the_margin(runs):
    one, live, _ = runs["dpo"]
    samples = one.samples()
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        assert first.advantage is None and first.used["margin"] == -second.used["margin"]
        assert first.used["margin"] == pytest.approx(first.used["implicit reward"] - second.used["implicit reward"])
    chosen = [max(pair, key=lambda s: s.rewards["nines"]) for pair in zip(samples[::2], samples[1::2], strict=True)]
    mean = sum(sample.used["margin"] for sample in chosen) / len(chosen)
    assert live.history[-1]["margin"] == pytest.approx(mean, rel=1e-4)
    said = seen(live)
    assert said.index("chosen answer of a pair") < said.index(f"margin {chosen[0].used['margin']:+.2g}"[:9])
    assert "rejected answer of the same pair" in said and "implicit reward" in said
    for word in ("GRPO", "advantage", "of a group"):
        assert word not in said
    assert "margin of a pair: margin" in panel.curves.words(live.history) and " · margin +" in live.line()


def test_a_tie_shows_no_margin(tmp_path):
    one = tiny("dpo", tmp_path, reward=lambda completion_ids, **_: [1.0, 1.0, 0.0, 1.0, 2.0, 2.0])
    method_cases.rollout(one)
    assert [len(sample.used) for sample in one.samples()] == [0, 0, 2, 2, 0, 0]


def test_a_pair_that_was_replaced_does_not_get_its_successors_margin(tmp_path, monkeypatch):
    """What is shown is the rollout as it was drawn first; the batch has another pair in the place of the tie."""
    calls = []

    def tied_once(completion_ids, **_):
        calls.append(len(completion_ids))
        scores = method_cases.scored(completion_ids)
        return [1.0, 1.0, *scores[2:]] if len(calls) == 1 else scores

    one = tiny("dpo", tmp_path, reward=tied_once, dynamic_sampling=1)
    batch = method_cases.rollout(one)
    assert len(calls) == 2 and batch["advantages"].abs().min() > 0
    assert [len(sample.used) for sample in one.samples()] == [0, 0, 2, 2, 2, 2]


def test_sft_shows_loss_gradient_and_tokens_and_nothing_of_rewards(tmp_path, shown):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(WORKSHOP)
    model = AutoModelForCausalLM.from_pretrained(WORKSHOP, dtype=torch.float32)
    live = panel.Live()
    args = LeanSFTConfig(str(tmp_path), max_steps=3, per_device_train_batch_size=4, **method_cases.QUIET)
    texts = tasks.decimals(n_train=24, n_test=4, texts=True).train
    LeanSFTTrainer(model, args, train_dataset=texts, processing_class=tokenizer, callbacks=[live]).train()
    for said in (live.line(), seen(live), panel.curves.words(live.history)):
        assert "loss" in said and "gradient" in said and "tokens" in said
        for word in ("reward", "GRPO", "group", "advantage", "answer", "prompts"):
            assert word not in said, (word, said)
    assert list(panel.curves.curves_of(live.history)) == ["loss", "gradient", "tokens / s"]
    assert picture(newest(shown, "curves")).size[0] > 100
    assert "of the texts, nats a token" in text(newest(shown, "numbers")["text/html"])
