"""A tokenizer made ready for GRPO: a chat template, a pad token that is not the end token, padding on the left.

Training and inference both go through `prompt_ids`, or through TRL, which makes the same call: one list of messages
gives one list of token ids.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from nbhelpers.files import read_json

from . import template_check

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

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

    If the pad token is the end token, a loss that ignores padding never learns to stop, so another is taken.

    Raises ValueError without an end token, without any token that could serve as padding, or for a chat template that
    fails or does not end.
    """
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end token, so a completion could not end: set tokenizer.eos_token first")
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        candidates = [*_PAD, *(token for token in (tokenizer.unk_token, tokenizer.bos_token) if token)]
        for token in candidates:
            if token in vocabulary and token != tokenizer.eos_token:
                tokenizer.pad_token = token
                break
        else:
            raise ValueError("the tokenizer has no pad token other than its end token: set tokenizer.pad_token first")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_TEMPLATE
        print("the tokenizer has no chat template: it gets plain text, as in `User: ...` and `Assistant:`")
    template_check.check(tokenizer)
    tokenizer.padding_side = "left"  # generation continues at the right edge
    return tokenizer


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the answer begins.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): As `prepare` returns it.
        messages (`list[dict]`): {"role", "content"} each. Don't tokenize the templated text instead: it holds the begin
            token, and the tokenizer would add another.
    """
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(cast("BatchEncoding", encoded)["input_ids"])
