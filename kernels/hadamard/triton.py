"""The Hadamard rotation on a GPU: two small matrix products on tensor cores a row, quantization in the same pass.

A block of n = m 2^k channels is read as a matrix X [LEFT, RIGHT], RIGHT a power of two: since H_n = (B_m ⊗ S_a) ⊗ S_b,
the transform is Mᵀ X S (M X S the transposed one) with M = B_m ⊗ S_a [LEFT, LEFT] and Sylvester's S = S_b. S is made in
registers from the parity of i & j; where both are small, a program keeps them and goes through many rows.

Numerics. The entries of both matrices are ±1, exact in any format, sums are fp32, and 1/sqrt(n) comes last. Inputs of
16 bits enter the first product as they are; its result enters the second as the sum of three bf16 numbers, 24 bits, and
so do fp32 inputs the first. Matrices are padded with zeros to 16 inside the
products only, never in the result.

Roofline. 2 bytes in, 2 (or 1, with int8 codes) out an element; 2 (LEFT + 3 RIGHT) operations on tensor cores: at
n = 1536 = 48 x 32, LEFT padded to 64, 430 a padded element and so an element. An H100 moves 1.1 T elements/s with codes
out and has 990 T/s of dense fp16: 0.5 of the time of memory. fp16 [2048, 1536]: 9.4 MB with codes, 2.8 us.

Legend: n channels of a block, T rows.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu
from mambacompress.kernels.hadamard.reference import hadamard_matrix, split
from mambacompress.kernels.int8_linear.reference import qmax_of
from mambacompress.kernels.quantized import empty_codes, quantized
from mambacompress.kernels.tile_math import SMALLEST_SCALE, codes_of, narrow, operand, round_to, wide

LARGEST_RIGHT = 128
LARGEST_LEFT = 64
PROGRAMS = 1024  # at most: then a program takes several rows,
TILE_OF_MANY = 2048  # unless its matrices are so large that kept from row to row they would not fit into registers


@triton.jit
def _parity(i, j):
    """1 or -1: Sylvester's S[i, j] for indices below 256."""
    bits = i & j
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    return 1 - 2 * (bits & 1)


@triton.jit
def _parts(x):
    """fp32 x as three numbers of bf16, 24 bits: their sum is x."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return operand(high), operand(middle), operand((rest - middle.to(tl.float32)).to(tl.bfloat16))


@triton.jit
def _from_left(b_left, b_x, WHOLE: tl.constexpr):
    """M X for M of ±1; X of 16 bits enters whole, of fp32 in parts."""
    if WHOLE:
        b_x = operand(b_x)
        return tl.dot(b_left.to(b_x.dtype), b_x)
    b_high, b_middle, b_low = _parts(b_x)
    b_left = operand(b_left.to(tl.bfloat16))
    return tl.dot(b_left, b_high, tl.dot(b_left, b_middle, tl.dot(b_left, b_low)))


@triton.jit
def _from_right(b_x, b_right):
    """X S for fp32 X and S of ±1."""
    b_high, b_middle, b_low = _parts(b_x)
    b_right = operand(b_right.to(tl.bfloat16))
    return tl.dot(b_high, b_right, tl.dot(b_middle, b_right, tl.dot(b_low, b_right)))


@triton.jit
def _rotate_row(
    i, b_left, b_right, o_d, m_d, p_x, p_signs, p_static, p_y, p_codes, p_scale, x_row, blocks, size, factor,
    qmax: tl.constexpr, SIGNS_FIRST: tl.constexpr, WHOLE: tl.constexpr,
):
    """Block i of all blocks of all rows."""
    o_s = (i % blocks) * size + o_d
    b_x = tl.load(p_x + tl.cast(i // blocks, tl.int64) * x_row + o_s, mask=m_d, other=0.0)
    if p_signs is not None and SIGNS_FIRST:
        b_x = (wide(b_x) * tl.load(p_signs + o_s, mask=m_d, other=0).to(tl.float32)).to(p_x.dtype.element_ty)
    b_y = _from_right(_from_left(b_left, b_x, WHOLE), b_right) * factor  # [LEFT, RIGHT]
    if p_signs is not None and not SIGNS_FIRST:
        b_y = b_y * tl.load(p_signs + o_s, mask=m_d, other=0).to(tl.float32)
    o_out = tl.cast(i, tl.int64) * size + o_d
    if p_codes is None:
        tl.store(p_y + o_out, narrow(b_y, p_y), mask=m_d)
    else:  # one block a row: the scale is the row's
        b_y = tl.where(m_d, round_to(b_y, p_x), 0.0)
        lost = tl.max((b_y != b_y).to(tl.int32)) > 0
        if p_static is None:
            largest = tl.max(tl.abs(b_y))
            scale = tl.maximum(tl.div_rn(largest, qmax * 1.0), SMALLEST_SCALE)
            lost = lost | (largest == float("inf"))
        else:
            scale = tl.load(p_static).to(tl.float32)
        b_codes = codes_of(b_y, scale, qmax)
        tl.store(p_codes + o_out, tl.where(lost, 0, b_codes).to(tl.int8), mask=m_d)
        tl.store(p_scale + i, tl.where(lost, float("nan"), scale))


@triton.jit
def _rotate_kernel(
    p_x, p_left, p_signs, p_static, p_y, p_codes, p_scale, rows, x_row, blocks, left, factor, qmax: tl.constexpr,
    SIGNS_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TILE_R: tl.constexpr, MANY: tl.constexpr,
):
    WHOLE: tl.constexpr = p_x.dtype.element_ty != tl.float32
    o_l, o_r = tl.arange(0, LEFT), tl.arange(0, TILE_R)
    o_d = o_l[:, None] * RIGHT + o_r[None, :]  # [LEFT, RIGHT]
    m_d = (o_l < left)[:, None] & (o_r < RIGHT)[None, :]
    m_left = (o_l < left)[:, None] & (o_l < left)[None, :]
    b_left = wide(tl.load(p_left + o_l[:, None] * left + o_l[None, :], mask=m_left, other=0))  # [LEFT, LEFT]
    b_right = _parity(o_r[:, None], o_r[None, :]).to(tl.float32)  # [RIGHT, RIGHT]
    size = left * RIGHT
    if MANY:
        for i in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
            _rotate_row(i, b_left, b_right, o_d, m_d, p_x, p_signs, p_static, p_y, p_codes, p_scale, x_row, blocks,
                        size, factor, qmax, SIGNS_FIRST, WHOLE)
    else:
        _rotate_row(tl.program_id(0), b_left, b_right, o_d, m_d, p_x, p_signs, p_static, p_y, p_codes, p_scale, x_row,
                    blocks, size, factor, qmax, SIGNS_FIRST, WHOLE)


@functools.cache
def sides(block: int) -> tuple[int, int] | None:
    """(LEFT, RIGHT) of a block, the cheapest of all; None where both are too large."""
    base, power = split(block)  # type: ignore[misc]
    found = []
    right = 1
    while right <= min(power, LARGEST_RIGHT):
        left = base * (power // right)
        if left <= LARGEST_LEFT:
            tile_l, tile_r = max(16, triton.next_power_of_2(left)), max(16, right)
            found.append((tile_l * tile_r * (tile_l + 3 * tile_r), left, right))
        right *= 2
    return min(found)[1:] if found else None


@functools.cache
def _left_matrix(left: int, transpose: bool, device: torch.device) -> Tensor:
    """int8 [LEFT, LEFT] of ±1, as it stands left of a row."""
    matrix = (hadamard_matrix(left) * math.sqrt(left)).round().to(torch.int8)
    return (matrix if transpose else matrix.T).contiguous().to(device)


def _launch(x: Tensor, signs: Tensor | None, block: int, transpose: bool, y: Tensor | None, codes: Tensor | None,
            scale: Tensor | None, static: Tensor | None, bits: int) -> None:
    size = x.shape[-1]
    rows_x = x if x.dim() == 2 else x.reshape(-1, size)
    if rows_x.stride(1) != 1:
        rows_x = rows_x.contiguous()
    found = sides(block)
    if found is None:
        raise ValueError(f"the Hadamard rotation in Triton has no blocks of {block}")
    left, right = found
    tile = max(16, triton.next_power_of_2(left)), max(16, right)
    blocks = size // block
    signs = None if signs is None else signs.to(torch.int8).contiguous()
    count, many = rows_x.shape[0] * blocks, tile[0] * tile[1] <= TILE_OF_MANY
    gpu.launch(_rotate_kernel, (min(PROGRAMS, count) if many else count,), rows_x,
               _left_matrix(left, transpose, x.device), signs, static, y, codes, scale, rows_x.shape[0],
               rows_x.stride(0), blocks, left, 1.0 / math.sqrt(block), qmax=qmax_of(bits), SIGNS_FIRST=not transpose,
               LEFT=tile[0], RIGHT=right, TILE_R=tile[1], MANY=many,
               num_warps=4 if many or (gpu.amd() and tile[1] == 128) else 8)


def hadamard_triton(x: Tensor, signs: Tensor | None, block: int, transpose: bool) -> Tensor:
    """See ``hadamard``; x in fp32, bf16 or fp16."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        _launch(x, signs, block, transpose, y, None, None, None, 8)
    return y


def hadamard_int8_triton(x: Tensor, signs: Tensor | None, block: int, transpose: bool, act_scale: Tensor | None,
                         act_bits: int) -> tuple[Tensor, Tensor]:
    """See ``hadamard_int8``. Rows of several blocks are quantized behind the rotation, by torch."""
    if block != x.shape[-1]:
        return quantized(hadamard_triton(x, signs, block, transpose), act_scale, act_bits)
    codes, scale = empty_codes(x)
    if codes.numel():
        _launch(x, signs, block, transpose, None, codes, scale, act_scale, act_bits)
    return codes, scale


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    for dtype in gpu.FLOATS:
        for size in (48, 768, 1536, 2560, 5120) if dtype == torch.float16 else (1536, 5120):
            x = torch.empty(64, size, dtype=dtype, device="meta")
            signs = torch.empty(size, dtype=torch.int8, device="meta")
            hadamard_triton(x, signs, size, False)
            hadamard_int8_triton(x, None if size == 768 else signs, size, False, None, 8)


__all__ = ["hadamard_int8_triton", "hadamard_triton", "offline_calls", "sides"]
