"""LoRA matrices of a layer's groups, stacked in one launch, and products without autograd."""

from contextlib import contextmanager

import interpreter
import pytest
import torch
from engine_models import make, prompts
from matmul_cases import layer

from nbhelpers import kernels
from nbhelpers.engines.forward import Decoder
from nbhelpers.engines.kv_cache import KVCache
from nbhelpers.kernels import adapters
from nbhelpers.kernels.adapters import by_layer


def groups(dtype=torch.float32, ranks=(8, 16), **how):
    """Two layers of three groups: Q, K and V, of which K has no LoRA; two without one; one alone."""
    return [
        [
            tuple(layer(64, out, dtype, rank, lora=rank > 0, **how) for out, rank in ((40, r), (24, 0), (24, 2 * r))),
            (layer(64, 16, dtype, lora=False, **how), layer(64, 48, dtype, lora=False, **how)),
            (layer(48, 64, dtype, r, **how),),
        ]
        for r in ranks
    ]


class TestStacked:
    __test__ = interpreter.ON

    @pytest.mark.parametrize("ranks", [(8, 16), (3, 5)], ids=["even", "odd"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_as_group_by_group(self, dtype, ranks):
        layers = groups(ranks=ranks, master=torch.float32)
        with kernels.use("triton"):
            stacked = by_layer(layers, torch.empty(0, dtype=dtype))
            for step in range(2):  # an optimizer has written new numbers by the second
                for i in (1, 0):  # each shares the buffer with the others
                    for parts, (a, b) in zip(layers[i], stacked(i), strict=True):
                        wanted = kernels.triton.lora_stack.stack_adapters(parts, dtype)
                        if wanted[0] is None:
                            assert a is None and b is None
                            continue
                        assert a.dtype == b.dtype == dtype
                        assert a.equal(wanted[0]) and b.equal(wanted[1])
                for part in layers[step][0]:
                    if part.lora_a is not None:
                        part.lora_a.data.mul_(2), part.lora_b.data.sub_(1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_products_with_them_and_without_autograd_are_the_same_numbers(self, dtype):
        """Of a group, packed or not, and of an MLP; with a bias, quantised, and one layer without LoRA."""
        qkv, _, (narrow,) = groups(dtype, quantised=True)[0]
        gate_up, down = (layer(64, 48, dtype, quantised=True), layer(64, 48, dtype, lora=False, quantised=True)), narrow
        x, residual = torch.randn(2, 7, 64).to(dtype), torch.randn(2, 7, 64).to(dtype)
        with kernels.use("triton"):
            wanted = kernels.lora_linear_group(x, qkv), kernels.lora_mlp(x, gate_up, down, residual)
            with torch.no_grad():
                first, *rest = by_layer([[qkv, gate_up, (down,)]], x)(0)
                for adapters, more in ((None, None), (first, tuple(rest))):
                    got = kernels.lora_linear_group(x, qkv, adapters=adapters)
                    packed = kernels.lora_linear_group(x, qkv, None, True, adapters)
                    assert all(a.equal(b) for a, b in zip(got, wanted[0], strict=True))
                    assert packed.equal(torch.cat(wanted[0], dim=-1))
                    assert kernels.lora_mlp(x, gate_up, down, residual, adapters=more).equal(wanted[1])

    def test_norm_and_rotation_without_autograd_are_the_same_numbers(self):
        x, weight = torch.randn(2, 3, 64), torch.rand(64)
        q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16)
        cos, sin = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
        with kernels.use("triton"):
            wanted = [*kernels.rms_norm(x, weight, 1e-6, x), *kernels.rope(q.clone(), k.clone(), cos, sin)]
            with torch.no_grad():
                got = [*kernels.rms_norm(x, weight, 1e-6, x), *kernels.rope(q.clone(), k.clone(), cos, sin)]
                assert all(a.equal(b) for a, b in zip(got, wanted, strict=True))
                leaf, before = q.clone().requires_grad_(), q.clone()
                turned, _ = kernels.rope(leaf, k.clone(), cos, sin)
                assert turned.equal(wanted[2]) and leaf.equal(before) and not turned.requires_grad

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["llama", "phi3"])
    def test_a_prompt_of_a_whole_model_is_as_with_torch(self, name):
        """In one piece, and in two on rows that are not in order."""
        model, ids, found = make(name, four_bit=True), torch.tensor(prompts(n=40, longest=1)[:24]).view(2, 12), []
        for backend in ("torch", "triton"):
            with kernels.use(backend):
                cache = KVCache(decoder := Decoder(model))
                for rows, width in (([0, 1], 12), ([1, 0], 7)):
                    cache.allocate(2, 16, 10**9)
                    for at in range(0, 12, width):
                        piece = ids[:, at : at + width]
                        positions = torch.arange(at, at + piece.shape[1])[None]
                        found.append(decoder.hidden(piece, positions, cache.prompt(rows, at)))
        assert decoder.adapters is not None
        for wanted, got in zip(found[:3], found[3:], strict=True):
            assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_in_the_interpreter():
    interpreter.run(__file__, "TestStacked")


def test_the_launch_is_on_the_card_of_the_matrices(monkeypatch):
    """Which need not be the current one."""
    inside = []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    monkeypatch.setattr(adapters, "device_of", device_of)
    monkeypatch.setattr(kernels.reference, "layer_adapters", lambda *_: lambda layer: list(inside))
    like = torch.zeros(2)
    stacked = by_layer([], like)
    assert not inside and stacked(0) == [like.device]


def test_who_stacks_for_himself():
    """torch, and Triton where the matrices are not all alike or where there are none."""
    assert by_layer(groups(), torch.empty(0)) is None
    if kernels.triton is None:
        return
    with kernels.use("triton"):
        assert by_layer(groups(), torch.empty(0)) is not None
        assert by_layer([[(layer(8, 8, lora=False),)]], torch.empty(0)) is None
        assert by_layer(groups() + groups(torch.float16), torch.empty(0)) is None
