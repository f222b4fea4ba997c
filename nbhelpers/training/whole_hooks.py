"""A trainer of weights that are trained in 16 bits themselves, without a copy in fp32: its optimizer and clipping.

These hooks touch these private parts of transformers:

    create_optimizer                        rounded_adam.py's, where torch's would round small steps away
    _clip_grad_norm                         the norm in fp32; the optimizer scales the gradients, also in fp32
"""

from typing import Any

import torch
from torch import Tensor, nn

from .hooks import RunHooks
from .rounded_adam import RoundedAdamW


class WholeHooks(RunHooks):
    """See the module. `trainer.LeanGRPOTrainer` is what people use."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' hook. Raises ValueError for an optimizer that is no AdamW, where weights in bf16 are trained:
        its steps would be rounded away."""
        trained = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
        if self.optimizer is not None or all(p.dtype != torch.bfloat16 for _, p in trained):
            return super().create_optimizer(model)
        args, name = self.args, str(self.args.optim).rpartition(".")[2].lower()  # an enum: "OptimizerNames.ADAMW_8BIT"
        if "adamw" not in name:
            raise ValueError(f"weights in bf16 are trained, and optim={name!r} would round small steps away: set "
                             "optim='adamw_8bit', or load the model with lora_rank=0 in fp32")  # fmt: skip
        decayed = set(self.get_decay_parameter_names(model or self.model))
        groups = [
            {"params": [p for n, p in trained if n in decayed], "weight_decay": args.weight_decay},
            {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = RoundedAdamW(
            groups, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
            bits=8 if "8bit" in name else 32, seed=args.seed,
        )  # fmt: skip
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if not isinstance(optimizer, RoundedAdamW):
            return super()._clip_grad_norm(model)
        norm = gradient_norm(model)
        factor = min(1.0, self.args.max_grad_norm / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            group["gradient_factor"] = factor
        return norm


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together, fp32: summed in fp32, where torch's clipping would round it to 16 bits. 0
    without any, as of a step that is skipped."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).norm()
