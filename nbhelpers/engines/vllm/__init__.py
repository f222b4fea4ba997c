"""vLLM in this process, on the very tensors that are being trained: Ampere and newer.

    vLLM's model    built on the training model's storage, NF4 with its statistics included  (vllm_model.py)
    the adapter     written into vLLM's own LoRA buffers before each generation              (vllm_lora.py)
    keys, values    asleep between two generations: their memory is training's until the next

Decoding runs in vLLM's CUDA graphs without torch.compile, which takes a minute or more; what it would gain has not been
measured here. Draws differ from the other engines' at the same seed, and min-p comes before top-k and top-p.
"""

import copy
import os
import random
import tempfile
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from math import ceil
from pathlib import Path

import torch
from torch import nn

from nbhelpers import gpu, host
from nbhelpers.architecture import GB
from nbhelpers.memory.kv import kv_bytes_per_token
from nbhelpers.memory.room import Room, vllm_kv_budget
from nbhelpers.models import families

from ..base import LENGTH, STOP_STRING, Completion, Engine, Sampling, Writer, check, inference
from ..cuda_graphs import BATCHES

TESTED = ("0.26", "0.27")  # from, up to but not including
BLOCK = 16  # tokens that vLLM gives memory to at once
PREFILL_TOKENS = 2048  # computed at once: more would be little faster, and its activations are memory
ENVIRONMENT = {  # read by vLLM when it is imported; what the user has set stays
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # another process could not share the weights
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it cannot tell the log-probabilities, and compiles for a minute
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLMEngine(Engine):
    """See the top of this file. One a process: pass it on, as in `evaluate.ask(..., engine=trainer.engine)`.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): Qwen2, Llama, Mistral or Phi3 on GPU 0. From then on
            its base weights must stay where they are; the adapter's are read anew in each generation.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Needed for stop strings alone.
        max_rows (`int`): Rows that are written at the same time, at most.
        max_length (`int`, *optional*): Tokens of the longest prompt with its completion; None for what the model and
            the memory for keys and values can hold. It cannot grow later.
        kv_bytes (`int`, *optional*): What keys and values may take; by default what the rows need, at most a share of
            what is free now.
        budget_gb (`float`, *optional*): What torch may allocate in this process in all, GB (10^9 bytes).
        eager (`bool`): No CUDA graphs: slow, and starts sooner.

    Raises host.CannotRun without vLLM or with a GPU below Ampere, ValueError for a model that it cannot follow,
    MemoryError if not even one text fits, RuntimeError for a second engine.
    """

    name = "vllm"
    made = False  # in this process: vLLM's sleeping memory pool serves one engine

    def __init__(
        self, model: nn.Module, tokenizer=None, *, max_rows: int = 128, max_length: int | None = None,
        kv_bytes: int | None = None, budget_gb: float | None = None, eager: bool = False,
    ):  # fmt: skip
        host.require("vllm")
        if (why := cannot(model)) is not None:
            raise ValueError(f'engine="vllm" cannot decode this model: {why}. Use engine="graph" or "hf"')
        if VLLMEngine.made:
            raise RuntimeError("this process has its vllm engine already: pass that one on (engine=trainer.engine)")
        warn_of_version(version("vllm"))
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
            raise ValueError("VLLM_ENABLE_V1_MULTIPROCESSING=1 puts vLLM into another process: unset it")
        gpu.grow_blocks(False)
        from . import lora, model

        self.model, self.tokenizer = model, tokenizer
        inner = families.unwrap(model)
        budget = kv_bytes if kv_bytes is not None else vllm_kv_budget(Room(model.device, budget_gb).free())
        self.max_length, self.kv_bytes = sizes(inner.config, inner.dtype, max_rows, max_length, budget)
        adapter = lora.settings(lora.adapted(inner))
        with tempfile.TemporaryDirectory() as folder, model.built_on(inner), _as_it_was():
            write_folder(inner, tokenizer, Path(folder), model.NAME)
            self.llm = _start(
                inner,
                settings(folder, inner.dtype, max_rows, self.max_length, self.kv_bytes, tokenizer is not None, eager)
                | {"load_format": model.NAME, **adapter},
            )
        VLLMEngine.made = True
        worker = self.llm.llm_engine.model_executor.driver_worker.worker
        self.vllm_model = worker.model_runner.model
        self._slot = lora.Slot(worker.model_runner.lora_manager) if adapter else None
        self._places = self._addresses()
        self.sleep()

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """See `Engine.generate`. ValueError too for texts longer than `max_length`, RuntimeError if a base weight has
        moved since the engine was made."""
        check(prompts, sampling, self.model.config.max_position_embeddings, self.tokenizer)
        seeds = sampling.seeds(len(prompts) * sampling.num_generations)
        if not prompts:
            return []
        if (longest := max(map(len, prompts)) + sampling.max_tokens) > self.max_length:
            raise ValueError(
                f"a text may get {longest} tokens long and this engine was made for {self.max_length}: restart the "
                f"kernel and make it with max_length={longest}"
            )
        if self._addresses() != self._places:
            raise RuntimeError(
                "base weights of the model have moved since the vllm engine was made: restart the kernel"
            )
        self.wake()
        try:
            request = self._update()
            rows = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(sampling.num_generations)]
            draws = [self._parameters(sampling, seed) for seed in seeds]
            outputs = self.llm.generate(rows, draws, use_tqdm=False, lora_request=request)
            return [self._completion(output.outputs[0], sampling) for output in outputs]
        except BaseException:  # the stop button too: else the next call would wait for what was being written
            engine = self.llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        finally:
            self.sleep()

    def sleep(self) -> None:
        """Give the memory of keys and values to training. `generate` does it by itself."""
        if not self.asleep:
            self.llm.sleep(level=1)  # what was kept of earlier prompts is gone; the adapter's buffers go to the host
            self.asleep = self.kv_bytes

    def wake(self) -> None:
        """Take it again: what torch has cached goes back to the driver first."""
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up()
            self.asleep = 0

    def _update(self):
        """Write the adapter as it is now; vLLM's request for it, or None."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM still holds keys and values of earlier prompts, written with an older adapter")
        if self._slot is None:
            return None
        with inference(self.model):
            return self._slot.update(families.unwrap(self.model))

    def _addresses(self) -> list[int]:
        """Where the base weights lie: the captured graphs have taken it for granted."""
        inner = families.unwrap(self.model)
        return [p.data_ptr() for name, p in inner.named_parameters() if "lora_" not in name]

    def _parameters(self, sampling: Sampling, seed: int):
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=sampling.max_tokens, min_tokens=sampling.min_tokens, temperature=sampling.temperature,
            top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty, seed=seed, stop_token_ids=list(sampling.stop_ids),
            stop=list(sampling.stop_strings), ignore_eos=True, logprobs=0, flat_logprobs=True,
            detokenize=bool(sampling.stop_strings), skip_special_tokens=False, include_stop_str_in_output=True,
        )  # fmt: skip

    def _completion(self, output, sampling: Sampling) -> Completion:
        flat = output.logprobs
        writer = Writer(sampling, self.tokenizer)
        writer.add(list(output.token_ids), [flat.logprobs[i] for i in flat.start_indices])
        if not writer.ended:  # vLLM found a stop string where decoding the last tokens alone shows none
            writer.completion.reason = STOP_STRING if isinstance(output.stop_reason, str) else LENGTH
        return writer.completion


def cannot(model: nn.Module) -> str | None:
    """Why vLLM cannot be built on this model here, or None: it can."""
    if (why := families.why_not(model, "generation")) is not None:
        return why
    found = {
        p.dtype
        for name, p in families.unwrap(model).named_parameters()
        if "lora_" not in name and p.is_floating_point()
    }
    if len(found) > 1 or not found <= {torch.bfloat16, torch.float16}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        return f"its base weights are in {names}, and vLLM computes in one 16-bit type"
    for variable in gpu.ALLOCATOR_VARIABLES:
        if "expandable_segments:True" in os.environ.get(variable, ""):
            return f"{variable} has expandable_segments:True, which vLLM's sleep cannot work with; unset it"
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return "several processes train it"
    if model.device.type != "cuda" or model.device.index not in (None, 0):
        return f"it lies on {model.device}, and vLLM takes the first GPU that this process sees"
    return None


def warn_of_version(installed: str) -> None:
    if not TESTED[0] <= installed < TESTED[1]:
        warnings.warn(
            f"vllm {installed} is outside the tested range {TESTED[0]}.*: pip install -r requirements-vllm.txt",
            stacklevel=3,
        )


def sizes(config, dtype: torch.dtype, rows: int, length: int | None, budget: int) -> tuple[int, int]:
    """What vLLM's keys and values need.

    Args:
        config (`transformers.PretrainedConfig`): The model's.
        dtype (`torch.dtype`): Of keys and values.
        rows (`int`): Texts that are written at the same time.
        length (`int`, *optional*): Tokens of the longest text; None: what the model and the budget can hold.
        budget (`int`): Bytes that they may take, at most.

    Returns (tokens of the longest text, bytes for keys and values). Raises MemoryError if one text does not fit in the
    budget, ValueError for a text longer than the model can be.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = kv_bytes_per_token(config.num_hidden_layers, config.num_key_value_heads, head, dtype.itemsize)
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
) -> dict:
    """The arguments of vllm.LLM, but for the adapter's."""
    compilation: dict = {"mode": 0}
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
        "gpu_memory_utilization": 0.01,  # of no account beside kv_cache_memory_bytes, but it must be free
        "enable_sleep_mode": True,
        "enable_flashinfer_autotune": False,
        "logprobs_mode": "processed_logprobs",  # of the distribution that was drawn from
        "generation_config": "vllm",  # nobody's defaults
        "enforce_eager": eager,
        "compilation_config": compilation,
        "disable_log_stats": True,
        "seed": 0,
    }


def write_folder(model: nn.Module, tokenizer, folder: Path, method: str) -> None:
    """What vLLM reads of a model besides its weights: config.json and the tokenizer. No weights are written."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.quantization_config = {"quant_method": method}
    config.head_dtype = "float32"  # logits, as in the training forward
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _start(model: nn.Module, arguments: dict):
    """vllm.LLM(**arguments). Its model class is shown to it first: else it starts a process to look at it."""
    import vllm

    name = type(model).__name__
    vllm.ModelRegistry.register_model(name, vllm.ModelRegistry.models[name].load_model_cls())
    return vllm.LLM(**arguments)


@contextmanager
def _as_it_was():
    """vLLM seeds all generators and sets the precision of fp32 products; afterwards they are as they were."""
    import numpy

    states = random.getstate(), numpy.random.get_state(), torch.get_float32_matmul_precision()
    try:
        with torch.random.fork_rng(devices=[0]):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_float32_matmul_precision(states[2])
