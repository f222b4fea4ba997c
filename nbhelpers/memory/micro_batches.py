"""The bytes of one training step, and how a batch is cut so that they fit: what `step` does and `memory` predicts.

Plain arithmetic, no torch: the step asks it with the tokens at hand, the planner with those of a preset.

A micro-batch of T packed tokens runs layer by layer, forward and then backward. A layer is in one of three states:

    kept        everything its backward needs stays: nothing is computed twice      (the last layers)
    on card     its input stays, the rest is computed again in the backward
    in host     its input waits in pinned host memory                               (the first layers)

The formulas name every tensor that is alive at the moments that can be the peak. Letters: T tokens, S of them scored,
K keys (a shared prompt's count once for each completion), H hidden, I intermediate, h and g query and key heads.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from nbhelpers.architecture import Architecture

LOGITS_SCRATCH = 263_000_000  # kernels.linear_logprob's scratch_bytes
TILES = (8192, 4096, 2048, 1024)  # tokens of the MLP at once, where not all of them fit
FIXED_TOKENS = 256  # undoing a layer's 4 bits costs about as much as this many tokens in it
AGAIN = 0.75  # of a layer's forward is computed again where it is not kept (the MLP's last product is not)
SLACK = 1.02  # small tensors: statistics, indices, LoRA's thin products


class CannotFit(ValueError):
    """The smallest micro-batch does not fit; the message says by how much and what to change."""


class Tokens(NamedTuple):
    """What a micro-batch weighs: packed tokens, scored tokens, keys (equal to tokens where no prompt is shared)."""

    packed: int
    scored: int
    keys: int


class Part(NamedTuple):
    """A micro-batch: the rows in it (indices of the list that was split), its tokens, and the state of the layers."""

    rows: tuple[int, ...]
    tokens: Tokens
    kept: int  # the last `kept` layers
    on_card: int  # the `on_card` layers before them; the rest is in host memory
    tile: int  # tokens of the MLP at once in a layer that is computed again
    peak: int  # bytes on top of what is resident


def count(rows: list[tuple[int, int, int]], share: bool = True) -> Tokens:
    """Of rows (prompt, its length, the completion's length): see packing.pack, which lays them out."""
    groups: dict[object, list[tuple[int, int, int]]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row[0] if share else number, []).append(row)
    packed = keys = 0
    for members in groups.values():
        own = [completion - 1 for _, _, completion in members]
        length = members[0][1]
        packed += length + sum(own)
        keys += length + sum(own) + (length * sum(1 for n in own if n) if len(members) > 1 else 0)
    return Tokens(packed, sum(row[2] for row in rows), keys)


@dataclass(frozen=True)
class Work:
    """The step's tensors in bytes. width: of an activation, 2 or 4. attention: "flash", "efficient" or "rows"."""

    architecture: Architecture
    width: int = 2
    attention: str = "flash"

    @property
    def layers(self) -> int:
        return self.architecture.num_hidden_layers

    def hidden(self, tokens: int) -> int:
        """[tokens, H]: a layer's input, output, residual or one of their gradients."""
        return tokens * self.architecture.hidden_size * self.width

    def inner(self, tokens: int) -> int:
        """[tokens, I]: the MLP's gate, up, or their product."""
        return tokens * self.architecture.intermediate_size * self.width

    def q(self, tokens: int) -> int:
        return tokens * self.architecture.num_attention_heads * self.architecture.head_dim * self.width

    def kv(self, tokens: int) -> int:
        return 2 * tokens * self.architecture.num_key_value_heads * self.architecture.head_dim * self.width

    def _expanded(self, keys: int) -> int:
        """K and V, or their gradients, with as many heads as Q; nothing where they have as many anyway."""
        a = self.architecture
        return 2 * self.q(keys) if a.num_attention_heads != a.num_key_value_heads else 0

    def _attention_kept(self, t: Tokens) -> int:
        """Q, K, V (K and V again in the order of the sequences if a prompt is shared), output, log-sum-exp."""
        gathered = self.kv(t.keys) if t.keys != t.packed else 0
        expanded = 0 if self.attention == "flash" else self._expanded(t.keys)
        lse = 4 * t.packed * self.architecture.num_attention_heads
        return 2 * self.q(t.packed) + self.kv(t.packed) + gathered + expanded + lse

    def _attention_scratch(self, t: Tokens) -> int:
        """What attention's backward has of its own: gradients of its output, Q, K, V, and their fp32 sums."""
        grads = 2 * self.q(t.packed) + self.kv(t.keys)
        sums = self.q(t.packed) * 4 // self.width
        if self.attention == "flash":
            return grads + sums + self._expanded(t.keys)
        return grads + sums + 2 * self._expanded(t.keys)

    def recompute_attention(self, t: Tokens) -> int:
        """Backward through a layer's attention: input, gradient of the sum, what was kept, scratch."""
        return 2 * self.hidden(t.packed) + self._attention_kept(t) + self._attention_scratch(t)

    def recompute_mlp(self, t: Tokens, tile: int) -> int:
        """Backward through a layer's MLP, before that: input, incoming gradient, attention's output, a tile's work."""
        tile = min(tile, t.packed)
        return 3 * self.hidden(t.packed) + self._attention_kept(t) + 3 * self.inner(tile) + 4 * self.hidden(tile)

    def head(self, t: Tokens) -> int:
        """Last layer's output, the scored tokens, normed, their gradients, and the buffer for logits."""
        logits = min(LOGITS_SCRATCH, t.scored * self.architecture.vocab_size * self.width)
        wide = (self.hidden(t.packed) + self.hidden(t.scored)) * 4 // self.width  # summed in fp32 on the way back
        return self.hidden(t.packed) + max(3 * self.hidden(t.scored) + logits, 2 * self.hidden(t.scored) + wide)

    def kept(self, t: Tokens) -> int:
        """A layer whose backward needs nothing computed again: input, its attention, sum, gate and up."""
        return self._attention_kept(t) + 2 * self.hidden(t.packed) + 2 * self.inner(t.packed)

    def kept_backward(self, t: Tokens) -> int:
        """On top of the kept tensors, while such a layer goes backward: the gradients on the way."""
        mlp = self.inner(t.packed) + 2 * self.hidden(t.packed)
        return self.hidden(t.packed) + max(mlp, self._attention_scratch(t) + self.hidden(t.packed))

    def forward(self, t: Tokens, tile: int = TILES[0]) -> int:
        """A layer without gradients: input, normed input, Q, K, V, output, projected; or the MLP's tile."""
        tile = min(tile, t.packed)
        attention = 3 * self.hidden(t.packed) + self._attention_kept(t)
        return max(attention, 4 * self.hidden(t.packed) + 3 * self.inner(tile), self.head(t))

    def peak(self, t: Tokens, kept: int, on_card: int, tile: int) -> int:
        """The most bytes alive at once, on top of weights, adapters and optimizer."""
        saved = kept * self.kept(t) + on_card * self.hidden(t.packed)
        moments = [self.head(t) + saved]
        if kept:
            moments.append(self.kept_backward(t) + saved)
        if kept < self.layers:
            again = max(self.recompute_attention(t), self.recompute_mlp(t, tile))
            moments.append(again + max(on_card - 1, 0) * self.hidden(t.packed))
            if kept + on_card < self.layers:
                moments.append(again + 2 * self.hidden(t.packed))  # the next one on its way from the host
        return round(max(moments) * SLACK)

    def part(self, rows: tuple[int, ...], t: Tokens, room: float) -> Part | None:
        """How a micro-batch runs within `room` bytes: as much kept as fits, then as much on the card; None if not."""
        if self.peak(t, self.layers, 0, t.packed) <= room:
            return Part(rows, t, self.layers, 0, t.packed, self.peak(t, self.layers, 0, t.packed))
        for tile in (t.packed, *(tile for tile in TILES if tile < t.packed)):
            if self.peak(t, 0, 0, tile) <= room:
                break
        else:
            return None
        kept = _largest(self.layers - 1, lambda n: self.peak(t, n, 0, tile) <= room)
        on_card = _largest(self.layers - kept, lambda n: self.peak(t, kept, n, tile) <= room)
        return Part(rows, t, kept, on_card, tile, self.peak(t, kept, on_card, tile))

    def cost(self, part: Part) -> float:
        """Time in tokens times layers: forward, backward, and what is computed again."""
        again = AGAIN * (self.layers - part.kept)
        return (part.tokens.packed + FIXED_TOKENS) * (2 * self.layers + again)

    def split(self, rows: list[tuple[int, int, int]], room: float, share: bool = True) -> list[Part]:
        """The fastest way to run `rows` (prompt, its length, the completion's) within `room` bytes of work.

        Rows of a prompt stay together as far as they can. CannotFit if not even one row fits.
        """
        order = sorted(range(len(rows)), key=lambda i: (rows[i][0], -rows[i][2]))
        best, best_cost = None, float("inf")
        for pieces in _piece_counts(len(rows)):
            parts = []
            for chosen in _cut(order, [rows[i][1] + rows[i][2] for i in order], pieces):
                tokens = count([rows[i] for i in chosen], share)
                parts.append(self.part(tuple(chosen), tokens, room))
            if None in parts:
                continue
            cost = sum(map(self.cost, parts))
            if cost < best_cost:
                best, best_cost = parts, cost
        if best is None:
            longest = max(rows, key=lambda row: row[1] + row[2])
            least = self.least([longest])
            raise CannotFit(
                f"a completion of {longest[2]} tokens after a prompt of {longest[1]} needs {least / 1e9:.2f} GB of "
                f"work on top of the weights, and {max(room, 0) / 1e9:.2f} GB are left: shorten max_completion_length, "
                "or raise budget_gb if the card has more"
            )
        return best

    def least(self, rows: list[tuple[int, int, int]]) -> int:
        """Bytes below which these rows cannot run together."""
        tokens = count(rows)
        return min(self.peak(tokens, 0, 0, tile) for tile in (tokens.packed, TILES[-1]))


def _largest(most: int, fits) -> int:
    """The largest n of 0..most that fits; 0 is taken to fit."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _piece_counts(rows: int) -> list[int]:
    """1, 2, 3, ... and coarser further on, up to one row a piece."""
    counts = {*range(1, min(rows, 16) + 1), rows}
    counts |= {ceil(rows / n) for n in range(1, 9)}
    return sorted(counts)


def _cut(order: list[int], lengths: list[int], pieces: int) -> list[list[int]]:
    """`order` in at most `pieces` runs of about the same number of tokens."""
    target, runs, done = sum(lengths) / pieces, [[]], 0
    for index, length in zip(order, lengths, strict=True):
        if runs[-1] and done + length / 2 > target * len(runs):
            runs.append([])
        runs[-1].append(index)
        done += length
    return runs


@dataclass(frozen=True)
class Resident:
    """Bytes that lie on the card all the time. Sources: Architecture counts, bitsandbytes for 8-bit Adam."""

    weights: int
    adapters: int  # fp32; with every weight trained, 0: they are the weights
    gradients: int
    optimizer: int
    dequantized: int  # the one buffer in which a 4-bit matrix is made dense

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer + self.dequantized


DENSE_BYTES = 2**27  # kernels.lora_linear's: of 4-bit matrices this much is made dense at a time


def dense_bytes(a: Architecture, width: int = 2) -> int:
    """The buffer in which the kernels make 4-bit matrices dense: the largest one or a piece of it, or several if they
    are small."""
    sizes = {m.name: m.out_features * m.in_features * width for m in a.linears()}
    joined = [sum(sizes[name] for name in names) for names in (a.family.qkv, a.family.gate_up)]
    largest = min(max(sizes.values()), DENSE_BYTES)
    return max(size for size in (largest, *joined) if size <= DENSE_BYTES)


OPTIMIZER_BYTES = {"adamw_8bit": 2.04, "adamw": 8.0}  # a trained number: two moments, and 8-bit's scale of each 256


def resident(
    a: Architecture, quantization: str, rank: int, targets: tuple[str, ...] | None, optimizer: str, width: int = 2
) -> Resident:
    """Of a model with a LoRA of `rank` (0: every weight is trained, in fp32)."""
    state = OPTIMIZER_BYTES[optimizer]
    if rank == 0:
        numbers = a.parameters()
        return Resident(4 * numbers, 0, 4 * numbers, round(state * numbers), 0)
    numbers = a.lora_parameters(rank, targets)
    dense = 0 if quantization == "none" else dense_bytes(a, width)
    return Resident(a.weight_bytes(quantization, width), 4 * numbers, 4 * numbers, round(state * numbers), dense)
