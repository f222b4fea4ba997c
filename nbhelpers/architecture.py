"""The shapes of a decoder, and what they weigh: parameters and bytes counted from a config.json, nothing loaded.

GB is 10^9 bytes everywhere in this package.
"""

from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import NamedTuple

GB = 1e9


class Linear(NamedTuple):
    name: str
    out_features: int
    in_features: int
    bias: bool


def nf4_bytes(out_features: int, in_features: int) -> int:
    """Bytes of one NF4 matrix with double quantisation (Dettmers et al. 2023, QLoRA, section 3).

    Half a byte a weight; one 8-bit absmax for 64 weights; one fp32 for 256 absmax; the two code books and the mean.
    """
    weights = out_features * in_features
    blocks = ceil(weights / 64)
    return ceil(weights / 2) + blocks + 4 * ceil(blocks / 256) + 4 * (16 + 256 + 1)


@dataclass(frozen=True)
class Architecture:
    """The numbers that decide how large a decoder is. Field names are those of its config.json."""

    model_type: str  # "qwen2" | "llama" | "mistral" | "phi3"
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool = False  # on q, k and v (Qwen2)
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    KNOWN = ("qwen2", "llama", "mistral", "phi3")  # no annotation: a constant, not a field

    @classmethod
    def from_config(cls, config: dict) -> "Architecture":
        """From the dictionary in a config.json. Raises ValueError for a model type it cannot count."""
        if config.get("model_type") not in cls.KNOWN:
            raise ValueError(f"cannot count a {config.get('model_type')!r}; only {', '.join(cls.KNOWN)}")
        heads = config["num_attention_heads"]
        given = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
        rope = config.get("rope_parameters") or {}  # where transformers 5 writes what was `rope_theta`
        return cls(
            **{
                "num_key_value_heads": heads,
                "head_dim": config["hidden_size"] // heads,
                "tie_word_embeddings": False,
                "rope_theta": rope.get("rope_theta", 10000.0),
                **given,
                "attention_bias": config["model_type"] == "qwen2" or config.get("attention_bias", False),
            }
        )

    def config(self) -> dict:
        """The dictionary of a config.json that transformers turns into this architecture."""
        own = asdict(self)
        if self.model_type == "qwen2":  # both are fixed in its code
            own.pop("attention_bias")
        names = {"qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "phi3": "Phi3"}
        return {**own, "architectures": [f"{names[self.model_type]}ForCausalLM"], "hidden_act": "silu"}

    def linears(self) -> tuple[Linear, ...]:
        """The matrices of one layer, those that are quantised and get a LoRA."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        bias = self.attention_bias
        if self.model_type == "phi3":
            return (
                Linear("qkv_proj", q + 2 * kv, hidden, bias),
                Linear("o_proj", hidden, q, False),
                Linear("gate_up_proj", 2 * inner, hidden, False),
                Linear("down_proj", hidden, inner, False),
            )
        return (
            Linear("q_proj", q, hidden, bias),
            Linear("k_proj", kv, hidden, bias),
            Linear("v_proj", kv, hidden, bias),
            Linear("o_proj", hidden, q, False),
            Linear("gate_proj", inner, hidden, False),
            Linear("up_proj", inner, hidden, False),
            Linear("down_proj", hidden, inner, False),
        )

    def parameters(self) -> int:
        return self._linear_parameters() + self._other_parameters()

    def _linear_parameters(self) -> int:
        return self.num_hidden_layers * sum(m.out_features * m.in_features for m in self.linears())

    def _other_parameters(self) -> int:
        """Embedding, head, norms and biases: what stays in 16 bits."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        biases = sum(m.out_features for m in self.linears() if m.bias)
        return embeddings + self.hidden_size + self.num_hidden_layers * (2 * self.hidden_size + biases)

    def weight_bytes(self, quantization: str = "nf4", width: int = 2, budget: float = 0.10) -> int:
        """Bytes of the frozen weights; `width` is the size of an unquantised number.

        "dynamic" is its upper bound: NF4 and the whole of its budget.
        """
        if quantization == "none":
            return self.parameters() * width
        matrices = sum(nf4_bytes(m.out_features, m.in_features) for m in self.linears())
        nf4 = self.num_hidden_layers * matrices + self._other_parameters() * width
        return round(nf4 * (1 + budget)) if quantization == "dynamic" else nf4

    def lora_parameters(self, rank: int, targets: tuple[str, ...] | None = None) -> int:
        """Numbers in a LoRA (Hu et al. 2021, section 4.1) of `rank` on `targets`, all linear layers if None."""
        matrices = [m for m in self.linears() if targets is None or m.name in targets]
        return self.num_hidden_layers * rank * sum(m.out_features + m.in_features for m in matrices)

    def largest_tensor_bytes(self, width: int = 2) -> int:
        return width * max(
            self.vocab_size * self.hidden_size, *(m.out_features * m.in_features for m in self.linears())
        )
