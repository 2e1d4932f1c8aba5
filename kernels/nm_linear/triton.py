"""Linears on N:M sparse weights on a GPU, read as they are stored: kept values, and where they belong.

A tile of the dense weight is made in registers (``expanded``): a column's place in its group says which of the group's
values is its own, by the bits before it in a mask, or by the index that names it. For few rows, whose bound is the
weight, tiles go straight into tensor-core products (``_linear_kernel``): int8 exactly, in int32, with the epilogue of
``int8_linear``, so the reference's bits; fp16 values in the input's dtype, sums in fp32. For many rows, whose bound is
the products, every tile of rows would expand the weight again: it is expanded once (``_expand_kernel``) and multiplied
densely, by int8_linear's kernel or torch's. So is it for products in fp32, which no tensor core makes.

Sparse tensor cores are left out: they take 2:4 alone, in an order of their own, so a weight would be stored twice.

Roofline, 2:4 int8, [O, I]: 0.5 bytes of values and 0.125 of mask a weight, about 20 instructions to place it. 1536 x
3072 at T = 1: 2.9 MB, 0.9 us on an H100 (3.35 TB/s) against 1.4 us dense, and 94 M instructions, 3.3 us at 28.7 T/s:
the instructions are the bound, what is saved is memory. At T = 512: 2.8 us of dense int8 products, 3.3 us to expand and
4.7 MB, 1.4 us, written. 1:8 (indices of 3 bits): 0.17 bytes a weight.

Legend: T rows (tokens), I inputs, O outputs, V values a row, B bytes of positions a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu
from mambacompress.kernels.int8_linear.triton import (
    FEW_ROWS,
    KEY,
    int8_linear_triton,
    quantized_input,
    rows_class,
    rows_of_input,
    token_scales,
)
from mambacompress.kernels.nm_linear.reference import index_bits, position_bytes, position_form
from mambacompress.kernels.tile_math import codes_of, narrow, operand, tile_of, wide

FEW = [({"BLOCK_T": 16, "BLOCK_O": 16, "BLOCK_I": 128}, 4, 2), ({"BLOCK_T": 16, "BLOCK_O": 32, "BLOCK_I": 64}, 4, 2),
       ({"BLOCK_T": 32, "BLOCK_O": 32, "BLOCK_I": 64}, 8, 2)]


@triton.jit
def _bits_of_byte(x):
    """How many bits are set in int32 of 0..255."""
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 15


@triton.jit
def _ranks_by_mask(p_rows, o_i, mask, row_bytes, OF: tl.constexpr):
    """(whether a column is kept, how many of its group are kept before it), [O, I]; p_rows: the rows' bytes [O, 1]."""
    SPAN: tl.constexpr = (OF + 7) // 8 if 8 % OF == 0 or OF % 8 == 0 else (OF + 14) // 8  # bytes a group touches
    first = o_i // OF * OF
    here, rank = tl.zeros(mask.shape, tl.int32), tl.zeros(mask.shape, tl.int32)
    for k in tl.static_range(SPAN):
        o_byte = first // 8 + k
        b = tl.load(p_rows + o_byte, mask=mask & (o_byte < row_bytes), other=0).to(tl.int32)
        before = tl.minimum(tl.maximum(o_i - 8 * o_byte, 0), 8)
        after = first % 8 if k == 0 else tl.zeros_like(first)
        rank += _bits_of_byte((b & ((1 << before) - 1)) >> after)
        here = tl.where(o_i // 8 == o_byte, b >> (o_i % 8), here)
    return (here & 1) != 0, rank


@triton.jit
def _ranks_by_index(p_rows, o_i, mask, row_bytes, KEEP: tl.constexpr, OF: tl.constexpr, WIDTH: tl.constexpr):
    """The same where every value has an index of WIDTH bits."""
    kept, rank = mask & False, tl.zeros(mask.shape, tl.int32)
    for k in tl.static_range(KEEP):
        o_bit = (o_i // OF * KEEP + k) * WIDTH
        o_byte = o_bit // 8
        b = tl.load(p_rows + o_byte, mask=mask, other=0).to(tl.int32)
        if 8 % WIDTH != 0:
            b |= tl.load(p_rows + o_byte + 1, mask=mask & (o_byte + 1 < row_bytes), other=0).to(tl.int32) << 8
        here = ((b >> (o_bit % 8)) & ((1 << WIDTH) - 1)) == o_i % OF
        rank = tl.where(here, k, rank)
        kept = kept | here
    return kept, rank


@triton.jit
def expanded(p_values, p_positions, o_o, o_i, mask, row_values, row_bytes, KEEP: tl.constexpr, OF: tl.constexpr,
             WIDTH: tl.constexpr):
    """A tile of the dense weight [O, I], zero where nothing is stored. o_o: rows, int64 [O, 1]; o_i: columns [1, I];
    WIDTH: bits of an index, 0: a mask."""
    p_rows = p_positions + o_o * row_bytes
    if WIDTH:
        kept, rank = _ranks_by_index(p_rows, o_i, mask, row_bytes, KEEP, OF, WIDTH)
    else:
        kept, rank = _ranks_by_mask(p_rows, o_i, mask, row_bytes, OF)
    return tl.load(p_values + o_o * row_values + o_i // OF * KEEP + rank, mask=mask & kept, other=0)


@triton.jit
def _expand_kernel(p_values, p_positions, p_dense, inputs, outputs, row_values, row_bytes, KEEP: tl.constexpr,
                   OF: tl.constexpr, WIDTH: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    o_o = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O))[:, None].to(tl.int64)
    o_i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    mask = (o_o < outputs) & (o_i < inputs)
    b_w = expanded(p_values, p_positions, o_o, o_i, mask, row_values, row_bytes, KEEP, OF, WIDTH)
    tl.store(p_dense + o_o * inputs + o_i, narrow(wide(b_w), p_dense), mask=mask)


@gpu.tuned(FEW, KEY)
@triton.jit
def _linear_kernel(
    p_x, p_token, p_static, p_values, p_positions, p_scale, p_bias, p_y, rows, inputs, outputs, x_row, row_values,
    row_bytes, ROWS: tl.constexpr, KEEP: tl.constexpr, OF: tl.constexpr, WIDTH: tl.constexpr, qmax: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """p_token, p_static, qmax: as in ``int8_linear``."""
    i_t, i_o = tile_of(tl.program_id(0), rows, outputs, BLOCK_T, BLOCK_O, 8)
    o_t, o_o = i_t * BLOCK_T + tl.arange(0, BLOCK_T), i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_t, m_o = o_t < rows, o_o < outputs
    if qmax:
        b_token = token_scales(p_x, p_token, p_static, o_t, m_t, x_row, inputs, qmax, BLOCK_I)
    b_sum = tl.zeros([BLOCK_T, BLOCK_O], tl.int32 if qmax else tl.float32)
    for first in range(0, inputs, BLOCK_I):
        o_i = first + tl.arange(0, BLOCK_I)
        m_i = o_i < inputs
        b_a = tl.load(p_x + o_t[:, None].to(tl.int64) * x_row + o_i[None, :], mask=m_t[:, None] & m_i[None, :],
                      other=0)  # [T, I]
        b_w = tl.trans(expanded(p_values, p_positions, o_o[:, None].to(tl.int64), o_i[None, :],
                                m_o[:, None] & m_i[None, :], row_values, row_bytes, KEEP, OF, WIDTH))  # [I, O]
        if qmax:
            if p_token is None:
                b_a = codes_of(wide(b_a), b_token[:, None], qmax)
            b_sum = tl.dot(b_a, b_w, b_sum, out_dtype=tl.int32)
        else:
            b_a = operand(b_a)
            b_sum = tl.dot(b_a, b_w.to(b_a.dtype), b_sum, input_precision="ieee")
    b_y = b_sum.to(tl.float32)
    if p_scale is not None:
        b_y = b_y * tl.load(p_scale + o_o, mask=m_o, other=0.0)[None, :]
    if qmax:
        b_y = b_y * b_token[:, None]
    if p_bias is not None:
        b_y = b_y + wide(tl.load(p_bias + o_o, mask=m_o, other=0.0))[None, :]
    tl.store(p_y + o_t[:, None].to(tl.int64) * outputs + o_o[None, :], narrow(b_y, p_y),
             mask=m_t[:, None] & m_o[None, :])


def expand_triton(values: Tensor, positions: Tensor, keep: int, of: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [O, I] in ``dtype``."""
    outputs, inputs = values.shape[0], values.shape[1] // keep * of
    dense = torch.empty(outputs, inputs, dtype=dtype, device=values.device)
    gpu.launch(_expand_kernel, (triton.cdiv(outputs, 8), triton.cdiv(inputs, 256)), values.contiguous(),
               positions.contiguous(), dense, inputs, outputs, values.shape[1], positions.shape[1], KEEP=keep, OF=of,
               WIDTH=_width(keep, of), BLOCK_O=8, BLOCK_I=256, num_warps=4)
    return dense


def nm_linear_triton(x: Tensor, values: Tensor, positions: Tensor, scale: Tensor | None, bias: Tensor | None, keep: int,
                     of: int, activation: str, act_scale: Tensor | None, act_bits: int) -> Tensor:
    """See ``nm_linear``; x in fp32, bf16 or fp16."""
    outputs, inputs = values.shape[0], x.shape[-1]
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x_TI = rows_of_input(x)
    rows = x_TI.shape[0]
    exact = activation == "none" and x.dtype == torch.float32
    if exact or (scale is None and rows > FEW_ROWS):
        dense = expand_triton(values, positions, keep, of, x.dtype)
        dense = dense if scale is None else dense * scale[:, None]
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    if scale is not None and rows > FEW_ROWS:
        codes = expand_triton(values, positions, keep, of, torch.int8)
        return int8_linear_triton(x, codes, scale, bias, activation, act_scale, act_bits)
    x_TI, token, static, qmax = quantized_input(x_TI, outputs, activation, act_scale, act_bits)
    gpu.launch(
        _linear_kernel,
        lambda meta: (triton.cdiv(rows, meta["BLOCK_T"]) * triton.cdiv(outputs, meta["BLOCK_O"]),), x_TI, token,
        static, values.contiguous(), positions.contiguous(), None if scale is None else scale.float().contiguous(),
        None if bias is None else bias.contiguous(), y, rows, inputs, outputs, x_TI.stride(0), values.shape[1],
        positions.shape[1], ROWS=rows_class(rows), KEEP=keep, OF=of, WIDTH=_width(keep, of), qmax=qmax,
        enable_fp_fusion=not qmax)
    return y


def _width(keep: int, of: int) -> int:
    return 0 if position_form(keep, of) == "mask" else index_bits(of)


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    scale, x = torch.empty(3072, device="meta"), torch.empty(1, 1536, dtype=torch.float16, device="meta")
    for keep, of in ((2, 4), (1, 4), (2, 8), (5, 12)):
        codes = torch.empty(3072, 1536 // of * keep, dtype=torch.int8, device="meta")
        positions = torch.empty(3072, position_bytes(1536, keep, of), dtype=torch.uint8, device="meta")
        for dtype in gpu.FLOATS if (keep, of) == (2, 4) else (torch.float16,):
            nm_linear_triton(x.to(dtype), codes, positions, scale, scale, keep, of, "token", None, 8)
            expand_triton(codes.half(), positions, keep, of, dtype)
            if dtype != torch.float32:
                nm_linear_triton(x.to(dtype), codes, positions, scale, scale, keep, of, "none", None, 8)
                nm_linear_triton(x.to(dtype), codes.half(), positions, None, scale, keep, of, "none", None, 8)
        expand_triton(codes, positions, keep, of, torch.int8)


__all__ = ["expand_triton", "nm_linear_triton", "offline_calls"]
