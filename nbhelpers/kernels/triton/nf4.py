"""NF4 weights back to 16 bits, with the double quantisation undone in the same launch (QLoRA, arXiv:2305.14314).

A weight W [out, in] lies row by row as 4-bit codes, two to a byte (the first in the high half), in blocks of 64:

    W[i] = code[q[i]] * absmax[i // 64]                     code: the 16 NF4 levels in [-1, 1], fp32

and the absmax of the blocks, one fp32 for every 64 weights, is itself kept in 8 bits in blocks of 256:

    absmax[b] = code8[q8[b]] * absmax8[b // 256] + offset   code8: 256 levels, fp32

bitsandbytes undoes this in three launches with an fp32 absmax in between; here it is one. Multiplication and addition
are not fused, so the result is bit for bit bitsandbytes' own: training and generation see the same weights.
"""

from functools import cache
from math import ceil

import torch
import triton
import triton.language as tl

from .common import ceil_div

# Which dequantisation is faster: ours, 0.57 of bitsandbytes' time (nf4 rows of benchmarks/results/kernels.json).
DEQUANTIZE_WITH = "triton"  # or "bitsandbytes"

# Up to how many rows bitsandbytes' fused product beats dequantising and cuBLAS. On an H200 (few_rows rows of the same
# file; us, fused / ours):
#                  1 row      4 rows     8 rows     32 rows    64 rows    multiprocessors' waves
#   1536 x 1536    6 / 12    10 / 12    17 / 11    21 / 11    17 / 12    0.18
#   1536 x 8960   15 / 28    37 / 28    38 / 27    39 / 28    39 / 28    0.18
#   4096 x 4096   12 / 30    26 / 30    42 / 29    43 / 30    42 / 29    0.48
#   5120 x 5120   16 / 38    36 / 38    55 / 38    55 / 39    57 / 40    0.61
#   4096 x 14336  31 / 76    77 / 77   109 / 77   111 / 78   113 / 81    0.48
#   5120 x 17920  47 / 117  116 / 117  166 / 118  165 / 116  168 / 119   0.61
#   8960 x 1536   12 / 25    26 / 25    26 / 25    28 / 26    37 / 26    1.06
#  14336 x 4096   30 / 77    67 / 77    67 / 77    70 / 75   109 / 76    1.70
#  17920 x 5120   44 / 113  121 / 113  122 / 113  130 / 112  165 / 115   2.12
# At 1 row it is twice as fast, at 4 the two are even (517 us together for either), with less memory moved by it. With
# more rows it wins where the output, 64 columns to a multiprocessor, nearly fills its
# last wave, until its tile of 32 rows is full.
FEW_ROWS, FEW_ROWS_FILLED, FILLED = 4, 32, 0.8

BLOCKS = 64  # blocks of 64 weights that one program undoes


@triton.jit
def _dequantize_kernel(
    packed_ptr,  # uint8 [n / 2]
    code_ptr,  # fp32 [16]
    absmax_ptr,  # uint8 [blocks] if NESTED, else fp32 [blocks]
    code8_ptr,  # fp32 [256]
    absmax8_ptr,  # fp32 [blocks / 256]
    offset_ptr,  # fp32 []
    out_ptr,  # [n - first_block * BLOCK_SIZE]
    first_block,  # where to begin
    n,  # weights up to where to go
    n_bytes,  # the same in packed bytes; an argument, for the compiler to see that it allows loads of 16 bytes
    NESTED: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_SIZE // 2
    # int64: the vocabulary matrix of a large model has more than 2^31 weights' bytes
    block = first_block + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    real = block * BLOCK_SIZE < n
    if NESTED:
        q8 = tl.load(absmax_ptr + block, mask=real, other=0).to(tl.int32)
        scale = tl.load(code8_ptr + q8) * tl.load(absmax8_ptr + block // NESTED_BLOCK_SIZE, mask=real, other=0.0)
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=real, other=0.0)

    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    q = tl.load(packed_ptr + byte, mask=byte < n_bytes, other=0).to(tl.int32)
    first = tl.load(code_ptr + (q >> 4)) * scale[:, None]
    second = tl.load(code_ptr + (q & 15)) * scale[:, None]

    weight = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    out = weight - first_block * BLOCK_SIZE
    value = tl.interleave(first, second)
    tl.store(out_ptr + out, value.to(out_ptr.dtype.element_ty), mask=weight < n)


def dequantize_nf4(weight, quant_state, dtype, out=None, rows=None):
    """The dense weight behind an NF4 tensor.

    Args:
        weight: uint8 [out * in / 2, 1], `Linear4bit.weight` (another storage type is read as bytes).
        quant_state: its bitsandbytes `QuantState`, nested or not.
        dtype: of the result, 16 or 32 bits.
        out: a contiguous [out, in] tensor of `dtype` to write into, or None for a new one.
        rows: (first, last) to undo only rows first <= i < last; first * in must be a multiple of the block size.

    Returns: [out, in], or [last - first, in].
    """
    if quant_state.quant_type != "nf4":
        raise ValueError(f"this weight is {quant_state.quant_type!r}, not NF4: load it with bnb_4bit_quant_type='nf4'")
    height, width = quant_state.shape
    first, last = rows or (0, height)
    if first * width % quant_state.blocksize:
        raise ValueError(f"row {first} of width {width} does not begin a block of {quant_state.blocksize} weights")
    if out is None:
        out = torch.empty(last - first, width, dtype=dtype, device=weight.device)
    if out.shape != (last - first, width) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {(last - first, width)} {dtype}, not {tuple(out.shape)} {out.dtype}")
    packed = _bytes(weight)
    if DEQUANTIZE_WITH == "bitsandbytes" and rows is None:
        return _dequantize_with_bitsandbytes(packed, quant_state, out)

    state, nested = quant_state, quant_state.state2
    blocks = ceil_div((last - first) * width, state.blocksize)
    _dequantize_kernel[(ceil_div(blocks, BLOCKS),)](
        packed,
        state.code,
        state.absmax,
        nested.code if nested else state.code,
        nested.absmax if nested else state.absmax,
        state.offset if nested else state.code,
        out,
        first * width // state.blocksize,
        last * width,
        (last * width + 1) // 2,
        NESTED=nested is not None,
        NESTED_BLOCK_SIZE=nested.blocksize if nested else 1,
        BLOCK_SIZE=state.blocksize,
        BLOCKS=BLOCKS,
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add would round once where bitsandbytes rounds twice
    )
    return out


def _bytes(weight):
    """The weight's storage as bytes; bitsandbytes' parameter class is left behind, it makes every look at it slow."""
    weight = weight.as_subclass(torch.Tensor)
    return weight if weight.dtype == torch.uint8 else weight.detach().reshape(-1).view(torch.uint8)


def _dequantize_with_bitsandbytes(packed, state, out):
    from bitsandbytes.functional import dequantize_blockwise

    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    torch.ops.bitsandbytes.dequantize_4bit.out(
        packed, absmax, state.blocksize, state.quant_type, state.shape, out.dtype, out=out
    )
    return out


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the card; 1 for a CPU, where Triton's interpreter runs one program after the other."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def few_rows(x, quant_state) -> bool:
    """Whether x [rows, in] is few enough rows for bitsandbytes' fused product to be the faster way."""
    if not x.is_cuda:
        return False
    if x.shape[0] <= FEW_ROWS:
        return True
    waves = quant_state.shape[0] / (64 * multiprocessors(x.device))
    return x.shape[0] <= FEW_ROWS_FILLED and waves / ceil(waves) >= FILLED


def matmul_few_rows(x, weight, quant_state, bias=None):
    """x W^T + bias for few rows, the weight never written out: bitsandbytes' fused kernel.

    x [rows, in] 16-bit; weight, quant_state as above; bias [out] in x's dtype. Returns [rows, out].
    """
    import bitsandbytes  # noqa: F401  (registers the operator)

    state, nested = quant_state, quant_state.state2
    x, packed = x.contiguous(), _bytes(weight).view(-1, 1)
    if nested is None:
        return torch.ops.bitsandbytes.gemm_4bit(
            x, packed, state.shape, state.absmax, state.blocksize, state.quant_type, bias=bias
        )
    return torch.ops.bitsandbytes.gemm_4bit(
        x,
        packed,
        state.shape,
        nested.absmax,
        state.blocksize,
        state.quant_type,
        bias=bias,
        absmax_8bit=state.absmax,
        absmax_code=nested.code,
        absmax_offset=state.offset,
    )
