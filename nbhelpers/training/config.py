"""The configs of the trainers: TRL's own with the precision of this machine, and a checkpoint before much is lost."""

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import torch
import trl

from nbhelpers import gpu
from nbhelpers.rewards.guard import SECONDS

from . import settings
from .stages import Stage

TESTED_TRL = ("1.16", "1.17")  # from, up to but not including


def check_trl() -> None:
    """Warns of a TRL whose trainers were not tested with these."""
    installed = version("trl")
    if not TESTED_TRL[0] <= installed < TESTED_TRL[1]:
        warnings.warn(f"trl {installed} is outside the tested range {TESTED_TRL[0]}.*: pip install 'trl==1.16.*'",
                      stacklevel=4)  # fmt: skip


def precision() -> dict[str, bool]:
    """The arguments of a config of TRL's that decide the arithmetic: bf16 from Ampere on, fp16 on a T4, fp32 on a CPU.

    TRL's own default is bf16 wherever fp16 is not asked for, which a T4 does not have and a CPU refuses.
    """
    dtype = gpu.compute_dtype()
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "use_cpu": dtype == torch.float32}


@dataclass
class OfThisMachine:
    """What the configs here share: a precision that is this machine's if none is set, every step logged, no service.

    No gradient checkpointing: the lean step decides for each layer what to keep and what to compute again.

    A checkpoint every 20 steps, the newest two kept: on a T4, where a step takes tens of seconds, a killed run costs
    minutes, and a LoRA's checkpoint is a few dozen MB. transformers' own default, 500, is longer than most runs here.
    The folder must outlive the machine: on Colab one on Google Drive, on Kaggle below /kaggle/working with
    Persistence set to "Files only".
    """

    OWN: ClassVar[tuple[settings.Setting, ...]] = ()  # rows as in settings.py, of a method's own settings

    logging_steps: float = 1
    report_to: str | list[str] | None = "none"
    save_steps: float = 20
    save_total_limit: int | None = 2

    def __post_init__(self) -> None:
        args: Any = self  # one of TRL's configs
        settings.refuse(args, self.OWN)  # before TRL divides by some of them
        self._settle()
        if args.bf16 is None and not args.fp16:
            for name, value in precision().items():
                setattr(args, name, value)
        if args.use_cpu:
            args.dataloader_pin_memory = False  # there is no card to pin for, and torch warns at each step
        with warnings.catch_warnings():  # TRL sets gradient_checkpointing, which transformers 5.23 calls deprecated
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            super().__post_init__()  # type: ignore[misc]  # TRL's

    def _settle(self) -> None:
        """Set what follows from other settings, once they are known to make sense."""


@dataclass
class LeanGRPOConfig(OfThisMachine, trl.GRPOConfig):
    """TRL's GRPOConfig with what `OfThisMachine` says, dynamic sampling, stages, a time limit of rewards and `kv_bits`.

    With `stages` the run begins with the first stage's `max_completion_length`. `kv_bits=8` keeps keys and values in 8
    bits while the graph engine writes: about twice as many completions at once, or twice as long.

    Where engine and trainer disagree about a token's probability, that token's loss is importance-weighted. TRL's own
    default, the product of a completion's ratios, turns rounding noise into a factor: 0.3 to 1.9 in bf16 at 256 tokens
    (rows `first_loss_...` of benchmarks/results/vllm.json), and more the longer the completion.
    """

    gradient_checkpointing: bool = False
    vllm_importance_sampling_mode: str = "token_truncate"
    dynamic_sampling: int = 0  # rounds in which groups without a signal are replaced before the update (DAPO)
    reward_seconds: float = SECONDS  # for one call of a reward function, before its rows count as not scored
    stages: list[Stage] | None = None  # of the length of completions
    kv_bits: int = 16  # or 8

    def _settle(self) -> None:
        if self.stages:
            first = self.stages[0].max_completion_length
            if self.max_completion_length not in (trl.GRPOConfig.max_completion_length, first):
                raise ValueError(f"max_completion_length={self.max_completion_length}, and the first of the stages has "
                                 f"{first}: leave max_completion_length out")  # fmt: skip
            self.max_completion_length = first
