"""RMSNorm, RoPE and SwiGLU: the references by gradcheck and against transformers, Triton's against the references.

The checks that end in `_error` take a device and a dtype and are called on a GPU by benchmarks/kernels.py --check too:
each returns the largest error of our side against an fp64 reference and that of stock's arithmetic, forward and
backward together, relative to the reference's norm.
"""

import interpreter  # first: before anything that imports triton
import pytest
import torch
import torch.nn.functional as F

from nbhelpers import kernels
from nbhelpers.kernels import HeadNorms, reference

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
# hidden sizes of Qwen2.5-1.5B, Llama-3.1-8B and Phi-4 cut by 64, primes, and one past a power of two
WIDTHS = [24, 64, 80, 31, 3, 129]
ROWS = [(1,), (7,), (2, 3)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def wide(t):
    """An fp64 copy that learns if t does."""
    return t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t


def run(function, args, grads=None):
    """The outputs of `function` and the gradients of every input that wants one, for random or given output grads."""
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = grads or [torch.randn_like(out) for out in outputs]
    leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    with_grad = torch.autograd.grad(outputs, leaves, [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)])
    return [*outputs, *with_grad], grads


def error(results, truth) -> float:
    """The largest relative error among several tensors."""
    return max(
        ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(results, truth, strict=True)
    )


def compare(function, oracle, args, dtype):
    """`function` on Triton against `oracle` in fp64, forward and backward."""
    grads = None
    with kernels.use("triton"):
        ours, grads = run(function, args)
    truth, _ = run(oracle, [wide(t) for t in args], [g.double() for g in grads])
    assert all(out.dtype == dtype for out in ours)
    assert error(ours, truth) < TOLERANCE[dtype]


def through(function):
    """`function` of results of other operations instead of leaves, so that storage is reused."""
    return lambda *args: function(*(t * 1 if isinstance(t, torch.Tensor) and t.requires_grad else t for t in args))


def tables(tokens, rotary, dtype=torch.float32, batch=1, scaling=1.0, factor=None):
    """cos and sin [batch, tokens, rotary] as transformers hands them: each frequency twice, scaled."""
    frequencies = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    if factor is not None:  # Llama 3 and longrope divide each frequency by a factor of its own
        frequencies = frequencies / torch.linspace(1, factor, len(frequencies))
    positions = torch.arange(batch * tokens).view(batch, tokens, 1) * 1.0
    angles = torch.cat([positions * frequencies] * 2, dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def randn(*shape, dtype=torch.float32, device="cpu", learns=True):
    return torch.randn(*shape, device=device).to(dtype).requires_grad_(learns)


class TestInterpreted:
    """Triton against the references in fp64."""

    __test__ = interpreter.ON

    @FLOATS
    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("rows", ROWS)
    def test_rms_norm(self, rows, width, dtype):
        x, residual = randn(*rows, width, dtype=dtype), randn(*rows, width, dtype=dtype)
        for weight in (randn(width, dtype=dtype), randn(width, dtype=dtype, learns=False)):
            compare(kernels.rms_norm, reference.rms_norm, (x, weight, 1e-6, residual), dtype)
            compare(kernels.rms_norm, reference.rms_norm, (x, weight, 1e-6), dtype)

    def test_rms_norm_sums_the_weight_gradient_over_many_rows(self):
        x, weight = randn(2100, 4), randn(4)  # more rows than one program's share: 512 rows of 4 a step
        compare(kernels.rms_norm, reference.rms_norm, (x, weight, 1e-6), torch.float32)

    def test_rms_norm_of_strided_rows_and_mixed_dtypes(self):
        x = randn(3, 5, 48)
        half = lambda function: lambda x, *rest: function(x[..., 7:31], *rest)  # noqa: E731
        compare(half(kernels.rms_norm), half(reference.rms_norm), (x, randn(24), 1e-5), torch.float32)
        turned = lambda function: lambda x, *rest: function(x.transpose(0, 2), *rest)  # noqa: E731
        compare(turned(kernels.rms_norm), turned(reference.rms_norm), (x, randn(3), 1e-5), torch.float32)
        with kernels.use("triton"):
            s, y = kernels.rms_norm(randn(2, 8, dtype=torch.float16), randn(8, dtype=torch.float16), 1e-6, randn(2, 8))
        assert s.dtype == y.dtype == torch.float32  # an fp32 residual stream stays one

    def test_rms_norm_of_nothing(self):
        with kernels.use("triton"):
            y = kernels.rms_norm(randn(0, 8), randn(8), 1e-6)
        y.sum().backward()
        assert y.shape == (0, 8)

    @FLOATS
    @pytest.mark.parametrize("heads, kv_heads, size, rotary", [(12, 2, 8, 8), (5, 1, 16, 12), (1, 1, 2, 2)])
    @pytest.mark.parametrize("tokens", [1, 5])
    def test_rope(self, tokens, heads, kv_heads, size, rotary, dtype):
        """Strided views as the projections give them; one position table for the batch, and one a row."""
        q, k = (randn(2, tokens, n, size, dtype=dtype) for n in (heads, kv_heads))
        for batch in (1, 2):
            cos, sin = tables(tokens, rotary, batch=batch, scaling=1.2, factor=8)
            view = lambda f, c=cos, s=sin: lambda q, k: f(q.transpose(1, 2), k.transpose(1, 2), c.to(q), s.to(q))  # noqa: E731
            in_fp64 = view(reference.rope, cos.to(dtype).double(), sin.to(dtype).double())
            compare(through(view(kernels.rope)), in_fp64, (q, k), dtype)
            if batch == 1:  # leaves are copied first
                compare(view(kernels.rope), in_fp64, (q, k), dtype)

    @FLOATS
    def test_rope_packed(self, dtype):
        qkv, (cos, sin) = randn(2, 5, 7 * 8, dtype=dtype), tables(5, 6, dtype)
        packed = lambda f, c=cos, s=sin: lambda qkv: f(qkv, c, s, 3, 2)  # noqa: E731
        oracle = packed(reference.rope_packed, cos.double(), sin.double())
        compare(through(packed(kernels.rope_packed)), oracle, (qkv,), dtype)
        compare(packed(kernels.rope_packed), oracle, (qkv,), dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("rotary, learns", [(16, False), (16, True), (12, False)])  # one launch, or two
    def test_head_norms(self, rotary, learns, dtype):
        """The norm of each head before its rotation: values, gradients of q and k, and of the weights if they learn."""
        q, k = randn(2, 4, 5, 16, dtype=dtype), randn(2, 2, 5, 16, dtype=dtype)
        weights = tuple((randn(16) + 1).detach().to(dtype).requires_grad_(learns) for _ in range(2))
        cos, sin = tables(5, rotary, batch=2)

        def with_norms(function, cos, sin):
            def call(q, k, *learned):
                return function(q, k, cos, sin, HeadNorms(*(learned or [w.to(q.dtype) for w in weights]), 1e-6))

            return call

        args = (q, k, *weights) if learns else (q, k)
        oracle = with_norms(reference.rope, cos.double(), sin.double())
        compare(with_norms(kernels.rope, cos, sin), oracle, args, dtype)

    @pytest.mark.parametrize("rotary", [16, 12])
    def test_head_norms_packed(self, rotary):
        qkv, weights = randn(2, 5, 8 * 16), [randn(16).detach() + 1 for _ in range(2)]
        cos, sin = tables(5, rotary)

        def with_norms(function, cos, sin):
            def call(qkv):
                norms = HeadNorms(*(w.to(qkv.dtype) for w in weights), 1e-6)
                return function(qkv, cos, sin, 4, 2, norms)

            return call

        oracle = with_norms(reference.rope_packed, cos.double(), sin.double())
        compare(with_norms(kernels.rope_packed, cos, sin), oracle, (qkv,), torch.float32)
        compare(through(with_norms(kernels.rope_packed, cos, sin)), oracle, (qkv,), torch.float32)

    def test_rope_works_in_place_on_what_is_not_a_leaf(self):
        leaf, other = randn(1, 2, 3, 8), randn(1, 1, 3, 8, learns=False)
        kept, inner = leaf.detach().clone(), leaf * 1
        with kernels.use("triton"):
            q, k = kernels.rope(inner, other, *tables(3, 8))
            assert q.data_ptr() == inner.data_ptr() and k.data_ptr() == other.data_ptr()
            kernels.rope(leaf, other, *tables(3, 8))
            assert torch.equal(leaf, kept), "a leaf that learns was overwritten"
            square = leaf * 1
            twice, once_more = kernels.rope(square, square, *tables(3, 8))
        assert torch.equal(twice, once_more)

    @FLOATS
    @pytest.mark.parametrize("width", [1, 35, 140, 1025])
    @pytest.mark.parametrize("rows", ROWS)
    def test_swiglu(self, rows, width, dtype):
        gate, up = randn(*rows, width, dtype=dtype), randn(*rows, width, dtype=dtype)
        both = randn(*rows, 2 * width, dtype=dtype)
        for wrap in (through, lambda function: function):
            compare(wrap(kernels.swiglu), reference.swiglu, (gate, up), dtype)
            compare(wrap(kernels.swiglu_packed), reference.swiglu_packed, (both,), dtype)

    def test_swiglu_of_strided_and_shared_inputs(self):
        both = randn(3, 5, 22)
        halves = lambda f: lambda t: f(t[..., :11], t[..., 11:])  # noqa: E731
        compare(through(halves(kernels.swiglu)), halves(reference.swiglu), (both,), torch.float32)
        compare(through(lambda t: kernels.swiglu(t, t)), lambda t: reference.swiglu(t, t), (both,), torch.float32)
        spread = lambda f: lambda g, u: f(g.expand(3, 5, 22), u)  # noqa: E731
        compare(through(spread(kernels.swiglu)), spread(reference.swiglu), (randn(5, 22), both), torch.float32)

    def test_swiglu_backward_writes_over_its_inputs_and_autograd_knows(self):
        gate, up = randn(2, 6), randn(2, 6)
        with kernels.use("triton"):
            g, u = gate * 1, up * 1
            h = kernels.swiglu(g, u)
            before = g.detach().clone()
            h.sum().backward(retain_graph=True)
            assert not torch.equal(g, before), "the storage was not reused"
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                h.sum().backward()
            g, u = gate * 1, up * 1
            total = (g * g).sum()  # somebody else keeps g
            kernels.swiglu(g, u).sum().backward()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                total.backward()
            kept = gate.detach().clone()
            kernels.swiglu(gate, up).sum().backward()
        assert torch.equal(gate, kept), "a leaf was overwritten"

    def test_fp16_saturates_where_stock_overflows(self):
        big = torch.full((2, 8), 6e4, dtype=torch.float16)
        with kernels.use("triton"):
            s, y = kernels.rms_norm(big, torch.ones(8, dtype=torch.float16), 1e-6, big)
            h = kernels.swiglu(big, -big)
            infinite = kernels.swiglu(torch.full_like(big, -torch.inf), torch.full_like(big, torch.inf))
        assert (big + big).isinf().all() and (F.silu(big) * big).isinf().all()
        assert (s == 65504).all() and torch.allclose(y, torch.ones_like(y))
        assert (h == -65504).all()
        assert infinite.isfinite().all()
        for function, args in (
            (reference.rms_norm, (big, torch.ones(8).half(), 1e-6, big)),
            (reference.swiglu, (big, big)),
        ):
            out = function(*args)
            assert all(t.isfinite().all() for t in (out if isinstance(out, tuple) else (out,)))


def test_in_the_interpreter():
    interpreter.run(__file__, "TestInterpreted")


def test_references_by_gradcheck():
    x, residual, weight = (randn(*shape, dtype=torch.float64) for shape in ((2, 3, 5), (2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda *a: reference.rms_norm(a[0], a[1], 1e-6, a[2]), (x, weight, residual))
    assert torch.autograd.gradcheck(lambda *a: reference.rms_norm(*a, 1e-6), (x, weight))
    q, k = randn(2, 3, 4, 6, dtype=torch.float64), randn(2, 1, 4, 6, dtype=torch.float64)
    cos, sin = tables(4, 4, torch.float64, scaling=1.3)
    assert torch.autograd.gradcheck(lambda q, k: reference.rope(q, k, cos, sin), (q, k))
    qkv = randn(2, 4, 5 * 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: reference.rope_packed(t, cos, sin, 3, 1), (qkv,))
    assert torch.autograd.gradcheck(reference.swiglu, (x, residual))
    assert torch.autograd.gradcheck(reference.swiglu_packed, (randn(3, 8, dtype=torch.float64),))


def longrope(hidden_size, partial):
    """Phi-4-mini's kind of rope_parameters: a factor for each frequency, and only some of the channels rotate."""
    pairs = int(hidden_size // 4 * partial) // 2
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(pairs)], "long_factor": [2.0] * pairs}
    return {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": partial,
            "original_max_position_embeddings": 64, **factors}  # fmt: skip


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("name, rope", [("qwen2", None), ("llama", LLAMA3), ("phi3", longrope(64, 0.75))])
def test_references_are_what_transformers_computes(name, rope):
    """Bit for bit in fp32, on the rotary tables of the model's own class."""
    from importlib import import_module

    module = import_module(f"transformers.models.{name}.modeling_{name}")
    prefix = {"qwen2": "Qwen2", "llama": "Llama", "phi3": "Phi3"}[name]
    extra = {"rope_parameters": rope} if rope else {}
    if name == "phi3":
        extra |= {"max_position_embeddings": 256, "original_max_position_embeddings": 64, "pad_token_id": 0}
    config = getattr(module, f"{prefix}Config")(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, **extra)
    x = torch.randn(2, 5, 64)
    cos, sin = getattr(module, f"{prefix}RotaryEmbedding")(config)(x, torch.arange(5)[None])
    assert cos.shape[-1] == (12 if name == "phi3" else 16)
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    for ours, stock in zip(reference.rope(q, k, cos, sin), module.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(ours, stock)
    norm = getattr(module, f"{prefix}RMSNorm")(64, 1e-5)
    torch.nn.init.normal_(norm.weight)
    assert torch.allclose(reference.rms_norm(x, norm.weight, 1e-5), norm(x), rtol=0, atol=1e-6)


def test_use_chooses_and_complains():
    x = torch.randn(2, 4)
    with kernels.use("torch"):
        kernels.swiglu(x, x)
        with kernels.use(None):
            assert kernels._for(x) is reference
    with pytest.raises(ValueError, match='"torch", "triton" or None'), kernels.use("cuda"):
        pass
    with pytest.raises(KeyError), kernels.use("torch"):
        raise KeyError
    assert kernels._for(x) is reference, "the choice outlived its block"


# ------------------------------------------------------------------- for benchmarks/kernels.py --check, and here


def stock_rms_norm(x, weight, eps, residual):
    """As transformers computes it: the sum and the normed rows are each rounded to x's dtype."""
    s = x + residual
    normed = s.float() * torch.rsqrt(s.float().pow(2).mean(-1, keepdim=True) + eps)
    return s, weight * normed.to(s.dtype)


def stock_rope(q, k, cos, sin):
    def turn(x):
        x1, x2 = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(1)

    return turn(q), turn(k)


def elementwise_errors(device: str, dtype: torch.dtype, tokens: int = 64, hidden: int = 64, inner: int = 140) -> dict:
    """{kernel: (our error, stock's error)} against fp64, forward and backward, on a device and in a dtype."""
    make = lambda *shape: randn(*shape, dtype=dtype, device=device)  # noqa: E731
    cos, sin = (t.to(device) for t in tables(tokens, 16, dtype))
    cases = {
        "rms_norm": (kernels.rms_norm, stock_rms_norm, reference.rms_norm,
                     (make(1, tokens, hidden), make(hidden), 1e-6, make(1, tokens, hidden))),
        "swiglu": (kernels.swiglu, lambda g, u: F.silu(g) * u, reference.swiglu,
                   (make(tokens, inner), make(tokens, inner))),
        "rope": (kernels.rope, stock_rope, reference.rope, (make(1, 4, tokens, 16), make(1, 2, tokens, 16), cos, sin)),
    }  # fmt: skip
    errors = {}
    for name, (ours, stock, oracle, args) in cases.items():
        ours, grads = run(through(ours), args)
        truth, _ = run(oracle, [wide(t) for t in args], [g.double() for g in grads])
        errors[name] = (error(ours, truth), error(run(stock, args, grads)[0], truth))
    return errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_less_exact_than_stock(dtype):
    for name, (ours, stock) in elementwise_errors("cpu", dtype).items():
        assert ours <= stock * 1.01, name
