"""LoRA matrices of many layers, stacked layer by layer: for a text that goes through all of them without a gradient.

Each of the functions that take `adapters` stacks for itself where it is given none.
"""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.cuda import device_of

from . import _for
from .reference import Projection, Stacked


def by_layer(
    layers: Sequence[Sequence[Sequence[Projection]]], like: Tensor
) -> Callable[[int], Sequence[Stacked]] | None:
    """The stacked matrices of the layer with a given number, made in one launch.

    Args:
        layers (`Sequence`): Of each layer the groups, of each group the projections that read the same x, or none.
        like (`Tensor`): Of the device and dtype of what the layers read.

    Returns a function of the layer's number that gives `adapters` for each of its groups, valid until it is called
    again. New numbers in the same matrices are seen. None where there is nothing to gain.
    """
    with device_of(like):
        of = _for(like).layer_adapters(layers, like.dtype)
    if of is None:
        return None
    own = like[:0].clone()  # on the same device; `like` itself is not kept

    def stacked(layer: int) -> Sequence[Stacked]:
        with device_of(own):
            return of(layer)

    return stacked
