"""Linears on int8 weights on a GPU: tensor-core products in int32, scales and bias in the epilogue.

A row's largest value is needed before its first product. Where rows are few, every program reads its rows twice and
quantizes them itself, which costs less than a launch; else a kernel of its own does it once. Both round as reference.py
does: true division, ties to even. Products are exact and the epilogue neither fuses nor reorders
(``enable_fp_fusion=False``), so results are the reference's, bit for bit, whatever the tiles, and a row's do not depend
on the others. Weight-only int8 ("none") converts weights to the input's dtype, which is exact, and sums in fp32.

Roofline. T rows, [O, I]: 2 T O I operations; O I bytes of weights, T (2 I + 2 O) of fp16 activations, T (3 I + 4) more
to quantize them. On an H100 1,979 Top/s and 3.35 TB/s: below T = 300 the weights are the bound. 1536 x 3072 at T = 512:
4.8 Gop, 2.4 us, 9.4 MB, 2.8 us; at T = 1: 4.7 MB, 1.4 us, half of fp16's. 4096 x 4096 at T = 4096: 137 Gop, 69 us.

Legend: T rows (tokens), I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu
from mambacompress.kernels.int8_linear.reference import qmax_of
from mambacompress.kernels.tile_math import SMALLEST_SCALE, codes_of, narrow, operand, tile_of, wide

FEW_ROWS = 32
QUANTIZED_INSIDE = 1 << 26  # rows x inputs x outputs: above, reading rows again and again takes longer than a launch
FEW = [({"BLOCK_T": 16, "BLOCK_O": 32, "BLOCK_I": 128}, 4, 4), ({"BLOCK_T": 16, "BLOCK_O": 16, "BLOCK_I": 256}, 4, 4),
       ({"BLOCK_T": 32, "BLOCK_O": 64, "BLOCK_I": 128}, 4, 4)]
MANY = [({"BLOCK_T": 64, "BLOCK_O": 64, "BLOCK_I": 128}, 8, 3), ({"BLOCK_T": 128, "BLOCK_O": 128, "BLOCK_I": 64}, 8, 3),
        ({"BLOCK_T": 64, "BLOCK_O": 128, "BLOCK_I": 64}, 4, 3)]
KEY = ["ROWS", "inputs", "outputs"]


@triton.jit
def _quantize_kernel(p_x, p_static, p_codes, p_scale, x_row, inputs, qmax: tl.constexpr, BLOCK_I: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_i = tl.arange(0, BLOCK_I)
    m_i = o_i < inputs
    b_x = wide(tl.load(p_x + row * x_row + o_i, mask=m_i, other=0.0))  # [I]
    if p_static is None:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(b_x)), qmax * 1.0), SMALLEST_SCALE)
    else:
        scale = tl.load(p_static).to(tl.float32)
    tl.store(p_codes + row * inputs + o_i, codes_of(b_x, scale, qmax), mask=m_i)
    lost = tl.max((b_x != b_x).to(tl.int32)) > 0
    tl.store(p_scale + row, tl.where(lost, float("nan"), scale))


@triton.jit
def token_scales(p_x, p_token, p_static, o_t, mask, x_row, inputs, qmax: tl.constexpr, BLOCK_I: tl.constexpr):
    """The scales of rows [T]: as stored with their codes, or those that ``_quantize_kernel`` would give them."""
    if p_token is not None:
        b_scale = tl.load(p_token + o_t, mask=mask, other=0.0)
    else:
        b_largest, b_lost = tl.zeros(o_t.shape, tl.float32), tl.zeros(o_t.shape, tl.int32)
        o_i = tl.arange(0, BLOCK_I)
        for first in range(0, inputs, BLOCK_I):
            b_x = wide(tl.load(p_x + o_t[:, None].to(tl.int64) * x_row + first + o_i[None, :],
                               mask=mask[:, None] & (o_i < inputs - first)[None, :], other=0.0))  # [T, I]
            b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_x), 1))
            b_lost = tl.maximum(b_lost, tl.max((b_x != b_x).to(tl.int32), 1))
        if p_static is None:
            b_scale = tl.maximum(tl.div_rn(b_largest, tl.full(o_t.shape, qmax, tl.float32)), SMALLEST_SCALE)
        else:
            b_scale = tl.load(p_static).to(tl.float32) + tl.zeros(o_t.shape, tl.float32)
        b_scale = tl.where(b_lost > 0, float("nan"), b_scale)
    return b_scale


@triton.jit
def _linear_kernel(
    p_x, p_token, p_static, p_weight, p_scale, p_bias, p_y, rows, inputs, outputs, x_row, ROWS: tl.constexpr,
    qmax: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """qmax: 0 for float products; else x is codes, their rows' scales at ``p_token``, or, without, quantized here."""
    i_t, i_o = tile_of(tl.program_id(0), rows, outputs, BLOCK_T, BLOCK_O, 8)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = tl.arange(0, BLOCK_I)
    m_t, m_o = o_t < rows, o_o < outputs
    p_a = p_x + o_t[:, None].to(tl.int64) * x_row + o_i[None, :]  # [T, I]
    p_b = p_weight + o_o[None, :].to(tl.int64) * inputs + o_i[:, None]  # [I, O]
    if qmax:
        b_token = token_scales(p_x, p_token, p_static, o_t, m_t, x_row, inputs, qmax, BLOCK_I)
    b_sum = tl.zeros([BLOCK_T, BLOCK_O], tl.int32 if qmax else tl.float32)
    for first in range(0, inputs, BLOCK_I):
        m_i = o_i < inputs - first
        b_a = tl.load(p_a + first, mask=m_t[:, None] & m_i[None, :], other=0)
        b_w = tl.load(p_b + first, mask=m_i[:, None] & m_o[None, :], other=0)
        if qmax:
            if p_token is None:
                b_a = codes_of(wide(b_a), b_token[:, None], qmax)
            b_sum = tl.dot(b_a, b_w, b_sum, out_dtype=tl.int32)
        else:
            b_a = operand(b_a)
            b_sum = tl.dot(b_a, b_w.to(b_a.dtype), b_sum, input_precision="ieee")
    b_y = b_sum.to(tl.float32) * tl.load(p_scale + o_o, mask=m_o, other=0.0)[None, :]
    if qmax:
        b_y = b_y * b_token[:, None]
    if p_bias is not None:
        b_y = b_y + wide(tl.load(p_bias + o_o, mask=m_o, other=0.0))[None, :]
    tl.store(p_y + o_t[:, None].to(tl.int64) * outputs + o_o[None, :], narrow(b_y, p_y),
             mask=m_t[:, None] & m_o[None, :])


_few_rows = gpu.tuned(FEW, KEY)(_linear_kernel)
_many_rows = gpu.tuned(MANY, KEY)(_linear_kernel)


def quantize_rows_triton(x_TI: Tensor, act_scale: Tensor | None, act_bits: int) -> tuple[Tensor, Tensor]:
    """(codes int8 [T, I], scale fp32 [T]) as ``quantize_input``; act_scale: one static scale, None: one a row."""
    rows, inputs = x_TI.shape
    codes = torch.empty(rows, inputs, dtype=torch.int8, device=x_TI.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x_TI.device)
    block = triton.next_power_of_2(inputs)
    gpu.launch(_quantize_kernel, (rows,), x_TI, act_scale, codes, scale, x_TI.stride(0), inputs,
               qmax=qmax_of(act_bits), BLOCK_I=block, num_warps=min(16, max(1, block // 512)))
    return codes, scale


def quantized_input(x_TI: Tensor, outputs: int, activation: str, act_scale: Tensor | None,
                    act_bits: int) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """(x or its codes, scales of the codes' rows, static scale for what the product quantizes itself, qmax)."""
    if activation == "none":
        return x_TI, None, None, 0
    static = act_scale if activation == "tensor" else None
    if len(x_TI) <= FEW_ROWS and x_TI.numel() * outputs <= QUANTIZED_INSIDE:
        return x_TI, None, static, qmax_of(act_bits)
    return *quantize_rows_triton(x_TI, static, act_bits), None, qmax_of(act_bits)


def rows_of_input(x: Tensor) -> Tensor:
    """x [..., I] as rows [T, I] without gaps inside a row."""
    x_TI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()


def rows_class(rows: int) -> int:
    """What the tiles are chosen by: the next power of two, from 1 to 4096."""
    return min(4096, triton.next_power_of_2(rows))


def int8_linear_triton(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
                       act_scale: Tensor | None, act_bits: int) -> Tensor:
    """See ``int8_linear``; x in fp32, bf16 or fp16."""
    outputs, inputs = qweight.shape
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x_TI, token, static, qmax = quantized_input(rows_of_input(x), outputs, activation, act_scale, act_bits)
    rows = x_TI.shape[0]
    gpu.launch(
        _few_rows if rows <= FEW_ROWS else _many_rows,
        lambda meta: (triton.cdiv(rows, meta["BLOCK_T"]) * triton.cdiv(outputs, meta["BLOCK_O"]),),
        x_TI, token, static, qweight.contiguous(), scale.float().contiguous(),
        None if bias is None else bias.contiguous(), y, rows, inputs, outputs, x_TI.stride(0), ROWS=rows_class(rows),
        qmax=qmax, enable_fp_fusion=not qmax)
    return y


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    weight, scale = torch.empty(3072, 1536, dtype=torch.int8, device="meta"), torch.empty(3072, device="meta")
    for rows in (1, 32, 512):
        for dtype, activation in ((torch.float16, "token"), (torch.float16, "none"), (torch.bfloat16, "tensor"),
                                  (torch.float32, "token")):
            if rows == 32 and activation == "none":
                continue
            x = torch.empty(rows, 1536, dtype=dtype, device="meta")
            int8_linear_triton(x, weight, scale, scale.to(dtype), activation, scale[:1], 8)


__all__ = ["FEW_ROWS", "KEY", "int8_linear_triton", "offline_calls", "quantized_input", "rows_class", "rows_of_input",
           "token_scales"]
