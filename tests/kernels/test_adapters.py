"""LoRA matrices of a layer's groups, stacked in one launch, and products without autograd."""

import interpreter
import pytest
import torch
from matmul_cases import layer

from nbhelpers import kernels
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


def test_in_the_interpreter():
    interpreter.run(__file__, "TestStacked")


def test_who_stacks_for_himself():
    """torch, and Triton where the matrices are not all alike or where there are none."""
    assert by_layer(groups(), torch.empty(0)) is None
    if kernels.triton is None:
        return
    with kernels.use("triton"):
        assert by_layer(groups(), torch.empty(0)) is not None
        assert by_layer([[(layer(8, 8, lora=False),)]], torch.empty(0)) is None
        assert by_layer(groups() + groups(torch.float16), torch.empty(0)) is None
