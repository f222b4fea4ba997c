"""A decoder run layer by layer, forward and backward: what is saved for the backward, and where, is decided here.

transformers' forward leaves it to autograd what is saved. Here each layer is an autograd graph of its own, built and
freed within one micro-batch; between the layers there are plain tensors [1, T, H]:

    attention half   a = attention(norm(x))                  over the packed sequences of packing.Packed
    MLP half         y = s + mlp(norm(s)),  s = x + a        per token, so in tiles of tokens where memory is short

The backward of a layer that is recomputed starts with the MLP half, tile by tile: its last product is skipped (only
its gradient is needed), and the gradient of s is written over a. The attention half follows once the MLP's memory is
free again. What it draws at random, LoRA's dropout say, is what the forward drew: the layer starts from the same state
of the random generators and computes in the same order.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nbhelpers import kernels
from nbhelpers.kernels.taken import take
from nbhelpers.models import families, patch, projection, swap

from .offload import Checkpoints
from .packed_attention import attend
from .packing import Packed


@dataclass(frozen=True)
class Layers:
    """What each layer of the decoder saves for the backward of one micro-batch; memory.MicroBatch plans it."""

    saved: int  # the last so many layers save everything
    on_device: int  # the so many before them save their input on the device, the others theirs on the host
    tile: int  # tokens of the MLP half that are computed at a time


CosSin = tuple[Tensor, Tensor]  # of the rotary embedding at each token's position, [1, T, D] each


class LayerwiseDecoder:
    """Forward and backward of one model. Puts the fused kernels on it if they are not there yet.

    Args:
        model (`nn.Module`): A transformers causal LM, or peft's wrapper around one, for which `families.why_not` finds
            nothing.
        backend (`str`): Of attention, see packed_attention.py.
        autocast (`Callable[[], AbstractContextManager]`): Gives the context to compute in, as accelerator.autocast.
    """

    def __init__(self, model: nn.Module, backend: str, autocast: Callable[[], AbstractContextManager]):
        patch.with_kernels(model)
        modules = families.skeleton(model)
        self.embed, self.rotary, self.layers, self.norm = modules[:4]
        self.head: Any = modules.head  # nn.Linear, or one of bitsandbytes', whose weight has a quant_state
        self.backend, self.autocast = backend, autocast
        self.embedding: Tensor = next(self.embed.parameters())
        self.device = self.embedding.device
        self.store, self.swapped = Checkpoints(self.device), swap.of(model)
        self.value_head: nn.Module | None = None  # from hidden states fp32 [S, H] to [S, 1], PPO's
        self.values: Tensor | None = None  # what it gave to the newest scored tokens, fp32 [S]

    # ------------------------------------------------------------------------------------------ halves of a layer
    # A layer is Any here: nn.Module does not know what models/patch.py gave it.

    def _attention(self, layer: Any, x: Tensor, packed: Packed, cos_sin: CosSin) -> Tensor:
        first, last = layer.self_attn.groups()
        qkv = projection.linears(x, *first, norm=layer.input_layernorm, packed=True)
        q, k, v = layer.self_attn.rotated(qkv, *cos_sin)
        out = attend(q, k, v, packed, layer.self_attn.scaling, self.backend)
        return projection.linears(out, *last)[0]

    def _mlp(self, layer: Any, a: Tensor, x: Tensor, value: bool = True) -> Tensor:
        return layer.mlp(a, x, layer.post_attention_layernorm, value)

    def _forward(self, layer: Any, x: Tensor, packed: Packed, cos_sin: CosSin, tile: int) -> Tensor:
        """The layer's output without gradients; x is left as it is."""
        a = self._attention(layer, x, packed, cos_sin)
        tokens = a.shape[1]
        if tokens <= tile:
            return self._mlp(layer, a, x)
        y = torch.empty_like(x)
        for start in range(0, tokens, tile):
            span = slice(start, start + tile)
            y[:, span] = self._mlp(layer, a[:, span], x[:, span])
        return y

    def _backward(
        self, layer: Any, x: Tensor, packed: Packed, cos_sin: CosSin, tile: int, gradient: list[Tensor]
    ) -> Tensor:
        """The gradient of x; `gradient` holds that of the layer's output and is emptied, to free it early."""
        x = x.detach().requires_grad_()
        with torch.enable_grad(), self._arithmetic():
            a = self._attention(layer, x, packed, cos_sin)
        edge, ds = get_gradient_edge(a), a.detach()
        del a
        dy = gradient.pop()
        for start in range(0, x.shape[1], tile):
            span = slice(start, start + tile)
            a_tile = ds[:, span].detach().requires_grad_()
            with torch.enable_grad(), self._arithmetic():
                y = self._mlp(layer, a_tile, x[:, span].detach(), value=False)
            self._differentiate(y, dy[:, span].to(y.dtype))
            ds[:, span] = _gradient_of(a_tile)  # a of these tokens is not needed any more
            del y, a_tile
        del dy
        self._differentiate(edge, ds)
        return _gradient_of(x).add_(ds)

    # ------------------------------------------------------------------------------------------ the whole decoder

    def start(self, packed: Packed) -> tuple[Tensor, CosSin]:
        """Embedded tokens [1, T, H], with a gradient if the embedding is trained, and (cos, sin) of their positions."""
        x = self.embed(packed.ids)
        with torch.no_grad():
            return x, self.rotary(x, packed.positions)

    def logps(self, x: Tensor, packed: Packed, temperature: float, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [S] fp32 of the scored tokens, from the last layer's output [1, T, H]."""
        scored = take(x.flatten(0, 1), packed.source)
        normed, bias, state = self.norm(scored), self.head.bias, None
        if self.value_head is not None:
            with _plain(self.device):
                self.values = self.value_head(normed.float()).squeeze(-1)
        if type(self.head) is not nn.Linear:
            state = self.head.weight.quant_state
        return kernels.linear_logprob(
            normed, self.head.weight, packed.target, quant_state=state, bias=bias, temperature=temperature,
            entropy=True, entropy_grad=entropy_grad,
        )  # fmt: skip

    @torch.no_grad()
    def score(self, packed: Packed, temperature: float, tile: int) -> tuple[Tensor, Tensor]:
        """`logps` of packed tokens, without gradients; nothing is saved."""
        with self._arithmetic():
            x, cos_sin = self.start(packed)
            for number, layer in enumerate(self.layers):
                self._need(number, number + 1)
                x = self._forward(layer, x, packed, cos_sin, tile)
            return self.logps(x, packed, temperature)

    def differentiate(
        self,
        packed: Packed,
        temperature: float,
        layers: Layers,
        objective: Callable[[Tensor, Tensor], Tensor],
        backward: Callable[[Tensor], Any],
        entropy_grad: bool = False,
    ) -> None:
        """One micro-batch forward and backward; gradients are added to the parameters' `.grad`.

        Args:
            packed (`Packed`): The micro-batch, on this decoder's device.
            temperature (`float`): Of the distribution that was sampled from.
            layers (`Layers`): What each layer saves.
            objective (`Callable`): (logps [S] fp32, entropies [S] fp32) -> scalar with a gradient.
            backward (`Callable`): Called with that scalar, e.g. accelerator.backward.
            entropy_grad (`bool`): The entropies have a gradient too.
        """
        try:
            self._differentiate_layers(packed, temperature, layers, objective, backward, entropy_grad)
        finally:
            self.store.clear()

    def _differentiate_layers(
        self,
        packed: Packed,
        temperature: float,
        layers: Layers,
        objective: Callable[[Tensor, Tensor], Tensor],
        backward: Callable[[Tensor], Any],
        entropy_grad: bool,
    ) -> None:
        store, last = self.store, len(self.layers) - 1
        first_saved = len(self.layers) - layers.saved
        first_on_device = first_saved - layers.on_device
        trained = self.embedding.requires_grad
        with torch.set_grad_enabled(trained), self._arithmetic():
            embedded, cos_sin = self.start(packed)
        x, root = embedded.detach(), get_gradient_edge(embedded) if trained else None
        del embedded
        graphs: list[tuple[Tensor, Tensor]] = []
        random: list[list[Tensor]] = []  # states of the generators before each layer that is computed again
        for number, layer in enumerate(self.layers):
            self._need(number, number + 1)
            if number >= first_saved:
                leaf = x.detach().requires_grad_()
                with torch.enable_grad(), self._arithmetic():
                    y = self._mlp(layer, self._attention(layer, leaf, packed, cos_sin), leaf)
                graphs.append((leaf, y))
                x = y.detach()
                del leaf, y
            else:
                store.put(number, x, host=number < first_on_device)
                random.append(_random_state(self.device))
                with torch.no_grad(), self._arithmetic():
                    x = self._forward(layer, x, packed, cos_sin, layers.tile)
        store.flush()

        leaf = x.requires_grad_()
        del x
        with torch.enable_grad(), self._arithmetic():
            value = objective(*self.logps(leaf, packed, temperature, entropy_grad))
        with _plain(self.device):
            backward(value)
        gradient = [_gradient_of(leaf)]  # a list, so that who takes it out can free it
        del leaf, value
        for number in range(last, -1, -1):
            self._need(number, number - 1)
            if number >= first_saved:
                leaf, y = graphs.pop()
                self._differentiate(y, gradient.pop().to(y.dtype))
                gradient.append(_gradient_of(leaf))
                del leaf, y
            else:
                store.prefetch(number)
                store.prefetch(number - 1)
                x = store.take(number)
                with _random_from(random.pop(), self.device):
                    gradient.append(self._backward(self.layers[number], x, packed, cos_sin, layers.tile, gradient))
                del x
        if root is not None:
            self._differentiate(root, gradient.pop())

    def _need(self, number: int, then: int) -> None:
        """The layer's weights are on the device, and those of the next one on their way."""
        if self.swapped is not None:
            self.swapped.need(number, then)

    def _differentiate(self, root: Tensor | GradientEdge, gradient: Tensor) -> None:
        with _plain(self.device):
            torch.autograd.backward(root, gradient)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The trainer's autocast without its cache: a weight cast under no_grad would be used where a gradient is
        needed."""
        kind = self.device.type
        with self.autocast():
            on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            with torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False):
                yield


def _gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None  # it has been differentiated
    return leaf.grad


def _random_state(device: torch.device) -> list[Tensor]:
    """The states of the generators that a layer on this device draws from."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


@contextmanager
def _random_from(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """What is drawn within is drawn from these states of the generators, and what comes after it as if it were not."""
    before = _random_state(device)
    try:
        _set_random_state(states, device)
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)


def _plain(device: torch.device) -> AbstractContextManager:
    """No autocast: the backward runs in the dtypes that the forward chose."""
    return torch.autocast(device.type, enabled=False)
