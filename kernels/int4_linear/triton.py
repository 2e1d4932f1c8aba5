"""Linears on int4 weights in groups on a GPU: nibbles become numbers in registers.

Quantized activations (W4A8): a group's codes multiply exactly in int32 on tensor cores and are scaled in fp32, group
after group, unfused: the reference's bits. Float activations (W4A16): for many rows a tile of weights is dequantized
and multiplied on tensor cores; for few rows there is nothing to share between rows, and a program reads whole groups of
a few outputs and sums in fp32. There a nibble becomes fp32 by putting its bits under the exponent of 2^23 and
subtracting 2^23 + zero: conversions run at an eighth of that speed.

Roofline. [O, I] in groups of 64 with fp16 scales: 0.53 bytes a weight. 1536 x 3072 at T = 1: 2.5 MB, 0.75 us on an H100
(3.35 TB/s) against fp16's 9.4 MB, 2.8 us; about 8 instructions a byte, 28.7 T/s of them, 0.7 us: both bounds are close.
At T = 512 the products are the bound: 4.8 Gop, 2.4 us in int8, 4.9 us in fp16.

Legend: T rows (tokens), I inputs, O outputs, G groups, g inputs a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu
from mambacompress.kernels.int8_linear.triton import FEW_ROWS, quantized_input, rows_class, rows_of_input, token_scales
from mambacompress.kernels.tile_math import codes_of, narrow, operand, tile_of, wide

ROWS_ALONE = 4
KEY = ["ROWS", "inputs", "outputs"]


@triton.jit
def number(nibbles, zero):
    """nibble - zero in fp32, exactly; nibbles: int32 of 0..15, zero: fp32."""
    return (nibbles | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)


@gpu.tuned([({"BLOCK_O": 8, "BLOCK_G": 4}, 4, 1), ({"BLOCK_O": 4, "BLOCK_G": 8}, 4, 1),
            ({"BLOCK_O": 16, "BLOCK_G": 4}, 8, 1)], key=KEY)
@triton.jit
def _row_kernel(
    p_x, p_weight, p_scale, p_zero, p_bias, p_y, inputs, outputs, groups, x_row, ROWS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_G: tl.constexpr,
):
    i_t = tl.program_id(1).to(tl.int64)
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < outputs
    o_h = tl.arange(0, HALF)
    b_sum = tl.zeros([BLOCK_O, BLOCK_G, HALF], tl.float32)
    for first in range(0, groups, BLOCK_G):
        o_g = first + tl.arange(0, BLOCK_G)
        m_g = o_g < groups
        m_og = m_o[:, None] & m_g[None, :]
        o_byte = o_g[None, :, None] * HALF + o_h[None, None, :]  # [1, G, g/2]
        b_w = tl.load(p_weight + o_o[:, None, None].to(tl.int64) * (inputs // 2) + o_byte, mask=m_og[:, :, None],
                      other=0).to(tl.int32)  # [O, G, g/2]
        b_scale = wide(tl.load(p_scale + o_o[:, None] * groups + o_g[None, :], mask=m_og, other=0.0))  # [O, G]
        b_zero = tl.full([BLOCK_O, BLOCK_G], 8.0, tl.float32)
        if p_zero is not None:
            b_zero = tl.load(p_zero + o_o[:, None] * groups + o_g[None, :], mask=m_og, other=0).to(tl.float32)
        b_even = wide(tl.load(p_x + i_t * x_row + 2 * o_byte, mask=m_g[None, :, None], other=0.0))  # [1, G, g/2]
        b_odd = wide(tl.load(p_x + i_t * x_row + 2 * o_byte + 1, mask=m_g[None, :, None], other=0.0))
        b_pair = number(b_w & 15, b_zero[:, :, None]) * b_even + number(b_w >> 4, b_zero[:, :, None]) * b_odd
        b_sum += b_pair * b_scale[:, :, None]
    b_y = tl.sum(tl.sum(b_sum, 2), 1)  # [O]
    if p_bias is not None:
        b_y += wide(tl.load(p_bias + o_o, mask=m_o, other=0.0))
    tl.store(p_y + i_t * outputs + o_o, narrow(b_y, p_y), mask=m_o)


@triton.jit
def _linear_kernel(
    p_x, p_token, p_static, p_weight, p_scale, p_zero, p_bias, p_y, rows, inputs, outputs, x_row, ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, qmax: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """p_token, p_static, qmax: as in ``int8_linear``."""
    i_t, i_o = tile_of(tl.program_id(0), rows, outputs, BLOCK_T, BLOCK_O, 8)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i, o_h = tl.arange(0, GROUP_SIZE), tl.arange(0, GROUP_SIZE // 2)
    m_t, m_o = o_t < rows, o_o < outputs
    groups = inputs // GROUP_SIZE
    p_a = p_x + o_t[:, None].to(tl.int64) * x_row + o_i[None, :]  # [T, g]
    p_b = p_weight + o_o[:, None].to(tl.int64) * (inputs // 2) + o_h[None, :]  # [O, g/2]
    if qmax:
        b_token = token_scales(p_x, p_token, p_static, o_t, m_t, x_row, inputs, qmax, GROUP_SIZE)
    b_sum = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for g in range(0, groups):
        b_a = tl.load(p_a + g * GROUP_SIZE, mask=m_t[:, None], other=0)
        b_w = tl.load(p_b + g * (GROUP_SIZE // 2), mask=m_o[:, None], other=0)
        b_scale = wide(tl.load(p_scale + o_o * groups + g, mask=m_o, other=0.0))  # [O]
        b_codes = tl.interleave(b_w & 15, b_w >> 4).to(tl.int8)  # [O, g]
        if p_zero is None:
            b_codes = b_codes - 8
        else:
            b_codes = b_codes - tl.load(p_zero + o_o * groups + g, mask=m_o, other=0).to(tl.int8)[:, None]
        if qmax:
            if p_token is None:
                b_a = codes_of(wide(b_a), b_token[:, None], qmax)
            b_sum += tl.dot(b_a, tl.trans(b_codes), out_dtype=tl.int32).to(tl.float32) * b_scale[None, :]
        else:
            b_a = operand(b_a)
            b_sum += tl.dot(b_a, tl.trans(b_codes.to(b_a.dtype)), input_precision="ieee") * b_scale[None, :]
    if qmax:
        b_sum = b_sum * b_token[:, None]
    if p_bias is not None:
        b_sum = b_sum + wide(tl.load(p_bias + o_o, mask=m_o, other=0.0))[None, :]
    tl.store(p_y + o_t[:, None].to(tl.int64) * outputs + o_o[None, :], narrow(b_sum, p_y),
             mask=m_t[:, None] & m_o[None, :])


_few_rows = gpu.tuned([({"BLOCK_T": 16, "BLOCK_O": 32}, 4, 4), ({"BLOCK_T": 16, "BLOCK_O": 64}, 8, 3)],
                      KEY)(_linear_kernel)
_many_rows = gpu.tuned([({"BLOCK_T": 64, "BLOCK_O": 64}, 4, 3), ({"BLOCK_T": 128, "BLOCK_O": 64}, 8, 2)],
                       KEY)(_linear_kernel)


def int4_linear_triton(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
                       group_size: int, activation: str, act_scale: Tensor | None, act_bits: int) -> Tensor:
    """See ``int4_linear``; x in fp32, bf16 or fp16."""
    outputs, inputs = qweight.shape[0], qweight.shape[1] * 2
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x_TI = rows_of_input(x)
    rows = x_TI.shape[0]
    scale = scale if scale.dtype in gpu.FLOATS else scale.float()
    packed = (qweight.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous(),
              None if bias is None else bias.contiguous())
    if activation == "none" and rows <= ROWS_ALONE:
        gpu.launch(_row_kernel, lambda meta: (triton.cdiv(outputs, meta["BLOCK_O"]), rows), x_TI, *packed, y, inputs,
                   outputs, inputs // group_size, x_TI.stride(0), ROWS=rows_class(rows), HALF=group_size // 2)
        return y
    x_TI, token, static, qmax = quantized_input(x_TI, outputs, activation, act_scale, act_bits)
    gpu.launch(
        _few_rows if rows <= FEW_ROWS else _many_rows,
        lambda meta: (triton.cdiv(rows, meta["BLOCK_T"]) * triton.cdiv(outputs, meta["BLOCK_O"]),), x_TI, token, static,
        *packed, y, rows, inputs, outputs, x_TI.stride(0), ROWS=rows_class(rows), GROUP_SIZE=group_size, qmax=qmax,
        enable_fp_fusion=not qmax)
    return y


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    for size in (32, 64, 128):
        weight = torch.empty(3072, 768, dtype=torch.uint8, device="meta")
        scale = torch.empty(3072, 1536 // size, dtype=torch.float16, device="meta")
        for rows in (1, 32, 512):
            more = ((torch.bfloat16, "none"), (torch.float32, "tensor")) if size == 64 else ()
            for dtype, activation in ((torch.float16, "none"), (torch.float16, "token"), *more):
                x = torch.empty(rows, 1536, dtype=dtype, device="meta")
                zero = scale.to(torch.uint8) if dtype == torch.bfloat16 else None
                bias = torch.empty(3072, device="meta")
                int4_linear_triton(x, weight, scale, zero, bias, size, activation, bias[:1], 8)


__all__ = ["int4_linear_triton", "offline_calls"]
