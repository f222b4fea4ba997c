"""What the trainer's model reads is what everybody else asks it with; and where its completions end."""

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from nbhelpers import evaluate, loader, panel, tasks
from nbhelpers.models import chat
from nbhelpers.training import trainer

QUESTION = {"role": "user", "content": "Which is bigger, 9.11 or 9.9?"}
THINKS = (
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OFF = {"enable_thinking": False}


@pytest.fixture
def loaded():
    torch.manual_seed(0)
    return loader.load("workshop", quantization="none", lora_rank=4, progress=False)


def make(loaded, folder, prompts, callbacks=None, engine="auto", rewards=None, **settings):
    model, tokenizer = loaded
    args = trainer.LeanGRPOConfig(
        str(folder), **{"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "save_strategy": "no",
                        "max_completion_length": 24, "disable_tqdm": True, **settings},
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": prompt, "answer": "9.9"} for prompt in prompts])

    def length(completions, **_):
        return [float(len(str(completion)) % 7) for completion in completions]

    return trainer.LeanGRPOTrainer(
        model, rewards or length, args, data, processing_class=tokenizer, callbacks=callbacks, engine=engine
    )


def read(run, prompt):
    """The text that the trainer's model reads of a prompt."""
    return run._tokenizer.decode(run._tokenize_prompts([prompt])[0][0])


# ---- what the template is given besides ----


def thinking(loaded):
    tokenizer = loaded[1]
    end = tokenizer.chat_template.index("{% if add_generation_prompt %}")
    tokenizer.chat_template = tokenizer.chat_template[:end] + THINKS
    return tokenizer


def test_evaluation_probes_and_previews_read_what_the_training_reads(loaded, tmp_path):
    tokenizer = thinking(loaded)
    live = panel.Live(probes=evaluate.ask(*loaded, ["b?"], max_new_tokens=4, chat_template_kwargs=OFF), probe_every=1)
    run = make(loaded, tmp_path, [[QUESTION]] * 4, [live], chat_template_kwargs=OFF)
    wanted = read(run, [QUESTION])
    assert wanted.endswith("assistant\n<think>\n\n</think>\n\n")
    run.train()
    assert live.probed[1][0].prompt == live.probed[0][0].prompt and live.probed[1][0].prompt.endswith(wanted[-20:])
    (asked,) = evaluate.ask(*loaded, [QUESTION["content"]], max_new_tokens=4)
    (row,) = evaluate.accuracy(*loaded, [{"prompt": [QUESTION], "answer": "9.9"}], max_new_tokens=4).rows
    assert asked.prompt == row.prompt == wanted
    task = tasks.Task("one", run.train_dataset, run.train_dataset)
    assert "".join(text for text, _ in task.preview(tokenizer, 1).prompts[0][0]) == wanted
    make(loaded, tmp_path, [[QUESTION]] * 4)  # the newest run counts
    assert evaluate.ask(*loaded, ["b?"], max_new_tokens=4)[0].prompt.endswith("assistant\n")


def test_probes_that_were_asked_otherwise_are_named(loaded, tmp_path, capsys):
    thinking(loaded)
    live = panel.Live(probes=evaluate.ask(*loaded, ["b?"], max_new_tokens=4))
    make(loaded, tmp_path, [[QUESTION]] * 4, [live])
    assert "probes were asked" not in capsys.readouterr().out
    make(loaded, tmp_path, [[QUESTION]] * 4, [live], chat_template_kwargs=OFF)
    assert "probes were asked with chat_template_kwargs={}, and will be again" in capsys.readouterr().out


# ---- where the prompt ends ----


@pytest.mark.parametrize("engine", ["graph", "hf", None])
def test_a_begun_answer_is_continued(loaded, tmp_path, engine):
    begun = [QUESTION, {"role": "assistant", "content": "<reasoning>\n"}]
    run = make(loaded, tmp_path, [begun, [QUESTION], begun, [QUESTION]], engine=engine)
    wanted = read(run, [QUESTION]) + "<reasoning>\n"
    assert read(run, begun) == wanted
    assert run._tokenize_prompts([begun, [QUESTION]])[0] == [
        chat.prompt_ids(loaded[1], begun), chat.prompt_ids(loaded[1], [QUESTION])
    ]  # fmt: skip
    (row,) = evaluate.accuracy(*loaded, [{"prompt": begun, "answer": "9.9"}], max_new_tokens=4).rows
    assert row.prompt == wanted and row.question == QUESTION["content"]
    run.train()
    assert {sample.prompt for sample in run.state.samples} == {QUESTION["content"]}


def test_what_would_read_a_begun_answer_as_a_turn_is_refused(loaded, tmp_path):
    run = make(loaded, tmp_path, [[QUESTION]] * 4)
    run.reward_funcs.append(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="leave that message out"):
        run._tokenize_prompts([[QUESTION, {"role": "assistant", "content": "<reasoning>"}]])


def test_a_text_that_is_a_rendered_chat_has_one_begin_token_and_no_end_token(loaded, tmp_path):
    tokenizer = loaded[1]
    tokenizer.bos_token = "<|im_start|>"
    ids = [(tokenizer.bos_token, tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{ids[0][0]} $A {ids[1][0]}", special_tokens=ids
    )
    text = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    run = make(loaded, tmp_path, [text] * 4)
    assert run._tokenize_prompts([text, "plain"])[0] == [
        chat.prompt_ids(tokenizer, [QUESTION]), [ids[0][1], *tokenizer("plain", add_special_tokens=False)["input_ids"]]
    ]  # fmt: skip
    run.train()


# ---- where a completion ends ----


@pytest.mark.parametrize("engine", ["graph", "hf"])
def test_a_stop_string_ends_a_completion_and_it_was_not_cut_off(loaded, tmp_path, engine):
    settings = {"max_completion_length": 60, "generation_kwargs": {"stop_strings": ["</reasoning>", "9."]}}
    run = make(loaded, tmp_path, [[QUESTION]] * 4, engine=engine, **settings)
    run.train()
    log = run.state.log_history[0]
    texts = [sample.completion for sample in run.state.samples]
    assert all(text.rstrip().endswith(("</reasoning>", "9.")) for text in texts)
    assert log["completions/clipped_ratio"] == 0.0
    assert log["completions/mean_terminated_length"] == log["completions/mean_length"] < 60
    (answer,) = evaluate.ask(*loaded, [QUESTION["content"]], max_new_tokens=60, stop_strings=["9."], engine=engine)
    assert answer.completion.endswith("9.") and answer.finished
    assert evaluate.ask_again(*loaded, [answer]) == [answer]


def test_one_stop_string_may_stand_alone_and_minimum_lengths_reach_the_engine(loaded, tmp_path):
    asked = {"stop_strings": "</reasoning>", "min_new_tokens": 7}
    sampling = make(loaded, tmp_path, [[QUESTION]] * 4, generation_kwargs=asked)._sampling(1, 0)
    assert sampling.stop_strings == ("</reasoning>",) and sampling.min_tokens == 7


def test_what_cannot_end_at_a_stop_string_is_refused_at_construction(loaded, tmp_path):
    stops = {"stop_strings": ["a"]}
    for engine, settings, why in (
        (None, {"generation_kwargs": stops}, "engine=None, cannot look for stop_strings"),
        ("auto", {"generation_kwargs": {**stops, "top_k": 3}}, "generation_kwargs, cannot look for stop_strings"),
        ("auto", {"generation_kwargs": stops, "mask_truncated_completions": True}, "would mask it"),
        ("auto", {"generation_kwargs": {"min_new_tokens": 99}}, "min_tokens=99 is not between"),
    ):
        with pytest.raises(ValueError, match=why):
            make(loaded, tmp_path, [[QUESTION]] * 4, engine=engine, **settings)


def test_an_end_of_turn_that_ends_nothing_is_named(loaded, tmp_path, capsys, recwarn):
    model, tokenizer = loaded
    make(loaded, tmp_path, [[QUESTION]] * 4)
    evaluate.ask(*loaded, ["b?"], max_new_tokens=2)
    assert "ends a turn" not in capsys.readouterr().out and not [w for w in recwarn if "ends a turn" in str(w.message)]
    tokenizer.eos_token, model.generation_config.eos_token_id = "<|endoftext|>", 0
    make(loaded, tmp_path, [[QUESTION]] * 4)
    assert "'<|im_end|>' ends a turn in the chat template and ends no completion" in capsys.readouterr().out
    with pytest.warns(UserWarning, match=r"model\.generation_config\.eos_token_id = \[0, 2\]"):
        evaluate.ask(*loaded, ["b?"], max_new_tokens=2)
