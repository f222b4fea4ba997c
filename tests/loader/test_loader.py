"""Load, forward, backward, save, reload, refuse: all four architectures, small and random, on a CPU."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from loader_cases import load
from safetensors.torch import load_file, save_file

from nbhelpers import loader, presets
from nbhelpers.kernels import ahead
from nbhelpers.loader import calibration, request, stream
from nbhelpers.models import chat, quantize, smoke

ARCHITECTURES = ("qwen2.5-1.5b", "llama-3.1-8b", "mistral-7b", "phi-4")
TOKENS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("small")


def logits(model):
    for module in filter(quantize.is_nf4, model.modules()):  # transformers' own: an eval-mode forward on a CPU with
        module.support_avx512bf16_for_cpu = False  # avx512_bf16 would repack and round it
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def train_step(model):
    """One step that moves every trained weight."""
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    model.zero_grad()


def stand_in(preset):
    return smoke.make(preset.name, preset.architecture)


@pytest.mark.parametrize("quantization", ["nf4", "dynamic", "none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_load_train_save_reload(name, quantization, tmp_path, capsys):
    preset = presets.get(name)
    model, tokenizer = loader.load(preset, quantization=quantization, progress=False)
    summary = capsys.readouterr().out
    assert f"{name} · {quantization}" in summary and "trainable" in summary and "GB on cpu" in summary
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id and not model.training

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    for target in preset.lora_targets:  # Phi-4's fused ones too
        assert sum(f"{target}.lora_A" in n for n in trained) == preset.architecture.num_hidden_layers
    count, trainable = quantize.parameters(model)
    lora = preset.architecture.lora_parameters(preset.lora_rank)
    assert (count, trainable) == (preset.architecture.parameters() + lora, lora)

    linears = [m for m in model.modules() if quantize.is_nf4(m)]
    assert bool(linears) == (quantization != "none")
    assert quantization != "dynamic" or len(linears) == len(model.nbhelpers_choice.layers) - len(
        model.nbhelpers_choice.kept
    )
    before = logits(model)
    train_step(model)
    train_step(model)  # B is 0 at first, so A has no gradient until the second
    after = logits(model)
    assert torch.isfinite(after).all() and not torch.allclose(before, after)

    loader.save_adapter(model, tmp_path / "adapter")
    again = load(tmp_path / "adapter", None)  # base, choice and adapter from the folder alone
    assert torch.equal(logits(again), after)
    onto = load(preset, quantization, calibration=model.nbhelpers_choice)
    assert torch.equal(logits(loader.load_adapter(onto, tmp_path / "adapter")), after)
    assert all(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)


def test_kernels_are_begun_before_weights_are_read(monkeypatch):
    order = []
    read = stream.fill
    monkeypatch.setattr(ahead, "begin", lambda device: order.append(device.type))
    monkeypatch.setattr(stream, "fill", lambda *args: (order.append("weights"), read(*args)))
    loader.load(presets.get("qwen2.5-1.5b"), progress=False)
    assert order == ["cpu", "weights"]


def test_without_quantization_it_is_the_model_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = load(folder, "none")
    assert torch.equal(logits(model), logits(reference))
    assert model.get_base_model().lm_head.weight is model.get_base_model().model.embed_tokens.weight  # tied
    assert model.generation_config.eos_token_id == reference.generation_config.eos_token_id


@pytest.mark.parametrize("name", ["llama-3.1-8b", "phi-4"])
def test_nf4_is_that_of_bitsandbytes(name):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    folder = stand_in(presets.get(name))
    reference = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    assert torch.allclose(logits(load(presets.get(name))), logits(reference), atol=1e-5)


def test_a_checkpoint_that_bitsandbytes_quantised_loads_as_it_is(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    preset = presets.get("llama-3.1-8b")
    skipped = ["lm_head", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp"]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skipped
    )
    reference = AutoModelForCausalLM.from_pretrained(stand_in(preset), quantization_config=config, dtype=torch.float32)
    reference.save_pretrained(tmp_path)
    smoke.make_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, "dynamic")  # its own choice stands
    base = model.get_base_model()
    assert torch.equal(logits(model), logits(reference))
    four = {name.removesuffix(".base_layer") for name, module in base.named_modules() if quantize.is_nf4(module)}
    assert "model.layers.1.self_attn.k_proj" in four and "model.layers.1.self_attn.q_proj" not in four
    assert not any("layers.0.mlp" in name for name in four) and len(four) == 14 - 4
    train_step(model)
    with pytest.raises(ValueError, match="in 4 bits already"):
        load(tmp_path, "none")


def test_the_bytes_are_those_counted():
    """In 16 bits, as on a card: to 3 % of what the config says, dynamic within its budget."""
    for name in ARCHITECTURES:
        preset = presets.get(name)
        counted = preset.architecture.weight_bytes("nf4") + preset.lora_bytes()
        model = load(preset, dtype=torch.bfloat16)
        assert quantize.nbytes(model) == pytest.approx(counted, rel=0.03)
        dynamic = load(preset, "dynamic", dtype=torch.bfloat16)
        extra = dynamic.nbhelpers_choice.extra_bytes
        assert 0 < extra <= 0.1 * preset.architecture.weight_bytes("nf4")
        assert quantize.nbytes(dynamic) - quantize.nbytes(model) == pytest.approx(extra, rel=0.03)


def test_shards_make_no_difference(tmp_path):
    preset = presets.get("phi-4")
    smoke.write(preset.architecture, tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path)), logits(load(preset)))


HOST_PEAK = """
import sys, threading, time, torch
from pathlib import Path
from safetensors.torch import load_file
import bitsandbytes  # what an import takes is not the loader's
from nbhelpers.loader import hub, stream

def resident():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmRSS")).split()[1]) * 1024

def peak_of(work):
    most, done = [start := resident()], threading.Event()
    def watch():
        while not done.wait(0.001):
            most.append(resident())
    thread = threading.Thread(target=watch); thread.start()
    held = work(); done.set(); thread.join()
    return max(most) - start

source = hub.find(sys.argv[1])
model = stream.empty_model(source, torch.float32)
card = torch.device("meta")  # stands for a card: what is sent there leaves the host
load = lambda: stream.fill(model, source.weights(), card, torch.float32, torch.float32, lambda n: None)
files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
naive = lambda: [load_file(file)[key].clone() for file in files for key in load_file(file)]
print(peak_of(load), peak_of(naive), max(file.stat().st_size for file in files))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_host_holds_less_than_a_shard_and_a_half(tmp_path):
    """All resident memory, mapped pages too; and the measurement sees a loader that holds everything."""
    architecture = replace(
        presets.get("mistral-7b").architecture, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=4096,
    )  # fmt: skip
    smoke.write(architecture, tmp_path, shard_bytes=24_000_000)
    out = subprocess.run(
        [sys.executable, "-c", HOST_PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    ours, naive, largest_shard = map(int, out.split())
    assert ours < 1.5 * largest_shard < naive


def test_gradients_after_an_eval_forward():
    """bitsandbytes on a CPU with AVX512-BF16 repacks weights in the first eval forward; gradients are wrong after it.

    On such a CPU this fails without the cure; on every CPU it shows that the cure is in place on each layer.
    """
    import bitsandbytes as bnb

    assert "support_avx512bf16_for_cpu" in vars(bnb.nn.Linear4bit(64, 64))  # else the cure cures nothing
    model = load(presets.get("qwen2.5-1.5b"))
    four = [module for module in model.modules() if quantize.is_nf4(module)]
    assert len(four) == 14 and all(module.support_avx512bf16_for_cpu is False for module in four)

    dense = load(presets.get("qwen2.5-1.5b"), "none")  # the same numbers without 4-bit layers
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, module in dense.named_modules():
            if quantize.is_nf4(modules.get(name)):
                module.weight.copy_(quantize.unpack(modules[name].weight))
        for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
            if p.requires_grad:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
                q.copy_(p)
    logits(model)  # the eval forward
    for each in (model, dense):
        each.train()
        each(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), name


def test_where_the_card_computes_in_fp16():
    model = load(presets.get("phi-4"), dtype=torch.float16)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.float16), (False, torch.uint8)}
    four = [module for module in model.modules() if quantize.is_nf4(module)]
    assert all(m.compute_dtype == m.weight.quant_state.dtype == torch.float16 for m in four)
    assert model.config.dtype == torch.float16


def test_every_weight_can_be_trained(tmp_path):
    model, tokenizer = loader.load(presets.get("workshop"), progress=False)
    assert model.nbhelpers_base.id == "workshop" and len(tokenizer) == model.config.vocab_size == 372  # no stand-in
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    train_step(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, "none", lora_rank=0)), logits(model))
    assert {p.dtype for p in load(tmp_path, "none", lora_rank=0, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_train_all_is_every_weight_in_the_dtype_that_the_card_computes_in(monkeypatch):
    preset = presets.get("qwen2.5-1.5b")
    assert {p.dtype for p in load(preset, None, train="all").parameters()} == {torch.float32}  # a CPU
    resolved = request.resolve(preset, train="all")
    assert (resolved.lora_rank, resolved.quantization) == (0, "none")
    for card, wanted in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):  # no gradient scaling
        monkeypatch.setattr(request.gpu, "compute_dtype", lambda card=card: card)
        assert request.resolve(preset, train="all", device="cuda").weight_dtype == wanted
        assert request.resolve(preset, lora_rank=0, quantization="none", device="cuda").weight_dtype == torch.float32
    for wrong in ({"train": "some"}, {"train": "all", "lora_rank": 8}, {"train": "all", "quantization": "nf4"}):
        with pytest.raises(ValueError, match="train="):
            request.resolve(preset, **wrong)


def test_dynamic_on_the_workshop_model_is_never_worse():
    """Tokens of its own kind: questions that it was not measured on, with its own answers."""
    preset = presets.get("workshop")

    def questions(first: int):
        return [
            [{"role": "user", "content": f"Which is bigger? {a}.9 or {a}.{b}?"}]
            for a in range(first, 9, 2)
            for b in (11, 35)
        ]

    dense, tokenizer = loader.load(preset, progress=False)
    prompts = torch.tensor([chat.prompt_ids(tokenizer, messages) for messages in questions(2)])
    held_out = [dense.generate(prompts, max_new_tokens=16, min_new_tokens=16, do_sample=False)]
    kl = {}
    for quantization in ("nf4", "dynamic"):
        model = load(preset, quantization, lora_rank=1, calibration=questions(1)).get_base_model()
        kl[quantization] = quantize.divergence(dense, model, held_out)
    assert 0 < kl["dynamic"] <= kl["nf4"]


def test_lora_arguments():
    model = load(presets.get("llama-3.1-8b"), lora_rank=2, lora_alpha=8, lora_dropout=0.1, lora_targets=["q_proj"])
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (2, 8, 0.1, {"q_proj"})
    everything = load(stand_in(presets.get("phi-4"))).peft_config["default"]  # no preset: all linear layers, rank 16
    assert (everything.r, everything.lora_alpha, everything.target_modules) == (
        16,
        16,
        set(presets.get("phi-4").lora_targets),
    )


def test_calibration_is_the_callers(tmp_path):
    preset = presets.get("qwen2.5-1.5b")
    prompts = ["What is 2 + 2?", [{"role": "user", "content": "And 3 + 3?"}]]
    choice = load(preset, "dynamic", calibration=prompts, budget=0.2).nbhelpers_choice
    assert choice.tokens < 120 and choice.budget == 0.2
    choice.save(tmp_path / "choice.json")
    again = load(preset, "dynamic", calibration=tmp_path / "choice.json")
    assert again.nbhelpers_choice == choice
    four = [name for name, module in again.get_base_model().named_modules() if quantize.is_nf4(module)]
    assert len(four) == 14 - len(choice.kept)
    plain = load(preset, "nf4", calibration=choice)  # a preset on a small card turns to nf4; the choice then waits
    assert plain.nbhelpers_choice is None
    assert calibration.token_ids(smoke.make_tokenizer()).shape == (1, 512)


def test_measured_from_disk_is_measured_in_memory():
    """In NF4 with 16-bit matrices from the shards, or all in memory: the same choice, to rounding."""
    preset = presets.get("mistral-7b")
    streamed = load(preset, "dynamic").nbhelpers_choice
    dense = load(preset, "none").get_base_model()
    for module in list(dense.modules()):  # without the adapter
        for name, child in module.named_children():
            if hasattr(child, "base_layer"):
                setattr(module, name, child.base_layer)
    choice = quantize.choose(dense, [calibration.token_ids(smoke.make_tokenizer())])
    assert choice.kept == streamed.kept and choice.model_bytes == streamed.model_bytes
    for a, b in zip(choice.layers, streamed.layers, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-3)
    assert choice.kl_nf4 == pytest.approx(streamed.kl_nf4, rel=1e-2)
    with pytest.raises(ValueError, match="already in NF4: pass weights="):
        quantize.choose(load(preset).get_base_model(), [TOKENS])


def test_it_generates():
    model, tokenizer = loader.load(presets.get("llama-3.1-8b"), progress=False)
    batch = tokenizer(["Hi", "What is 2 + 2?"], padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= batch["input_ids"].shape[1] + 4


def test_a_second_copy_of_a_tied_head_is_not_loaded(folder):
    file = folder / "model.safetensors"
    before = logits(load(folder))
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(320, 64)}, file)
    assert torch.equal(logits(load(folder)), before)
