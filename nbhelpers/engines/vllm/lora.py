"""The live adapter in vLLM: one adapter under one id, whose numbers are written into vLLM's own LoRA buffers.

It is registered once, as zeros. Before each generation A and B are copied into the buffers of its LoRA slot, from fp32
to vLLM's dtype, B times lora_alpha / r. That takes some milliseconds and writes no file, and captured CUDA graphs stay
valid, as the buffers keep their addresses.

Imports vLLM: only VLLMEngine imports this, when one is made.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.lora.request import LoRARequest

from nbhelpers.kernels import Projection
from nbhelpers.models.projection import projection

from .model import parts_of

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ID = 1  # of the only adapter
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has buffers for


def adapted(model: nn.Module) -> "dict[str, LoraLayer]":
    """{name: module} of the layers of a transformers model that peft has put a LoRA on."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def settings(layers: "Mapping[str, LoraLayer]") -> dict[str, Any]:
    """vLLM's arguments for the adapter on `layers`; {} without one. Raises ValueError if vLLM cannot have it."""
    if not layers:
        return {}
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    rank = max(rank for module in layers.values() for rank in module.r.values())
    if rank > RANKS[-1]:
        raise ValueError(f'a LoRA of rank {rank}: vLLM takes {RANKS[-1]} at most. Use engine="graph"')
    if unsupported := [leaf for leaf in leaves if leaf in ("lm_head", "embed_tokens")]:
        raise ValueError(
            f'the adapter is on {unsupported[0]} too, which engine="vllm" cannot follow. Use engine="graph"'
        )
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(size for size in RANKS if size >= rank),
        "lora_target_modules": leaves,
    }


class LoRASlot:
    """The adapter's buffers in vLLM, as many as layers that it is on.

    Args:
        worker_manager: The LoRA manager of vLLM's worker.
    """

    def __init__(self, worker_manager: Any):
        self.manager = worker_manager._adapter_manager
        self.request = LoRARequest("nbhelpers", ID, "in memory")  # the path is never opened: the id is registered
        worker_manager.add_dummy_lora(self.request, rank=1)
        self.manager.activate_adapter(ID)
        self.index = self.manager.lora_index_to_id.index(ID)

    @torch.inference_mode()
    def update(self, model: nn.Module) -> LoRARequest | None:
        """Write the adapter as it is now.

        Args:
            model (`nn.Module`): The transformers model with LoRA on its layers, in eval mode.

        Returns what vLLM needs to use it, or None if it is switched off. Raises ValueError for what vLLM cannot follow
        (several active adapters, DoRA, hooks, ...), RuntimeError if vLLM no longer has the adapter.
        """
        active = False
        for name, layer in self.manager.modules.items():
            parts = parts_of(name, self.manager.packed_modules_mapping)
            for part, a, b in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
                source = projection(model.get_submodule(part))
                if isinstance(source, str):
                    raise ValueError(f'engine="vllm" cannot follow {part}: {source}. Use engine="graph"')
                active |= source.lora_a is not None
                _write(source, a[self.index, 0], b[self.index, 0])
        if active and ID not in self.manager.list_adapters():
            raise RuntimeError("vLLM has dropped the adapter: restart the kernel")
        return self.request if active else None


def _write(source: Projection, a: Tensor, b: Tensor) -> None:
    """Into the buffers a [slot's rank, in] and b [out, slot's rank], whose rank may be above the adapter's."""
    if source.lora_a is None or source.lora_b is None:
        a.zero_()
        b.zero_()
        return
    rank = source.lora_a.shape[0]
    a[rank:].zero_()
    b[:, rank:].zero_()
    a[:rank].copy_(source.lora_a)
    b[:, :rank].copy_(source.lora_b if source.scale == 1.0 else source.lora_b * source.scale)
