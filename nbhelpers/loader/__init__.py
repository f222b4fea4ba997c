"""One call from a preset, a hub id or a folder to a model that can be trained on this card.

    model, tokenizer = loader.load(presets.get("qwen2.5-1.5b"))

The model is built without memory, then its checkpoint is read tensor by tensor; each goes to the card and is quantised
there. The host holds one tensor at a time, the card what is loaded so far and one tensor. Weights are safetensors or
GGUF, and no code from a repository is ever run.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from nbhelpers import gpu, host, presets
from nbhelpers.architecture import GB
from nbhelpers.models import chat, families, patch, quantize
from nbhelpers.models.adapter import Base, attach, load_adapter, read_base, read_choice, refuse_other, save_adapter
from nbhelpers.models.quantize import Choice
from nbhelpers.presets import QUANTIZATIONS, Preset

from . import hub, stream
from .packed import keep

__all__ = ["keep", "load", "load_adapter", "save_adapter"]
CALIBRATION_TOKENS = 512
# what dynamic 4-bit is measured on when the caller has no prompts of its own
CALIBRATION = (
    "A shop sells pencils in boxes of 12. Ana buys 7 boxes and gives 19 pencils away. How many are left?",
    "Which is bigger, 9.11 or 9.9? Explain step by step.",
    "A train leaves at 9:40 and arrives at 13:05. It stops for 25 minutes on the way. How long does it move?",
    "Solve for x: 3(x - 4) + 5 = 2x + 11. Show your work.",
    "A rectangle is 3 cm longer than it is wide and has an area of 88 square centimetres. Find its perimeter.",
    "Tom reads 18 pages a day. After 6 days he has read three quarters of his book. How many pages has the book?",
    "If every bloop is a razzle and some razzles are lazzles, must some bloops be lazzles? Why or why not?",
    "The price of a coat rises by 20 % and then falls by 20 %. Is it cheaper or dearer than before, and by how much?",
    "Write the numbers from 1 to 20 that leave a remainder of 2 when divided by 3, and add them up.",
    "Using 3, 5, 8 and 10 once each with + - * /, make 24. Check your answer.",
    "Three friends share 84 euros in the ratio 2:3:7. How much does each of them get?",
    "What is the probability that two fair dice show a sum of at least 10? Give a fraction in lowest terms.",
)


def load(
    preset_or_id: Preset | str | Path,
    *,
    quantization: str | None = None,
    lora_rank: int | None = None,
    lora_alpha: int | None = None,
    lora_dropout: float | None = None,
    lora_targets: Iterable[str] | None = None,
    kernels: bool = True,
    calibration: "list | Choice | Path | None" = None,
    budget: float = 0.10,
    device: "torch.device | str | None" = None,
    dtype: torch.dtype | None = None,
    token: str | None = None,
    progress: bool = True,
):
    """(model, tokenizer), in eval mode, on `device` (the GPU if there is one).

    preset_or_id: a Preset, a preset's name, a hub id ("owner/model"), a folder, a GGUF file or any part of a split one,
        or a folder that `save_adapter` or `keep` wrote.
    quantization: "nf4", "dynamic" (NF4 with the worst layers in 16 bits, see `quantize`) or "none"; None is the
        preset's, "nf4" without a preset. A checkpoint that bitsandbytes quantised loads as it is.
    lora_*: the adapter; None is the preset's (rank 16, alpha 16, no dropout, all linear layers without a preset).
        Its numbers are fp32. lora_rank=0 with quantization="none" trains every weight instead, in fp32 unless `dtype`
        says otherwise: in bf16 a step of 1e-5 is rounded away, and fp16 has no gradient scaling.
    kernels: the fused kernels of `patch`.
    calibration: for "dynamic": prompts (texts or lists of messages) to measure with, or a Choice or the Path of
        its file to repeat. None: a dozen built-in word problems.
    budget: for "dynamic": extra bytes as a share of the model's size in NF4.
    dtype: to compute in; None is bfloat16 where the card has it, float16 below, float32 on a CPU.
    token: of the hub, for a model whose licence has to be accepted.

    Host memory above the start stays under 1.5 times the largest shard (it is the largest tensor), the card's peak
    under the final size and the largest tensor.

    Raises ValueError, FileNotFoundError, PermissionError or ConnectionError for a model that cannot be had (see
    `hub.find`) and host.CannotRun for a card that is too small, before any weight is downloaded.
    """
    start = time.perf_counter()
    adapter = None
    if isinstance(preset_or_id, (str, Path)) and (Path(preset_or_id) / "base.json").exists():
        adapter = Path(preset_or_id)
        base, lora = read_base(adapter), json.loads((adapter / "adapter_config.json").read_text())
        preset_or_id, quantization = base.id, quantization or base.quantization
        calibration = calibration or read_choice(adapter)
        lora_rank, lora_alpha, lora_targets = lora["r"], lora["lora_alpha"], sorted(lora["target_modules"])
    if isinstance(preset_or_id, str) and preset_or_id in presets.names():
        preset_or_id = presets.get(preset_or_id)
    preset = preset_or_id if isinstance(preset_or_id, Preset) else None
    quantization = _first(quantization, preset and preset.quantization, "nf4")
    lora_rank = _first(lora_rank, preset and preset.lora_rank, 16)
    lora_alpha = _first(lora_alpha, preset and preset.lora_alpha) or lora_rank
    lora_dropout = _first(lora_dropout, preset and preset.lora_dropout, 0.0)
    lora_targets = tuple(_first(lora_targets, preset and preset.lora_targets, ()))
    _check_arguments(quantization, lora_rank, lora_dropout)
    choice = None
    if quantization == "dynamic" and isinstance(calibration, (Choice, Path)):
        choice = calibration if isinstance(calibration, Choice) else Choice.load(calibration)

    source = hub.find(preset_or_id, token)
    if adapter:
        refuse_other(adapter, source.id, source.config_hash())
    if source.prequantized():
        if quantization == "none" or choice:
            raise ValueError(f"{source.id} is in 4 bits already and loads as it is: leave quantization and choice out")
        quantization = "nf4"
    device = torch.device(device) if device else gpu.device()
    weight_dtype = _first(dtype, torch.float32 if lora_rank == 0 else None, _compute_dtype(device))
    dtype = _first(dtype, _compute_dtype(device))
    if quantization != "none":
        host.require("bitsandbytes")
    _check_room(source, quantization, device, weight_dtype)
    tokenizer = source.tokenizer()

    shards = source.weights()
    small = shards.nbytes < 100e6  # there in a moment: no bar
    model = stream.build(source, weight_dtype)
    if quantization != "none":
        stream.swap_linears(model, shards, dtype, choice)
    with tqdm(total=shards.nbytes, unit="B", unit_scale=True, desc=source.id, disable=not progress or small) as bar:
        stream.fill(model, shards, device, weight_dtype, dtype, bar.update)
    if quantization == "dynamic" and choice is None:
        tokens = calibration_tokens(tokenizer, calibration)
        choice = quantize.choose(model, [tokens], budget, weights=lambda name: shards.read(f"{name}.weight").to(device))
        stream.keep_in_16_bits(model, choice, shards, device, dtype)
    shards.release()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the matrices that passed through in 16 bits
    _describe(model, source, tokenizer, quantization != "none")
    model.nbhelpers_base = Base(source.id, source.config_hash(), shards.fingerprint(), quantization)
    model.nbhelpers_choice = choice
    if lora_rank:
        model = attach(model, lora_rank, lora_alpha, lora_dropout, lora_targets)
        if adapter:
            load_adapter(model, adapter)
    else:
        model.requires_grad_(True)
    if kernels:
        swapped = patch.with_kernels(model)
        if device.type == "cuda":  # on a CPU they are the same functions in plain torch: nothing to report
            print(swapped)
    every, trainable = quantize.parameters(model)
    print(
        f"{source.id} · {quantization} · {every / 1e6:,.1f} M parameters, {trainable / 1e6:,.1f} M trainable "
        f"({100 * trainable / every:.2f} %) · {quantize.nbytes(model) / GB:.3f} GB on {device} · "
        f"{time.perf_counter() - start:.1f} s"
    )
    return model, tokenizer


def calibration_tokens(tokenizer, prompts: list | None = None) -> torch.Tensor:
    """LongTensor [1, at most 512] of prompts (texts or lists of messages) one after another, as training sees them."""
    if isinstance(prompts, str):
        raise ValueError("calibration is a list of prompts, a Choice, or the Path of its file; this is one string")
    ids = []
    for prompt in prompts or CALIBRATION:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids += chat.prompt_ids(tokenizer, messages)
    return torch.tensor([ids[:CALIBRATION_TOKENS]])


def _first(*values):
    return next((value for value in values if value is not None), None)


def _compute_dtype(device: torch.device) -> torch.dtype:
    return gpu.compute_dtype() if device.type == "cuda" else torch.float32


def _check_arguments(quantization: str, lora_rank: int, lora_dropout: float) -> None:
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization={quantization!r}: it is one of {', '.join(QUANTIZATIONS)}")
    if lora_rank < 0 or not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_rank={lora_rank}, lora_dropout={lora_dropout}: a rank is 0 or more, a dropout below 1")
    if lora_rank == 0 and quantization != "none":
        raise ValueError(
            f"lora_rank=0 trains every weight, and weights in 4 bits ({quantization}) cannot be trained: pass "
            'quantization="none" too, or a rank'
        )


def _check_room(source: hub.Source, quantization: str, device: torch.device, weight_dtype: torch.dtype) -> None:
    """CannotRun if the card has not the room to load it, from the config alone; on a CPU a warning that it is slow."""
    try:
        architecture = families.architecture(source.config)
    except (ValueError, KeyError):  # an architecture that nobody counted: the card will say
        return
    width = weight_dtype.itemsize
    if device.type != "cuda":
        if quantization != "none" and architecture.parameters() > 100e6:
            host.warn_slow(f"{source.id} in 4 bits")
        return
    card, free = gpu.card(device.index or 0), gpu.free_bytes(device.index or 0)
    needed = architecture.weight_bytes(quantization, width) + architecture.largest_tensor_bytes()
    if needed > free:
        raise host.CannotRun(
            f"{source.id} needs {needed / GB:.1f} GB to load as {quantization} and the {card.name} has "
            f"{free / GB:.1f} GB free of {card.total / GB:.1f}: {(needed - free) / GB:.1f} GB too little. "
            f"Restart the kernel if it holds another model; these fit: {', '.join(presets.that_fit(free / GB))}"
        )


def _describe(model: nn.Module, source: hub.Source, tokenizer, four_bits: bool) -> None:
    """What transformers' from_pretrained would have set besides the weights."""
    from transformers.utils.quantization_config import QuantizationMethod

    model.generation_config = source.generation_config() or model.generation_config
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    if four_bits:  # what peft looks at to choose its 4-bit layer, and Trainer before it moves a model
        model.is_loaded_in_4bit = True
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
