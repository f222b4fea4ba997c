"""The table is right: published parameter counts, bytes as bitsandbytes really takes them, cards as data."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from nbhelpers import architecture, presets
from nbhelpers.models import families
from nbhelpers.models.chat import InUserTurn
from nbhelpers.models.tags import REASONING, THINK

PACKAGE = Path(presets.__file__).parents[1]
# as published with each checkpoint (the totals of its tensors)
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "phi-4": 14_659_507_200,
    "r1-distill-qwen-7b": 7_615_616_512,
    "r1-distill-qwen-32b": 32_763_876_352,
}


@pytest.fixture(autouse=True)
def no_smoke(monkeypatch):
    monkeypatch.delenv("NBHELPERS_SMOKE", raising=False)


def test_names():
    assert set(presets.names()) == {"workshop", *PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    assert presets.get(name).architecture.parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_complete(name):
    preset = presets.get(name)
    assert preset.name == name and preset.title and preset.hub_id
    assert preset.quantization in presets.QUANTIZATIONS
    assert set(preset.lora_targets) == {linear.name for linear in preset.architecture.linears()}
    assert preset.max_prompt_length + preset.max_completion_length <= preset.architecture.max_position_embeddings
    hash(preset)  # frozen through and through
    for gb in (8.3, 12.6, 15.8, 25.4, 42, 141):
        assert preset.on_card(gb).num_generations >= 2


def test_the_workshop_model_is_trained_whole():
    preset = presets.get("workshop")
    assert (preset.quantization, preset.lora_rank, preset.learning_rate) == ("none", 0, 5e-4)
    assert (preset.num_generations, preset.max_prompt_length, preset.max_completion_length) == (8, 96, 64)
    assert Path(preset.hub_id) == PACKAGE / "workshop"


@pytest.mark.parametrize("shape", [(64, 64), (96, 160), (7, 33), (512, 768)])
def test_nf4_bytes_are_what_bitsandbytes_takes(shape):
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True)
    parts = (packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert architecture.nf4_bytes(*shape) == sum(part.nbytes for part in parts)


def test_bytes_of_known_models():
    llama = presets.get("llama-3.1-8b").architecture
    assert llama.weight_bytes("none") == 2 * llama.parameters()
    assert llama.weight_bytes("nf4") / 1e9 == pytest.approx(5.70, abs=0.01)
    assert llama.weight_bytes("dynamic") == pytest.approx(1.1 * llama.weight_bytes("nf4"), rel=1e-6)
    assert llama.largest_tensor_bytes() == 128256 * 4096 * 2
    assert llama.lora_parameters(16) == 41_943_040
    assert llama.lora_parameters(16, ("q_proj",)) == 32 * 16 * (4096 + 4096)
    phi = presets.get("phi-4")
    assert phi.lora_bytes() == 4 * 40 * 16 * ((7680 + 5120) + (5120 + 5120) + (35840 + 5120) + (5120 + 17920))


def test_a_config_and_back():
    for name in presets.names():
        architecture = presets.get(name).architecture
        assert families.architecture(architecture.config()) == architecture
    short = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    short |= {"num_attention_heads": 4, "vocab_size": 320, "rope_parameters": {"rope_theta": 5e5}}
    found = families.architecture(short)
    assert (found.num_key_value_heads, found.head_dim, found.rope_theta) == (4, 16, 5e5)
    with pytest.raises(ValueError, match="cannot count a 'gpt2'"):
        families.architecture({"model_type": "gpt2"})


@pytest.mark.parametrize("name", presets.names())
def test_models_that_think_by_themselves_are_asked_in_their_own_way(name):
    """In their tags, in the user's turn, not at temperature 0, and with room for a thought on every card."""
    preset = presets.get(name)
    thinks = name.startswith(("qwen3", "r1-distill"))
    assert preset.tags == (THINK if thinks else REASONING)
    assert isinstance(preset.system_prompt, InUserTurn) == thinks and (preset.temperature > 0) == thinks
    for gb in (8, 12, 15, 24, 40) if thinks else ():
        assert preset.on_card(gb).max_completion_length >= 1024


def test_cards_are_data():
    preset = presets.get("llama-3.1-8b")
    assert preset.on_card(None) is preset
    t4 = preset.on_card(15.8)
    assert t4.quantization == "nf4" and t4.max_completion_length == 768
    assert preset.on_card(6.4) == preset.on_card(8.3)  # below the smallest: the smallest
    assert preset.on_card(80).max_completion_length > t4.max_completion_length
    assert preset.on_card(11.9) == preset.on_card(8.3) != preset.on_card(12)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r'no preset .*Did you mean presets.get\("qwen2.5-1.5b"\).*phi-4'):
        presets.get("qwen-1.5b")
    with pytest.raises(ValueError, match="There are: workshop"):
        presets.get("xxxxxxx")


@pytest.mark.parametrize("name", PUBLISHED)
def test_smoke_keeps_the_architecture(name, monkeypatch):
    real = presets.get(name)
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    smoke = presets.get(name)
    assert smoke.smoke and smoke.max_steps == 2 and smoke.on_card(15.8) == smoke
    assert smoke.architecture.parameters() < 200_000
    assert smoke.architecture.model_type == real.architecture.model_type
    assert smoke.architecture.tie_word_embeddings == real.architecture.tie_word_embeddings
    assert bool(smoke.lora_rank) == bool(real.lora_rank) and smoke.quantization == real.quantization
    monkeypatch.setenv("NBHELPERS_SMOKE", "0")
    assert presets.get(name) == real


def test_the_workshop_model_stays_itself_in_smoke(monkeypatch):
    real = presets.get("workshop")
    monkeypatch.setenv("NBHELPERS_SMOKE", "1")
    smoke = presets.get("workshop")
    assert smoke.smoke and smoke.max_steps < real.max_steps
    assert replace(smoke, smoke=False, max_steps=real.max_steps) == real


def test_the_switch_is_read_in_presets_alone():
    for file in PACKAGE.rglob("*.py"):
        strings = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        assert ("NBHELPERS_SMOKE" in strings) == (file == Path(presets.__file__)), file
