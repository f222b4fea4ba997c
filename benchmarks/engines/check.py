"""Is the graph engine right on this GPU? The CPU tests' questions again, with captured graphs, Triton and 16 bits.

Every check prints a line; `run` returns how many failed. In 16 bits two engines round differently, so where their
tokens part, the training forward must hold both words for all but equal: such forks are counted and their gap shown.
"""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from benchmarks import harness, random_model
from benchmarks.random_model import Model
from nbhelpers import kernels, presets
from nbhelpers.architecture import Architecture
from nbhelpers.engines import Completion, Sampling
from nbhelpers.engines.graph import GraphEngine
from nbhelpers.engines.hf import HFEngine
from nbhelpers.kernels import decode_step

GREEDY = Sampling(max_tokens=64, temperature=0.0)
NEAR = {torch.bfloat16: 0.25, torch.float16: 0.06, torch.float32: 1e-3}  # what counts as a near-tie, in logits
OFF = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-4}  # nats, mean error of log-probabilities

Say = Callable[[str, bool, str], None]  # (what was checked, whether it is right, the numbers behind it)


@torch.no_grad()
def forward_logps(model: Model, prompt: list[int], token_ids: list[int], temperature: float = 1.0) -> Tensor:
    """fp32 [tokens, V]: the training forward's log-probabilities after a prompt."""
    logits = model(input_ids=torch.tensor([prompt + token_ids], device=model.device)).logits[0].float()
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def errors(model: Model, prompts: list[list[int]], completions: list[Completion], temperature: float) -> Tensor:
    """How far the log-probability that came with each token is from the training forward's; fp32 [tokens of all]."""
    off = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logps = forward_logps(model, prompt, completion.token_ids, temperature).cpu()
        wanted = logps.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        off.append((torch.tensor(completion.logprobs) - wanted).abs())
    return torch.cat(off)


def compare(
    model: Model, prompts: list[list[int]], ours: list[Completion], theirs: list[Completion]
) -> tuple[int, float]:
    """(rows that part, the largest gap between the two words where they part, by the training forward)."""
    forks, worst = 0, 0.0
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y), None)
        if at is not None:
            forks += 1
            last = forward_logps(model, prompt, b.token_ids[: at + 1])[-1]
            worst = max(worst, (last[b.token_ids[at]] - last[a.token_ids[at]]).abs().item())
    return forks, worst


def run(device: torch.device, dtypes: list[torch.dtype], quick: bool, line: Callable[[str], None]) -> int:
    """Every check for four models in each of `dtypes`, a `line` of text each; returns how many failed."""
    failed = 0

    def say(name: str, good: bool, detail: str) -> None:
        nonlocal failed
        failed += not good
        line(f"{'ok  ' if good else 'FAIL'} {name}: {detail}")

    if device.type == "cuda":
        for dtype in dtypes:
            say(f"{dtype} NF4 weights in a decoding step", *same_weights(device, dtype))
            say(f"{dtype} 16-bit weights in a decoding step", *plain_weights(device, dtype))
    for name in ("qwen2.5-1.5b", "qwen3-0.6b", "llama-3.1-8b", "phi-4"):
        real = presets.get(name).architecture
        shape = harness.small(real) if quick else replace(real, num_hidden_layers=4)
        for dtype in dtypes:
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            try:
                one_model(label, shape, device, dtype, say, 8 if quick else 64)
            except Exception as error:
                say(label, False, f"{type(error).__name__}: {error}"[:600])
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return failed


def same_weights(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Unit vectors pick single weights out of the few-row product: bit for bit those of the dequantisation?"""
    from bitsandbytes.functional import quantize_4bit

    from nbhelpers.kernels import Projection
    from nbhelpers.kernels.triton import nf4_few_rows

    generator = torch.Generator(device).manual_seed(0)
    for nested in (True, False):
        dense = [torch.randn(out, 1536, generator=generator, device=device) for out in (1000, 64, 3)]
        parts = [Projection(*quantize_4bit(w, quant_type="nf4", compress_statistics=nested)) for w in dense]
        wanted = torch.cat([kernels.reference.dequantize_nf4(p.weight, p.quant_state, dtype) for p in parts])
        units = torch.eye(1536, dtype=dtype, device=device)
        # the last two: as a T4 does it, which has the instruction for half as much in fp16
        for rows, ampere in ((8, True), (16, True), (64, True), (128, True), (8, False), (16, False)):
            if not ampere and dtype != torch.float16:
                continue
            for first in range(0, 1536, rows):
                with mock.patch.object(nf4_few_rows, "tensor_cores", lambda device, answer=ampere: answer):
                    y, _ = nf4_few_rows.few_rows_product(units[first : first + rows], tuple(parts))
                if not torch.equal(y.sum(0), wanted[:, first : first + rows].t().float()):
                    return False, f"nested={nested}, {rows} rows, {ampere=}: other weights from {first} on"
    return True, "bit for bit those of nf4.py"


def plain_weights(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """A group of layers in 16 bits, and one of which some are NF4, by the few-row products and by torch."""
    from bitsandbytes.functional import quantize_4bit

    from nbhelpers.kernels import Projection

    generator, worst = torch.Generator(device).manual_seed(0), 0.0

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5

    def part(out: int, rank: int, packed: bool = False) -> Projection:
        weight, state = make(out, 1536).to(dtype), None
        if packed:
            weight, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        lora = {"lora_a": make(rank, 1536), "lora_b": make(out, rank), "scale": 2.0} if rank else {}
        return Projection(weight, state, make(out).to(dtype), **lora)

    def exact(x: Tensor, part: Projection) -> Tensor:
        weight = part.weight
        if part.quant_state is not None:
            weight = kernels.reference.dequantize_nf4(weight, part.quant_state, dtype)
        y = x.float() @ weight.float().t() + part.bias.float()
        return y if part.lora_a is None else y + part.scale * (x.float() @ part.lora_a.t()) @ part.lora_b.t()

    mixed = (part(200, 16, packed=True), part(72, 0), part(8, 9, packed=True))
    for parts in ((part(1000, 32), part(64, 8), part(24, 0)), (part(1536, 128),), mixed):
        for rows in (1, 16, 33, 64, 128, 200):
            x = make(rows, 1, 1536).to(dtype)
            for part_, y in zip(parts, decode_step.decode_linear(x, parts), strict=True):
                wanted = exact(x, part_)
                worst = max(worst, ((y.float() - wanted).norm() / wanted.norm()).item())
    return worst < (1e-2 if dtype == torch.bfloat16 else 2e-3), f"relative error {worst:.5f}"


def one_model(label: str, shape: Architecture, device: torch.device, dtype: torch.dtype, say: Say, tokens: int) -> None:
    """The graph engine on one random model, against itself without graphs, in stages, and transformers."""
    model = random_model.make(shape, device, dtype)
    greedy, near = replace(GREEDY, max_tokens=tokens), NEAR[dtype]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (5, 40, 33, 120, 64, 64, 9, 200)]
    engine = GraphEngine(model)
    graph = engine.generate(prompts, greedy)

    eager = GraphEngine(model, eager=True)
    same = [c.token_ids for c in eager.generate(prompts, greedy)] == [c.token_ids for c in graph]
    say(f"{label} graph = the same steps without a graph", same, "tokens equal" if same else "tokens differ")

    forks, gap = compare(model, prompts, graph, HFEngine(model).generate(prompts, greedy))
    say(f"{label} graph = transformers, greedy", gap < near, f"{forks} of {len(prompts)} rows part, gap {gap:.4f}")

    with kernels.use("torch"):
        plain = HFEngine(model).generate(prompts, greedy)
    forks, gap = compare(model, prompts, graph, plain)
    say(f"{label} graph = transformers, torch's draw", gap < near, f"{forks} rows part, gap {gap:.4f}")

    drawn = engine.generate(prompts, replace(greedy, temperature=0.9, num_generations=2, seed=3))
    off = errors(model, [prompt for prompt in prompts for _ in range(2)], drawn, 0.9)
    right = off.mean().item() < OFF[dtype]
    say(f"{label} log-probabilities of draws", right, f"mean {off.mean():.5f}, largest {off.max():.4f} off")

    small = engine.generate(prompts[:3], replace(greedy, max_tokens=tokens // 2, num_generations=5))  # another cache
    again = engine.generate(prompts, greedy)
    moved = [c.token_ids for c in again] == [c.token_ids for c in graph] and len(small) == 15
    say(f"{label} graphs outlive their cache", moved, "tokens equal" if moved else "tokens differ")

    long = replace(greedy, max_tokens=10 * tokens)
    room = 8 * (max(map(len, prompts)) + 4 * tokens + 16) * harness.kv_token_bytes(shape, dtype)  # not for all of that
    staged = GraphEngine(model, kv_bytes=room).generate(prompts, long)
    forks, gap = compare(model, prompts, staged, engine.generate(prompts, long))
    say(f"{label} in stages = in one piece", gap < near, f"{forks} of {len(prompts)} rows part, gap {gap:.4f}")

    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    trained = engine.generate(prompts, greedy)
    forks, gap = compare(model, prompts, trained, HFEngine(model).generate(prompts, greedy))
    differs = [c.token_ids for c in trained] != [c.token_ids for c in graph]
    say(f"{label} after an update", gap < near and differs, f"{forks} rows part, gap {gap:.4f}, changed: {differs}")

    # one word in twenty ends a row: the batch shrinks again and again while it writes, which captures new graphs
    ends = tuple(range(0, model.config.vocab_size, 20))
    ragged = replace(greedy, temperature=1.0, stop_ids=ends, num_generations=3, seed=5)
    shrinking, steady = GraphEngine(model).generate(prompts, ragged), eager.generate(prompts, ragged)
    parted = sum(a.token_ids != b.token_ids for a, b in zip(shrinking, steady, strict=True))
    say(f"{label} rows that end one by one", parted == 0, f"{parted} of 24 rows part from those without graphs")

    seeds = list(range(8))
    stops = tuple(range(3, 300, 7))
    sampling = replace(greedy, temperature=1.0, stop_ids=stops, seed=seeds)
    wide, narrow = engine.generate(prompts, sampling), GraphEngine(model, max_rows=3).generate(prompts, sampling)
    forks, gap = compare(model, prompts, narrow, wide)
    say(f"{label} 8 requests through 3 rows", forks <= 4, f"{forks} of 8 rows part (near-ties are no error)")
