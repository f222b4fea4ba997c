"""What PyTorch does while lesson 4 looks on: its operations counted, and the bytes of a GRPO step part by part."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nbhelpers import quantize
from nbhelpers.panel.curves import COLORS, GREY
from nbhelpers.panel.picture import Picture

PARTS = {
    "weights": COLORS[0],
    "LoRA": COLORS[2],
    "optimizer": COLORS[1],
    "gradients": GREY,
    "KV cache": COLORS[3],
    "work": COLORS[5],
}


class Spy(TorchDispatchMode):
    """Counts what goes by inside `with Spy() as spy:`.

    Args:
        ignore (`Iterable[Tensor]`): Tensors that were there before.
        grown (`Callable`): Called when a new tensor has been made.

    Attributes:
        operations (`int`): Those that move or compute something; views do not.
        bytes (`int`): Of the tensors that were made meanwhile and are still there. What is made and gone again within
            one operation is not seen.
    """

    def __init__(self, ignore: Iterable[torch.Tensor] = (), grown: Callable[[], None] = lambda: None):
        super().__init__()
        self.operations, self.bytes, self.grown = 0, 0, grown
        self.sizes = {tensor.untyped_storage().data_ptr(): 0 for tensor in ignore}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.operations += not op.is_view
        storages = [leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for key, storage in {s.data_ptr(): s for s in storages if s.data_ptr() not in self.sizes}.items():
            self.sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._gone, key)  # called when the last tensor that uses it is gone
            self.grown()
        return out

    def _gone(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)


class Watch:
    """The bytes of a GRPO step inside `with Watch(model, optimizer) as watch:`, noted at each new tensor.

    Parts that are known by name are told apart; the rest is "work": activations, logits, what autograd keeps.

    Args:
        model (`PreTrainedModel`): With a LoRA.
        optimizer (`torch.optim.Optimizer`): Of the LoRA.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        lora = sum(p.nbytes for p in self.trained)
        self.fixed = (quantize.nbytes(model) - lora, lora)
        self.optimizer = optimizer
        self.cache: Callable[[], torch.Tensor | None] = lambda: None
        self.phases: dict[str, list[tuple[int, ...]]] = {}
        self.spy = Spy([*model.parameters(), *model.buffers()], self._note)

    def __enter__(self) -> "Watch":
        self.spy.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.spy.__exit__(*error)

    def phase(self, name: str) -> None:
        """What comes next is called `name`."""
        self.phases[name] = []

    def is_cache(self, tensor: torch.Tensor) -> None:
        """That tensor holds keys and values, for as long as it is there."""
        self.cache = weakref.ref(tensor)

    def peak(self, phase: str, part: str | None = None) -> float:
        """MB: the most that a part took in a phase, or all parts together."""
        place = list(PARTS).index(part) if part else None
        return max(sum(moment) if place is None else moment[place] for moment in self.phases[phase]) / 1e6

    def picture(self) -> Picture:
        """The parts over time, phase by phase."""
        picture = Picture(figsize=(9, 3.6), layout="constrained")
        axes = picture.subplots()
        for i, moments in enumerate(self.phases.values()):
            few = max(1, len(moments) // 150)  # of so many moments the highest is drawn
            tops = [max(moments[j : j + few], key=sum) for j in range(0, len(moments), few)]
            x = [i + 0.02 + 0.96 * j / max(1, len(tops) - 1) for j in range(len(tops))]
            y = [[size / 1e6 for size in part] for part in zip(*tops, strict=True)]
            axes.stackplot(x, y, colors=list(PARTS.values()), labels=() if i else list(PARTS), linewidth=0)
        peaks = {name: self.peak(name) for name in self.phases}
        ticks = [f"{name}\npeak {peak:.1f} MB" for name, peak in peaks.items()]
        axes.set_xticks([i + 0.5 for i in range(len(peaks))], ticks)
        axes.set(ylabel="MB", ylim=(0, None))
        axes.legend(ncols=6, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        told = ", ".join(f"{name} {peak:.1f} MB" for name, peak in peaks.items())
        picture.words = f"Memory over time. Peaks: {told}."
        return picture

    def _note(self) -> None:
        """One moment of the newest phase: the bytes of each part."""
        cache = self.cache()
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        gradients = [p.grad for p in self.trained if p.grad is not None]
        named = [
            sum(tensor.nbytes for tensor in part) for part in (states, gradients, [] if cache is None else [cache])
        ]
        moment = (*self.fixed, *named, self.spy.bytes - sum(named))
        self.phases[list(self.phases)[-1]].append(moment)
