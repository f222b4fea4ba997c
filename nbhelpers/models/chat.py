"""A tokenizer made ready for GRPO: a chat template, a pad token that is not the end token, padding on the left.

Training and inference both go through `prompt_ids`, or through TRL, which makes the same call: one list of messages
gives one list of token ids. What a run hands to the chat template (`chat_template_kwargs`) is kept with the tokenizer,
so that whoever asks the model later asks as it was trained.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nbhelpers.files import read_json

from . import template_check

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

# For a base model that has no template: plain text, no token that the model was not trained on. The first token is the
# tokenizer's own begin token, if it has one; an answer ends with the end token.
DEFAULT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'].capitalize() }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# tokens that are reserved for padding or never used in text, best first
_PAD = (
    "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|dummy_85|>", "<|endoftext|>", "<|fim_pad|>",
    "<|vision_pad|>", "[control_8]", "<unk>",
)  # fmt: skip


class InUserTurn(str):
    """An instruction for the end of the user's turn, where others have a system message; as a `system_prompt`.

    For models that were trained without system messages, as DeepSeek-R1 and what was distilled from it.
    """


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder, prepared. Raises ValueError if it has none, or as `prepare`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds; the tokenizers library raises Exception itself
        for name in _FILES:
            if (Path(folder) / name).exists():
                read_json(Path(folder) / name)  # if it is this one that is damaged, its name is said
        raise ValueError(f"{folder} has no tokenizer that transformers can read ({error})") from None
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise ValueError(
            f"{folder} has no tokenizer that transformers can read: its vocabulary (tokenizer.json, tokenizer.model, "
            "or vocab.json with merges.txt) is missing or empty. Download it again"
        )
    return prepare(tokenizer)


def prepare(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The same tokenizer, changed in place: a pad token, a chat template if it has none, padding on the left.

    If the pad token is the end token, a loss that ignores padding never learns to stop, so another is taken: one made
    for it, else a special token that the chat template does not write.

    Raises ValueError without an end token, without any token that could serve as padding, or for a chat template that
    fails or does not end.
    """
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end token, so a completion could not end: set tokenizer.eos_token first")
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        candidates = [*_PAD, *(token for token in (tokenizer.unk_token, tokenizer.bos_token) if token)]
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        candidates += [token for token in special if token not in str(tokenizer.chat_template or "")]
        for token in candidates:
            if token in vocabulary and token != tokenizer.eos_token:
                tokenizer.pad_token = token
                break
        else:
            raise ValueError(
                "the tokenizer has no pad token other than its end token, and no special token that is free: in "
                'tokenizer_config.json of the model\'s folder, set "pad_token" to a token that no text holds'
            )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_TEMPLATE
        print("the tokenizer has no chat template: it gets plain text, as in `User: ...` and `Assistant:`")
    template_check.check(tokenizer)
    tokenizer.padding_side = "left"  # generation continues at the right edge
    return tokenizer


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation up to where the model goes on.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): As `prepare` returns it.
        messages (`list[dict]`): {"role", "content"} each. If the last is the assistant's, the answer has begun and is
            continued. Don't tokenize the templated text instead: it holds the begin token, and the tokenizer would add
            another.
        chat_template_kwargs (`dict`, *optional*): What the template is given besides, {"enable_thinking": False} for
            instance; None for those of the run that trained with this tokenizer (`template_kwargs`).

    Raises ValueError for a begun answer that the template does not write as it is.
    """
    more = template_kwargs(tokenizer) if chat_template_kwargs is None else chat_template_kwargs
    if begins_answer(messages):
        return list(tokenizer(_begun(tokenizer, messages, more), add_special_tokens=False)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **more
    )
    return list(cast("BatchEncoding", encoded)["input_ids"])


def _begun(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], more: dict[str, Any]) -> str:
    """The text of a conversation whose last message is the beginning of the answer. ValueError as `prompt_ids`."""
    answer = messages[-1]["content"]
    try:
        text = str(tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False, **more))
    except ValueError:
        raise ValueError(
            f"the chat template does not write the begun answer {answer!r} as it is, so it cannot be continued: leave "
            "the last message out"
        ) from None
    if len(messages) > 1:
        asked = str(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False, **more))
        rest = text.removeprefix(asked).strip()
        if text.startswith(asked) and rest != answer.strip() and rest.endswith(answer.strip()):
            return asked + answer  # Qwen3's writes an empty <think></think> in front of an answer that has none
    return text


def begins_answer(messages: list[dict[str, str]]) -> bool:
    """Whether the conversation ends with the beginning of the assistant's answer."""
    return messages[-1]["role"] == "assistant"


def text_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a prompt that is plain text. A begin token in it, as a rendered chat has one, gets no second; an end
    token that the tokenizer puts behind every text is taken off, for the model goes on there."""
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return ids


# ---- what the template is given besides the messages ----


def keep_template_kwargs(tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: dict[str, Any]) -> None:
    """Render with these from here on, where nothing else is asked for; saved and loaded with the tokenizer.

    Raises ValueError for values that JSON does not have.
    """
    tokenizer.init_kwargs.pop("chat_template_kwargs", None)
    if chat_template_kwargs:
        try:
            kept = json.loads(json.dumps(chat_template_kwargs))
        except (TypeError, ValueError) as error:
            raise ValueError(f"chat_template_kwargs={chat_template_kwargs!r} cannot be saved: {error}") from None
        tokenizer.init_kwargs["chat_template_kwargs"] = kept


def template_kwargs(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What `keep_template_kwargs` was given, {} if it never was."""
    return tokenizer.init_kwargs.get("chat_template_kwargs", {})


# ---- where an answer ends ----


def end_ids(model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's own and all that the model declares, as in TRL's trainers."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    return tuple(sorted({*declared, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}))


def goes_on(tokenizer: "PreTrainedTokenizerBase", end_ids: Iterable[int], end: int) -> str:
    """What to tell of an `end_of_turn`, and the line that mends it."""
    return (
        f"{tokenizer.decode(end)!r} ends a turn in the chat template and ends no completion, so answers may go on to "
        f"the limit. If the model stops with it: model.generation_config.eos_token_id = {[*end_ids, end]}"
    )


def end_of_turn(tokenizer: "PreTrainedTokenizerBase", end_ids: Iterable[int]) -> int | None:
    """The special token behind an answer in the chat template, if nothing there ends a completion; else None.

    A model that writes such a token, and was meant to stop there, goes on to the limit.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template or without.
        end_ids (`Iterable[int]`): Tokens that end a completion.
    """
    from jinja2 import TemplateError

    chat = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    if tokenizer.chat_template is None:
        return None
    try:
        begun = prompt_ids(tokenizer, chat)
        encoded = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **template_kwargs(tokenizer))
    except (TemplateError, ValueError):  # a template for other conversations
        return None
    behind = list(cast("BatchEncoding", encoded)["input_ids"])[len(begun) :]
    added = tokenizer.added_tokens_decoder
    special = [token for token in behind if token in added and added[token].special]
    return None if not special or set(special) & set(end_ids) else special[0]
