"""The bytes of one training step, and how a batch is cut so that they fit: what the step does and the planner predicts.

Plain arithmetic, no torch: the step asks it with the tokens at hand, the planner with those of a preset.

A micro-batch of T packed tokens runs layer by layer, forward and then backward. A layer is in one of three states:

    saved       all that its backward needs is saved: nothing is computed twice         (the last layers)
    on device   only its input is, the rest is computed again in the backward
    offloaded   its input waits in pinned host memory                                   (the first layers)

The formulas name every tensor that is alive at the moments that can be the peak. Letters: T tokens, S of them scored,
K keys (a shared prompt's count once for each completion), H hidden, I intermediate, h and g query and key heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from nbhelpers import gpu
from nbhelpers.architecture import GB, Architecture

from .kv import kv_bytes_per_token

TILES = (8192, 4096, 2048, 1024)  # tokens of the MLP at once, where not all of them fit
FIXED_TOKENS = 256  # dequantising a layer costs about as much time as this many tokens in it
RECOMPUTED = 0.75  # share of a layer's forward that a layer computes again (the MLP's last product is not needed)
PIECE = 0.377  # of a layer's launches once more for each further piece of the MLP (seconds.py fits it)
PROMPT_SHARE = 0.1  # of a completion: a shorter prompt is computed again for each long one, see `StepCost.alone`
SLACK = 1.02  # small tensors: statistics, indices, products with LoRA's A of a layer that is computed again


class CannotFit(ValueError):
    """The smallest micro-batch does not fit; the message says by how much and what to change."""


class Tokens(NamedTuple):
    """Counts of a micro-batch: packed tokens, scored tokens, keys (equal to tokens where no prompt is shared)."""

    packed: int
    scored: int
    keys: int


class MicroBatch(NamedTuple):
    """Rows that go forward and backward together, and the states of the layers meanwhile."""

    rows: tuple[int, ...]  # indices into the list that was split
    tokens: Tokens
    saved: int  # the last `saved` layers
    on_device: int  # the `on_device` layers before them; the inputs of the rest are offloaded
    tile: int  # tokens of the MLP at once in a layer that is computed again
    peak: int  # bytes on top of what is resident


Lengths = tuple[int, int, int]  # of a row: (its prompt's number, tokens of the prompt, tokens of the completion)


def count(rows: list[Lengths], share: bool = True) -> Tokens:
    """Tokens of these rows as `packing.pack` lays them out; share: a group's prompt goes through once."""
    groups: dict[int, list[Lengths]] = {}
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
class StepCost:
    """Bytes of the step's tensors, and the time that a cut takes.

    Args:
        architecture (`Architecture`): The model's shapes.
        width (`int`): Bytes of an activation's number, 2 or 4.
        attention (`str`): The backend, "flash", "efficient" or "rows" (see training/packed_attention.py).
        dropped (`int`): Features that go through LoRA's dropout in a layer, over all of its linear layers.
        valued (`bool`): A value head reads what the head reads, in fp32.
        whole (`bool`): Every weight is trained: the inputs of all linear layers are saved too, and gradients of weights
            are made before they are added up.
        adapted (`int`): Columns of the products with LoRA's A in a layer, over all of its linear layers.
        launches (`int`): Tokens that a layer computes while Python launches one pass through it: fewer take as long.
        alone (`int`): Longer completions, in tokens, are not packed with others, unless they share a prompt that would
            count: attention to one sequence is quicker then. 0: all are packed.
    """

    architecture: Architecture
    width: int = 2
    attention: str = "flash"
    dropped: int = 0
    valued: bool = False
    whole: bool = False
    adapted: int = 0
    launches: int = 0
    alone: int = 0

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
        """[tokens, h * D]: queries, or attention's output."""
        return tokens * self.architecture.num_attention_heads * self.architecture.head_dim * self.width

    def kv(self, tokens: int, layers: int = 1) -> int:
        """2 [tokens, g * D]: keys and values of `layers` layers."""
        a = self.architecture
        return tokens * kv_bytes_per_token(layers, a.num_key_value_heads, a.head_dim, self.width)

    def dropout(self, tokens: int) -> int:
        """What LoRA's dropout saves of a layer: its input and its output for A, in fp32, and the mask, in bytes."""
        return 9 * self.dropped * tokens

    def inputs(self, tokens: int) -> int:
        """Of linear layers that are trained: two normed hidden states and the MLP's product, in one layer."""
        return (2 * self.hidden(tokens) + self.inner(tokens)) if self.whole else 0

    def head_gradient(self) -> int:
        """[V, H] of a head that is trained: summed in fp32, then in its own dtype."""
        a = self.architecture
        return a.vocab_size * a.hidden_size * (4 + self.width) if self.whole else 0

    def weight_gradient(self) -> int:
        """Of the largest linear layer, before it is added to what is there."""
        a = self.architecture
        return a.hidden_size * a.intermediate_size * self.width if self.whole else 0

    def _expanded(self, keys: int) -> int:
        """K and V, or their gradients, with as many heads as Q; nothing where they have as many anyway."""
        a = self.architecture
        return 2 * self.q(keys) if a.num_attention_heads != a.num_key_value_heads else 0

    def _attention_saved(self, t: Tokens) -> int:
        """Q, K, V (K and V again in the order of the sequences if a prompt is shared), output, log-sum-exp.

        Behind norms over the heads Q and K are new tensors, and what the projections gave stays beside them.
        """
        gathered = self.kv(t.keys) if t.keys != t.packed else 0
        expanded = 0 if self.attention == "flash" else self._expanded(t.keys)
        lse = 4 * t.packed * self.architecture.num_attention_heads
        normed = self.q(t.packed) + self.kv(t.packed) // 2 if self.architecture.family.head_norms else 0
        return 2 * self.q(t.packed) + self.kv(t.packed) + normed + gathered + expanded + lse

    def _attention_scratch(self, t: Tokens) -> int:
        """What attention's backward has of its own: gradients of its output, Q, K, V, and their fp32 sums."""
        grads = 2 * self.q(t.packed) + self.kv(t.keys)
        sums = self.q(t.packed) * 4 // self.width
        if self.attention == "flash":
            return grads + sums + self._expanded(t.keys)
        return grads + sums + 2 * self._expanded(t.keys)

    def recompute_attention(self, t: Tokens) -> int:
        """Backward through a layer's attention: input, gradient of the sum, what was saved, scratch."""
        dropout = self.dropout(t.packed) + self.inputs(t.packed) + self.weight_gradient()
        return 2 * self.hidden(t.packed) + self._attention_saved(t) + self._attention_scratch(t) + dropout

    def recompute_mlp(self, t: Tokens, tile: int) -> int:
        """Backward through a layer's MLP, before that: input, incoming gradient, attention's output, a tile's work."""
        tile = min(tile, t.packed)
        work = 3 * self.inner(tile) + 4 * self.hidden(tile) + self.dropout(tile)
        work += self.inputs(tile) + self.weight_gradient()
        return 3 * self.hidden(t.packed) + self._attention_saved(t) + self.dropout(t.packed) + work

    def head(self, t: Tokens) -> int:
        """Last layer's output, the scored tokens, normed, their gradients, and the buffer for logits."""
        logits = min(gpu.LOGITS_BYTES, t.scored * self.architecture.vocab_size * self.width)
        wide = (self.hidden(t.packed) + self.hidden(t.scored)) * 4 // self.width  # summed in fp32 on the way back
        values = 2 * t.scored * self.architecture.hidden_size * 4 if self.valued else 0  # its input, and the gradient
        own = max(3 * self.hidden(t.scored) + logits, 2 * self.hidden(t.scored) + wide)
        return self.hidden(t.packed) + values + own

    def saved(self, t: Tokens) -> int:
        """A layer whose backward needs nothing computed again: input, its attention, sum, gate, up, products with A."""
        own = 2 * self.hidden(t.packed) + 2 * self.inner(t.packed) + self.dropout(t.packed) + self.inputs(t.packed)
        return self._attention_saved(t) + own + self.adapted * t.packed * self.width

    def saved_backward(self, t: Tokens) -> int:
        """On top of the saved tensors, while such a layer goes backward: the gradients alive in it."""
        mlp = self.inner(t.packed) + 2 * self.hidden(t.packed) + self.weight_gradient()
        return self.hidden(t.packed) + max(mlp, self._attention_scratch(t) + self.hidden(t.packed))

    def forward(self, t: Tokens, tile: int = TILES[0]) -> int:
        """A layer without gradients: input, normed input, Q, K, V, output, projected; or the MLP's tile."""
        tile = min(tile, t.packed)
        attention = 3 * self.hidden(t.packed) + self._attention_saved(t)
        return max(attention, 4 * self.hidden(t.packed) + 3 * self.inner(tile), self.head(t))

    def peak(self, t: Tokens, saved: int, on_device: int, tile: int, fresh: int = 0) -> int:
        """The most bytes alive at once, on top of weights, adapters and optimizer, in these states of the layers.

        fresh: bytes of gradients that are put aside and that no layer has made yet when the head makes its own.
        """
        held = saved * self.saved(t) + on_device * self.hidden(t.packed)
        moments = [self.head(t) + held + max(0, self.head_gradient() - fresh)]
        if saved:
            moments.append(self.saved_backward(t) + held)
        if saved < self.layers:
            again = max(self.recompute_attention(t), self.recompute_mlp(t, tile))
            moments.append(again + max(on_device - 1, 0) * self.hidden(t.packed))
            if saved + on_device < self.layers:
                moments.append(again + 2 * self.hidden(t.packed))  # the next layer's input is being prefetched
        return round(max(moments) * SLACK)

    def micro_batch(self, rows: tuple[int, ...], t: Tokens, room: float, fresh: int = 0) -> MicroBatch | None:
        """How these rows run within `room` bytes: as many layers saved as fit, then as many inputs on the device.

        None if they cannot.
        """
        if (peak := self.peak(t, self.layers, 0, t.packed, fresh)) <= room:
            return MicroBatch(rows, t, self.layers, 0, t.packed, peak)
        for tile in (t.packed, *(tile for tile in TILES if tile < t.packed)):
            if self.peak(t, 0, 0, tile, fresh) <= room:
                break
        else:
            return None
        saved = largest(lambda n: self.peak(t, n, 0, tile, fresh) <= room, 1, self.layers - 1)
        on_device = largest(lambda n: self.peak(t, saved, n, tile, fresh) <= room, 1, self.layers - saved)
        return MicroBatch(rows, t, saved, on_device, tile, self.peak(t, saved, on_device, tile, fresh))

    def time(self, batch: MicroBatch) -> float:
        """In tokens times layers: forward, backward, what is computed again; each takes as long as its launches."""
        tokens, further = batch.tokens.packed + FIXED_TOKENS, ceil(batch.tokens.packed / batch.tile) - 1
        again = max(tokens, self.launches * (1 + PIECE * further))
        return 2 * batch.saved * max(tokens, self.launches) + (2 + RECOMPUTED) * (self.layers - batch.saved) * again

    def split(self, rows: list[Lengths], room: float, share: bool = True, fresh: int = 0) -> list[MicroBatch]:
        """The fastest way to run `rows` within `room` bytes of work; `fresh` as for `peak`, if it is one piece.

        Rows of a prompt stay together as far as they can. Raises CannotFit if not even one row fits.
        """
        order = sorted(range(len(rows)), key=lambda i: (rows[i][0], -rows[i][2]))
        alone = [i for i in order if 0 < self.alone < rows[i][2] and rows[i][1] < PROMPT_SHARE * rows[i][2]]
        packed = [i for i in order if i not in alone]
        lengths = [rows[i][1] + rows[i][2] for i in packed]
        best: list[MicroBatch] | None = None
        least_time = float("inf")
        for pieces in _piece_counts(len(packed)):
            cut, runs = [], [[i] for i in alone] + _cut(packed, lengths, pieces)
            for chosen in runs:
                tokens = count([rows[i] for i in chosen], share)
                batch = self.micro_batch(tuple(chosen), tokens, room, fresh if len(runs) == 1 else 0)
                if batch is None:
                    break
                cut.append(batch)
            else:
                if (time := sum(map(self.time, cut))) < least_time:
                    best, least_time = cut, time
        if best is None:
            longest = max(rows, key=lambda row: row[1] + row[2])
            least = self.least([longest])
            raise CannotFit(
                f"a completion of {longest[2]} tokens after a prompt of {longest[1]} needs {least / GB:.2f} GB of "
                f"work on top of the weights, and {max(room, 0) / GB:.2f} GB are left: shorten max_completion_length, "
                "or raise budget_gb if the card has more"
            )
        return best

    def least(self, rows: list[Lengths], fresh: int = 0) -> int:
        """Bytes below which these rows cannot run together; `fresh` as for `peak`."""
        tokens = count(rows)
        return min(self.peak(tokens, 0, 0, tile, fresh) for tile in (tokens.packed, TILES[-1]))


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest n of low..high that fits, by bisection: what is larger needs more. low - 1 if none of them does."""
    low -= 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _piece_counts(rows: int) -> list[int]:
    """1, 2, 3, ... and coarser further on, up to one row a piece; 0 for no rows."""
    counts = {*range(1, min(rows, 16) + 1), rows}
    counts |= {ceil(rows / n) for n in range(1, 9)}
    return sorted(counts)


def _cut(order: list[int], lengths: list[int], pieces: int) -> list[list[int]]:
    """`order` in at most `pieces` runs of about the same number of tokens."""
    target, done = sum(lengths) / max(1, pieces), 0
    runs: list[list[int]] = []
    for index, length in zip(order, lengths, strict=True):
        if not runs or done + length / 2 > target * len(runs):
            runs.append([])
        runs[-1].append(index)
        done += length
    return runs
