"""A decoder walked by hand, forward and backward, layer by layer: what is kept, and where, is decided here.

transformers' own forward leaves the backward to autograd, which keeps what it likes. Here each layer is a small
autograd graph of its own, made and consumed within the walk; between them flow plain tensors [1, T, H]:

    attention half   a = attention(norm(x))                  over the packed sequences of packing.Packed
    MLP half         y = s + mlp(norm(s)),  s = x + a        token by token, so in tiles if need be

In the backward of a layer that is computed again the MLP half goes first, tile by tile: its last product is not
computed (only its gradient is wanted), and the gradient of s is written over a. Then attention's half follows with the
MLP's memory free again.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from nbhelpers import kernels
from nbhelpers.models import families, patch, projection

from .offload import Checkpoints
from .packed_attention import attend
from .packing import Packed, take


@dataclass(frozen=True)
class Layers:
    """The states of the layers in one walk: the last `saved` save all, the `on_device` before them their input."""

    saved: int
    on_device: int
    tile: int


class LayerwiseDecoder:
    """The parts of one model in the order in which a token passes them. Puts the fused kernels on it, if they are not.

    model: a transformers causal LM, or peft's wrapper around one, for which `families.why_not` finds nothing.
    backend: of attention, see packed_attention.py; autocast: a function that gives the context to compute in.
    """

    def __init__(self, model: nn.Module, backend: str, autocast):
        patch.with_kernels(model)
        self.embed, self.rotary, self.layers, self.norm, self.head = families.skeleton(model)
        self.backend, self.autocast = backend, autocast
        self.device = self.embed.weight.device
        self.store = Checkpoints(self.device)

    # ------------------------------------------------------------------------------------------ halves of a layer

    def _attention(self, layer, x: Tensor, packed: Packed, cos_sin) -> Tensor:
        first, last = layer.self_attn.groups()
        qkv = projection.linears(x, *first, norm=layer.input_layernorm, packed=True)
        q, k, v = layer.self_attn.rotated(qkv, *cos_sin)
        out = attend(q, k, v, packed, layer.self_attn.scaling, self.backend)
        return projection.linears(out, *last)[0]

    def _mlp(self, layer, a: Tensor, x: Tensor, value: bool = True) -> Tensor:
        return layer.mlp(a, x, layer.post_attention_layernorm, value)

    def _forward(self, layer, x, packed, cos_sin, tile) -> Tensor:
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

    def _backward(self, layer, x, packed, cos_sin, tile, gradient: list[Tensor]) -> Tensor:
        """The gradient of x; `gradient` holds that of the layer's output and is emptied, to free it early."""
        x = x.detach().requires_grad_()
        with torch.enable_grad(), self._arithmetic():
            a = self._attention(layer, x, packed, cos_sin)
        edge, ds = get_gradient_edge(a), a.detach()
        del a
        dy = gradient.pop()
        for start in range(0, x.shape[1], tile):
            span = slice(start, start + tile)
            part = ds[:, span].detach().requires_grad_()
            with torch.enable_grad(), self._arithmetic():
                y = self._mlp(layer, part, x[:, span].detach(), value=False)
            self._differentiate(y, dy[:, span].to(y.dtype))
            ds[:, span] = part.grad  # a of these tokens was read for the last time
            del y, part
        del dy
        self._differentiate(edge, ds)
        return x.grad.add_(ds)

    # --------------------------------------------------------------------------------------------- the whole walk

    def start(self, packed: Packed) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Embedded tokens [1, T, H], with a gradient if the embedding learns, and (cos, sin) of their positions."""
        x = self.embed(packed.ids)
        with torch.no_grad():
            return x, self.rotary(x, packed.positions)

    def logps(self, x: Tensor, packed: Packed, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [S] fp32 of the scored tokens, from the last layer's output [1, T, H]."""
        scored = take(x.flatten(0, 1), packed.source)
        bias, state = self.head.bias, None
        if type(self.head) is not nn.Linear:
            state = self.head.weight.quant_state
        return kernels.linear_logprob(
            self.norm(scored), self.head.weight, packed.target, quant_state=state, bias=bias, temperature=temperature,
            entropy=True,
        )  # fmt: skip

    @torch.no_grad()
    def score(self, packed: Packed, temperature: float, tile: int) -> tuple[Tensor, Tensor]:
        """`logps` of packed tokens, nothing kept."""
        with self._arithmetic():
            x, cos_sin = self.start(packed)
            for layer in self.layers:
                x = self._forward(layer, x, packed, cos_sin, tile)
            return self.logps(x, packed, temperature)

    def differentiate(self, packed: Packed, temperature: float, layers: Layers, objective, backward) -> None:
        """One micro-batch forward and backward; gradients are added to the parameters' `.grad`.

        objective: (logps, entropies) -> scalar; backward: what is called with it, such as accelerator.backward.
        """
        try:
            self._differentiate_layers(packed, temperature, layers, objective, backward)
        finally:
            self.store.clear()

    def _differentiate_layers(self, packed, temperature, layers, objective, backward):
        store, last = self.store, len(self.layers) - 1
        first_saved = len(self.layers) - layers.saved
        first_on_device = first_saved - layers.on_device
        learns = self.embed.weight.requires_grad
        with torch.set_grad_enabled(learns), self._arithmetic():
            embedded, cos_sin = self.start(packed)
        x, root = embedded.detach(), get_gradient_edge(embedded) if learns else None
        del embedded
        graphs: list[tuple[Tensor, Tensor]] = []
        for number, layer in enumerate(self.layers):
            if number >= first_saved:
                leaf = x.detach().requires_grad_()
                with torch.enable_grad(), self._arithmetic():
                    y = self._mlp(layer, self._attention(layer, leaf, packed, cos_sin), leaf)
                graphs.append((leaf, y))
                x = y.detach()
                del leaf, y
            else:
                store.put(number, x, host=number < first_on_device)
                with torch.no_grad(), self._arithmetic():
                    x = self._forward(layer, x, packed, cos_sin, layers.tile)
        store.flush()

        leaf = x.requires_grad_()
        del x
        with torch.enable_grad(), self._arithmetic():
            value = objective(*self.logps(leaf, packed, temperature))
        with _plain(self.device):
            backward(value)
        gradient = [leaf.grad]
        del leaf, value
        for number in range(last, -1, -1):
            if number >= first_saved:
                leaf, y = graphs.pop()
                self._differentiate(y, gradient.pop().to(y.dtype))
                gradient.append(leaf.grad)
                del leaf, y
            else:
                store.prefetch(number)
                store.prefetch(number - 1)
                x = store.take(number)
                gradient.append(self._backward(self.layers[number], x, packed, cos_sin, layers.tile, gradient))
                del x
        if root is not None:
            self._differentiate(root, gradient.pop())

    def _differentiate(self, root, gradient: Tensor) -> None:
        with _plain(self.device):
            torch.autograd.backward(root, gradient)

    @contextmanager
    def _arithmetic(self):
        """The trainer's autocast without its cache: a weight cast without a gradient would serve those who need one."""
        kind = self.device.type
        with self.autocast():
            on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            with torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False):
                yield


def _plain(device):
    """Backward runs in the types that forward chose."""
    return torch.autocast(device.type, enabled=False)
