"""Block swap: frozen layers that wait in pinned host memory, and are copied to the card one layer ahead of their use.

    swap.attach(model, 10)                   # the large matrices of the first ten decoder layers leave the card
    swapped = swap.of(model)                 # None for a model without
    for number, layer in enumerate(layers):
        swapped.need(number, number + 1)     # layer's matrices are there; the next ones' copy begins beside its work

The card keeps two places, each for one layer. A layer always uses the same place, so the addresses of its matrices
never change, but what stands there does: who reads a swapped matrix calls `need`, or `bring`, before. A module that is
called as one, by transformers' own forward, does so by a hook, without gradients only: its backward would find another
layer there. On a CPU the places are ordinary memory and the results the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import families

KEY = "nbhelpers_swap"  # on the model: a Swapped; on a swapped parameter: (Swapped, its layer)
PLACES = 2  # layers that stand on the card: the one that is computed, and the next one
ALIGNED = 512  # bytes: where a matrix begins in its place


def large(layer: nn.Module) -> list[Tensor]:
    """The matrices of a decoder layer that are swapped: those of its linear layers, quantised or not, all frozen."""
    return [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]


class Swapped:
    """The first layers of a decoder, whose matrices wait on the host.

    Args:
        layers (`Sequence[nn.Module]`): Those that are swapped, without an adapter yet; their matrices may be on the
            host already.
        device (`torch.device`): Where they are computed.

    Raises ValueError for a matrix that is trained.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device):
        self.device, self.count = device, len(layers)
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.moved = 0  # bytes that were copied to the card so far
        matrices = [large(layer) for layer in layers]
        if any(parameter.requires_grad for each in matrices for parameter in each):
            raise ValueError("a layer whose weights are trained cannot wait on the host: train an adapter, or load the "
                             "model without budget_gb")  # fmt: skip
        sizes = [sum(_aligned(parameter.nbytes) for parameter in each) for each in matrices]
        pinned = self.copies is not None
        self.places = [
            torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(min(PLACES, self.count))
        ]
        self.holds: list[int | None] = [None] * len(self.places)  # the layer that stands in each
        self.arrived: list[torch.cuda.Event | None] = [None] * len(self.places)
        self.host: list[Tensor] = []
        for number, (each, size) in enumerate(zip(matrices, sizes, strict=True)):
            waiting, place, start = torch.empty(size, dtype=torch.uint8, pin_memory=pinned), self._place(number), 0
            for parameter in each:
                data = parameter.data.contiguous()
                span = slice(start, start + data.nbytes)
                waiting[span].copy_(data.view(-1).view(torch.uint8))
                parameter.data = self.places[place][span].view(data.dtype).view(data.shape)
                vars(parameter)[KEY] = (self, number)
                start += _aligned(data.nbytes)
            self.host.append(waiting)

    @property
    def host_bytes(self) -> int:
        """Bytes that wait on the host."""
        return sum(waiting.nbytes for waiting in self.host)

    def need(self, number: int, then: int | None = None) -> None:
        """Layer `number` is computed next, and after it layer `then`: what is enqueued from now on finds its matrices.

        Args:
            number (`int`): Of a decoder layer; one that is not swapped is there anyway.
            then (`int`, *optional*): Its copy begins now, unless it would have to take the place of `number`.
        """
        mine = self._place(number) if number < self.count else None
        if mine is not None:
            if self.holds[mine] != number:
                self._copy(number)
            if (event := self.arrived[mine]) is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
        if then is None or not 0 <= then < self.count or (place := self._place(then)) == mine:
            return
        if self.holds[place] != then:
            self._copy(then)

    def _place(self, number: int) -> int:
        return number % len(self.places)

    def _copy(self, number: int) -> None:
        place, waiting = self._place(number), self.host[number]
        target = self.places[place][: len(waiting)]
        self.holds[place] = None  # until it is done: Ctrl-C may fall in between, and the model is used again
        if self.copies is None:
            target.copy_(waiting)
        else:
            self.copies.wait_stream(torch.cuda.current_stream(self.device))  # who used the place is enqueued there
            with torch.cuda.stream(self.copies):
                target.copy_(waiting, non_blocking=True)
                self.arrived[place] = self.copies.record_event()
        self.holds[place], self.moved = number, self.moved + len(waiting)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


def attach(model: nn.Module, count: int, device: torch.device) -> Swapped:
    """The first `count` layers of a model without an adapter wait on the host from now on."""
    inner: Any = families.unwrap(model)
    layers = list(inner.model.layers)[:count]
    swapped = Swapped(layers, device)
    vars(inner)[KEY] = swapped
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(_before(swapped, number))
    return swapped


def _before(swapped: Swapped, number: int) -> Any:
    def hook(*_: Any) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(f"the first {swapped.count} layers wait on the host, and only the lean step can train "
                               "such a model: leave lean=False out, or call it within torch.no_grad()")  # fmt: skip
        swapped.need(number, number + 1)

    return hook


def of(model: nn.Module) -> Swapped | None:
    """What of this model, in peft's wrapper or not, waits on the host; None: nothing."""
    return vars(families.unwrap(model)).get(KEY)


def waits(parameter: Tensor) -> bool:
    """Whether the parameter's numbers wait on the host: where it points to, another layer's may be, or none yet."""
    return KEY in vars(parameter)


def bring(parameter: Tensor) -> None:
    """The parameter's numbers are where it points to, until another layer is needed."""
    if (mine := vars(parameter).get(KEY)) is not None:
        swapped, number = mine
        swapped.need(number)
