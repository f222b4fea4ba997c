"""A decoding step before its first layer and behind its head, in one launch each where three dozen small ones would do.

    embed            the last tokens' embeddings, and cosines and sines of their positions
    append_drawn     a token for each row, drawn from its logits, and all that follows from it
    append           the same for tokens that were chosen elsewhere: greedily, or behind filters

The rows' state and the results stay where they are, so that a captured CUDA graph can be replayed: `Rows`.
"""

from torch import Tensor
from torch.cuda import device_of

from . import _for
from .reference import LEFT, POSITION, SEED, TOKEN, WRITTEN, Rows, advance

__all__ = ["LEFT", "POSITION", "SEED", "TOKEN", "WRITTEN", "Rows", "advance", "append", "append_drawn", "embed"]


def embed(rows: Rows, weight: Tensor, angles: Tensor, table: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """A step begins: `rows.tick` grows by one.

    Args:
        rows (`Rows`): The last token of each is embedded, and its position looked up.
        weight (`Tensor`): [V, H], the embedding.
        angles (`Tensor`): [length, D] in weight's dtype, of `eight_bits.angles_of`; no position is beyond.
        table (`Tensor`): As for `decode_attention`; the Triton kernel reads the address of `angles` there.
        half (`int`): Frequencies of the rotation, R / 2.

    Returns x [B, 1, H] and the cosines and sines [B, 1, R], each frequency twice, as for `rope`.
    """
    with device_of(weight):
        return _for(weight).embed(rows, weight, angles, table, half)


def append_drawn(rows: Rows, logits: Tensor, temperature: float) -> None:
    """`append` of what `kernels.draw` draws from logits / temperature for the rows' seeds and their tokens so far.

    Args:
        rows (`Rows`): B of them.
        logits (`Tensor`): fp32 [B, V].
        temperature (`float`): Above 0.
    """
    with device_of(logits):
        _for(logits).append_drawn(rows, logits, temperature)


def append(rows: Rows, token: Tensor, logp: Tensor) -> None:
    """Write a step's tokens to row `tick - 1` of the results, and bring the state up to date as `advance` does.

    Args:
        rows (`Rows`): B of them.
        token (`Tensor`): int64 [B].
        logp (`Tensor`): fp32 [B], their log-probabilities.
    """
    with device_of(logp):
        _for(logp).append(rows, token, logp)
