"""What the kernels are compared on: the models' shapes, and for each kernel the contestants on the same inputs."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers import kernels
from nbhelpers.models import projection


@dataclass(frozen=True)
class Shape:
    """The sizes of a model's layers and head."""

    name: str
    family: str  # transformers' model_type
    hidden: int
    wide: int
    heads: int
    kv_heads: int
    words: int
    head_dim: int = 128


MODELS = (
    Shape("qwen2.5-1.5b", "qwen2", 1536, 8960, 12, 2, 151_936),
    Shape("llama-3.1-8b", "llama", 4096, 14336, 32, 8, 128_256),
    Shape("phi-4", "phi3", 5120, 17920, 40, 10, 100_352),
)
QUICK = (Shape("tiny", "llama", 64, 128, 4, 2, 320, 16), Shape("tiny-phi", "phi3", 64, 128, 4, 2, 320, 16))
RANK = 16


class Intermediate(torch.autograd.Function):
    """A leaf as if an operation had produced it: kernels that write over their input may do so, as in a model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.data

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


@dataclass
class Case:
    """One kernel at one shape. Contestants take the inputs; bytes are what has to be read and written once."""

    inputs: list[Tensor]
    contestants: dict[str, Any]
    bytes_forward: int = 0
    bytes_both: int = 0
    parameters: list[Tensor] = field(default_factory=list)  # what else gets a gradient


def liger() -> dict[str, Callable]:
    """Liger's functions, or an error that says it is not there."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction, LigerSiLUMulFunction

    return {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", True),
        "rms_norm_add": lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6, 0.0, "llama", True),
        "rope": lambda q, k, cos, sin: LigerRopeFunction.apply(q, k, cos, sin),
        "swiglu": lambda g, u: LigerSiLUMulFunction.apply(g, u, 1.0, 1.0),
        # its backward wants two dimensions
        "swiglu_packed": lambda gu: LigerFusedGateUpSiLUMulFunction.apply(gu.flatten(0, -2), False),
    }


def elementwise(
    shape: Shape, batch: int, length: int, dtype: torch.dtype, device: torch.device, compiled: Callable
) -> dict[str, Case]:
    """{kernel: Case} of the element-wise kernels. `compiled` wraps a function as torch.compile does."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    make = partial(torch.randn, dtype=dtype, device=device)
    norm = LlamaRMSNorm(shape.hidden, 1e-6).to(device, dtype).requires_grad_(False)
    w = norm.weight
    fused = liger() if device.type == "cuda" else {}

    def rms_norm(x: Tensor) -> Tensor:
        return norm(x)

    def rms_norm_add(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = residual + x
        return s, norm(s)

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def swiglu_packed(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    tokens, size = batch * length, dtype.itemsize
    x = [make(batch, length, shape.hidden).requires_grad_() for _ in range(2)]
    q, k = (make(batch, length, n, shape.head_dim).requires_grad_() for n in (shape.heads, shape.kv_heads))
    angle = torch.rand(1, length, shape.head_dim // 2, device=device).repeat(1, 1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def flat(function: Any) -> Callable:
        return lambda q, k: function(*(Intermediate.apply(t).transpose(1, 2) for t in (q, k)), cos, sin)

    stock_rope = compiled(apply_rotary_pos_emb)
    cases = {
        "rms_norm": Case(
            x[:1],
            {
                "ours": lambda x: kernels.rms_norm(x, w, 1e-6),
                "eager": rms_norm,
                "compile": compiled(rms_norm),
                "liger": lambda x: fused["rms_norm"](x, w),
            },
            2 * tokens * shape.hidden * size,
            5 * tokens * shape.hidden * size,
        ),
        "rms_norm_add": Case(
            x,
            {
                "ours": lambda x, r: kernels.rms_norm(x, w, 1e-6, r),
                "eager": rms_norm_add,
                "compile": compiled(rms_norm_add),
                "liger": lambda x, r: fused["rms_norm_add"](x, r, w)[::-1],
            },
            4 * tokens * shape.hidden * size,
            8 * tokens * shape.hidden * size,
        ),
        "rope": Case(
            [q, k],
            {
                "ours": flat(kernels.rope),
                "eager": flat(apply_rotary_pos_emb),
                "compile": flat(stock_rope),
                "liger": flat(fused.get("rope")),
            },
            2 * (q.numel() + k.numel() + cos.numel()) * size,
            4 * (q.numel() + k.numel() + cos.numel()) * size,
        ),
    }
    ours: Callable
    eager: Callable
    if shape.family == "phi3":
        gate_up = [make(batch, length, 2 * shape.wide).requires_grad_()]
        name, ours, eager = "swiglu_packed", kernels.swiglu_packed, swiglu_packed
    else:
        gate_up = [make(batch, length, shape.wide).requires_grad_() for _ in range(2)]
        name, ours, eager = "swiglu", kernels.swiglu, swiglu
    cases["swiglu"] = Case(
        gate_up,
        {"ours": ours, "eager": eager, "compile": compiled(eager), "liger": fused.get(name)},
        3 * tokens * shape.wide * size,
        8 * tokens * shape.wide * size,
    )
    if not fused:  # Liger has no CPU
        for case in cases.values():
            del case.contestants["liger"]
    return cases


def linear4bit(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, bias: bool = False) -> nn.Linear:
    """A random NF4 layer of bitsandbytes."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(inputs, outputs, bias=bias, compute_dtype=dtype, quant_type="nf4", device="cpu")
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device) * inputs**-0.5
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer.support_avx512bf16_for_cpu = False  # its CPU repacking breaks training
    layer = layer.to(device)
    if bias:
        layer.bias = nn.Parameter(torch.randn(outputs, dtype=dtype, device=device) * 0.1, requires_grad=False)
    return layer


def add_lora(model: Any, names: Sequence[str], dtype: torch.dtype = torch.float32) -> Any:
    """peft's LoRA on the named layers, with a B that is not zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(names))
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


class Linears(nn.Module):
    """The linear layers of one decoder layer, NF4; peft needs a module to wrap."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        super().__init__()
        make = partial(linear4bit, dtype=dtype, device=device)
        heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.layers = nn.ModuleDict(
            OrderedDict(
                q=make(shape.hidden, heads, bias=shape.family == "qwen2"),
                k=make(shape.hidden, kv_heads, bias=shape.family == "qwen2"),
                v=make(shape.hidden, kv_heads, bias=shape.family == "qwen2"),
                gate=make(shape.hidden, shape.wide),
                up=make(shape.hidden, shape.wide),
                down=make(shape.wide, shape.hidden),
            )
        )


NAMES = ["q", "k", "v", "gate", "up", "down"]


def _served(layer: nn.Module) -> kernels.Projection:
    part = projection.projection(layer)
    assert not isinstance(part, str), part  # why the kernels do not serve it
    return part


def lora(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    lora_dtype: torch.dtype,
    compiled: Callable | None = None,
) -> tuple[dict[str, Case], dict[str, kernels.Projection]]:
    """{kernel: Case} of the products with LoRA, and {name: Projection}. Stock (eager) is peft on bitsandbytes."""
    layers: Any = add_lora(Linears(shape, dtype, device), NAMES, lora_dtype).base_model.model.layers
    q, k, v, gate, up, down = (layers[name] for name in NAMES)
    parts = {name: _served(layers[name]) for name in NAMES}
    x = torch.randn(tokens, shape.hidden, dtype=dtype, device=device, requires_grad=True)

    def group(*layers: nn.Module) -> Callable:
        return lambda x: tuple(layer(x) for layer in layers)

    def mlp(x: Tensor) -> Tensor:
        return down(F.silu(gate(x)) * up(x))

    qkv = tuple(parts[name] for name in "qkv")
    size, heads = dtype.itemsize, (shape.heads + 2 * shape.kv_heads) * shape.head_dim

    def case(names: Sequence[str], ours: Callable, stock: Callable, wide: int, weights: int) -> Case:
        four_bits = weights * 33 // 64  # and one byte for every 64
        io = tokens * (shape.hidden + wide) * size
        contestants = {"ours": ours, "eager": stock} | ({"compile": compiled(stock)} if compiled else {})
        learn = [t for name in names for t in (parts[name].lora_a, parts[name].lora_b) if t is not None]
        return Case([x], contestants, io + four_bits, 3 * io + 2 * four_bits, learn)

    gate_up = (parts["gate"], parts["up"])
    heads_in, wide_in = shape.hidden * heads, shape.hidden * shape.wide
    made = {
        "lora_linear": case(
            ["gate"], lambda x: kernels.lora_linear(x, parts["gate"]), group(gate), shape.wide, wide_in
        ),
        "lora_qkv": case(["q", "k", "v"], lambda x: kernels.lora_linear_group(x, qkv), group(q, k, v), heads, heads_in),
        "lora_mlp": case(
            ["gate", "up", "down"],
            lambda x: kernels.lora_mlp(x, gate_up, parts["down"]),
            mlp,
            shape.hidden,
            3 * wide_in,
        ),
    }
    return made, parts


def one_layer_model(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    layers: int = 1,
    words: int = 256,
    quantise: bool = True,
    lora_dtype: torch.dtype = torch.float32,
) -> Any:
    """A stock transformers model of this shape with `layers` layers, NF4 and LoRA r=16 on every linear of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.family, hidden_size=shape.hidden, intermediate_size=shape.wide, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, num_hidden_layers=layers, vocab_size=words, max_position_embeddings=32768,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = set()
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            names.add(name)
            if quantise:
                new = linear4bit(child.in_features, child.out_features, dtype, device, child.bias is not None)
                setattr(parent, name, new)
            else:
                nn.init.normal_(child.weight, std=child.in_features**-0.5)
    model.requires_grad_(False)
    return add_lora(model, sorted(names), lora_dtype)
