"""What the Triton kernels share: elementwise functions on fp32 blocks, and the rounding of the integer linears.

Kernels import this only through an op's ``triton.py``. Every function takes and returns fp32 unless it says otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambacompress.kernels import int8_state

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits behind the point
STEP, CHANNEL, STATE = (tl.constexpr(number) for number in (int8_state.STEP, int8_state.CHANNEL, int8_state.STATE))
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def wide(x):
    """A loaded block in fp32; before anything else is done with it (bf16 has no arithmetic here)."""
    return x.to(tl.float32)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to a few units in the last place in the tail too: there log(1 + t) = t (1 - t/2 + t²/3)."""
    t = tl.exp2(tl.minimum(x, 20.0) * LOG2E)
    near = tl.where(t < 0.00390625, t * (1.0 + t * (-0.5 + t * (0.33333334 - 0.25 * t))), tl.log(1.0 + t))
    return tl.where(x <= 20.0, near, x)  # in this order a NaN stays one: a GPU's minimum of it and 20 is 20


@triton.jit
def clamp(x, low, high):
    """x between the two; a NaN stays one."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def exp2_polynomial(x):
    """2^x for x <= 0 without the special function unit: about fifteen instructions of other pipes, relative error 2e-7.

    x = n + f with n = round(x), f in [-1/2, 1/2]; Taylor's polynomial of degree 6 for 2^f, and n added to the
    exponent. Below -126 the result is 0; a NaN stays one.
    """
    shifted = x + ROUNDING
    f = x - (shifted - ROUNDING)
    p = 1.5403530e-4
    p = p * f + 1.3333558e-3
    p = p * f + 9.6181291e-3
    p = p * f + 5.5504109e-2
    p = p * f + 2.4022651e-1
    p = p * f + 6.9314718e-1
    p = p * f + 1.0
    exponent = (shifted.to(tl.int32, bitcast=True) - 0x4B400000) << 23
    value = (p.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)
    return tl.where(x >= -126.0, value, tl.where(x < -126.0, 0.0, x))


@triton.jit
def round_half_even(x):
    """Nearest integers of |x| < 2^22, ties to even, still fp32."""
    return (x + ROUNDING) - ROUNDING


@triton.jit
def codes_of(x, scale, qmax: tl.constexpr):
    """int8 codes clamp(round(x / scale)); NaN gives 0."""
    q = tl.div_rn(x, scale + tl.zeros_like(x))
    q = tl.where(q == q, q, 0.0)
    return round_half_even(tl.minimum(tl.maximum(q, -qmax), qmax)).to(tl.int8)


@triton.jit
def round_to(x, pointer):
    """x rounded to the dtype ``pointer`` points to, ties to even, in fp32 again."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:  # the interpreter's own conversion cuts the bits off
        return _nearest_bf16(x)
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def _nearest_bf16(x):
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def factor(x, BF16: tl.constexpr):
    """An fp32 block as a factor of ``tl.dot``: rounded to bf16, or as it is."""
    if BF16:
        return _nearest_bf16(x) if INTERPRETED else x.to(tl.bfloat16)
    else:  # to Triton, code behind an ``if`` that returns is compiled all the same
        return x


@triton.jit
def narrow(x, pointer):
    """x as it is stored at ``pointer``."""
    return round_to(x, pointer).to(pointer.dtype.element_ty)


@triton.jit
def dither(step, channel, state):
    """What is added to a state before it is rounded down to its code: ``int8_state``, in whole numbers modulo 2^32."""
    place = step.to(tl.uint32) * STEP + channel.to(tl.uint32) * CHANNEL + state.to(tl.uint32) * STATE
    return (place >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def int8_state_scale(b_h, AXIS: tl.constexpr):
    """The scale of every channel's states, NaN where one of them is no finite number."""
    largest = tl.max(tl.abs(b_h), AXIS)
    return tl.div_rn(tl.maximum(largest, 1e-30), tl.full(largest.shape, 127.0, tl.float32)) + tl.sum(b_h - b_h, AXIS)


@triton.jit
def int8_state_codes(b_scaled, b_dither):
    """int8 codes of states divided by their scale."""
    x = tl.minimum(tl.maximum(tl.floor(b_scaled + b_dither), -127.0), 127.0)
    return tl.where(x == x, x, -127.0).to(tl.int8)


@triton.jit
def operand(x):
    """A float block as ``tl.dot`` takes it: the interpreter multiplies bf16 only in fp32."""
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def tile_of(program, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share a column of tiles, so that both stay in L2."""
    tiles_r, tiles_c = tl.cdiv(rows, BLOCK_R), tl.cdiv(columns, BLOCK_C)
    i_group = program // (GROUP * tiles_c)
    first = i_group * GROUP
    size = min(tiles_r - first, GROUP)
    inside = program % (GROUP * tiles_c)
    return first + inside % size, inside // size
