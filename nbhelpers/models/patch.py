"""Put the fused kernels on one model instance, and take them off again.

    report = with_kernels(model)     # Qwen2, Llama, Mistral, Phi3 of transformers; with or without peft and 4-bit
    print(report)
    report.undo()

Each decoder layer, attention, MLP and RMSNorm of the instance gets a subclass of its own class, with another forward;
the module objects, their names, parameters and hooks stay, so saving, loading, peft's switches, gradient checkpointing
and generation work as before, and other models of the same class are untouched. Undo gives the old class back.

Every forward looks again at what each linear layer is: plain or 4-bit, with LoRA, with LoRA disabled or merged. Where
the kernels cannot serve it as it stands (LoRA dropout while training, DoRA, several adapters at once, hooks, ...) that
module's own forward runs, and the report names it.

In fp16 the residual stream saturates at 65504 and the MLP's product may reach 1e6 (`kernels.lora_mlp`), where stock
transformers overflow to infinity.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from nbhelpers import kernels
from nbhelpers.architecture import Family

from . import families
from .projection import DROPOUT, compute_dtype, foldable, linears, projection, projections, watched

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

# --------------------------------------------------------------------------- the four modules of a decoder layer


class _Fused(nn.Module):
    """What every swapped module has. The other attributes named in the classes below are those of the stock classes."""

    stock: ClassVar[type[nn.Module]]  # the module's class before the swap
    family: ClassVar[Family]


class _RMSNorm(_Fused):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (sum, y) when a residual is given."""
        return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon, residual)


def _called(norm: nn.Module) -> bool:
    """Whether a norm must be called as a module: it is watched, or one that peft wraps."""
    return watched(norm) or not isinstance(norm, _RMSNorm)


def _add_and_norm(x: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + residual, and the norm of it; in one launch unless the norm has to be called as it is."""
    if _called(norm):
        x = x + residual
        return x, norm(x)
    return norm(x, residual)


class _MLP(_Fused):
    config: "PreTrainedConfig"

    def groups(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
        """The linear layers in two groups; those of a group read the same input."""
        return families.named(self, self.family.gate_up), families.named(self, (self.family.down,))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None, value: bool = True
    ) -> Tensor:
        """mlp(x), plus the residual if one is given; with a norm s + mlp(norm(s)) for s = x + residual.

        Args:
            x (`Tensor`): [..., H].
            residual (`Tensor`, *optional*): [..., H].
            norm (`nn.Module`, *optional*): An RMSNorm; with it goes a residual.
            value (`bool`): False where only the backward is wanted, see `kernels.lora_mlp`.
        """
        first, last = self.groups()
        silu = families.has_silu(self)
        parts = projections((*first, *last)) if silu else None
        folded = None
        if norm is not None:
            folded = foldable(norm, x, first) if parts is not None else None
            if folded is None:
                assert residual is not None  # for the type checker
                residual, x = _add_and_norm(x, residual, norm)
        if parts is not None:
            x = x if folded is not None else x.to(compute_dtype(x, first))
            y = kernels.lora_mlp(x, parts[:-1], parts[-1], residual, folded, value)
            return y if residual is not None or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
        if silu:
            wide = linears(x, *first)
            (y,) = linears(kernels.swiglu(*wide) if len(wide) == 2 else kernels.swiglu_packed(*wide), *last)
        else:
            y = super().forward(x)
        return y if residual is None else residual + y


class _Attention(_Fused):
    config: "PreTrainedConfig"
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float

    def groups(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
        """The linear layers in two groups; those of a group read the same input."""
        return families.named(self, self.family.qkv), families.named(self, (self.family.out,))

    def rotated(self, outputs: Sequence[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V [B, heads, S, D], Q and K rotated and, where the family has norms over the heads, normed.

        Args:
            outputs (`Sequence[Tensor]`): Of the first group: three [B, S, heads D], or one with the three side by side.
            cos (`Tensor`): As for `kernels.rope`.
            sin (`Tensor`): As for `kernels.rope`.
        """
        norms = families.named(self, self.family.head_norms)
        if any(_called(norm) for norm in norms):
            q, k, v = self._heads(outputs)
            q_norm, k_norm = norms
            return *kernels.rope(q_norm(q).to(q.dtype), k_norm(k).to(k.dtype), cos, sin), v
        weights = families.head_norms(norms)
        if len(outputs) == 1:
            counts = self.config.num_attention_heads, self.config.num_key_value_heads
            return kernels.rope_packed(outputs[0], cos, sin, *counts, weights)
        q, k, v = self._heads(outputs)
        return *kernels.rope(q, k, cos, sin, weights), v

    def _heads(self, outputs: Sequence[Tensor]) -> Iterable[Tensor]:
        """Q, K and V [B, heads, S, D] as views, before the rotation; `outputs` as for `rotated`."""
        if len(outputs) == 1:
            q_heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
            outputs = outputs[0].split([self.head_dim * n for n in (q_heads, kv_heads, kv_heads)], dim=-1)
        return (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in outputs)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: "Cache | None" = None,
        norm: nn.Module | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock forward; with a norm, of norm(hidden_states)."""
        first, last = self.groups()
        q, k, v = self.rotated(linears(hidden_states, *first, norm=norm, packed=True), *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        stock: Any = sys.modules[self.stock.__module__]
        attention = stock.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, stock.eager_attention_forward
        )
        window = families.window(self.family, self)
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "sliding_window": window}
        out, weights = attention(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        (out,) = linears(out.reshape(*hidden_states.shape[:-1], -1), *last)
        return out, weights


class _Layer(_Fused):
    """Each half is handed its norm, to fold it; a half that is watched gets and returns what the stock one does."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return self._mlp_half(self._attend(hidden_states, attention_mask, **kwargs), hidden_states)

    def _attend(self, x: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        if watched(self.self_attn):
            return self.self_attn(hidden_states=self.input_layernorm(x), attention_mask=attention_mask, **kwargs)[0]
        return self.self_attn(hidden_states=x, attention_mask=attention_mask, norm=self.input_layernorm, **kwargs)[0]

    def _mlp_half(self, attended: Tensor, residual: Tensor) -> Tensor:
        if watched(self.mlp):
            residual, normed = _add_and_norm(attended, residual, self.post_attention_layernorm)
            return residual + self.mlp(normed)
        return self.mlp(attended, residual, self.post_attention_layernorm)


class _DropoutLayer(_Layer):
    """With dropout on what each half adds to the residual stream."""

    resid_attn_dropout: nn.Dropout
    resid_mlp_dropout: nn.Dropout

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        attended = self.resid_attn_dropout(self._attend(hidden_states, attention_mask, **kwargs))
        if self.training and self.resid_mlp_dropout.p > 0:
            residual, normed = _add_and_norm(attended, hidden_states, self.post_attention_layernorm)
            return residual + self.resid_mlp_dropout(self.mlp(normed))
        return self._mlp_half(attended, hidden_states)


_ROLES: dict[str, type[_Fused]] = {"RMSNorm": _RMSNorm, "MLP": _MLP, "Attention": _Attention, "DecoderLayer": _Layer}


@cache
def _fused(stock: type) -> type | None:
    """The subclass of a transformers class that has our forward; None for a class that the kernels do not serve."""
    for family in families.FAMILIES.values():
        name = family.model_type
        role = stock.__name__.removeprefix(family.prefix)
        if stock.__module__ == f"transformers.models.{name}.modeling_{name}" and role in _ROLES:
            forward = _DropoutLayer if role == "DecoderLayer" and family.residual_dropout else _ROLES[role]
            # under its old name: wrapping policies (FSDP, device maps) and error messages look layers up by name
            return type(stock.__name__, (forward, stock), {"__module__": __name__, "stock": stock, "family": family})
    return None


# ------------------------------------------------------------------------------------------- swap and undo


@dataclass
class Report:
    """What `with_kernels` did: `print(report)` to read it, `report.undo()` to take the kernels off again."""

    model: str
    modules: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)  # swapped, and their stock classes
    linears: int = 0  # linear layers that run in the kernels
    left: Counter[tuple[str, str]] = field(default_factory=Counter)  # (name, why) -> how many run their own forward

    def undo(self) -> None:
        """Every swapped module gets its own class back; outputs are bit-identical to those before the swap."""
        for module, stock in self.modules:
            module.__class__ = stock
        self.modules.clear()

    def __str__(self) -> str:
        if self.modules:
            kinds = Counter(stock.__name__ for _, stock in self.modules)
            swapped = ", ".join(f"{count} {name}" for name, count in kinds.items())
            lines = [f"{self.model}: kernels in {swapped}; {self.linears} linear layers"]
        else:
            lines = [f"{self.model}: no kernels"]
        lines += [f"  left alone: {count} {name}: {why}" for (name, why), count in self.left.items()]
        return "\n".join(lines)


def with_kernels(model: nn.Module) -> Report:
    """Run this model's layers on the fused kernels, in place; a model of another architecture is left alone.

    Args:
        model (`nn.Module`): A transformers model, or peft's wrapper around one.

    Returns what was swapped and which layers run their own forward at the time of the call. Linear layers are looked at
    again in each forward, so adapters may be attached, disabled or merged afterwards.
    """
    report = Report(type(families.unwrap(model)).__name__)
    for module in model.modules():
        stock: type = type(module)
        if isinstance(module, _Fused):
            report.left[stock.__name__, "already on the kernels"] += 1
        elif (fused := _fused(stock)) is not None:
            module.__class__ = fused
            report.modules.append((module, stock))
    if not report.modules and not report.left:
        known = ", ".join(family.prefix for family in families.FAMILIES.values())
        report.left[report.model, f"not an architecture that the kernels know ({known})"] += 1
    for module, _ in report.modules:
        if isinstance(module, _MLP) and not families.has_silu(module):
            report.left[type(module).__name__, "its activation is not silu"] += 1
        elif isinstance(module, (_MLP, _Attention)):
            for group in module.groups():
                _count(module, group, report)
    return report


def _count(parent: nn.Module, group: tuple[nn.Module, ...], report: Report) -> None:
    """Enter a group of linear layers in the report: they run in the kernels all together or not at all."""
    names = {child: name for name, child in parent.named_children()}
    reasons = [reason for module in group if isinstance(reason := projection(module), str)]
    if not reasons and any(isinstance(m, nn.Dropout) for module in group for m in module.modules()):
        reasons = [DROPOUT]
    if reasons:
        report.left[" + ".join(names[module] for module in group), reasons[0]] += 1
    else:
        report.linears += len(group)


def undo(model: nn.Module) -> None:
    """Take the kernels off every module of this model, as `Report.undo` does, for callers without the report."""
    for module in model.modules():
        fused = type(module)
        if issubclass(fused, _Fused):
            module.__class__ = fused.stock
