"""Generation from the model that is being trained: one contract, several engines, and who chooses among them.

engine = engines.choose("auto", model, tokenizer)          # prints which one, and why
completions = engine.generate(prompts, engines.Sampling(max_tokens=512, num_generations=8))
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from nbhelpers.models import families

from .base import Completion, Engine, Sampling

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Completion", "Engine", "Sampling", "choose"]
NAMES = ("auto", "graph", "vllm", "hf")


def choose(
    engine: "str | Engine",
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    rows: int = 128,
    max_length: int | None = None,
    budget_gb: float | None = None,
    kv_bits: int = 16,
    quiet: bool = False,
) -> Engine:
    """The engine of that name for this model; an Engine object is returned as it is.

    "graph": the project's decoder, one CUDA graph per step (on a CPU eagerly). "vllm": vLLM on the same weights, Ampere
    and newer; it starts more slowly and pays off with many rows. "hf": transformers' `generate`. "auto": "graph" where
    it can decode the model, else "hf".

    Args:
        engine (`str` or `Engine`): "auto", "graph", "vllm", "hf", or an engine.
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): What writes.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Needed for stop strings alone.
        rows (`int`): Completions that are written at the same time, at most.
        max_length (`int`, *optional*): Tokens of the longest prompt with its completion, which "vllm" has to know
            beforehand; None for what fits.
        budget_gb (`float`, *optional*): What torch may allocate in this process in all, GB (10^9 bytes); None for what
            the card has.
        kv_bits (`int`): Of a number of keys and values, 16 or 8. "graph" alone has 8, and an engine that was made so.
        quiet (`bool`): Do not print which engine "auto" has chosen, and why.

    Raises ValueError for another name, or if the engine that was asked for cannot serve the model; host.CannotRun
    without vLLM.
    """
    from .cuda_graphs import BATCHES
    from .graph import GraphEngine
    from .hf import HFEngine

    if isinstance(engine, Engine):
        if kv_bits != 16 and engine.kv_bits != kv_bits:
            raise ValueError(f"kv_bits={kv_bits}, and the engine was made with {engine.kv_bits}: set one as the other")
        return engine
    if engine not in NAMES:
        raise ValueError(f"engine={engine!r}: it is one of {', '.join(NAMES)}, or an Engine")
    if engine in ("hf", "vllm") and kv_bits != 16:
        raise ValueError(f'kv_bits={kv_bits} is an option of the graph engine: take engine="graph", or leave it out')
    if engine == "hf":
        return HFEngine(model, tokenizer, batch_size=rows)
    if engine == "vllm":
        from .vllm import VLLMEngine

        return VLLMEngine(model, tokenizer, max_rows=rows, max_length=max_length, budget_gb=budget_gb)
    why = families.why_not(model, "generation")
    if engine == "auto" and why is None and model.device.type == "cuda" and find_spec("triton") is None:
        why = "triton is not installed here"
    if engine == "auto" and why is not None and kv_bits != 16:
        raise ValueError(f"kv_bits={kv_bits} is an option of the graph engine, which cannot serve here: {why}. Leave "
                         "kv_bits out")  # fmt: skip
    if engine == "auto" and not quiet:
        where = "one CUDA graph a step" if model.device.type == "cuda" else "plain PyTorch on the CPU"
        chosen = f"graph: reads {model.config.model_type}'s training weights, {where}" if why is None else f"hf: {why}"
        print(f"engine {chosen}")
    if why is not None and engine == "auto":
        return HFEngine(model, tokenizer, batch_size=rows)
    return GraphEngine(model, tokenizer, max_rows=min(rows, BATCHES[-1]), budget_gb=budget_gb, kv_bits=kv_bits)
