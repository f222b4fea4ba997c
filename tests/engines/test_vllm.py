"""vLLM on the training model's tensors, as far as it can be looked at without a GPU.

Where vLLM is not installed, its base classes stand in as empty ones: what is tested is what we answer when it asks.
"""

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from engine_models import ARCHITECTURES, make
from torch import nn

from nbhelpers import gpu, host
from nbhelpers.engines import Sampling, choose, vllm
from nbhelpers.models import families, projection

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
OURS = ("nbhelpers.engines.vllm.model", "nbhelpers.engines.vllm.lora")
STAND_INS = {
    "vllm.model_executor.layers.linear": ("LinearBase", "LinearMethodBase"),
    "vllm.model_executor.layers.quantization": (),
    "vllm.model_executor.layers.quantization.base_config": ("QuantizationConfig",),
    "vllm.model_executor.layers.vocab_parallel_embedding": (
        "VocabParallelEmbedding", "ParallelLMHead", "UnquantizedEmbeddingMethod"),
    "vllm.model_executor.model_loader": (),
    "vllm.model_executor.model_loader.base_loader": ("BaseModelLoader",),
    "vllm.lora.request": (),
}  # fmt: skip


@pytest.fixture
def ours(monkeypatch):
    """(vllm_model, vllm_lora), imported beside stand-ins for what they import of vLLM."""
    for name, classes in STAND_INS.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        module = ModuleType(name)
        for leaf in classes:
            base = nn.Module if leaf in ("LinearBase", "VocabParallelEmbedding", "ParallelLMHead") else object
            setattr(module, leaf, type(leaf, (base,), {}))
        monkeypatch.setitem(sys.modules, name, module)
    tables = sys.modules["vllm.model_executor.layers.vocab_parallel_embedding"]
    tables.ParallelLMHead = type("ParallelLMHead", (tables.VocabParallelEmbedding,), {})
    config = sys.modules["vllm.model_executor.layers.quantization.base_config"].QuantizationConfig
    config.__init__ = lambda self: setattr(self, "packed_modules_mapping", dict(PACKED))
    sys.modules["vllm.model_executor.layers.quantization"].register_quantization_config = lambda _: lambda cls: cls
    sys.modules["vllm.model_executor.model_loader"].register_model_loader = lambda _: lambda cls: cls
    request = type(
        "LoRARequest", (), {"__init__": lambda self, name, lora_int_id, path: vars(self).update(id=lora_int_id)}
    )
    sys.modules["vllm.lora.request"].LoRARequest = request
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tuple(importlib.import_module(name) for name in OURS)
    for name in OURS:
        sys.modules.pop(name, None)


def storages(module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


# ---- the weights ----


@pytest.mark.parametrize("four_bit", [False, True], ids=["16 bits", "nf4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_layer_of_vllm_is_ours_where_it_lies(ours, name, four_bit):
    """vLLM's fused layers give what ours give, from the same storage, biases included; ours are not touched."""
    vllm_model, _ = ours
    linear_base = sys.modules["vllm.model_executor.layers.linear"].LinearBase
    model = families.unwrap(make(name, four_bit=four_bit))
    before = [p.data_ptr() for p in model.parameters()]
    config = vllm_model.SharedWeights.from_config({})
    if name == "phi3":
        config.packed_modules_mapping.update({leaf: [leaf] for leaf in PACKED})
    leaves = {"qkv_proj": 1 if name == "phi3" else 3, "o_proj": 1}
    for leaf, count in leaves.items():
        layer, prefix = linear_base(), f"model.layers.1.self_attn.{leaf}"
        with vllm_model.built_on(model):
            method = config.get_quant_method(layer, prefix)
        method.create_weights(layer, 64, [64], weight_loader=None)
        parts = [model.get_submodule(part) for part in vllm_model.parts_of(prefix, config.packed_modules_mapping)]
        assert len(parts) == count == len(list(layer.parameters()))
        assert storages(layer) == {vllm_model.linear(part).weight.untyped_storage().data_ptr() for part in parts}
        x = torch.randn(5, vllm_model.linear(parts[0]).in_features)
        with torch.no_grad():
            wanted = torch.cat([vllm_model.linear(part)(x) for part in parts], dim=-1)
            torch.testing.assert_close(method.apply(layer, x), wanted, atol=1e-5, rtol=1e-5)
    assert [p.data_ptr() for p in model.parameters()] == before


def test_a_fused_layer_may_be_half_in_16_bits(ours):
    """Dynamic 4-bit keeps single layers: a q_proj in 16 bits beside k and v in NF4."""
    vllm_model, _ = ours
    model = families.unwrap(make("qwen2", four_bit=True, lora=False))
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Linear(64, 64).requires_grad_(False)
    layer = nn.Module()
    method = vllm_model.SharedLinear([attention.q_proj, attention.k_proj, attention.v_proj])
    method.create_weights(layer)
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = torch.cat([part(x) for part in (attention.q_proj, attention.k_proj, attention.v_proj)], dim=-1)
        torch.testing.assert_close(method.apply(layer, x), wanted, atol=1e-5, rtol=1e-5)


def test_tables_and_norms_are_shared_and_vllms_biases_are_gone(ours):
    vllm_model, _ = ours
    tables = sys.modules["vllm.model_executor.layers.vocab_parallel_embedding"]
    linear_base = sys.modules["vllm.model_executor.layers.linear"].LinearBase
    model = families.unwrap(make("qwen2"))
    theirs = nn.Module()
    theirs.model, theirs.lm_head = nn.Module(), tables.ParallelLMHead()
    theirs.model.embed_tokens, theirs.model.norm = tables.VocabParallelEmbedding(), nn.LayerNorm(64, bias=False)
    theirs.model.layers = nn.ModuleList([nn.Module()])
    theirs.model.layers[0].self_attn = nn.Module()
    theirs.model.layers[0].self_attn.qkv_proj = fused = linear_base()
    fused.register_parameter("bias", nn.Parameter(torch.zeros(128)))
    with vllm_model.built_on(model):
        config = vllm_model.SharedWeights.from_config({})
        for table in (theirs.lm_head, theirs.model.embed_tokens):
            config.get_quant_method(table, "").create_weights(table, 64, [128])
        assert config.get_quant_method(nn.Module(), "model.layers.0.self_attn.attn") is None
        vllm_model.SharedLoader().load_weights(theirs, None)
    assert fused.bias is None
    assert theirs.model.embed_tokens.weight.data_ptr() == theirs.lm_head.weight.data_ptr()  # tied, as in Qwen2
    assert theirs.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert theirs.model.norm.weight.data_ptr() == model.model.norm.weight.data_ptr()
    theirs.model.norm = nn.LayerNorm(32, bias=False)
    with vllm_model.built_on(model), pytest.raises(ValueError, match=r"model.norm.weight is \(64,\), vLLM's \(32,\)"):
        vllm_model.SharedLoader().load_weights(theirs, None)


# ---- the adapter ----


class Manager:
    """The part of vLLM's LoRA manager that LoRASlot looks at, with buffers of rank 8 full of old numbers."""

    def __init__(self, shapes: dict[str, list[tuple[int, int]]]):
        self.packed_modules_mapping, self.lora_index_to_id, self.there = PACKED, [None], set()
        self.modules = {
            name: SimpleNamespace(
                lora_a_stacked=tuple(torch.full((1, 1, 8, i), 7.0, dtype=torch.bfloat16) for i, _ in parts),
                lora_b_stacked=tuple(torch.full((1, 1, o, 8), 7.0, dtype=torch.bfloat16) for _, o in parts),
            )
            for name, parts in shapes.items()
        }
        self._adapter_manager = self

    def add_dummy_lora(self, request, rank):
        self.there.add(request.id)

    def activate_adapter(self, adapter):
        self.lora_index_to_id[0] = adapter

    def list_adapters(self):
        return self.there


QKV, DOWN = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"


def test_the_slot_holds_the_adapter_as_it_is_now(ours):
    """A and lora_alpha / r times B in vLLM's type, zeros beyond the adapter's rank; the buffers stay where they are."""
    _, vllm_lora = ours
    model = make("qwen2").eval()
    inner = families.unwrap(model)
    manager = Manager({QKV: [(64, 64), (64, 32), (64, 32)], DOWN: [(128, 64)]})
    slot = vllm_lora.LoRASlot(manager)
    places = [b.data_ptr() for layer in manager.modules.values() for b in layer.lora_b_stacked]
    for _ in range(2):
        assert slot.update(inner).id == vllm_lora.ID
        for name, parts in {QKV: PACKED["qkv_proj"], DOWN: ["down_proj"]}.items():
            layer = manager.modules[name]
            for part, a, b in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
                module = inner.get_submodule(f"{name.rpartition('.')[0]}.{part}")
                torch.testing.assert_close(a[0, 0, :4], module.lora_A["default"].weight.bfloat16())
                torch.testing.assert_close(b[0, 0, :, :4], (2.0 * module.lora_B["default"].weight).bfloat16())
                assert not a[0, 0, 4:].any() and not b[0, 0, :, 4:].any()
        with torch.no_grad():  # as an optimizer does; the next update has it
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.add_(torch.randn_like(parameter))
    assert places == [b.data_ptr() for layer in manager.modules.values() for b in layer.lora_b_stacked]
    with model.disable_adapter():
        assert slot.update(inner) is None
    assert not any(b.any() for layer in manager.modules.values() for b in layer.lora_b_stacked)
    assert slot.update(inner) is not None
    manager.there.clear()
    with pytest.raises(RuntimeError, match="dropped the adapter"):
        slot.update(inner)


def test_an_adapter_that_vllm_cannot_follow_is_named(ours):
    _, vllm_lora = ours
    model = make("qwen2")
    slot = vllm_lora.LoRASlot(Manager({DOWN: [(128, 64)]}))
    families.unwrap(model).get_submodule(DOWN).lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"cannot follow {DOWN}: {projection.HOOKED}"):
        slot.update(families.unwrap(model))


def test_the_arguments_of_the_adapter(ours):
    _, vllm_lora = ours
    assert vllm_lora.settings(vllm_lora.adapted(families.unwrap(make("llama", lora=False)))) == {}
    found = vllm_lora.settings(vllm_lora.adapted(families.unwrap(make("phi3"))))
    assert found == {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8,  # r=4: vLLM's buffers come in steps
                     "lora_target_modules": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]}  # fmt: skip
    with pytest.raises(ValueError, match="512 at most"):
        vllm_lora.settings({"model.layers.0.mlp.down_proj": SimpleNamespace(r={"default": 513})})
    with pytest.raises(ValueError, match="on lm_head too"):
        vllm_lora.settings({"lm_head": SimpleNamespace(r={"default": 4})})


# ---- the settings ----


def test_the_memory_for_keys_and_values():
    """Two layers, 2 heads of 16, K and V in 16 bits: 256 bytes a token; vLLM gives it out 16 tokens at a time."""
    config = make("llama").config
    block = 16 * 256
    assert vllm.sizes(config, torch.bfloat16, 8, 100, 10**9) == (100, (8 * 7 + 1) * block)  # what 8 rows need
    assert vllm.sizes(config, torch.bfloat16, 8, 100, 30 * block) == (100, 30 * block)  # in waves
    assert vllm.sizes(config, torch.bfloat16, 8, None, 10**9) == (256, (8 * 16 + 1) * block)  # what the model can
    assert vllm.sizes(config, torch.bfloat16, 8, None, 5 * block) == (64, 5 * block)  # what fits
    for length in (100, None):
        with pytest.raises(MemoryError, match="keys and values"):
            vllm.sizes(config, torch.bfloat16, 8, length, block)
    with pytest.raises(ValueError, match="max_length=300, and the model can be 256"):
        vllm.sizes(config, torch.bfloat16, 8, 300, 10**9)


def test_the_arguments_of_vllm():
    found = vllm.settings("folder", torch.bfloat16, 40, 1024, 10**9, tokenizer=False, eager=False)
    assert found["compilation_config"]["cudagraph_capture_sizes"] == [1, 2, 4, 8, 12, 16, 24, 32, 40]
    assert (found["max_num_seqs"], found["max_model_len"], found["dtype"]) == (40, 1024, "bfloat16")
    assert found["max_num_batched_tokens"] == 2048 and found["skip_tokenizer_init"]
    few = vllm.settings("folder", torch.float16, 2, 64, 10**6, tokenizer=True, eager=True)
    assert few["compilation_config"] == {"mode": 0} and few["enforce_eager"]
    assert few["max_num_batched_tokens"] == 128 and not few["skip_tokenizer_init"]


def test_the_folder_has_a_config_and_no_weights(tmp_path):
    from transformers import AutoConfig

    model = families.unwrap(make("phi3", dtype=torch.bfloat16))
    vllm.write_folder(model, None, tmp_path, "nbhelpers")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["Phi3ForCausalLM"] and written["dtype"] == "bfloat16"
    assert written["quantization_config"] == {"quant_method": "nbhelpers"} and written["head_dtype"] == "float32"
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters
    assert getattr(model.config, "quantization_config", None) is None  # the training model's own stays as it was


def test_what_cannot_be_says_why(monkeypatch):
    half = make("qwen2", dtype=torch.bfloat16)
    assert vllm.why_not(make("qwen2")).startswith("its base weights are in float32")
    assert "lies on cpu" in vllm.why_not(half)
    assert "changes with the length" in vllm.why_not(
        make("llama", dtype=torch.bfloat16, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    )
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "unset it" in vllm.why_not(half)


def test_choosing_it(monkeypatch):
    """Without an Ampere the remedy, without vLLM the line that installs it; with both, why this model will not do."""
    model = make("qwen2", dtype=torch.bfloat16)
    monkeypatch.setattr(gpu, "card", lambda *_: None)
    with pytest.raises(host.CannotRun, match=r'no CUDA GPU.*engine="graph"'):
        choose("vllm", model)
    monkeypatch.setattr(gpu, "card", lambda *_: gpu.Card("Tesla T4", 15 * 10**9, (7, 5)))
    with pytest.raises(host.CannotRun, match=r"Tesla T4.*7\.5"):
        choose("vllm", model)
    monkeypatch.setattr(gpu, "card", lambda *_: gpu.Card("RTX 3060", 12 * 10**9, (8, 6)))
    monkeypatch.setattr(host, "version", lambda _: "0.26.0")
    with pytest.raises(ValueError, match="cannot decode this model: it lies on cpu"):
        choose("vllm", model)

    def missing(_):
        raise host.PackageNotFoundError

    monkeypatch.setattr(host, "version", missing)
    with pytest.raises(host.CannotRun, match=r"pip install -r requirements-vllm\.txt"):
        choose("vllm", model)


def test_another_version_is_warned_about(recwarn):
    vllm.warn_of_version("0.26.1")
    assert not recwarn
    for other in ("0.25.9", "0.27.0", "0.30.0"):
        with pytest.warns(UserWarning, match=rf"vllm {other} is outside the tested range 0.26"):
            vllm.warn_of_version(other)


# ---- what comes back ----


def test_a_completion_is_read_and_ends_where_the_others_end():
    engine = object.__new__(vllm.VLLMEngine)
    engine.tokenizer = None
    flat = SimpleNamespace(logprobs=[-0.1, -0.2, -0.3], start_indices=[0, 1, 2])

    def read(tokens, reason, **sampling):
        return engine._completion(
            SimpleNamespace(token_ids=tokens, logprobs=flat, stop_reason=reason), Sampling(max_tokens=3, **sampling)
        )

    assert read((5, 6, 7), None).reason == "length"
    stopped = read((5, 6, 7), 6, stop_ids=(6,))
    assert (stopped.token_ids, stopped.logprobs, stopped.reason) == ([5, 6], [-0.1, -0.2], "stop_id")
    flat.logprobs, flat.start_indices = [-0.1, -0.2], [0, 1]
    assert read((5, 6), "the end").reason == "stop_string"


def test_logits_are_divided_where_vllm_reports_them_and_not_again(ours, monkeypatch):
    """Raw log-probabilities: before penalty and filters, and so before vLLM's own temperature."""
    name = "vllm.model_executor.layers.logits_processor"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    layer_class = type("LogitsProcessor", (nn.Module,), {"scale": 1.0})
    sys.modules[name].LogitsProcessor = layer_class
    layer, wrapped = layer_class(), nn.Module()
    wrapped.add_module("base_layer", layer)  # as around an adapter of the head
    with pytest.raises(KeyboardInterrupt), ours[0].divided(nn.Sequential(wrapped, nn.Linear(2, 2)), 0.5):
        assert layer.scale == 2.0
        raise KeyboardInterrupt
    assert layer.scale == 1.0
    sys.modules["vllm"].SamplingParams = SimpleNamespace
    engine = object.__new__(vllm.VLLMEngine)
    for temperature, told in ((0.5, 1.0), (1.0, 1.0), (0.0, 0.0)):
        assert engine._parameters(Sampling(temperature=temperature), 1).temperature == told
    found = vllm.settings("folder", torch.bfloat16, 40, 1024, 10**9, tokenizer=False, eager=False)
    assert found["logprobs_mode"] == "raw_logprobs"


def test_the_adapter_is_not_written_into_an_engine_that_is_asleep():
    engine = object.__new__(vllm.VLLMEngine)
    engine.asleep = 10**9
    with pytest.raises(RuntimeError, match=r"asleep .* call wake\(\) first"):
        engine.update_adapter()
