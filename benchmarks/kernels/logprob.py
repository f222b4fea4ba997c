"""The head of a model: log-probabilities of tokens, 8,192 of them for each model and 32,768 against TRL's."""

from functools import partial

import torch
from torch import Tensor

from nbhelpers import kernels

from . import cases
from .measure import DEVICE, DTYPE, Run, attempt, milliseconds, row, train_rows

# (tokens, words) of one product where no gradient is wanted: linear_logprob.FORWARD_TOKENS is chosen from these. The
# first four fill the scratch; the results of the others, 16 to 64 MB, stay more or less in an L2 cache of 50 MB.
TILES = ((1024, 128_256), (2048, 64_128), (4096, 32_064), (8192, 16_032), (4096, 8192), (2048, 8192), (2048, 4096),
         (4096, 4096), (8192, 4096), (1024, 12_288))  # fmt: skip


def logprob(run: Run) -> None:
    """The head: 8,192 tokens of each model against everybody, 32,768 tokens x 128,256 words against TRL's."""
    from trl.kernels import ChunkedLogProbFunction

    def ours(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return kernels.linear_logprob(h, w, target, temperature=0.9)

    def trl(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
        outputs = ("log_probs",)
        return ChunkedLogProbFunction.apply(h, w, None, target, 0.9, 32768, None, 1.0, outputs)[0]

    def eager(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
        logps = torch.log_softmax((h @ w.t()).float() / 0.9, dim=-1)
        return logps.gather(-1, target[:, None]).squeeze(-1)

    def liger(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

        return _ChunkedSelectiveLogProbFunction.apply(h, w, target, None, 0.9, 4096)

    def cublas(h: Tensor, w: Tensor, target: Tensor) -> None:
        """The two products of a frozen head, in chunks of the same size, and nothing else."""
        h = h.detach()
        out, buffer = torch.empty_like(h), torch.empty(1024, w.shape[0], dtype=h.dtype, device=h.device)
        for start in range(0, h.shape[0], 1024):
            rows = h[start : start + 1024]
            z = buffer[: rows.shape[0]]
            torch.mm(rows, w.t(), out=z)
            torch.mm(z, w, out=out[start : start + 1024])

    def inputs(tokens: int, hidden: int, words: int) -> list[Tensor]:
        h = torch.randn(tokens, hidden, dtype=DTYPE, device=DEVICE, requires_grad=True)
        w = torch.randn(words, hidden, dtype=DTYPE, device=DEVICE) * 2 * hidden**-0.5
        return [h, w, torch.randint(0, words, (tokens,), device=DEVICE)]

    for shape in run.shapes:
        torch._dynamo.reset()
        everybody = {"ours": ours, "eager": eager, "compile": run.compiled(eager), "liger": liger, "trl": trl}
        if DEVICE.type == "cpu":  # Liger has none
            del everybody["liger"]
        data = inputs(run.tokens, shape.hidden, shape.words)
        train_rows(f"{shape.name}/linear_logprob", cases.Case(data, everybody), 1)
        what = f"{shape.name}/linear_logprob/forward+backward"
        row(what, "cublas", milliseconds(lambda data=data: cublas(*data)), "ms")
        run.write()
    nf4_head(run)

    tokens, hidden, words = (64, 32, 320) if run.quick else (32_768, 4096, 128_256)
    data = inputs(tokens, hidden, words)
    name = f"llama-3.1-8b/linear_logprob {tokens}x{words}"
    train_rows(name, cases.Case(data, {"ours": ours, "trl": trl}), 1)
    row(f"{name}/forward+backward", "cublas", milliseconds(lambda: cublas(*data)), "ms")
    for tile in () if run.quick else TILES:
        attempt(f"{name} {tile}", logprob_tile, name, data, tile)
    # of the peak the hidden states' gradient is a result, not scratch
    row(f"{name}/forward+backward/gradient", "ours", tokens * hidden * DTYPE.itemsize / 1e9, "GB")


def logprob_tile(name: str, data: list[Tensor], tile: tuple[int, int]) -> None:
    """The forward alone, its products cut to `tile` = (tokens, words)."""
    from nbhelpers.kernels.triton.linear_logprob import linear_logprob

    with torch.no_grad():
        time_it = partial(linear_logprob, *data, temperature=0.9, tile=tile)
        row(f"{name}/forward/tile {tile[0]}x{tile[1]}", "ours", milliseconds(time_it, budget=0.5), "ms")


def nf4_head(run: Run) -> None:
    """The same from a head in NF4."""
    import bitsandbytes.functional as functional

    shape = run.shapes[0] if run.quick else run.shapes[1]
    weight = torch.randn(shape.words, shape.hidden, dtype=DTYPE, device=DEVICE) * 2 * shape.hidden**-0.5
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    h = torch.randn(run.tokens, shape.hidden, dtype=DTYPE, device=DEVICE, requires_grad=True)
    target = torch.randint(0, shape.words, (run.tokens,), device=DEVICE)
    case = cases.Case([h], {"ours": lambda h: kernels.linear_logprob(h, packed, target, quant_state=state)})
    train_rows(f"{shape.name}/linear_logprob of an NF4 head", case, 1)
