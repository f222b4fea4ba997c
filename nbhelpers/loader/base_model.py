"""From a request to the base model on its device: find it, check that it fits, stream it in, quantise, calibrate."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from nbhelpers import gpu, host, memory
from nbhelpers.architecture import GB
from nbhelpers.kernels import ahead
from nbhelpers.models import chat, families, quantize, swap
from nbhelpers.models.adapter import Base, keep_base, refuse_other, rows_of
from nbhelpers.presets import Preset

from . import calibration, hub, stream
from .request import Request
from .shards import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SMALL = 100e6  # bytes of a checkpoint that is read in a moment: no progress bar


def build(
    request: Request, *, token: str | None = None, progress: bool = True
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model without an adapter, frozen, in eval mode, on the request's device; and its tokenizer.

    Raises as `load` does, before any weight is downloaded.
    """
    source = hub.locate(request.model, token)
    request = _accepted(request, source)
    swapped = layers_to_swap(request, source)
    check_room(source, request.quantization, request.device, request.weight_dtype, swapped)
    ahead.begin(request.device)  # while weights are read
    source.model_config()  # names a config without sense, over which loading the tokenizer would stumble
    tokenizer = source.tokenizer()
    if request.adapter is not None and (request.adapter / TOKENIZER_CONFIG_FILE).exists():
        tokenizer = chat.load_tokenizer(request.adapter)  # with the words and the template that it was trained with
    shards = source.weights()
    model = stream.empty_model(source, request.weight_dtype)
    refuse_unknown_tokens(tokenizer, model)
    if request.quantization != "none":
        stream.swap_linears(model, shards, request.dtype, request.choice)
    silent = not progress or shards.nbytes < SMALL
    with tqdm(total=shards.nbytes, unit="B", unit_scale=True, desc=source.id, disable=silent) as bar:
        stream.fill(model, shards, request.device, request.weight_dtype, request.dtype, bar.update, swapped)
    if swapped:
        waiting = swap.attach(model, swapped, request.device).host_bytes / GB
        print(f"{swapped} of {model.config.num_hidden_layers} layers wait in host memory, {waiting:.2f} GB")
    choice = request.choice
    if request.quantization == "dynamic" and choice is None:
        choice = _choose(model, shards, tokenizer, request)
        stream.keep_in_16_bits(model, choice, shards, request.device, request.dtype)
    shards.release()
    if request.device.type == "cuda":
        torch.cuda.empty_cache()  # torch caches the memory of the 16-bit matrices that were quantised
    _describe(model, source, tokenizer, request.quantization != "none")
    base = Base(source.id, source.config_hash(), shards.fingerprint(), request.quantization, rows_of(model))
    keep_base(model, base, choice)
    return model, tokenizer


def _accepted(request: Request, source: hub.Source) -> Request:
    """The request as this checkpoint allows it: one that is in 4 bits already loads as it is.

    Raises ValueError if that contradicts the request or the adapter is another base's, host.CannotRun if bitsandbytes
    or memory is missing.
    """
    if request.adapter is not None:
        refuse_other(request.adapter, source.id, source.config_hash())
    if source.prequantized():
        if request.quantization == "none" or request.choice:
            raise ValueError(f"{source.id} is in 4 bits already and loads as it is: leave quantization and choice out")
        request = replace(request, quantization="nf4")
    if request.quantization != "none":
        host.require("bitsandbytes")
    return request


def layers_to_swap(request: Request, source: hub.Source) -> int:
    """How many layers have to wait on the host for the run to stay within `request.budget_gb`.

    Raises host.CannotRun if even all of them are too few, ValueError for a model whose bytes cannot be counted and for
    one whose layers are still to be measured.
    """
    if request.budget_gb is None:
        return 0
    preset = request.model
    if not isinstance(preset, Preset):
        preset = Preset(source.id, source.id, source.id, families.architecture(source.config))
    in_16_bits = not request.lora_rank and request.quantization == "none" and request.weight_dtype.itemsize == 2
    plan = memory.plan(preset, request.budget_gb, quantization=request.quantization, lora_rank=request.lora_rank,
                       train="all" if in_16_bits else None, swap=True)  # fmt: skip
    if not plan.fits:
        raise host.CannotRun(f"budget_gb={request.budget_gb:g} is too little for {source.id}, even with its layers in "
                             f"host memory: {plan.verdict()[0]}")  # fmt: skip
    if plan.setting.swapped and request.quantization == "dynamic" and request.choice is None:
        raise ValueError(f"within budget_gb={request.budget_gb:g} layers have to wait on the host, where dynamic 4-bit "
                         'cannot measure them: take quantization="nf4", or give calibration= a Choice')  # fmt: skip
    return plan.setting.swapped


def refuse_unknown_tokens(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Look for tokens that the embedding has no row for.

    Raises ValueError for one that ordinary text could be cut into. Special ones, which Gemma 3 has for images that its
    small models do not see, are said in a line.
    """
    rows = rows_of(model)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    named = ", ".join(repr(token) for _, token in sorted(beyond.items())[:3])
    if beyond.keys() - special:
        raise ValueError(
            f"{model.name_or_path}: its tokenizer has {len(beyond)} tokens more than its embedding has rows ({rows}), "
            f"the first are {named}. Take the tokenizer that belongs to the weights, or save the model after "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    if beyond:
        print(f"the embedding has no row for {named}: a text with it cannot be read")


def check_room(
    source: hub.Source, quantization: str, device: torch.device, weight_dtype: torch.dtype, swapped: int = 0
) -> None:
    """Compare what the config says the model needs with what is free; on a CPU only warn that 4 bits are slow there.

    Args:
        source (`Source`): Only its config is read.
        quantization (`str`): "nf4", "dynamic" or "none".
        device (`torch.device`): Where the model is to be.
        weight_dtype (`torch.dtype`): Of what is not quantised.
        swapped (`int`): Layers that wait on the host.

    Raises host.CannotRun if the card has too little free memory.
    """
    try:
        architecture = families.architecture(source.config)
    except (
        ValueError,
        KeyError,
        TypeError,
        ArithmeticError,
    ):  # an architecture whose bytes cannot be counted: loading is tried
        return
    if device.type != "cuda":
        if quantization != "none" and architecture.parameters() > 100e6:
            host.warn_slow(f"{source.id} in 4 bits")
        return
    index = device.index or 0
    card, free = gpu.cards()[index], gpu.free_bytes(index)
    needed = architecture.weight_bytes(quantization, weight_dtype.itemsize) + architecture.largest_tensor_bytes()
    needed -= memory.freed_bytes(architecture, quantization, swapped)
    if needed > free:
        raise host.CannotRun(
            f"{source.id} needs {needed / GB:.1f} GB to load as {quantization} and the {card.name} has "
            f"{free / GB:.1f} GB free of {card.total / GB:.1f}: {(needed - free) / GB:.1f} GB too little. "
            f"Restart the kernel if it holds another model; these fit: {', '.join(memory.that_fit(free / GB))}"
        )


def _choose(
    model: "PreTrainedModel", shards: Shards, tokenizer: "PreTrainedTokenizerBase", request: Request
) -> quantize.Choice:
    """Measure the model in NF4 against its 16-bit matrices, which are read from disk one at a time."""

    def weight(name: str) -> torch.Tensor:
        return shards.read(f"{name}.weight").to(request.device)

    return quantize.choose(model, [calibration.token_ids(tokenizer, request.prompts)], request.budget, weights=weight)


def _describe(
    model: "PreTrainedModel", source: hub.Source, tokenizer: "PreTrainedTokenizerBase", four_bits: bool
) -> None:
    """Set what transformers' from_pretrained would have set besides the weights."""
    from transformers.utils.quantization_config import QuantizationMethod

    model.generation_config = source.generation_config() or model.generation_config
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    ends = chat.end_ids(model, tokenizer)
    if (end := chat.end_of_turn(tokenizer, ends)) is not None:
        model.generation_config.eos_token_id = [*ends, end]
        print(f"{tokenizer.decode(end)} ends a turn in the chat template and was no end token of the model: it is now.")
    if four_bits:  # what peft looks at to choose its 4-bit layer, and Trainer before it moves a model
        model.__dict__.update(is_loaded_in_4bit=True, quantization_method=QuantizationMethod.BITS_AND_BYTES)
