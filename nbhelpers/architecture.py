"""The shapes of a decoder, and what they weigh: parameters and bytes counted from a config.json, nothing loaded.

GB is 10^9 bytes everywhere in this package.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, NamedTuple

GB = 1e9


class Linear(NamedTuple):
    """The shape of one linear layer."""

    name: str
    out_features: int
    in_features: int
    bias: bool


def nf4_bytes(out_features: int, in_features: int) -> int:
    """Bytes of one NF4 matrix with double quantisation (Dettmers et al. 2023, QLoRA, section 3).

    Half a byte per weight; one 8-bit absmax per 64 weights; one fp32 per 256 absmax; the two code books and the mean.
    """
    weights = out_features * in_features
    blocks = ceil(weights / 64)
    return ceil(weights / 2) + blocks + 4 * ceil(blocks / 256) + 4 * (16 + 256 + 1)


@dataclass(frozen=True)
class Family:
    """What the decoders of one model type have in common. The families themselves are in models/families.py."""

    model_type: str  # as transformers calls it: "qwen2"
    prefix: str  # of its class names: "Qwen2" for Qwen2ForCausalLM
    # names of the linear layers, those that read the same input together
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    qkv_bias: bool | None = None  # whether q, k and v have a bias; None: as `attention_bias` in the config says
    window: Literal["layer", "config"] | None = None  # whose `sliding_window` counts: each attention's, or the config's
    head_norms: tuple[str, ...] = ()  # names of the RMSNorms over each head of q and of k
    residual_dropout: bool = False  # dropout on what a layer adds to the residual stream
    gguf: str = ""  # its name in gguf.MODEL_ARCH
    gguf_window: bool = False  # whether GGUF has a sliding window there
    gguf_pairs: bool = False  # GGUF wants the two halves of a rotated pair of q and k next to each other

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of a layer's linear layers, in the order of its computation."""
        return (*self.qkv, self.out, *self.gate_up, self.down)


@dataclass(frozen=True)
class Architecture:
    """The numbers that decide how large a decoder is. Field names are those of its config.json."""

    family: Family
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool = False  # on q, k and v
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    @property
    def model_type(self) -> str:
        """Its name in transformers: "qwen2"."""
        return self.family.model_type

    def config(self) -> dict[str, Any]:
        """The dictionary of a config.json from which transformers builds this architecture."""
        own = {name: value for name, value in vars(self).items() if name != "family"}
        if self.family.qkv_bias is not None:  # fixed in the code of transformers, not a setting
            own.pop("attention_bias")
        names = {"model_type": self.model_type, "architectures": [f"{self.family.prefix}ForCausalLM"]}
        return {**names, **own, "hidden_act": "silu"}

    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer: those that are quantised and get a LoRA."""
        f, hidden, inner = self.family, self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        qkv = (q, kv, kv) if len(f.qkv) == 3 else (q + 2 * kv,)
        gate_up = (inner, inner) if len(f.gate_up) == 2 else (2 * inner,)
        return (
            *(Linear(name, size, hidden, self.attention_bias) for name, size in zip(f.qkv, qkv, strict=True)),
            Linear(f.out, hidden, q, False),
            *(Linear(name, size, hidden, False) for name, size in zip(f.gate_up, gate_up, strict=True)),
            Linear(f.down, hidden, inner, False),
        )

    def parameters(self) -> int:
        """The number of parameters; an embedding that is the head as well counts once."""
        return self._linear_parameters() + self._other_parameters()

    def _linear_parameters(self) -> int:
        return self.num_hidden_layers * sum(m.out_features * m.in_features for m in self.linears())

    def _other_parameters(self) -> int:
        """Embedding, head, norms and biases: what stays in 16 bits."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        biases = sum(m.out_features for m in self.linears() if m.bias)
        norms = 2 * self.hidden_size + len(self.family.head_norms) * self.head_dim
        return embeddings + self.hidden_size + self.num_hidden_layers * (norms + biases)

    def weight_bytes(self, quantization: str = "nf4", width: int = 2, budget: float = 0.10) -> int:
        """Bytes of the frozen weights.

        Args:
            quantization (`str`): "none", "nf4", or "dynamic" (NF4 with some layers in 16 bits), of which this is the
                upper bound: NF4 and the whole budget.
            width (`int`): Bytes of an unquantised number.
            budget (`float`): What "dynamic" may add, as a share of NF4's bytes.
        """
        if quantization == "none":
            return self.parameters() * width
        matrices = sum(nf4_bytes(m.out_features, m.in_features) for m in self.linears())
        nf4 = self.num_hidden_layers * matrices + self._other_parameters() * width
        return round(nf4 * (1 + budget)) if quantization == "dynamic" else nf4

    def lora_parameters(self, rank: int, targets: tuple[str, ...] | None = None) -> int:
        """Parameters of a LoRA (Hu et al. 2021, section 4.1) of `rank` on `targets`, all linear layers if None."""
        matrices = [m for m in self.linears() if targets is None or m.name in targets]
        return self.num_hidden_layers * rank * sum(m.out_features + m.in_features for m in matrices)

    def largest_tensor_bytes(self, width: int = 2) -> int:
        """Bytes of the largest single weight, with `width` bytes per number."""
        return width * max(
            self.vocab_size * self.hidden_size, *(m.out_features * m.in_features for m in self.linears())
        )
