"""NF4 weights dequantised to 16 bits, double quantisation included, in one launch (QLoRA, arXiv:2305.14314).

A weight W [out, in] is stored row by row as 4-bit codes, two per byte (the first in the high half), in blocks of 64:

    W[i] = code[q[i]] * absmax[i // 64]                     code: the 16 NF4 levels in [-1, 1], fp32

and the absmax of the blocks, one fp32 for every 64 weights, is itself quantised to 8 bits in blocks of 256:

    absmax[b] = code8[q8[b]] * absmax8[b // 256] + offset   code8: 256 levels, fp32

bitsandbytes dequantises in three launches with an fp32 absmax in between; here it is one. Multiplication and addition
are not fused, so the result equals bitsandbytes' bit for bit: training and generation see the same weights.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from math import ceil, prod
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import MOST_PARTS, ceil_div, pad_to_three, tensor_cores, turing

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

# The faster dequantisation: ours takes 0.57 of bitsandbytes' time (nf4 rows of benchmarks/results/kernels.json).
DEQUANTIZE_WITH = "triton"  # or "bitsandbytes"

# Up to how many rows bitsandbytes' fused product is faster than dequantising and cuBLAS. On an H200 (few_rows rows of
# the same file; us, fused / ours):
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
# At 1 row the fused product is twice as fast; at 4 the two are even (517 us in total for either), but it moves less
# memory. With more rows it wins where the output, 64 columns per multiprocessor, nearly fills its last wave, until its
# tile of 32 rows is full.
FEW_ROWS, FEW_ROWS_FILLED, FILLED = 4, 32, 0.8

# A T4 has a fifteenth of that bandwidth, and writing the dense weight costs it far more: there the product is fused as
# far as bitsandbytes' own rule for Turing says (`_fused_on_turing`), which was made by measurement on a T4.
SMALL_WEIGHT = 4 * 2**20  # numbers

MOST_FEW_ROWS = 320  # `few_rows` is False beyond, whatever the card and the weight

BLOCKS = 64  # blocks of 64 weights that each program dequantises


@triton.jit
def _undo(
    packed_ptr, code_ptr, absmax_ptr, code8_ptr, absmax8_ptr, offset_ptr, out_ptr, program, first_block, n, n_bytes,
    WHOLE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """The blocks of one program; see _dequantize_kernel. WHOLE: n is a multiple of BLOCK_SIZE."""
    HALF: tl.constexpr = BLOCK_SIZE // 2
    # int64: a large model's vocabulary matrix takes more than 2^31 bytes
    block = first_block + program.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    real = block * BLOCK_SIZE < n
    if NESTED:
        q8 = tl.load(absmax_ptr + block, mask=real, other=0).to(tl.int32)
        scale = tl.load(code8_ptr + q8) * tl.load(absmax8_ptr + block // NESTED_BLOCK_SIZE, mask=real, other=0.0)
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=real, other=0.0)

    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    # of whole blocks the mask is the same for all bytes of one; else by n_bytes, which the compiler sees to be aligned
    there = real[:, None] if WHOLE else byte < n_bytes
    q = tl.load(packed_ptr + byte, mask=there, other=0).to(tl.int32)
    first = tl.load(code_ptr + (q >> 4)) * scale[:, None]
    second = tl.load(code_ptr + (q & 15)) * scale[:, None]

    weight = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    out = weight - first_block * BLOCK_SIZE
    value = tl.interleave(first, second)
    tl.store(out_ptr + out, value.to(out_ptr.dtype.element_ty), mask=real[:, None] if WHOLE else weight < n)


@triton.jit
def _dequantize_kernel(
    packed_ptr,  # uint8 [n / 2]
    code_ptr,  # fp32 [16]
    absmax_ptr,  # uint8 [blocks] if NESTED, else fp32 [blocks]
    code8_ptr,  # fp32 [256]
    absmax8_ptr,  # fp32 [blocks / 256]
    offset_ptr,  # fp32 []
    out_ptr,  # [n - first_block * BLOCK_SIZE]
    first_block,  # the first one to dequantise
    n,  # index of the weight at which to stop
    n_bytes,  # the same in packed bytes; an argument, so that the compiler can see that loads of 16 bytes are aligned
    NESTED: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of weights per program, dequantised into out."""
    _undo(
        packed_ptr, code_ptr, absmax_ptr, code8_ptr, absmax8_ptr, offset_ptr, out_ptr, tl.program_id(0), first_block,
        n, n_bytes, False, NESTED, NESTED_BLOCK_SIZE, BLOCK_SIZE, BLOCKS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["last0", "last1"])
def _dequantize_group(
    packed0_ptr, packed1_ptr, packed2_ptr, code0_ptr, code1_ptr, code2_ptr, absmax0_ptr, absmax1_ptr, absmax2_ptr,
    code8_0_ptr, code8_1_ptr, code8_2_ptr, absmax8_0_ptr, absmax8_1_ptr, absmax8_2_ptr,
    offset0_ptr, offset1_ptr, offset2_ptr, out_ptr,
    n0, n1, n2,  # of weights
    last0, last1,  # programs up to the end of the first weight, and of the second
    NESTED: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Up to three weights, one below the other in out."""
    program = tl.program_id(0)
    if program < last0:
        _undo(
            packed0_ptr, code0_ptr, absmax0_ptr, code8_0_ptr, absmax8_0_ptr, offset0_ptr, out_ptr, program, 0,
            n0, 0, True, NESTED, NESTED_BLOCK_SIZE, BLOCK_SIZE, BLOCKS,
        )  # fmt: skip
    elif program < last1:
        _undo(
            packed1_ptr, code1_ptr, absmax1_ptr, code8_1_ptr, absmax8_1_ptr, offset1_ptr, out_ptr + n0,
            program - last0, 0, n1, 0, True, NESTED, NESTED_BLOCK_SIZE, BLOCK_SIZE, BLOCKS,
        )  # fmt: skip
    else:
        _undo(
            packed2_ptr, code2_ptr, absmax2_ptr, code8_2_ptr, absmax8_2_ptr, offset2_ptr, out_ptr + n0 + n1,
            program - last1, 0, n2, 0, True, NESTED, NESTED_BLOCK_SIZE, BLOCK_SIZE, BLOCKS,
        )  # fmt: skip


def dequantize_nf4(
    weight: Tensor,
    quant_state: "QuantState",
    dtype: torch.dtype,
    out: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """See nbhelpers.kernels.dequantize_nf4."""
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


def dequantize_group(
    weights: Sequence[Tensor], states: Sequence["QuantState"], dtype: torch.dtype, out: Tensor
) -> None:
    """Two weights or more of one width, one below the other in `out`. In one launch, if they are two or three, are
    quantised alike and consist of whole blocks.

    Args:
        weights (`Sequence[Tensor]`): As for `dequantize_nf4`, each with its state.
        states (`Sequence[QuantState]`): bitsandbytes'.
        dtype (`torch.dtype`): Of the result.
        out (`Tensor`): [sum of rows, width], contiguous.
    """
    nested = [state.state2 for state in states]
    kinds = {
        (state.quant_type, state.blocksize, two and two.blocksize) for state, two in zip(states, nested, strict=True)
    }
    sizes = [prod(state.shape) for state in states]
    alike = len(kinds) == 1 and not any(size % states[0].blocksize for size in sizes)
    if not alike or len(states) > MOST_PARTS or DEQUANTIZE_WITH == "bitsandbytes":
        last = 0
        for weight, state in zip(weights, states, strict=True):
            dequantize_nf4(weight, state, dtype, out[last : (last := last + state.shape[0])])
        return
    ((_, block, nested_block),) = kinds
    pairs = [(state, two or state) for state, two in zip(states, nested, strict=True)]
    programs = list(accumulate(ceil_div(size, block * BLOCKS) for size in sizes))
    columns = (
        [_bytes(weight) for weight in weights],
        [state.code for state in states],
        [state.absmax for state in states],
        [two.code for _, two in pairs],
        [two.absmax for _, two in pairs],
        [state.offset if nested_block else state.code for state in states],
    )
    pointers = [pointer for column in columns for pointer in pad_to_three(column, column[-1])]
    _dequantize_group[(programs[-1],)](
        *pointers, out, *pad_to_three(sizes, sizes[-1]), programs[0], programs[1], NESTED=nested_block is not None,
        NESTED_BLOCK_SIZE=nested_block or 1, BLOCK_SIZE=block, BLOCKS=BLOCKS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _bytes(weight: Tensor) -> Tensor:
    """The weight's storage as bytes, as a plain Tensor: every attribute of bitsandbytes' parameter class is slow."""
    weight = weight.as_subclass(torch.Tensor)
    return weight if weight.dtype == torch.uint8 else weight.detach().reshape(-1).view(torch.uint8)


def _dequantize_with_bitsandbytes(packed: Tensor, state: "QuantState", out: Tensor) -> Tensor:
    """The dense weight written into `out` by bitsandbytes' kernels."""
    from bitsandbytes.functional import dequantize_blockwise

    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    torch.ops.bitsandbytes.dequantize_4bit.out(
        packed, absmax, state.blocksize, state.quant_type, state.shape, out.dtype, out=out
    )
    return out


@cache
def multiprocessors(device: torch.device) -> int:
    """The card's number of multiprocessors; 1 for a CPU, where Triton's interpreter runs programs one by one."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def few_rows(x: Tensor, quant_state: "QuantState") -> bool:
    """Whether x [rows, in] has so few rows that bitsandbytes' fused product is faster than dequantising and cuBLAS."""
    if not x.is_cuda:
        return False
    if x.shape[0] <= FEW_ROWS:
        return True
    if not tensor_cores(x.device):
        out, inside = quant_state.shape
        return _fused_on_turing(x, out, inside, multiprocessors(x.device), turing(x.device))
    waves = quant_state.shape[0] / (64 * multiprocessors(x.device))
    return x.shape[0] <= FEW_ROWS_FILLED and waves / ceil(waves) >= FILLED


def _fused_on_turing(x: Tensor, out: int, inside: int, processors: int, fused: bool) -> bool:
    """Where bitsandbytes 0.50 itself takes its fused product before Ampere, for 5 rows or more: it depends on how often
    the blocks of 64 columns of [rows, out] fill the card, and on the weight's shape. Beyond, its operator would write
    the dense weight too, and ours does that faster.

    Args:
        x (`Tensor`): [rows, inside].
        out (`int`), inside (`int`): The weight's shape.
        processors (`int`): The card's multiprocessors.
        fused (`bool`): Whether the card has tensor cores for fp16 (Turing); older ones have a product for 7 rows.
    """
    rows, columns = x.shape[0], ceil_div(out, 64)
    if not fused or x.dtype != torch.float16 or inside % 64:
        return rows < 8 and inside % 64 == 0
    thrice = columns >= 3 * processors
    if out * inside >= SMALL_WEIGHT:
        most = (128 if inside < out else 64) if thrice else 64 if columns >= processors // 2 else 32
    elif 2 * inside < out:  # short rows
        most = 320 if thrice or inside < 704 else 64 if inside >= 1024 else 96
    elif columns < processors and rows > 8:
        most = 64
    elif 4 * columns <= processors:
        most = 32 if inside < out else 23
    else:
        most = 16 if 2 * columns <= processors else 0
    return rows <= most


def matmul_few_rows(x: Tensor, weight: Tensor, quant_state: "QuantState", bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for few rows by bitsandbytes' fused kernel, which never writes the dense weight.

    Args:
        x (`Tensor`): [rows, in], 16-bit.
        weight (`Tensor`): NF4, as for `dequantize_nf4`.
        quant_state (`QuantState`): bitsandbytes' state of that weight.
        bias (`Tensor`, *optional*): [out] in x's dtype, added before the product is rounded.

    Returns [rows, out] in x's dtype.
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
