"""vLLM in this process, on the very tensors that are being trained: Ampere and newer.

    vLLM's model    built on the training model's storage, NF4 with its statistics included  (model.py)
    the adapter     written into vLLM's own LoRA buffers before each generation              (lora.py)
    keys, values    asleep between two generations: training has their memory until the next

Decoding runs in vLLM's CUDA graphs without torch.compile, which takes a minute or more; its gain has not been measured.
Draws differ from the other engines' at the same seed, and min-p comes before top-k and top-p.
"""

import copy
import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nbhelpers import gpu, host
from nbhelpers.architecture import GB
from nbhelpers.memory.kv import kv_bytes_per_token
from nbhelpers.memory.room import Room, vllm_kv_budget
from nbhelpers.models import families, swap

from ..base import LENGTH, STOP_STRING, Completion, Engine, Sampling, Writer, check, inference
from ..cuda_graphs import BATCHES

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

TESTED = ("0.26", "0.27")  # from, up to but not including
BLOCK = 16  # tokens; vLLM allocates keys and values in blocks
PREFILL_TOKENS = 2048  # of prompts, computed together: more is hardly faster, and its activations take memory
ENVIRONMENT = {  # read by vLLM when it is imported; what the user has set stays
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # another process could not share the weights
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it returns no log-probabilities, and compiles for a minute
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLMEngine(Engine):
    """See the top of this file. One per process: share it, as in `evaluate.ask(..., engine=trainer.engine)`.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): Of a family in models/families.py, on GPU 0. From
            then on its base weights must keep their addresses; the adapter is read again in each generation.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Needed for stop strings alone.
        max_rows (`int`): Rows that are written at the same time, at most.
        max_length (`int`, *optional*): Tokens of the longest prompt with its completion; None for what the model and
            the memory for keys and values can hold. It cannot grow later.
        kv_bytes (`int`, *optional*): Bytes that keys and values may take; by default what the rows need, at most a
            share of what is free now.
        budget_gb (`float`, *optional*): What torch may allocate in this process in all, GB (10^9 bytes).
        eager (`bool`): No CUDA graphs: slow, and starts sooner.

    Raises host.CannotRun without vLLM or with a GPU below Ampere, ValueError for a model that it cannot follow,
    MemoryError if not even one text fits, RuntimeError for a second engine.
    """

    name = "vllm"
    made = False  # in this process: the memory pool that vLLM puts to sleep serves one engine

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        max_rows: int = 128,
        max_length: int | None = None,
        kv_bytes: int | None = None,
        budget_gb: float | None = None,
        eager: bool = False,
    ):
        host.require("vllm")
        if (why := why_not(model)) is not None:
            raise ValueError(f'engine="vllm" cannot decode this model: {why}. Use engine="graph" or "hf"')
        if VLLMEngine.made:
            raise RuntimeError("this process has its vllm engine already: pass that one on (engine=trainer.engine)")
        warn_of_version(version("vllm"))
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
            raise ValueError("VLLM_ENABLE_V1_MULTIPROCESSING=1 puts vLLM into another process: unset it")
        gpu.grow_blocks(False)
        from . import lora
        from .model import NAME, built_on, divided

        self.model, self.tokenizer, self._divided = model, tokenizer, divided
        inner = families.unwrap(model)
        budget = kv_bytes if kv_bytes is not None else vllm_kv_budget(Room(inner.device, budget_gb).free())
        self.max_length, self.kv_bytes = sizes(inner.config, inner.dtype, max_rows, max_length, budget)
        adapter = lora.settings(lora.adapted(inner))
        with tempfile.TemporaryDirectory() as folder, built_on(inner), _global_state_kept():
            write_folder(inner, tokenizer, Path(folder), NAME)
            self.llm = _start(
                inner,
                settings(folder, inner.dtype, max_rows, self.max_length, self.kv_bytes, tokenizer is not None, eager)
                | {"load_format": NAME, **adapter},
            )
        VLLMEngine.made = True
        worker = self.llm.llm_engine.model_executor.driver_worker.worker
        self.vllm_model = worker.model_runner.model
        self._slot = lora.LoRASlot(worker.model_runner.lora_manager) if adapter else None
        self._captured = self._addresses()
        self.sleep()

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """See `Engine.generate`. ValueError too for texts longer than `max_length`, RuntimeError if a base weight has
        moved since the engine was made."""
        check(prompts, sampling, families.unwrap(self.model).config.max_position_embeddings, self.tokenizer)
        seeds = sampling.seeds(len(prompts) * sampling.num_generations)
        if not prompts:
            return []
        if (longest := max(map(len, prompts)) + sampling.max_tokens) > self.max_length:
            raise ValueError(
                f"a text may get {longest} tokens long and this engine was made for {self.max_length}: restart the "
                f"kernel and make it with max_length={longest}"
            )
        if self._addresses() != self._captured:
            raise RuntimeError(
                "base weights of the model have moved since the vllm engine was made: restart the kernel"
            )
        self.wake()
        try:
            adapter = self.update_adapter()
            requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(sampling.num_generations)]
            parameters = [self._parameters(sampling, seed) for seed in seeds]
            with self._divided(self.vllm_model, sampling.temperature or 1.0):
                outputs = self.llm.generate(requests, parameters, use_tqdm=False, lora_request=adapter)
            return [self._completion(output.outputs[0], sampling) for output in outputs]
        except BaseException:  # KeyboardInterrupt too: else the next call would go on with these requests
            engine = self.llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        finally:
            self.sleep()

    def sleep(self) -> None:
        """Free the memory of keys and values for training. `generate` does it itself."""
        if not self.asleep:
            self.llm.sleep(level=1)  # drops the prefix cache; the adapter's buffers are moved to the host
            self.asleep = self.kv_bytes

    def wake(self) -> None:
        """Reclaim that memory. `generate` does it itself."""
        if self.asleep:
            torch.cuda.empty_cache()  # vLLM allocates from the driver, not from torch's cache
            self.llm.wake_up()
            self.asleep = 0

    def update_adapter(self) -> "LoRARequest | None":
        """Write the adapter as it is now into vLLM's buffers, with the engine awake. `generate` does it itself.

        Returns what vLLM needs to use it; None without an adapter, or if it is switched off. Raises ValueError for an
        adapter that vLLM cannot follow, RuntimeError if the engine is asleep, or if vLLM has lost the adapter or cannot
        drop the keys and values of earlier prompts.
        """
        if self.asleep:
            raise RuntimeError("the vllm engine is asleep and has no memory to write to: call wake() first")
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM still holds keys and values of earlier prompts, written with an older adapter")
        if self._slot is None:
            return None
        with inference(self.model):
            return self._slot.update(families.unwrap(self.model))

    def _addresses(self) -> list[int]:
        """Of the base weights: the captured graphs depend on them."""
        inner = families.unwrap(self.model)
        return [p.data_ptr() for name, p in inner.named_parameters() if "lora_" not in name]

    def _parameters(self, sampling: Sampling, seed: int) -> "SamplingParams":
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=sampling.max_tokens, min_tokens=sampling.min_tokens,
            temperature=1.0 if sampling.temperature else 0.0,  # the logits come divided by it
            top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty, seed=seed, stop_token_ids=list(sampling.stop_ids),
            stop=list(sampling.stop_strings), ignore_eos=True, logprobs=0, flat_logprobs=True,
            detokenize=bool(sampling.stop_strings), skip_special_tokens=False, include_stop_str_in_output=True,
        )  # fmt: skip

    def _completion(self, output: Any, sampling: Sampling) -> Completion:
        """Of one vllm.CompletionOutput."""
        flat = output.logprobs
        writer = Writer(sampling, self.tokenizer)
        writer.add(list(output.token_ids), [flat.logprobs[i] for i in flat.start_indices])
        if not writer.ended:  # vLLM saw a stop string that decoding the last tokens alone does not show
            writer.completion.reason = STOP_STRING if isinstance(output.stop_reason, str) else LENGTH
        return writer.completion


def why_not(model: "PreTrainedModel | PeftModel") -> str | None:
    """The reason why vLLM cannot be built on this model in this process, or None if it can."""
    why = families.why_not(model, "generation")
    if why is not None or swap.of(model) is not None:
        return why or "some of its layers wait on the host"
    inner = families.unwrap(model)
    dtypes = {p.dtype for name, p in inner.named_parameters() if "lora_" not in name and p.is_floating_point()}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"its base weights are in {names}, and vLLM computes in one 16-bit type"
    for variable in gpu.ALLOCATOR_VARIABLES:
        if "expandable_segments:True" in os.environ.get(variable, ""):
            return f"{variable} has expandable_segments:True, which vLLM's sleep cannot work with; unset it"
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return "several processes train it"
    if inner.device.type != "cuda" or inner.device.index not in (None, 0):
        return f"it lies on {inner.device}, and vLLM takes the first GPU that this process sees"
    return None


def warn_of_version(installed: str) -> None:
    """Warn if this version of vLLM is not among those tested."""
    if not TESTED[0] <= installed < TESTED[1]:
        warnings.warn(
            f"vllm {installed} is outside the tested range {TESTED[0]}.*: pip install -r requirements-vllm.txt",
            stacklevel=3,
        )


def sizes(
    config: "PreTrainedConfig", dtype: torch.dtype, rows: int, length: int | None, budget: int
) -> tuple[int, int]:
    """What vLLM's keys and values need.

    Args:
        config (`transformers.PreTrainedConfig`): The model's.
        dtype (`torch.dtype`): Of keys and values.
        rows (`int`): Texts that are written at the same time.
        length (`int`, *optional*): Tokens of the longest text; None: what the model and the budget can hold.
        budget (`int`): Bytes that they may take, at most.

    Returns (tokens of the longest text, bytes for keys and values). Raises MemoryError if one text does not fit in the
    budget, ValueError for a text longer than the model can be.
    """
    shape = families.architecture(config.to_dict())
    token = kv_bytes_per_token(shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, dtype.itemsize)
    affordable = budget // (token * BLOCK) - 1  # blocks; vLLM keeps one for itself
    if length is None:
        length = min(config.max_position_embeddings, affordable * BLOCK)
    if length > config.max_position_embeddings:
        raise ValueError(f"max_length={length}, and the model can be {config.max_position_embeddings} tokens long")
    text = ceil(length / BLOCK)  # blocks
    if length < 1 or affordable < text:
        raise MemoryError(
            f"one text of {max(length, 1)} tokens needs {max(text, 1) * BLOCK * token / GB:.2f} GB for keys and "
            f"values, and the budget is {budget / GB:.2f} GB: lower max_completion_length, or give kv_bytes more"
        )
    return length, (min(affordable, rows * text) + 1) * BLOCK * token


def settings(
    folder: str, dtype: torch.dtype, rows: int, length: int, kv_bytes: int, tokenizer: bool, eager: bool
) -> dict[str, Any]:
    """The arguments of vllm.LLM, without the adapter's.

    Args:
        folder (`str`): Of config.json and tokenizer (`write_folder`).
        dtype (`torch.dtype`): Of the model's 16-bit tensors, and of keys and values.
        rows (`int`): Texts that are written at the same time, at most.
        length (`int`): Tokens of the longest text.
        kv_bytes (`int`): What keys and values take.
        tokenizer (`bool`): Whether the folder has one.
        eager (`bool`): No CUDA graphs.
    """
    compilation: dict[str, Any] = {"mode": 0}
    if not eager:
        graphs = [size for size in BATCHES if size < rows] + [rows]
        compilation |= {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": graphs}
    return {
        "model": folder,
        "tokenizer": folder,
        "skip_tokenizer_init": not tokenizer,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": length,
        "max_num_seqs": rows,
        "max_num_batched_tokens": max(rows, min(PREFILL_TOKENS, rows * length)),
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": kv_bytes,
        "gpu_memory_utilization": 0.01,  # ignored when kv_cache_memory_bytes is set, but this share must be free
        "enable_sleep_mode": True,
        "enable_flashinfer_autotune": False,
        "logprobs_mode": "raw_logprobs",  # without penalty and filters, which the trainer's own do not know of
        "generation_config": "vllm",  # ignore the checkpoint's generation defaults
        "enforce_eager": eager,
        "compilation_config": compilation,
        "disable_log_stats": True,
        "seed": 0,
    }


def write_folder(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", folder: Path, method: str
) -> None:
    """Write what vLLM reads besides the weights: config.json and the tokenizer.

    Args:
        model (`transformers.PreTrainedModel`): Without peft's wrapper.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Its tokenizer.
        folder (`Path`): Where to.
        method (`str`): The name of vLLM's quantisation method.
    """
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.quantization_config = {"quant_method": method}
    config.head_dtype = "float32"  # logits, as in the training forward
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _start(model: "PreTrainedModel", arguments: dict[str, Any]) -> "LLM":
    """vllm.LLM(**arguments). The model class is registered first: else vLLM starts a process to inspect it."""
    import vllm

    name = type(model).__name__
    vllm.ModelRegistry.register_model(name, vllm.ModelRegistry.models[name].load_model_cls())
    return vllm.LLM(**arguments)


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """vLLM seeds all random generators and sets the precision of fp32 products; both are restored afterwards."""
    import numpy

    states = random.getstate(), numpy.random.get_state(), torch.get_float32_matmul_precision()
    try:
        with torch.random.fork_rng(devices=[0]):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_float32_matmul_precision(states[2])
