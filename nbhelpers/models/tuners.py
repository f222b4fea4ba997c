"""Which of peft's ways to adapt a model change its linear layers alone, token by token.

Both walks (training/layerwise.py, engines/forward.py) call a linear layer that they do not know as a module, so
whatever peft puts in its place is computed. What peft does elsewhere they would leave out without a word: tokens in
front of the prompt, keys and values, norms, hooks on the whole model. So a walk takes what is known to be safe, and
nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

# Each replaces linear layers, and what its layer makes of a token depends on that token alone
LINEAR = frozenset((
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
    "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING",
    "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
))  # fmt: skip
# LoRA's variants that do not: fields of LoraConfig, for both walks and for training
_WHOLE_TEXT = ("alora_invocation_tokens",)
_RANDOM = ("monteclora_config", "velora_config")  # another forward, or backward, each time a layer is computed
_STARTS_FROM_DATA = ("corda", "lora_ga", "loftq")


def _kind(config: "PeftConfig") -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def adapters(model: "nn.Module") -> "dict[str, PeftConfig]":
    """{name: config} of the adapters on `model`; empty without one."""
    from peft import PeftModel

    return dict(model.peft_config) if isinstance(model, PeftModel) else {}


def why_not(model: "nn.Module", for_: Literal["training", "generation"]) -> str | None:
    """The reason why a walk would compute another model than peft does, or None; `for_` as in `families.why_not`."""
    for name, config in adapters(model).items():
        kind, fields = _kind(config), vars(config)
        if kind not in LINEAR:
            return f"its adapter {name!r} is {kind}, which changes more than linear layers, token by token"
        for field in _WHOLE_TEXT:
            if fields.get(field):
                return f"its adapter {name!r} has {field}, which depends on the whole text"
        if for_ == "generation":
            continue
        for field in _RANDOM:
            if fields.get(field):
                return f"its adapter {name!r} has {field}, which is drawn anew when a layer is computed again"
    return None


@contextmanager
def drawn_once() -> Iterator[None]:
    """A linear layer that is made inside the block keeps what its memory held. peft gives those of a LoRA their numbers
    itself; drawn by torch before, and for nothing, those of an 8B take a second of one core."""
    from torch import nn

    reset = nn.Linear.reset_parameters
    nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.reset_parameters = reset  # type: ignore[method-assign]


def why_not_rebuilt(config: "PeftConfig") -> str | None:
    """Why peft cannot build an adapter again from its saved files and the base, as it was; None if it can.

    Some ways to start a LoRA take a part out of the base's weights, and peft does so again on loading: the same part
    with "pissa" and "olora", another one where it depends on chance or on data.
    """
    kind = _kind(config)
    if config.is_prompt_learning:
        return f"the adapter is {kind}, which peft loads to be used but not to be trained"
    start = vars(config).get("init_lora_weights")
    if isinstance(start, str) and (start in _STARTS_FROM_DATA or start.startswith("pissa_niter")):
        return f"the adapter has init_lora_weights={start!r}, which changes the base by what is not saved"
    return None
