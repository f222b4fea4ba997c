"""with_kernels: the patched model computes what stock transformers + peft compute."""

import interpreter  # first: before anything that imports triton
import pytest
import torch
from patch_cases import ARCHITECTURES, CONFIGS, FOUR_BIT, batch, error, eval_logits, make, step, worst
from torch import nn

from nbhelpers import kernels
from nbhelpers.kernels import reference
from nbhelpers.models import patch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check_against_stock(name, four_bit, backend):
    model, inputs = make(name, four_bit=four_bit), batch()
    before = step(model, inputs)
    report = patch.with_kernels(model)
    assert report.linears == (8 if name == "phi3" else 14) and not report.left, str(report)
    with kernels.use(backend):
        patched = step(model, inputs)
    assert worst(patched, before, inputs["attention_mask"]) < 1e-4
    report.undo()
    after = step(model, inputs)
    assert torch.equal(after[0], before[0]), "undo left something behind"
    assert all(torch.equal(after[1][n], before[1][n]) for n in before[1])


def check_gradient_checkpointing(name, four_bit, reentrant, backend):
    model, inputs = make(name, four_bit=four_bit), batch()
    before = step(model, inputs)
    patch.with_kernels(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with kernels.use(backend):
        assert worst(step(model, inputs), before, inputs["attention_mask"]) < 1e-4


class TestInterpreted:
    __test__ = interpreter.ON

    @ARCHITECTURES
    @FOUR_BIT
    def test_logits_and_lora_gradients(self, name, four_bit):
        check_against_stock(name, four_bit, "triton")

    @pytest.mark.parametrize("name, four_bit, reentrant", [("qwen2", True, False), ("phi3", False, True)])
    def test_gradient_checkpointing(self, name, four_bit, reentrant):
        check_gradient_checkpointing(name, four_bit, reentrant, "triton")

    @pytest.mark.parametrize("name", ["llama", "phi3"])
    def test_a_layer_keeps_at_most_six_tenths_of_what_stock_keeps(self, name):
        """Bytes that autograd holds for one layer's backward, at a trained model's proportions, under autocast."""
        wide = dict(CONFIGS[name].to_dict(), intermediate_size=224)  # 3.5 times the hidden size
        model = make(name, four_bit=True, dtype=torch.bfloat16, config=type(CONFIGS[name]).from_dict(wide))
        inner, h = model.get_base_model().model, randn_bf16(1, 32, 64).requires_grad_()
        stock = saved_bytes(inner, h)
        patch.with_kernels(model)
        with kernels.use("triton"):
            assert saved_bytes(inner, h) < 0.45 * stock

    def test_fp16_stays_finite_where_stock_overflows(self):
        with kernels.use("triton"):
            check_fp16("qwen2", "cpu")


def randn_bf16(*shape):
    return torch.randn(*shape).to(torch.bfloat16)


def saved_bytes(inner: nn.Module, h: torch.Tensor) -> int:
    """What autograd keeps of the first layer's forward, besides its input and its weights."""
    tables = inner.rotary_emb(h, torch.arange(h.shape[1])[None])
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t  # by address, and held so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        inner.layers[0](h, position_embeddings=tables, attention_mask=None)
    for t in (h, *tables, *inner.layers[0].parameters()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in kept.values() if t.is_floating_point())


def test_in_the_interpreter():
    interpreter.run(__file__, "TestInterpreted")


@ARCHITECTURES
@FOUR_BIT
def test_logits_and_lora_gradients(name, four_bit):
    check_against_stock(name, four_bit, "torch")


@ARCHITECTURES
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    check_gradient_checkpointing(name, False, reentrant, "torch")


def model_errors(name: str, device: str, dtype: torch.dtype, four_bit: bool, seed: int = 1) -> tuple[float, float]:
    """(patched model's error, stock's error) of logits and LoRA gradients against the same model in fp64."""
    model, inputs = make(name, four_bit=four_bit, dtype=dtype, device=device, seed=seed), batch(device)
    truth_model = make(name, four_bit=False, dtype=torch.float64)
    load_exactly(truth_model, model)
    truth = step(truth_model, {key: value.cpu() for key, value in inputs.items()})
    move = lambda result: (result[0].cpu(), {n: g.cpu() for n, g in result[1].items()})  # noqa: E731
    mask = inputs["attention_mask"].cpu()
    stock = move(step(model, inputs))
    patch.with_kernels(model)
    return worst(move(step(model, inputs)), truth, mask), worst(stock, truth, mask)


def load_exactly(truth: nn.Module, model: nn.Module) -> None:
    """Every parameter of `model` into the fp64 `truth`, 4-bit weights as what they stand for."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in truth.named_parameters():
            module, _, leaf = name.rpartition(".")
            source = modules[module].get_parameter(leaf)
            if source.dtype == torch.uint8:
                source = reference.dequantize_nf4(source, source.quant_state, torch.float32)
            parameter.copy_(source)


@pytest.mark.parametrize("four_bit", [False, True])
def test_no_less_exact_than_stock_in_bf16(four_bit):
    """The largest error of one random model says little: ours over stock's has a deviation of 0.2 over seeds. Of sums
    over 12 models it is 0.05, around 0.95, with torch 2.10 and 2.13, so that 1.1 is three deviations away."""
    errors = [model_errors("llama", "cpu", torch.bfloat16, four_bit, seed) for seed in range(12)]
    ours, stock = zip(*errors, strict=True)
    assert sum(ours) < 1.1 * sum(stock)


def planted(name: str, device: str, size: float):
    """An fp16 model whose gate and up give activations of `size`, so that their product is size^2; in fp64 too."""
    models = [make(name, lora=False, dtype=dtype, device=device).eval() for dtype in (torch.float16, torch.float64)]
    for model in models:
        for layer in model.model.layers:
            mlp = layer.mlp
            for weight in [mlp.gate_up_proj.weight] if name == "phi3" else [mlp.gate_proj.weight, mlp.up_proj.weight]:
                with torch.no_grad():  # a few channels carry it, as in trained models; the output stays moderate
                    weight[:: weight.shape[0] // 4].mul_(size / 4)
            with torch.no_grad():
                mlp.down_proj.weight.mul_(1e-4)
    load_exactly(models[1], models[0])
    return models


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_fp16_stays_finite_where_stock_overflows(name):
    check_fp16(name, "cpu")


def check_fp16(name: str, device: str) -> None:
    """Products of 1e6 come out right, products of 1e8 finite; stock overflows at both."""
    inputs = batch(device)
    real = inputs["attention_mask"].bool()
    for size in (1e3, 1e4):
        model, truth = planted(name, device, size)
        assert not eval_logits(model, inputs)[real].isfinite().all(), "stock does not overflow: nothing is shown"
        patch.with_kernels(model)
        logits = eval_logits(model, inputs)[real]
        assert logits.isfinite().all()
        if size == 1e3:
            assert error(logits, eval_logits(truth, inputs)[real]) < 0.02
