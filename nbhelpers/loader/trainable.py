"""What a base model gets before it is handed out: an adapter, or every weight to train; the fused kernels; a line."""

import time
from typing import TYPE_CHECKING, cast

from nbhelpers.architecture import GB
from nbhelpers.models import patch, quantize
from nbhelpers.models.adapter import attach, base_of, load_adapter

from .request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dress(
    model: "PreTrainedModel", request: Request, *, kernels: bool = True, started: float = 0.0
) -> "PreTrainedModel":
    """The model, ready to train, and a line printed about it.

    Args:
        model (`PreTrainedModel`): A base model as `base_model.build` makes it.
        request (`Request`): A saved adapter or a new one, or lora_rank 0 to train every weight.
        kernels (`bool`): Whether to put on the fused kernels of `patch`.
        started (`float`): `time.perf_counter()` when loading began, for the seconds in the line.

    Raises ValueError for a target that the model does not have, or a saved adapter that is another base's.
    """
    base = base_of(model)
    assert base is not None  # `build` keeps it on the model
    # a PeftModel passes on to the model all that it lacks itself
    if request.adapter is not None:
        model = cast("PreTrainedModel", load_adapter(model, request.adapter, request.lora_dropout))
    elif request.lora_rank:
        dropout = request.lora_dropout or 0.0
        adapted = attach(model, request.lora_rank, request.lora_alpha, dropout, request.lora_targets)
        model = cast("PreTrainedModel", adapted)
    else:
        model.requires_grad_(True)
    if kernels:
        swapped = patch.with_kernels(model)
        if request.device.type == "cuda":  # on a CPU they are the same functions in plain torch: nothing to report
            print(swapped)
    every, trainable = quantize.parameters(model)
    print(
        f"{base.id} · {base.quantization} · {every / 1e6:,.1f} M parameters, {trainable / 1e6:,.1f} M trainable "
        f"({100 * trainable / every:.2f} %) · {quantize.nbytes(model) / GB:.3f} GB on {request.device} · "
        f"{time.perf_counter() - started:.1f} s"
    )
    return model
