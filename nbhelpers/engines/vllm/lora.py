"""The live adapter in vLLM: one adapter under one id, whose numbers are written into vLLM's own LoRA buffers.

It is registered once, as zeros; before each generation A and B are copied into the slot's buffers, fp32 to vLLM's type,
B times lora_alpha / r: some milliseconds, nothing on disk, and captured CUDA graphs stay valid as the buffers stay put.

Imports vLLM: only vllm.py imports this, when an engine is made.
"""

import torch
from torch import nn
from vllm.lora.request import LoRARequest

from nbhelpers.kernels import Projection
from nbhelpers.models.projection import projection

from .model import parts_of

ID = 1  # of the only adapter
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has buffers for


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} of the layers of a transformers model that peft has put a LoRA on."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def settings(layers: dict[str, nn.Module]) -> dict:
    """vLLM's arguments for the adapter on `layers`; {} without one. ValueError if vLLM cannot have it."""
    if not layers:
        return {}
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    rank = max(rank for module in layers.values() for rank in module.r.values())
    if rank > RANKS[-1]:
        raise ValueError(f'a LoRA of rank {rank}: vLLM takes {RANKS[-1]} at most. Use engine="graph"')
    if beside := [leaf for leaf in leaves if leaf in ("lm_head", "embed_tokens")]:
        raise ValueError(f'the adapter is on {beside[0]} too, which engine="vllm" cannot follow. Use engine="graph"')
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(size for size in RANKS if size >= rank),
        "lora_target_modules": leaves,
    }


class Slot:
    """The place of the adapter in vLLM. worker_manager: its worker's LoRA manager."""

    def __init__(self, worker_manager):
        self.manager = worker_manager._adapter_manager
        self.request = LoRARequest("nbhelpers", ID, "in memory")  # the path is never opened: the id is registered
        worker_manager.add_dummy_lora(self.request, rank=1)
        self.manager.activate_adapter(ID)
        self.index = self.manager.lora_index_to_id.index(ID)

    @torch.inference_mode()
    def update(self, model: nn.Module) -> LoRARequest | None:
        """Write the adapter of a transformers model in eval mode as it is now; None if it is switched off.

        ValueError for what vLLM cannot follow: several active adapters, DoRA, hooks, ...
        """
        active = False
        for name, layer in self.manager.modules.items():
            parts = parts_of(name, self.manager.packed_modules_mapping)
            for part, a, b in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
                found = projection(model.get_submodule(part))
                if isinstance(found, str):
                    raise ValueError(f'engine="vllm" cannot follow {part}: {found}. Use engine="graph"')
                active |= found.lora_a is not None
                _write(found, a[self.index, 0], b[self.index, 0])
        if active and ID not in self.manager.list_adapters():
            raise RuntimeError("vLLM has dropped the adapter: restart the kernel")
        return self.request if active else None


def _write(found: Projection, a: torch.Tensor, b: torch.Tensor) -> None:
    """Into the buffers a [rank of the slot, in] and b [out, rank of the slot], which may be wider than the adapter."""
    rank = 0 if found.lora_a is None else found.lora_a.shape[0]
    a[rank:].zero_()
    b[:, rank:].zero_()
    if rank:
        a[:rank].copy_(found.lora_a)
        b[:, :rank].copy_(found.lora_b if found.scale == 1.0 else found.lora_b * found.scale)
