"""The seconds of a step: what the counts of bytes, operations and launches say of a card, before anything runs.

    a pass through a layer        the longer of its launches, and products + attention + what goes through memory
    a decoding step of n rows     launches + weights + keys, values and logits, where weights are read while those read
                                  before are unpacked and multiplied: the longer of both, and some of the other

Products of T tokens with a weight of P numbers are 2 T P operations forward and as many backward, where the weight is
frozen (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); attention takes 4 operations for each pair of tokens and
each number of a head, and 2.5 times that backward (Dao 2023, arXiv:2307.08691, section 4.1). What a card reaches of
its data sheet, and what Python and a launch take, are the constants of `Reached`, fitted to the rows of
benchmarks/results/ that tests/memory/test_seconds.py predicts, of an H200 and an H100. For other cards the same
formulas with the numbers of their data sheets are estimates that nobody has measured.
"""

import re
from math import cbrt, ceil
from typing import NamedTuple

from nbhelpers.architecture import Architecture

from .kv import MAX_ROWS, kv_bytes_per_token
from .micro_batches import PIECE, RECOMPUTED, MicroBatch
from .report import Setting

NORMED_ROWS, NORMED, NORMED_RANKS = 16, 2048, 32768  # rows, channels, channels x rank: kernels/triton/decode_linear.py
STEP_SECONDS = 0.12  # of rewards, the optimizer and the trainer's own work in a step, beside the two halves


class Card(NamedTuple):
    """A card's data sheet. `tflops` are dense, of the tensor cores, 16-bit numbers summed in fp32; `clocks`: 10^9 a
    second, of all multiprocessors together; `gb`: of memory, as a program is told; `host_gb_s`: from pinned memory
    over PCIe with all its lanes: 12 in version 3.0, 24 in 4.0, 47 in 5.0 (an H100's, measured)."""

    name: str  # a part of what CUDA calls it
    gb: float
    tflops: float
    gb_s: float
    clocks: float
    ampere: bool = True  # or newer: bf16, FlashAttention and Triton's tl.dot
    host_gb_s: float = 24.0


# NVIDIA's data sheets, and for gaming cards its white papers of the generations. Of one size, the likeliest comes
# first: it stands for a card of which nothing but the size is known.
CARDS = (
    Card("RTX 4060", 8.0, 30.0, 272, 59, host_gb_s=12), Card("RTX 3070", 8.0, 40.6, 448, 80),
    Card("RTX 3080", 10.0, 59.5, 760, 116), Card("RTX 2080 Ti", 11.0, 53.8, 616, 105, False, 12),
    Card("RTX 3060", 12.0, 25.5, 360, 50), Card("RTX 4070 Ti", 12.0, 80.2, 504, 157),
    Card("T4", 15.0, 65.0, 320, 64, False, 12), Card("RTX 4060 Ti", 17.0, 44.1, 288, 86, host_gb_s=12),
    Card("RTX 4080", 17.0, 97.5, 717, 191), Card("RTX 5080", 17.0, 112.6, 960, 220, host_gb_s=47),
    Card("L4", 22.0, 121.0, 300, 118), Card("A10", 22.5, 125.0, 600, 122),
    Card("RTX 3090", 24.0, 71.0, 936, 139), Card("RTX 4090", 24.0, 165.2, 1008, 323),
    Card("RTX 5090", 32.0, 209.5, 1792, 410, host_gb_s=47), Card("A100", 40.0, 312.0, 1555, 152),
    Card("L40S", 48.0, 362.0, 864, 358), Card("H100", 80.0, 989.0, 3350, 242, host_gb_s=47),
    Card("H200", 140.0, 989.0, 4800, 242, host_gb_s=47),
)  # fmt: skip


class Reached(NamedTuple):
    """What is reached of a card's data sheet, and seconds that do not depend on it."""

    products: float = 0.545  # of tflops, in training
    flash: float = 0.428  # likewise in attention, by its backend
    efficient: float = 0.132
    memory: float = 0.949  # of gb_s, in training
    layer: float = 0.00315  # seconds that Python and the launches of one pass through a layer take
    piece: float = PIECE  # of them again for each further piece of the MLP
    decoding_memory: float = 0.72  # of gb_s, in a decoding step
    decoding_products: float = 0.315  # of tflops, likewise
    unpacked: float = 12.3  # NF4 weights in a clock of a multiprocessor
    fused: float = 4.33  # likewise in bitsandbytes' product for 32 rows, where Triton has no tensor cores
    fused_rows: float = 76.5  # rows that cost it as much again
    decoding_layer: float = 0.000053  # seconds that the launches of a layer take in a CUDA graph
    decoding_layer_old: float = 0.000078  # before Ampere: products and sums by launches of their own


REACHED = Reached()


def card_of(gb: float, name: str = "") -> Card:
    """The card of that name; without one the card that stands for its size: the largest that is no larger."""
    known = [card for card in CARDS if re.search(rf"\b{card.name}\b", name)]
    if known:
        return max(known, key=lambda card: len(card.name))  # "RTX 4060 Ti", not "RTX 4060"
    return max((card for card in CARDS if card.gb <= gb + 0.5), key=lambda card: card.gb, default=CARDS[0])


def named(name: str) -> Card:
    """The card of that name, with the GB in it where they are another size of that card, as in "A100 80GB". Raises
    ValueError if none of CARDS is in it, with those that there are, and for a laptop's."""
    card = card_of(0.0, name)
    if re.search("laptop|mobile|max-q", name, re.IGNORECASE):
        raise ValueError(f"card={name!r}: a laptop's has less memory and speed than the card it is named after. Leave "
                         "it out and say how much: card_gb=16")  # fmt: skip
    if not re.search(rf"\b{card.name}\b", name):
        there = ", ".join(card.name for card in CARDS)
        raise ValueError(f"card={name!r} is not known; there are {there}. For another one leave it out: card_gb=24")
    size = re.search(r"(\d{1,3}) ?GB\b", name)
    # a program is told up to 2 GB less than is sold: 15.0 of a T4's 16
    return card._replace(gb=float(size[1])) if size and abs(float(size[1]) - card.gb) > 2 else card


def of_a_step(a: Architecture, card: Card, s: Setting, batches: tuple[MicroBatch, ...], attention: str, fitting: int,
              groups: int = 1) -> float:  # fmt: skip
    """Seconds of a step of `groups` times what the setting says, with all completions of full length.

    Args:
        a (`Architecture`): The model's shapes.
        card (`Card`): Where.
        s (`Setting`): As planned; layers that wait on the host are not counted.
        batches (`tuple[MicroBatch, ...]`): How the setting's rows are cut.
        attention (`str`): Its backend in training.
        fitting (`int`): Completions of full length that have room for keys and values at the same time.
        groups (`int`): Of the setting's rows.
    """
    writing = 0.0 if s.method == "sft" else generating(a, card, s, s.rows * groups, fitting)
    return writing + groups * training(a, card, s, batches, attention) + STEP_SECONDS


def training(a: Architecture, card: Card, s: Setting, batches: tuple[MicroBatch, ...], attention: str) -> float:
    """Seconds of the training half: forward, what is computed again, and backward of all micro-batches."""
    tflops, gb_s = card.tflops * 1e12 * REACHED.products, card.gb_s * 1e9 * REACHED.memory
    attending = card.tflops * 1e12 * (REACHED.flash if attention == "flash" else REACHED.efficient)
    sizes = {m.name: m.out_features * m.in_features for m in a.linears()}
    linear, heads = sum(sizes.values()), a.num_attention_heads * a.head_dim
    mlp = sum(sizes[name] for name in (*a.family.gate_up, a.family.down)) / linear
    weights = linear * (2 if s.quantization == "none" else 2.5) / gb_s  # read packed, written in 16 bits
    prompt, own = s.max_prompt_length, s.max_completion_length
    seconds = 0.0
    for batch in batches:
        tokens = batch.tokens.packed
        pairs = len(batch.rows) * own * (prompt + own / 2) + prompt**2 / 2
        attended, multiplied = 4 * pairs * heads / attending, 2 * tokens * linear / tflops
        through = tokens * _through(a) / gb_s
        forward = multiplied + attended + through
        backward = multiplied * (1 if s.lora_rank else 2) + 2.5 * attended + 1.5 * through
        again = RECOMPUTED * multiplied + attended + through
        more = ceil(tokens / min(batch.tile, tokens)) - 1  # pieces of the MLP after the first: each unpacks its weights
        launches, unpacked = REACHED.layer * (1 + REACHED.piece * more), weights * (1 + mlp * more)
        twice = a.num_hidden_layers - batch.saved
        seconds += batch.saved * (max(REACHED.layer, forward + weights) + max(REACHED.layer, backward + weights))
        seconds += twice * (max(launches, forward + unpacked) + max(2 * launches, again + backward + 2 * unpacked))
        seconds += 6 * batch.tokens.scored * a.vocab_size * a.hidden_size / tflops  # logits, again, and backward
    return seconds


def launch_tokens(a: Architecture, card: Card, launches: float = REACHED.layer) -> int:
    """Tokens that a layer computes in the seconds in which Python launches a pass through it: see `StepCost`."""
    products = 2 * sum(m.out_features * m.in_features for m in a.linears()) / (card.tflops * 1e12 * REACHED.products)
    return round(launches / (products + _through(a) / (card.gb_s * 1e9 * REACHED.memory)))


def _through(a: Architecture) -> int:
    """Bytes that a layer reads and writes for a token: about 8 tensors of the hidden size, 4 of the MLP's, 2 of the
    heads', each once each way."""
    return 4 * (8 * a.hidden_size + 4 * a.intermediate_size + 2 * a.num_attention_heads * a.head_dim)


def decoding_step(
    a: Architecture, card: Card, quantization: str, rows: int, tokens: float, kv_bits: int = 16, rank: int = 16
) -> float:
    """Seconds in which each of `rows` rows, `tokens` tokens long by now, gets its next token; rank: the LoRA's."""
    tflops, gb_s, clocks = card.tflops * 1e12, card.gb_s * 1e9, card.clocks * 1e9
    numbers = a.num_hidden_layers * sum(m.out_features * m.in_features for m in a.linears())
    looked_up = 0 if a.tie_word_embeddings else 2 * a.vocab_size * a.hidden_size  # only the rows' own lines are read
    keys = rows * tokens * kv_bytes_per_token(a.num_hidden_layers, a.num_key_value_heads, a.head_dim, 2, kv_bits)
    logits = 12 * rows * a.vocab_size  # fp32, written once and read twice
    read = (a.weight_bytes(quantization) - looked_up) / (gb_s * REACHED.decoding_memory)
    own = (keys + logits) / (gb_s * REACHED.decoding_memory)
    launches = a.num_hidden_layers * (REACHED.decoding_layer if card.ampere else REACHED.decoding_layer_old)
    if rows <= NORMED_ROWS and a.hidden_size <= NORMED and a.hidden_size * rank <= NORMED_RANKS:
        launches *= 9 / 11  # the sum of a product's splits and the norm behind it are one launch
    unpacked = 0.0 if quantization == "none" else numbers / (clocks * REACHED.unpacked)
    tile = next((n for n in (8, 16, 64, 128) if rows <= n), rows)
    if rows > 16 and not card.ampere:  # a product for each layer, not one for those that read the same
        products = numbers / (clocks * REACHED.fused) * (1 + (rows - 32) / REACHED.fused_rows)
        return 2 * launches + read + products + own
    products = unpacked + 2 * tile * numbers / (tflops * REACHED.decoding_products)
    return launches + cbrt(read**3 + products**3) + own


def generating(a: Architecture, card: Card, s: Setting, rows: int, fitting: int) -> float:
    """Seconds in which `rows` completions are written to their full length. While texts are short, more than `fitting`
    have room together; once they are longer, the others wait."""
    full, pieces, seconds = s.max_prompt_length + s.max_completion_length, 16, 0.0
    for i in range(pieces):
        tokens = s.max_prompt_length + (i + 0.5) / pieces * s.max_completion_length
        together = max(1.0, min(rows, MAX_ROWS, fitting * full / tokens))
        step = decoding_step(a, card, s.quantization, ceil(together), tokens, s.kv_bits, s.lora_rank)
        seconds += step * s.max_completion_length / pieces * rows / together
    return seconds
