"""The Triton implementations of the functions of nbhelpers.kernels, one kernel per file."""

from .decode_attention import attention_splits, decode_attention
from .decode_linear import decode_linear, decode_mlp, decode_out
from .decode_step import append, append_drawn, embed
from .head_norm_rope import rope, rope_packed
from .linear_logprob import linear_logprob
from .lora_linear import free_scratch, lora_linear, lora_linear_group
from .lora_mlp import lora_mlp
from .lora_stack import layer_adapters
from .nf4 import dequantize_nf4
from .plain_few_rows import decode_head
from .rms_norm import rms_norm
from .sampling import draw
from .sum_rows import sum_rows
from .swiglu import swiglu, swiglu_packed

__all__ = [
    "append",
    "append_drawn",
    "attention_splits",
    "decode_attention",
    "decode_head",
    "decode_linear",
    "decode_mlp",
    "decode_out",
    "dequantize_nf4",
    "draw",
    "embed",
    "free_scratch",
    "layer_adapters",
    "linear_logprob",
    "lora_linear",
    "lora_linear_group",
    "lora_mlp",
    "rms_norm",
    "rope",
    "rope_packed",
    "sum_rows",
    "swiglu",
    "swiglu_packed",
]
