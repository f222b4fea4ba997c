"""Whole runs of models that write what they are told: the notebook that wasted a night, and models that think."""

from importlib.resources import files

import pytest
import tiny_model
from datasets import Dataset
from step_cases import make_model
from told import Told

from nbhelpers import LeanGRPOConfig, LeanGRPOTrainer, StopWhen, evaluate, panel, presets, replay, rewards, tasks
from nbhelpers.rewards import THINK

QUESTIONS = tuple(f"How many are {n} and {n + 1}?" for n in range(8))


def trainer_of(folder, text, reward_funcs, system_prompt, tokenizer=None, **options):
    tokenizer = tokenizer or tiny_model.tokenizer()
    rows = [{"prompt": tasks.messages(question, system_prompt), "answer": "18"} for question in QUESTIONS]
    args = LeanGRPOConfig(
        str(folder), max_steps=options.pop("steps", 30), per_device_train_batch_size=8, num_generations=8,
        max_completion_length=96, save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
        dynamic_sampling=options.pop("dynamic_sampling", 0),
    )  # fmt: skip
    return LeanGRPOTrainer(
        make_model(max_position_embeddings=512), reward_funcs, args, Dataset.from_list(rows),
        processing_class=tokenizer, engine=Told(tokenizer, text), **options,
    )  # fmt: skip


# ---- the notebook as it was at version 0.1: its prompt, its rewards, and a model that answers as people do ----


def correct_as_it_was(completions, answer, **_):
    texts = [rewards.text_of(completion) for completion in completions]
    return [float(rewards.is_correct(text, gold)) for text, gold in zip(texts, answer, strict=True)]


def in_form_as_it_was(completions, **_):
    return [0.2 * rewards.formatted(rewards.text_of(completion)) for completion in completions]


def as_people_do(prompt, i):
    """A third of the answers is right, none of them in tags."""
    return f"{'First I add. ' * (i % 3)}So the answer is **{18 if i % 3 == 0 else 10 + i}**."


def correct(completions, answer, **_):
    texts = [rewards.text_of(completion) for completion in completions]
    return [
        1.0 if rewards.is_correct(text, gold) else 0.8 * rewards.right(text, gold)
        for text, gold in zip(texts, answer, strict=True)
    ]


@pytest.mark.parametrize("rounds", [0, 1])
def test_the_notebook_that_wasted_a_night_stops_within_twelve_steps_and_says_why(tmp_path, capsys, rounds):
    one = trainer_of(
        tmp_path, as_people_do, [correct_as_it_was, in_form_as_it_was], tasks.SYSTEM_PROMPT, stop_when=StopWhen(),
        dynamic_sampling=rounds,
    )  # fmt: skip
    one.train()
    said = capsys.readouterr().out
    assert one.state.global_step <= 12
    assert "all answers to a question got the same reward, so nothing was learned: 38% of them are right" in said
    assert "not in a form that the rewards read (0% in form). Let a right answer pay in any form" in said
    assert said.count("  the answer 'First I add.") >= 1 and said.count("  the answer ") == 3


def test_with_the_rewards_of_today_the_same_model_has_a_signal(tmp_path, capsys):
    one = trainer_of(tmp_path, as_people_do, [correct], presets.REASONING_PROMPT, steps=13, stop_when=StopWhen())
    one.train()
    assert one.state.global_step == 13 and "Stopped" not in capsys.readouterr().out


# ---- models that think ----


def template(name):
    """A tokenizer of characters with the chat template of a family, as TRL has it."""
    tokenizer = tiny_model.tokenizer()
    tokenizer.chat_template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize(
    ("name", "preset", "ends"),
    [("deepseek_r1_distill", "r1-distill-qwen-7b", "<think>\n"), ("qwen3", "qwen3-1.7b", "assistant\n")],
)
def test_what_a_model_that_thinks_is_asked(name, preset, ends):
    preset = presets.get(preset)
    asked = tasks.messages("How many?", preset.system_prompt)
    assert [message["role"] for message in asked] == ["user"] and asked[0]["content"].startswith("How many?\n\n")
    prompt = template(name).apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith(ends) and "boxed" in prompt and "<reasoning>" not in prompt and "</think>" not in prompt


def thinks(prompt, i):
    opened = "" if prompt.rstrip().endswith("<think>") else "<think>\n"  # by the template, or by the model itself
    if i % 4 == 3:
        return f"{opened}It might be 18. Or else 18, so let me see"  # cut off, so to say
    return f"{opened}hm{'m' * i}\n</think>\n\nIt is \\boxed{{{17 + i % 2}}}."


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3"])
def test_trainer_panel_and_evaluation_count_the_form_of_the_tags(tmp_path, capsys, name):
    tokenizer, live = template(name), panel.Live()
    preset = presets.get("r1-distill-qwen-7b")

    def in_form(completions, **_):
        return [rewards.form(rewards.text_of(completion), preset.tags) for completion in completions]

    one = trainer_of(
        tmp_path, thinks, [in_form], preset.system_prompt, tokenizer, steps=1, tags=preset.tags, callbacks=[live]
    )
    how = {"tags": preset.tags, "max_new_tokens": 96, "engine": one.engine}
    live.probes = before = evaluate.ask(one.model, tokenizer, QUESTIONS[:2], system_prompt=preset.system_prompt, **how)
    one.train()
    log = one.state.log_history[0]
    assert (log["right"], log["in_form"]) == (2 / 8, 6 / 8) and live.history[0]["format"] == 6 / 8
    score = evaluate.accuracy(one.model, tokenizer, one.train_dataset, **how)
    assert score.format.value == 1.0 and score.accuracy.value == 0.0  # each question's first answer: 17
    assert [answer.answer for answer in before] == ["17", "17"] and before[0].tags == THINK
    again = evaluate.ask(one.model, tokenizer, [one.train_dataset[0]["prompt"]], **how)
    assert again[0].messages == before[0].messages  # a row's prompt is asked as it is
    panel.before_after(before, evaluate.ask_again(one.model, tokenizer, before, one.engine), "18")
    path = live.save(tmp_path / "run.json", "a model")
    assert [answer.tags for answer in replay.Replay(path)._probed[0]] == [THINK, THINK]
