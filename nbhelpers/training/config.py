"""`LeanGRPOConfig`: TRL's GRPOConfig with the precision of this machine, and a checkpoint before much is lost."""

import warnings
from dataclasses import dataclass

import torch
import trl

from nbhelpers import gpu
from nbhelpers.rewards.guard import SECONDS

from . import settings


def precision() -> dict[str, bool]:
    """The arguments of a GRPOConfig that decide the arithmetic: bf16 from Ampere on, fp16 on a T4, fp32 on a CPU.

    TRL's own default is bf16 wherever fp16 is not asked for, which a T4 does not have and a CPU refuses.
    """
    dtype = gpu.compute_dtype()
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "use_cpu": dtype == torch.float32}


@dataclass
class LeanGRPOConfig(trl.GRPOConfig):
    """TRL's GRPOConfig whose unset precision is this machine's, that logs every step and reports to no service.

    No gradient checkpointing: the lean step decides for each layer what to keep and what to compute again.

    Where engine and trainer disagree about a token's probability, that token's loss is importance-weighted. TRL's own
    default, the product of a completion's ratios, turns rounding noise into a factor: 0.3 to 1.9 in bf16 at 256 tokens
    (rows `first_loss_...` of benchmarks/results/vllm.json), and more the longer the completion.

    A checkpoint every 20 steps, the newest two kept: on a T4, where a step takes tens of seconds, a killed run costs
    minutes, and a LoRA's checkpoint is a few dozen MB. transformers' own default, 500, is longer than most runs here.
    The folder must outlive the machine: on Colab one on Google Drive, on Kaggle below /kaggle/working with
    Persistence set to "Files only".
    """

    gradient_checkpointing: bool = False
    vllm_importance_sampling_mode: str = "token_truncate"
    logging_steps: float = 1
    report_to: str | list[str] | None = "none"
    save_steps: float = 20
    save_total_limit: int | None = 2
    dynamic_sampling: int = 0  # rounds in which groups without a signal are replaced before the update (DAPO)
    reward_seconds: float = SECONDS  # for one call of a reward function, before its rows count as not scored

    def __post_init__(self):
        settings.refuse(self)  # before TRL divides by some of them
        if self.bf16 is None and not self.fp16:
            for name, value in precision().items():
                setattr(self, name, value)
        if self.use_cpu:
            self.dataloader_pin_memory = False  # there is no card to pin for, and torch warns at each step
        with warnings.catch_warnings():  # TRL sets gradient_checkpointing, which transformers 5.23 calls deprecated
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            super().__post_init__()
