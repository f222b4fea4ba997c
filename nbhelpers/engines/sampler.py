"""One token for each row from its logits, on whatever device they are, without ever asking the host.

Drawing is a race (the Gumbel trick, arXiv 1611.01144): token i wins with probability softmax(z)_i if it has the largest
z_i - log(E_i), the E_i being independent exponential random numbers. They come from a hash of (seed of the request,
number of the token in it, token id), so a request's draws do not depend on what else is in the batch. And if two
batches' logits differ in the last bits, as they do on a GPU, only a near-tie of the race can be decided differently.
"""

import math

import torch
from torch import Tensor

from nbhelpers.kernels import draw

from .base import Sampling


def next_token(
    logits: Tensor, seeds: Tensor, written: Tensor, sampling: Sampling, stops: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What an engine writes next: the token that `sample` draws, and its log-probability under the model.

    The trainer weighs a token by its own log-probability over this one (`grpo.engine_correction`), and its own is the
    model's at the temperature. Penalty, minimum length and filters would make each token's weight the mass that they
    kept there, and a completion's their product, which is 0 for a long one.

    Args and shapes as in `sample`.
    """
    token, logp = sample(logits, seeds, written, sampling, stops, seen)
    if sampling.plain:
        return token, logp
    scaled = logits / (sampling.temperature or 1.0)
    return token, scaled.gather(1, token[:, None])[:, 0] - scaled.logsumexp(-1)


def sample(
    logits: Tensor, seeds: Tensor, written: Tensor, sampling: Sampling, stops: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability in the distribution that it was drawn from.

    Args:
        logits (`Tensor`): fp32 [B, V].
        seeds (`Tensor`): int64 [B], the requests'.
        written (`Tensor`): int64 [B], tokens that each completion has so far.
        sampling (`Sampling`): The filters, in the order that it gives.
        stops (`Tensor`): int64 [stop ids], those of `sampling` on the device.
        seen (`Tensor`, *optional*): bool [B, V], tokens of prompt and completion so far. Needed with a repetition
            penalty; the new tokens are marked in it.

    Returns int64 [B], fp32 [B].
    """
    if sampling.repetition_penalty != 1.0:
        if seen is None:
            raise ValueError("a repetition penalty needs `seen`")
        penalised = torch.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.min_tokens and len(stops):
        too_early = written < sampling.min_tokens  # [B]
        barred = torch.zeros_like(logits[:1], dtype=torch.bool).index_fill(1, stops, True)  # [1, V]
        logits = logits.masked_fill(too_early[:, None] & barred, float("-inf"))
    if sampling.temperature == 0.0:
        token = logits.argmax(-1)
        logp = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    else:
        logits = _filtered(logits / sampling.temperature if sampling.temperature != 1.0 else logits, sampling)
        token, logp = draw(logits, seeds, written)
    if seen is not None:
        seen.scatter_(1, token[:, None], True)
    return token, logp


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """-inf for the tokens that top-k, top-p and min-p rule out, one filter after the other."""
    vocabulary = logits.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1.0:
        values, order = logits.sort(descending=True)
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens: the first one has 0 and stays
        barred = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(barred, float("-inf"))
    if sampling.min_p > 0.0:
        # in logarithms: log p_i < log p_max + log min_p
        smallest = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return logits
