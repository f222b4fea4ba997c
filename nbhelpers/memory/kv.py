"""Keys and values of the texts that are being written: the bytes of a token, the slot of a text, how many fit.

Plain arithmetic, no torch: the graph engine asks it with the model at hand, the planner with a preset's numbers.
"""

from math import ceil

SLOT = 16  # a text's place in the cache is a multiple of this many tokens
MAX_ROWS = 128  # texts that the graph engine decodes at the same time, unless it is told otherwise
KV_BITS = (16, 8)  # of a number in the cache; with 16 it is as wide as the model's own
SCALE_BYTES = 4  # with 8: what the numbers of a token and key head are multiplied by, in fp32
PREFILL_BYTES = 190e6  # what the activations of prompts that are computed together may take


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, width: int, bits: int = 16) -> int:
    """Bytes of a token's keys and values in `layers` layers; `width`: bytes of the model's numbers, bits: one of
    KV_BITS."""
    return 2 * layers * kv_heads * (head_dim * width if bits == 16 else head_dim + SCALE_BYTES)


def checked(kv_bits: int) -> int:
    """kv_bits itself. Raises ValueError for one that is not in KV_BITS."""
    if type(kv_bits) is not int or kv_bits not in KV_BITS:
        raise ValueError(f"kv_bits={kv_bits!r}: it is 16, or 8 for keys and values that take half as much")
    return kv_bits


def slot_tokens(tokens: int) -> int:
    """The slot of a text of up to `tokens` tokens, in tokens."""
    return ceil(tokens / SLOT) * SLOT


def rows_that_fit(budget: int, tokens: int, token_bytes: int, most: int = MAX_ROWS) -> int:
    """How many texts of up to `tokens` tokens have a slot within `budget` bytes at the same time; at most `most`."""
    return min(budget // (slot_tokens(tokens) * token_bytes), most)


def prefill_tokens(activation_bytes: int, spare: float = 0) -> int:
    """Tokens of prompts that are computed together.

    Args:
        activation_bytes (`int`): What the activations of one token take.
        spare (`float`): Bytes that those of a piece of one long text may take (`room.long_text_budget`), if that is
            more than short ones take together.
    """
    return max(16, int(max(PREFILL_BYTES, spare) / activation_bytes))
