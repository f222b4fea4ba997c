"""Token for token the same prompt in training and inference, and a pad token that is never the end token."""

from types import SimpleNamespace

import pytest

from nbhelpers.models import chat, smoke

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which is bigger, 9.11 or 9.9? é ∑"}]


def with_bos():
    """A tokenizer like Llama's: a begin token that it puts in front of every text by itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = smoke.make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", bos)])
    return tokenizer


def test_training_and_inference_see_the_same_prompt():
    """TRL's own tokenization, that of the trainer, gives the ids that `prompt_ids` gives."""
    from trl import GRPOTrainer

    for tokenizer in (smoke.make_tokenizer(), with_bos()):
        trainer = SimpleNamespace(
            processing_class=chat.prepare(tokenizer), tools=None, chat_template=None, chat_template_kwargs={},
            environment_factories=None, _is_vlm=False,
        )  # fmt: skip
        trained, _, _ = GRPOTrainer._tokenize_prompts(trainer, [CHAT, CHAT[1:]])
        assert trained == [chat.prompt_ids(tokenizer, CHAT), chat.prompt_ids(tokenizer, CHAT[1:])]


def test_a_begun_answer_is_continued_and_not_closed():
    tokenizer = chat.prepare(smoke.make_tokenizer())
    for begun in ("<reasoning>\n", "  two spaces ", "9"):
        ids = chat.prompt_ids(tokenizer, [*CHAT, {"role": "assistant", "content": begun}])
        assert tokenizer.decode(ids) == tokenizer.decode(chat.prompt_ids(tokenizer, CHAT)) + begun
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write the begun answer '9' as it is"):
        chat.prompt_ids(tokenizer, [*CHAT, {"role": "assistant", "content": "9"}])


@pytest.mark.parametrize(
    "asked, written, wanted",
    [
        ("A:", "A:", "A:<think>\n"),
        ("A:", "A: ", "A: <think>\n"),  # our own template for base models
        ("A:", "A:<think>\n\n</think>\n\n", "A:<think>\n"),  # Qwen3
        ("A:<think>\n", "A:", "A:<think>\n"),  # R1
    ],
)
def test_what_a_template_writes_in_front_of_an_answer_is_not_doubled(asked, written, wanted):
    tokenizer = chat.prepare(smoke.make_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ WRITTEN if m['role'] == 'assistant' else 'U:' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ASKED }}{% endif %}"
    ).replace("WRITTEN", repr(written)).replace("ASKED", repr(asked))  # fmt: skip
    ids = chat.prompt_ids(tokenizer, [CHAT[1], {"role": "assistant", "content": "<think>\n"}])
    assert tokenizer.decode(ids) == f"U:{CHAT[1]['content']}{wanted}"


def test_what_the_template_is_given_is_kept_with_the_tokenizer(tmp_path):
    """As an argument for once, or kept, and then saved and loaded too."""
    from transformers import AutoTokenizer

    tokenizer = chat.prepare(smoke.make_tokenizer())
    tokenizer.chat_template = "{{ mood | default('plain') }}"
    assert tokenizer.decode(chat.prompt_ids(tokenizer, CHAT)) == "plain"
    chat.keep_template_kwargs(tokenizer, {"mood": "gay"})
    assert tokenizer.decode(chat.prompt_ids(tokenizer, CHAT)) == "gay"
    assert tokenizer.decode(chat.prompt_ids(tokenizer, CHAT, {"mood": "sad"})) == "sad"
    assert tokenizer.decode(chat.prompt_ids(tokenizer, CHAT, {})) == "plain"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert again.decode(chat.prompt_ids(again, CHAT)) == "gay"
    chat.keep_template_kwargs(tokenizer, {})
    assert "chat_template_kwargs" not in tokenizer.init_kwargs
    with pytest.raises(ValueError, match="cannot be saved"):
        chat.keep_template_kwargs(tokenizer, {"when": object()})


def test_an_end_of_turn_that_ends_no_completion_is_found():
    tokenizer = chat.prepare(smoke.make_tokenizer())
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"])
    assert chat.end_of_turn(tokenizer, [end, other]) is None
    assert chat.end_of_turn(tokenizer, [other]) == end
    assert f"model.generation_config.eos_token_id = [{other}, {end}]" in chat.goes_on(tokenizer, [other], end)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|><|pad|>")
    assert chat.end_of_turn(tokenizer, [other]) is None  # the turn goes on to a token that does end it
    for template in (chat.DEFAULT_TEMPLATE.replace("eos_token", "nothing"), "{{ raise_exception('no') }}", None):
        tokenizer.chat_template = template
        assert chat.end_of_turn(tokenizer, [other]) is None


def test_padding_does_not_change_a_prompt():
    tokenizer = chat.prepare(smoke.make_tokenizer())
    padded = tokenizer.pad(
        {"input_ids": [chat.prompt_ids(tokenizer, CHAT), chat.prompt_ids(tokenizer, CHAT[1:])]}, return_tensors="pt"
    )
    row = padded["input_ids"][1][padded["attention_mask"][1].bool()]
    assert row.tolist() == chat.prompt_ids(tokenizer, CHAT[1:])
    assert padded["attention_mask"][1][0] == 0  # on the left
    assert tokenizer.decode(row).endswith("<|im_start|>assistant\n")


def test_the_begin_token_is_there_once():
    tokenizer = with_bos()
    tokenizer.chat_template = None
    ids = chat.prompt_ids(chat.prepare(tokenizer), CHAT)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    twice = tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False))["input_ids"]
    assert twice.count(tokenizer.bos_token_id) == 2  # the trap that prompt_ids avoids


def test_a_base_model_gets_the_default_template():
    tokenizer = smoke.make_tokenizer()
    tokenizer.chat_template = None
    text = chat.prepare(tokenizer).apply_chat_template(
        [*CHAT, {"role": "assistant", "content": "9.9"}], tokenize=False, add_generation_prompt=False
    )
    assert text == f"System: Be brief.\n\nUser: {CHAT[1]['content']}\n\nAssistant: 9.9<|im_end|>\n\n"
    assert tokenizer.decode(chat.prompt_ids(tokenizer, CHAT)).endswith("\n\nAssistant:")


@pytest.mark.parametrize("given", [None, "<|im_end|>"])
def test_the_pad_token_is_not_the_end_token(given):
    tokenizer = smoke.make_tokenizer()
    tokenizer.pad_token = given
    chat.prepare(tokenizer)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == 259  # nothing was added, so no embedding has to grow


def test_a_special_token_that_the_template_does_not_write_serves_as_padding():
    """As in SmolLM, whose other special tokens are those of code repositories."""
    tokenizer = smoke.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<repo_name>"]})
    tokenizer.eos_token, tokenizer.pad_token = "<|pad|>", None
    assert chat.prepare(tokenizer).pad_token == "<repo_name>"


def test_a_tokenizer_that_cannot_serve():
    tokenizer = smoke.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        chat.prepare(tokenizer)
    tokenizer.eos_token, tokenizer.pad_token = "<|pad|>", None
    with pytest.raises(ValueError, match=r"no pad token other than its end token.*tokenizer_config\.json"):
        chat.prepare(tokenizer)


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer that transformers can read"):
        chat.load_tokenizer(tmp_path)
