"""All that is known of an architecture, once: what its layers are called, what they do, and which walk can serve it.

A family is a `Family` below: the names of its layers and what its attention does that others do not. It is read by both
walks through a model's layers (training/layerwise.py, engines/forward.py), the fused kernels, the presets, the planner,
the merge and the GGUF writer. A new decoder family is an entry in `FAMILIES`, and an operation in kernels/ if it does
something that no other does.

All families share the skeleton of Llama: embedding, layers of a pre-norm attention and a pre-norm SwiGLU MLP with
RMSNorm (arXiv 1910.07467), rotary position embedding (2104.09864), a last norm, and a head that may be the embedding.
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from nbhelpers.architecture import Architecture, Family

from . import each, tuners

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from nbhelpers.kernels import HeadNorms

LLAMA = Family("llama", "Llama", gguf="LLAMA", gguf_pairs=True)
QWEN2 = Family("qwen2", "Qwen2", qkv_bias=True, window="layer", gguf="QWEN2")
QWEN3 = Family("qwen3", "Qwen3", window="layer", head_norms=("q_norm", "k_norm"), gguf="QWEN3")
MISTRAL = Family("mistral", "Mistral", window="config", gguf="LLAMA", gguf_pairs=True)
PHI3 = Family(
    "phi3", "Phi3", qkv=("qkv_proj",), gate_up=("gate_up_proj",), window="config", residual_dropout=True, gguf="PHI3",
    gguf_window=True,
)  # fmt: skip
FAMILIES = {family.model_type: family for family in (QWEN2, QWEN3, LLAMA, MISTRAL, PHI3)}
SILU = ("silu", "swish")  # the names of the activation that the kernels compute
# transformers' own ways to compute the one attention; another, registered by hand, may be another attention
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
ROPES_OF_LENGTH = ("dynamic", "longrope")  # rope types whose frequencies depend on the longest text of a batch


def architecture(config: dict[str, Any]) -> Architecture:
    """The `Architecture` that the dictionary of a config.json describes.

    Raises ValueError for a model type that is none of `FAMILIES`, KeyError for a config without its sizes.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"cannot count a {kind!r}; only {', '.join(FAMILIES)}")
    family, heads = FAMILIES[kind], config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}  # where transformers 5 writes what was `rope_theta`
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": config["hidden_size"] // heads,
        "tie_word_embeddings": False,
        "rope_theta": rope.get("rope_theta", 10000.0),
    }
    names = Architecture.__dataclass_fields__.keys() - {"family"}
    given = {name: config[name] for name in names if config.get(name) is not None}
    bias = config.get("attention_bias", False) if family.qkv_bias is None else family.qkv_bias
    return Architecture(family, **{**defaults, **given, "attention_bias": bias})


def unwrap(model: "nn.Module") -> "PreTrainedModel":
    """The transformers model inside peft's wrapper, or the model itself."""
    from peft import PeftModel

    return cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)


def of(model: "nn.Module") -> Family | None:
    """The family of a transformers model, in peft's wrapper or not; None for every other class.

    The class has to have that very name: a subclass may do something else.
    """
    inner = unwrap(model)
    return next((family for family in FAMILIES.values() if type(inner).__name__ == f"{family.prefix}ForCausalLM"), None)


class Skeleton(NamedTuple):
    """The modules of a decoder in the order in which a token passes them."""

    embedding: "nn.Module"
    rotary: "nn.Module"
    layers: "nn.ModuleList"
    norm: "nn.Module"
    head: "nn.Module"


def skeleton(model: "nn.Module") -> Skeleton:
    """The modules of a model for which `of` knows a family, in peft's wrapper or not."""
    inner = unwrap(model)
    body = inner.model
    return Skeleton(body.embed_tokens, body.rotary_emb, body.layers, body.norm, inner.get_output_embeddings())


class Layer(NamedTuple):
    """The modules of one decoder layer; linear layers that read the same input are in one tuple."""

    norm: "nn.Module"
    qkv: "tuple[nn.Module, ...]"
    out: "nn.Module"
    mlp_norm: "nn.Module"
    gate_up: "tuple[nn.Module, ...]"
    down: "nn.Module"
    head_norms: "tuple[nn.Module, ...]"  # of q's heads and of k's, or ()
    window: int | None  # positions that a token looks back to, itself included; None: all


def layer(family: Family, module: "nn.Module") -> Layer:
    """The parts of a decoder layer, whether the fused kernels are on it or not."""
    decoder: Any = module  # nn.Module does not say what its children are
    attention, mlp = in_force(decoder.self_attn), in_force(decoder.mlp)
    return Layer(
        decoder.input_layernorm, named(attention, family.qkv), named(attention, (family.out,))[0],
        decoder.post_attention_layernorm, named(mlp, family.gate_up), named(mlp, (family.down,))[0],
        named(attention, family.head_norms), window(family, attention),
    )  # fmt: skip


def in_force(module: "nn.Module") -> "nn.Module":
    """What computes in a module's place: the copy that peft trains (modules_to_save), else the module itself."""
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(module, ModulesToSaveWrapper):
        return module
    names = [] if module.disable_adapters else module.active_adapters
    copies: Any = module.modules_to_save
    return next((copies[name] for name in names if name in copies), module.original_module)


def head_norms(norms: "tuple[nn.Module, ...]") -> "HeadNorms | None":
    """The RMSNorms of q's and of k's heads as the kernels take them; None for ()."""
    from nbhelpers.kernels import HeadNorms

    if not norms:
        return None
    q: Any
    k: Any
    q, k = norms
    return HeadNorms(q.weight, k.weight, q.variance_epsilon)


def named(parent: "nn.Module", names: tuple[str, ...]) -> "tuple[nn.Module, ...]":
    """Children of a module by their names. (nn.Module's own look-up is slow, and this runs in each forward.)"""
    children: Any = parent._modules  # a child may be None, but none of these is
    return tuple(children[name] for name in names)


def has_silu(mlp: "nn.Module") -> bool:
    """Whether the activation of this MLP is the one that the kernels compute."""
    return any(type(child).__name__ in ("SiLU", "SiLUActivation") for child in mlp._modules.values())


def window(family: Family, attention: "nn.Module") -> int | None:
    """How many positions a token looks back to, itself included; None for all."""
    if family.window is None:
        return None
    module: Any = attention
    return module.sliding_window if family.window == "layer" else module.config.sliding_window


def config_window(family: Family, config: "PreTrainedConfig") -> int | None:
    """`window` of the layers that have one, from the model's config alone; None if no layer has one."""
    if family.window == "layer" and "sliding_attention" not in (config.layer_types or ()):
        return None
    return None if family.window is None else config.sliding_window


# ------------------------------------------------------------------------------------------- what cannot be served


def why_not(model: "nn.Module", for_: Literal["training", "generation"]) -> str | None:
    """The reason why this model cannot be walked layer by layer, or None if it can.

    Args:
        model (`nn.Module`): A transformers causal language model, or peft's wrapper around one.
        for_ (`str`): "training" (training/layerwise.py, forward and backward) or "generation" (engines/forward.py).
    """
    from torch import nn

    family, inner = of(model), unwrap(model)
    if family is None:
        return f"{type(inner).__name__} is not one of {', '.join(f'{f.prefix}ForCausalLM' for f in FAMILIES.values())}"
    config = inner.config
    if config.hidden_act not in SILU:
        return f"its activation is {config.hidden_act}, not silu"
    attention = (config._attn_implementation or "eager").removeprefix("paged|")
    if attention not in ATTENTIONS and "/" not in attention:  # with a slash: a kernel from the hub
        return f"its attention is {attention!r}, which is not transformers' own"
    if (rope := config.rope_parameters["rope_type"]) in ROPES_OF_LENGTH:
        return f"its rope ({rope}) changes with the length of the text"
    if (reason := tuners.why_not(model, for_)) is not None:
        return reason
    if type(inner.get_input_embeddings()) is not nn.Embedding:
        return f"its embedding is {_kind(inner.get_input_embeddings())}, wrapped or quantised"
    if (reason := _replaced(family, inner)) is not None:
        return reason
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "it is spread over several devices"
    if (why := missed_hook(model, for_)) is not None:
        return why
    return _why_not_train(model, family, inner) if for_ == "training" else None


def _replaced(family: Family, inner: "PreTrainedModel") -> str | None:
    """Which module, other than a linear layer, is not the family's own: a walk would compute what its own does."""
    norms, roles = ("input_layernorm", "post_attention_layernorm"), {"self_attn": "Attention", "mlp": "MLP"}
    body: Any = inner.model
    found = [("norm", "RMSNorm", body.norm), ("rotary_emb", "RotaryEmbedding", body.rotary_emb)]
    for number, layer in enumerate(body.layers):
        decoder: Any = in_force(layer)
        found.append((f"layers.{number}", "DecoderLayer", decoder))
        parts = [(decoder, name, "RMSNorm") for name in norms] + [(decoder, *role) for role in roles.items()]
        for owner, name, role in parts:
            if name not in owner._modules:
                break  # of another class, which is named below
            found.append((f"layers.{number}.{name}", role, owner._modules[name]))
        else:
            attention = in_force(decoder.self_attn)
            head_norms = [name for name in family.head_norms if name in attention._modules]
            found += [(f"layers.{number}.self_attn.{name}", "RMSNorm", attention._modules[name]) for name in head_norms]
    for name, role, module in found:
        if type(in_force(module)).__name__ != f"{family.prefix}{role}":
            return f"its {name} is {_kind(module)}, not the family's own"
        if role == "MLP" and not has_silu(in_force(module)):
            return f"the activation of its {name} is not silu"
    return None


def _kind(module: "nn.Module") -> str:
    """Its class in words: a Sequential, or peft's Embedding."""
    name, library = type(module).__name__, type(module).__module__.partition(".")[0]
    return f"peft's {name}" if library == "peft" else f"a {name}"


def _why_not_train(model: "nn.Module", family: Family, inner: "PreTrainedModel") -> str | None:
    """`why_not` of the training walk alone, for a model that the generation walk can serve."""
    from torch import nn

    from .projection import known

    if any(window(family, module.self_attn) for module in inner.model.layers):
        return "its attention has a sliding window"
    # dropout inside a linear layer, LoRA's, is drawn by the layer's own forward; any other would have to be walked
    halves = [half for layer in inner.model.layers for half in (layer.self_attn, layer.mlp)]
    inside = {module for half in halves for module in half.modules()}
    dropouts = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and module.p > 0 and module not in inside
    ]
    if dropouts or inner.config.attention_dropout:
        return f"it has dropout ({dropouts[0] if dropouts else 'attention_dropout'})"
    if known().get(type(inner.lm_head)) is not False:
        return f"its head is {_kind(inner.lm_head)}"
    if inner.lm_head.bias is not None:
        return "its head has a bias"  # which would get no gradient
    return None


# ------------------------------------------------------------------------------------------------------------- hooks

# A walk calls some modules, linear layers for instance, and computes others, a decoder layer or its attention, from
# their parts. A hook on the latter would not run: what is trained, or what writes, would be another model.

# transformers' own: the embedding's output gets to require a gradient, an output is copied where that is asked for
HARMLESS = (
    "transformers.modeling_utils",
    "transformers.utils.output_capturing",
    "nbhelpers.models.swap",
)  # its hook does what a walk does itself
NEFTUNE = "transformers.integrations.neftune"  # noise on the embedding, but not in evaluation mode


def missed_hook(model: "nn.Module", for_: Literal["training", "generation"]) -> str | None:
    """The first hook that the walk would not call, in words; None if there is none.

    Args:
        model (`nn.Module`): A model for which `of` knows a family, in peft's wrapper or not.
        for_ (`str`): As in `why_not`. In generation nothing is differentiated, so backward hooks may be there.
    """
    from torch.nn.modules import module as torch_module

    if torch_module._has_any_global_hook():
        return "it has hooks on all modules (torch's register_module_forward_hook and its like)"
    whole = (model, unwrap(model))  # accelerate and TRL give it another forward, for autocast and for the loss
    found = {
        id(module)
        for module in each.modules(model)
        if ("forward" in vars(module) and module not in whole) or _hooked(module, for_)
    }
    if not found:  # asked before each step, while the GPU has nothing to do
        return None
    found.difference_update(map(id, _called(model, for_)))
    names = (name for name, module in model.named_modules() if id(module) in found)
    name = next(names, None)
    return None if name is None else f"it has a hook on {name or 'the whole model'}, which would not be called"


def hooked(model: "nn.Module", for_: Literal["training", "generation"]) -> bool:
    """Whether the walk calls a hook of the user's: a CUDA graph cannot, and in a dry pass it would see noise.

    Args:
        model (`nn.Module`): As for `missed_hook`.
        for_ (`str`): As in `why_not`. In training a parameter's own hooks are called too.
    """
    from .projection import watched

    parameters = model.parameters() if for_ == "training" else ()
    return any(watched(module) for module in _called(model, for_)) or any(
        parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters
    )


def _hooked(module: "nn.Module", for_: str) -> bool:
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return False
    harmless = HARMLESS if for_ == "training" else (*HARMLESS, NEFTUNE)
    forward = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    backward = bool(module._backward_hooks or module._backward_pre_hooks) and for_ == "training"
    return backward or any(hook.__module__ not in harmless for hook in forward)


def _called(model: "nn.Module", for_: str) -> "Iterator[nn.Module]":
    """The modules that are called as modules, at least where they have a hook."""
    family, whole = of(model), skeleton(model)
    assert family is not None
    yield whole.rotary
    linears = [whole.head] if for_ == "generation" else []
    for module in whole.layers:
        parts = layer(family, module)
        linears += [*parts.qkv, parts.out, *parts.gate_up, parts.down]
        if for_ == "training":
            yield from (parts.norm, parts.mlp_norm, *parts.head_norms)
    if for_ == "training":
        yield whole.norm
    for linear in linears:  # with the parts of it that projection.py looks at
        yield linear
        for name in ("base_layer", "lora_A", "lora_B"):
            if (part := linear._modules.get(name)) is not None:
                yield from each.modules(part)
