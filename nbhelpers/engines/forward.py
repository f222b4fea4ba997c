"""The training model's own modules, walked layer by layer, of every family that models/families.py knows.

    x = embed(tokens)                                        [B, S, H]
    for each layer:
        q, k, v = linear(norm(x))                            [B, heads, S, D]
        x = x + linear(attend(q, k, v))                      attend is the caller's: it rotates, and owns the cache
        x = x + down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))                                   fp32 [..., V]

Nothing is copied: the 4-bit weights with their scales, LoRA's A and B, norms, embedding and head are the tensors that
training reads and writes. An adapter that is switched off leaves its term out.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers import kernels
from nbhelpers.kernels import HeadNorms, Projection, Stacked, decode_step
from nbhelpers.kernels.adapters import by_layer
from nbhelpers.models import families, swap
from nbhelpers.models.projection import projection, watched


class LinearGroup(NamedTuple):
    """Linear layers that read the same input: as tensors for the kernels, or as modules to call if one is not plain."""

    modules: tuple[nn.Module, ...]
    parts: tuple[Projection, ...] | None

    @classmethod
    def of(cls, *modules: nn.Module) -> "LinearGroup":
        """Of these modules, as they are now."""
        parts = [_part(module) for module in modules]
        plain = tuple(part for part in parts if not isinstance(part, str))
        return cls(modules, plain if len(plain) == len(parts) else None)

    def __call__(self, x: Tensor, adapters: Stacked | None = None) -> tuple[Tensor, ...]:
        """x [B, S, in] -> [B, S, out] of each, or all side by side in one; adapters: its own, stacked."""
        if self.parts is None:
            return tuple(module(x).to(x.dtype) for module in self.modules)
        if x.shape[-2] == 1:  # one token per row: a step of decoding; more: a prompt
            return decode_step.decode_linear(x, self.parts)
        y = kernels.lora_linear_group(x, self.parts, None, True, adapters)
        return y if isinstance(y, tuple) else (y,)

    def form(self) -> tuple:
        """What the kernels compiled for it depend on: the same for another layer of the same form."""
        if self.parts is None:
            return tuple(map(id, self.modules))
        return tuple(map(_form, self.parts))

    def addresses(self) -> tuple:
        """What a captured graph depends on."""
        if self.parts is None:
            return tuple(map(id, self.modules))
        tensors = [(p.weight, p.bias, p.lora_a, p.lora_b) for p in self.parts]
        return tuple(None if t is None else t.data_ptr() for four in tensors for t in four) + tuple(
            part.scale for part in self.parts
        )


def _form(part: Projection) -> tuple:
    """Dtypes and shapes of a layer's tensors."""
    state, tensors = part.quant_state, (part.weight, part.bias, part.lora_a, part.lora_b)
    packed = None if state is None else (tuple(state.shape), state.blocksize, state.nested)
    return (packed, *(None if t is None else (t.dtype, tuple(t.shape)) for t in tensors))


def _part(module: nn.Module) -> Projection | str:
    """`projection.projection`, which also takes a plain layer whose own weight is trained: nothing needs a gradient."""
    if type(module) is nn.Linear and module.weight.requires_grad and not watched(module):
        return Projection(module.weight.detach(), None, None if module.bias is None else module.bias.detach())
    return projection(module)


class Layer(NamedTuple):
    """A decoder layer's linear layers as groups, and what else it computes with."""

    norm: Any  # an RMSNorm, whose class is the family's own
    qkv: LinearGroup
    out: LinearGroup
    mlp_norm: Any
    gate_up: LinearGroup
    down: LinearGroup
    window: int | None  # positions that a token looks back to, itself included; None: all
    head_norms: HeadNorms | None
    key_bias: Tensor | None  # [kv heads * D], of keys that no norm comes behind

    @classmethod
    def of(cls, modules: families.Layer) -> "Layer":
        """Of these modules, as they are now."""
        return cls(
            norm=modules.norm,
            qkv=LinearGroup.of(*modules.qkv),
            out=LinearGroup.of(modules.out),
            mlp_norm=modules.mlp_norm,
            gate_up=LinearGroup.of(*modules.gate_up),
            down=LinearGroup.of(modules.down),
            window=modules.window,
            head_norms=families.head_norms(modules.head_norms),
            key_bias=None if modules.head_norms or len(modules.qkv) == 1 else getattr(modules.qkv[1], "bias", None),
        )

    def groups(self) -> tuple[LinearGroup, ...]:
        """In the order in which they are computed."""
        return self.qkv, self.out, self.gate_up, self.down

    def form(self) -> tuple:
        """The same for two layers for which the same kernels are compiled."""
        return (*(group.form() for group in self.groups()), self.window, self.head_norms is None)


class Decoder:
    """A view of one model; make a new one (milliseconds) when adapters may have been attached, disabled or merged.

    Call it within `base.inference(model)`: LoRA's dropout is off then, and no autocast recasts the weights.

    Args:
        model (`nn.Module`): A model for which `families.why_not(model, "generation")` is None.

    Raises ValueError for a model of no family, and for a hook that would not be called.
    """

    def __init__(self, model: nn.Module):
        family, config = families.of(model), families.unwrap(model).config
        if family is None:
            raise ValueError(f"no family is known for {type(families.unwrap(model)).__name__}")
        if (why := families.missed_hook(model, "generation")) is not None:  # set since the engine was made
            raise ValueError(f'the graph engine cannot decode this model: {why}. Use engine="hf"')
        # Any: a type checker cannot know the attributes of transformers' modules
        skeleton: Any = families.skeleton(model)
        self.rotary: Any = skeleton.rotary
        self.watched_rotary: bool = watched(skeleton.rotary)  # then it is called in each step
        self.norm: Any = skeleton.norm
        self.embedding: Tensor = skeleton.embedding.weight  # [V, H]
        self.layers = [Layer.of(families.layer(family, layer)) for layer in skeleton.layers]
        self.head = LinearGroup.of(skeleton.head)
        attention = skeleton.layers[0].self_attn
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.dim: int = attention.head_dim
        self.scale: float = attention.scaling
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        # of one token's activations at their largest, in the MLP: gate and up, and four hidden states
        self.token_bytes: int = self.dtype.itemsize * (2 * config.intermediate_size + 4 * config.hidden_size)
        self.vocabulary: int = self.embedding.shape[0]
        # of a step: gate's and up's product comes in up to four parts, or in more where it is wide (Phi-4's 128 rows)
        self.logits_are_largest: bool = self.vocabulary >= 4 * 2 * config.intermediate_size
        self.swapped = swap.of(model)
        self.adapters: Callable[[int], Sequence[Stacked]] | None = None  # made for the first prompt
        # whether a step has to be launched kernel by kernel: a replayed CUDA graph calls no hook, and waits for no copy
        self.eager: bool = families.hooked(model, "generation") or self.swapped is not None

    def of_each_form(self) -> "Decoder":
        """This decoder with one layer of each form, for which the kernels of all of them are compiled."""
        short = copy(self)
        short.layers, short.adapters = list({layer.form(): layer for layer in self.layers}.values()), None
        return short

    def addresses(self) -> tuple:
        """Changes when a graph captured before is no longer this model: other tensors, another adapter or scale."""
        norms = [norm.weight.data_ptr() for layer in self.layers for norm in (layer.norm, layer.mlp_norm)]
        groups = [group for layer in self.layers for group in layer.groups()]
        norms += [self.norm.weight.data_ptr(), self.embedding.data_ptr()]
        heads = [layer.head_norms for layer in self.layers if layer.head_norms]
        norms += [weight.data_ptr() for each in heads for weight in (each.q, each.k)]
        return (*norms, *(g.addresses() for g in [*groups, self.head]))

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """The normed hidden states of the last layer, [B, S, H].

        Args:
            tokens (`Tensor`): int64 [B, S].
            positions (`Tensor`): int64 [1 or B, S].
            attend (`Callable`): attend(i, layer, q, k, v, (cos, sin)) gets layer i, its q [B, heads, S, D], its k and v
                [B, kv heads, S, D] and the tables [1 or B, S, R] to rotate q and k with, behind the layer's norms of
                heads if it has them; it returns [B, S, heads * D].
        """
        x = F.embedding(tokens, self.embedding)
        return self.walk(x, self.rotary(x, positions), attend)

    def walk(self, x: Tensor, tables: tuple[Tensor, Tensor], attend: Callable[..., Tensor]) -> Tensor:
        """`hidden` of embeddings x [B, S, H], rotated by the tables (cos, sin), each [1 or B, S, R]."""
        norms = [*(layer.norm for layer in self.layers), self.norm]
        y, step, dtype = kernels.rms_norm(x, *_of(norms[0])), x.shape[1] == 1, x.dtype
        if not step and self.adapters is None:
            self.adapters = by_layer([[group.parts or () for group in layer.groups()] for layer in self.layers], x)
        adapters: Sequence[Stacked | None] = (None,) * 4
        for i, layer in enumerate(self.layers):
            if self.swapped is not None:
                self.swapped.need(i, (i + 1) % len(self.layers))
            if not step and self.adapters is not None:
                adapters = self.adapters(i)
            qkv, out, *mlp = adapters
            # what is not read again is gone at once: in a prompt larger tensors would then find no block of memory free
            outputs = layer.qkv(y.to(dtype), qkv)  # fp32 behind a norm in fp32, as training keeps it with autocast
            del y
            y = attend(i, layer, *self._heads(outputs), tables)
            del outputs
            if step and layer.out.parts is not None:
                x, y = decode_step.decode_out(y, layer.out.parts[0], x, _of(layer.mlp_norm))
            else:
                (y,) = layer.out(y, out)
                x, y = kernels.rms_norm(y, *_of(layer.mlp_norm), x)
            y = y.to(dtype)
            if step and layer.gate_up.parts is not None and layer.down.parts is not None:
                x, y = decode_step.decode_mlp(y, layer.gate_up.parts, layer.down.parts[0], x, _of(norms[i + 1]))
            else:
                x = _mlp(layer, y, x, *mlp)
                y = kernels.rms_norm(x, *_of(norms[i + 1]))
        return y.to(dtype)

    def _heads(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """q, k, v [B, heads, S, D] of the three projections, or of Phi3's one, as views."""
        if len(outputs) == 1:
            heads = outputs[0].unflatten(-1, (-1, self.dim)).transpose(1, 2)
            return heads.split_with_sizes((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return tuple(y.unflatten(-1, (-1, self.dim)).transpose(1, 2) for y in outputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, H] -> fp32 [B, V]; on a GPU never rounded to 16 bits, unless the head is not plain."""
        parts = self.head.parts
        if parts is not None and hidden.dtype != torch.float32:
            head = parts[0]
            plain = head.quant_state is None and head.lora_a is None and head.bias is None
            if plain and head.weight.dtype == hidden.dtype:
                return decode_step.decode_head(hidden, head.weight)
        return self.head(hidden[:, None])[0][:, 0].float()


def _of(norm: Any) -> tuple[Tensor, float]:
    """An RMSNorm's weight and eps."""
    return norm.weight, norm.variance_epsilon


def _mlp(layer: Layer, x: Tensor, residual: Tensor, wide: Stacked | None, narrow: Stacked | None) -> Tensor:
    """The second half of a layer; wide, narrow: the stacked adapters of gate_up and of down."""
    if layer.gate_up.parts is not None and layer.down.parts is not None:
        stacked = None if wide is None or narrow is None else (wide, narrow)
        return kernels.lora_mlp(x, layer.gate_up.parts, layer.down.parts[0], residual, adapters=stacked)
    outputs = layer.gate_up(x, wide)
    (y,) = layer.down(kernels.swiglu(*outputs) if len(outputs) == 2 else kernels.swiglu_packed(*outputs), narrow)
    return residual + y
