"""The presets but the workshop model: each model's shapes, and the numbers that it is trained with."""

from dataclasses import replace
from functools import partial

from nbhelpers.architecture import Architecture
from nbhelpers.models import families
from nbhelpers.models.tags import THINK

from .cards import (
    CARDS_7B,
    CARDS_14B,
    CARDS_32B,
    CARDS_70B,
    CARDS_PHI4,
    CARDS_SMALL,
    CARDS_THINKING,
    CARDS_THINKING_7B,
    CARDS_THINKING_32B,
)
from .preset import BOXED_PROMPT, Preset

# what the models of one release have in common
_llama3 = partial(
    Architecture, families.LLAMA, vocab_size=128256, rope_theta=500000.0, rms_norm_eps=1e-5,
    max_position_embeddings=131072,
)  # fmt: skip
_qwen25 = partial(Architecture, families.QWEN2, attention_bias=True, rope_theta=1000000.0)
_qwen3 = partial(
    Architecture, families.QWEN3, rope_theta=1000000.0, num_key_value_heads=8, head_dim=128, vocab_size=151936,
    max_position_embeddings=40960,
)  # fmt: skip
_QWEN25_7B = _qwen25(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, head_dim=128, vocab_size=152064, tie_word_embeddings=False,
)  # fmt: skip
_QWEN25_32B = _qwen25(
    hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
    num_key_value_heads=8, head_dim=128, vocab_size=152064, tie_word_embeddings=False,
)  # fmt: skip

_thinking = partial(Preset, system_prompt=BOXED_PROMPT, tags=THINK, temperature=0.6, max_completion_length=2048)
TABLE = {
    preset.name: preset
    for preset in (
        Preset(
            "qwen2.5-0.5b", "Qwen2.5 0.5B Instruct", "Qwen/Qwen2.5-0.5B-Instruct",
            _qwen25(
                hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                num_key_value_heads=2, head_dim=64, vocab_size=151936, tie_word_embeddings=True,
            ),
            # planned, not measured: 64 answers of up to 512 tokens a step, which should take a T4 some 9 s, so that all
            # of the notebook takes it 20 to 30 minutes; the learning rate is the 1.5B's
            questions_per_step=8, max_completion_length=512, learning_rate=5e-5, max_steps=150,
        ),
        Preset(
            "qwen2.5-1.5b", "Qwen2.5 1.5B Instruct", "Qwen/Qwen2.5-1.5B-Instruct",
            _qwen25(
                hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                num_key_value_heads=2, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
            ),
            # measured (benchmarks/results/real.json); with 4 questions a step and 3e-5 it learned about half as much in
            # the same time, and with 16 and 1e-4 it began to lose the form after 60 steps
            questions_per_step=16, learning_rate=5e-5, max_steps=110, cards=CARDS_SMALL,
        ),
        Preset(
            "qwen2.5-3b", "Qwen2.5 3B Instruct", "Qwen/Qwen2.5-3B-Instruct",
            _qwen25(
                hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                num_key_value_heads=2, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
            ),
            cards=CARDS_SMALL,
        ),
        Preset(
            "qwen2.5-7b", "Qwen2.5 7B Instruct", "Qwen/Qwen2.5-7B-Instruct", _QWEN25_7B,
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=CARDS_7B,
        ),
        Preset(
            "qwen2.5-14b", "Qwen2.5 14B Instruct", "Qwen/Qwen2.5-14B-Instruct",
            replace(_QWEN25_32B, intermediate_size=13824, num_hidden_layers=48),
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=CARDS_14B,
        ),
        Preset(
            "qwen2.5-32b", "Qwen2.5 32B Instruct", "Qwen/Qwen2.5-32B-Instruct", _QWEN25_32B,
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=CARDS_32B,
        ),
        _thinking(
            "qwen3-0.6b", "Qwen3 0.6B", "Qwen/Qwen3-0.6B",
            _qwen3(
                hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                tie_word_embeddings=True,
            ),
            notebook=False, cards=CARDS_THINKING,
        ),
        _thinking(
            "qwen3-1.7b", "Qwen3 1.7B", "Qwen/Qwen3-1.7B",
            _qwen3(
                hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                tie_word_embeddings=True,
            ),
            cards=CARDS_THINKING,
        ),
        _thinking(
            "qwen3-4b", "Qwen3 4B", "Qwen/Qwen3-4B",
            _qwen3(
                hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                tie_word_embeddings=True,
            ),
            cards=CARDS_THINKING,
        ),
        _thinking(
            "qwen3-8b", "Qwen3 8B", "Qwen/Qwen3-8B",
            _qwen3(
                hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                tie_word_embeddings=False,
            ),
            notebook=False, lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=CARDS_THINKING_7B,
        ),
        Preset(
            "llama-3.2-1b", "Llama 3.2 1B Instruct", "meta-llama/Llama-3.2-1B-Instruct",
            _llama3(
                hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
            ),
            gated=True, notebook=False, cards=CARDS_SMALL,
        ),
        Preset(
            "llama-3.2-3b", "Llama 3.2 3B Instruct", "meta-llama/Llama-3.2-3B-Instruct",
            _llama3(
                hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
            ),
            gated=True, cards=CARDS_SMALL,
        ),
        Preset(
            "llama-3.1-8b", "Llama 3.1 8B Instruct", "meta-llama/Llama-3.1-8B-Instruct",
            _llama3(
                hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
            ),
            gated=True, lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=CARDS_7B,
        ),
        Preset(
            "llama-3.3-70b", "Llama 3.3 70B Instruct", "meta-llama/Llama-3.3-70B-Instruct",
            _llama3(
                hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
            ),
            gated=True, lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=CARDS_70B,
        ),
        Preset(
            "mistral-7b", "Mistral 7B Instruct v0.3", "mistralai/Mistral-7B-Instruct-v0.3",
            Architecture(
                families.MISTRAL, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=32768,
                tie_word_embeddings=False, rope_theta=1000000.0, rms_norm_eps=1e-5,
            ),
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=CARDS_7B,
        ),
        Preset(
            "phi-4", "Phi-4 14B", "microsoft/phi-4",
            Architecture(
                families.PHI3, hidden_size=5120, intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40,
                num_key_value_heads=10, head_dim=128, vocab_size=100352, tie_word_embeddings=False,
                max_position_embeddings=16384, rope_theta=250000.0, rms_norm_eps=1e-5,
            ),
            lora_rank=16, lora_alpha=16, learning_rate=5e-6,
                        cards=CARDS_PHI4,
        ),
        _thinking(
            "r1-distill-qwen-7b", "DeepSeek R1 Distill Qwen 7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
            replace(_QWEN25_7B, rope_theta=10000.0, max_position_embeddings=131072),
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=CARDS_THINKING_7B,
        ),
        _thinking(
            "r1-distill-qwen-32b", "DeepSeek R1 Distill Qwen 32B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
            replace(_QWEN25_32B, max_position_embeddings=131072, rms_norm_eps=1e-5),
            lora_rank=16, lora_alpha=16, learning_rate=5e-6, cards=CARDS_THINKING_32B,
        ),
    )
}  # fmt: skip
