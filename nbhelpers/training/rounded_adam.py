"""AdamW for weights in 16 bits: the update in fp32, its result rounded up or down by chance, the moments in 8 bits.

A step of 1e-5 on a weight of 0.02 is a tenth of bf16's distance between two numbers there. Rounded to the nearest
nothing would ever change; rounded up with a probability of a tenth, the weight moves by the right amount on average
(stochastic rounding, Gupta et al. 2015, arXiv:1502.02551). So no second copy of the weights is needed. The moments are
kept in blocks of 256 numbers that share a scale (Dettmers et al. 2022, arXiv:2110.02861). Per weight that is 2 bytes
for itself, 2 for its gradient and 2.03 for the moments.

    g = factor * gradient                                    factor: of the clipping, exact because it acts in fp32
    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2     kept are m and the root of v, whose range is half as wide
    w = w (1 - lr decay) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # numbers that share a scale
PIECE = 2**22  # numbers that are updated at once, a multiple of BLOCK: what is in fp32 meanwhile takes 16 MB a tensor
SMALL = 4096  # tensors below keep their moments in fp32, as bitsandbytes does


def rounded_by_chance(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """fp32 to bf16, up or down with the probability that makes the mean right; what bf16 can hold stays as it is.

    bf16 is the upper half of fp32: 16 random bits are added to the lower half, which is then cut off.

    Args:
        x (`Tensor`): fp32, any shape.
        generator (`torch.Generator`, *optional*): Of x's device.
    """
    chance = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = chance.add_(x.view(torch.int32)).bitwise_and_(-(2**16))
    return bits.view(torch.float32).bfloat16()


class RoundedAdamW(torch.optim.Optimizer):
    """See the module. Weights in fp32 are updated as they are.

    The random bits of an update come from `seed` and the number of the update, which the state has: a run that is
    resumed draws what it would have drawn.

    Args:
        params (`Iterable`): As any optimizer's: contiguous tensors, on one device.
        lr (`float`), betas (`tuple[float, float]`), eps (`float`), weight_decay (`float`): As torch's AdamW has them.
        bits (`int`): 8, or 32 for moments in fp32.
        seed (`int`): Of the rounding.

    A group's `gradient_factor` multiplies its gradients in the next step, and is 1 again after it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: int = 8,
        seed: int = 0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"updates": 0, "gradient_factor": 1.0})
        self.bits, self.seed = bits, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. A group without any counts none, as in torch's AdamW."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generator: torch.Generator | None = None
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            group["updates"] += bool(learning)
            for parameter in learning:
                if generator is None:
                    generator = torch.Generator(parameter.device)
                    generator.manual_seed((self.seed * 1_000_003 + group["updates"]) % 2**63)
                self._update(parameter, parameter.grad, group, generator)
            group["gradient_factor"] = 1.0
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            for name in ("m", "root_v"):
                state |= self._empty(name, parameter)
        (b1, b2), count, lr = group["betas"], group["updates"], float(group["lr"])
        weights, gradients = parameter.data.view(-1), gradient.reshape(-1)
        for start in range(0, len(weights), PIECE):
            span = slice(start, start + PIECE)
            g = gradients[span].float() * group["gradient_factor"]
            m = _read(state, "m", span).lerp_(g, 1 - b1)
            v = _read(state, "root_v", span).square_().mul_(b2).addcmul_(g, g, value=1 - b2)
            below = (v / (1 - b2**count)).sqrt_().add_(group["eps"])
            w = weights[span].float() * (1 - lr * group["weight_decay"])
            w.addcdiv_(m, below, value=-lr / (1 - b1**count))
            weights[span] = rounded_by_chance(w, generator) if parameter.dtype == torch.bfloat16 else w
            _write(state, "m", span, m)
            _write(state, "root_v", span, v.sqrt_())

    def _empty(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """A moment of zeros: fp32 [n], or its codes uint8 [n] and the scales fp32 [n / 256] of their blocks."""
        n, device = parameter.numel(), parameter.device
        if self.bits == 32 or n < SMALL:
            return {name: torch.zeros(n, device=device)}
        codes = torch.full((n,), _zero(name), dtype=torch.uint8, device=device)
        return {name: codes, f"{name}_scales": torch.zeros(-(-n // BLOCK), device=device)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast the moments to the parameter's dtype. Without moments, as accelerate hands it
        over at the start, the state stays empty."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if saved := state_dict["state"].get(number):
                self.state[parameter] = {n: value.to(parameter.device, copy=True) for n, value in saved.items()}


@cache
def _codes(name: str, device: torch.device) -> Tensor:
    """The 256 numbers that a code stands for, fp32: of both signs for m, of one for the root of v."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == "m").to(device)


def _zero(name: str) -> int:
    """The code of 0."""
    return int(_codes(name, torch.device("cpu")).abs().argmin())


def _blocks(span: slice) -> slice:
    return slice(span.start // BLOCK, -(-span.stop // BLOCK))


def _read(state: dict[str, Tensor], name: str, span: slice) -> Tensor:
    """A piece of a moment in fp32, to be written into."""
    if f"{name}_scales" not in state:
        return state[name][span].clone()
    from bitsandbytes.functional import dequantize_blockwise

    codes, scales = state[name][span], state[f"{name}_scales"][_blocks(span)]
    return dequantize_blockwise(codes, absmax=scales, code=_codes(name, codes.device), blocksize=BLOCK)


def _write(state: dict[str, Tensor], name: str, span: slice, value: Tensor) -> None:
    if f"{name}_scales" not in state:
        state[name][span] = value
        return
    from bitsandbytes.functional import quantize_blockwise

    codes, quantised = quantize_blockwise(value, code=_codes(name, value.device), blocksize=BLOCK)
    state[name][span], state[f"{name}_scales"][_blocks(span)] = codes, quantised.absmax
