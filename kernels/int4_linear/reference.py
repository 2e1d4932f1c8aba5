"""Readable torch for linears on int4 weights in groups along the input.

Storage: two nibbles a byte, the low one is the even column; w = (nibble - zero) * scale with one scale a row and group.
Symmetric weights have no ``zero``: it is 8, so codes are -8..7 (quantizers use -7..7). Codes of a group multiply the
quantized activations exactly in int32; then, elementwise and in the order of the groups, in fp32:

    y = (float(acc_0) * s_0 + float(acc_1) * s_1 + ...) * activation_scale + bias

every product rounded before it is added (no fused multiply-add), so all backends agree bit for bit, and so do prefill
and decode. Rounding of activations: int8_linear/reference.py.

Legend: T rows (tokens), I inputs, O outputs, G groups, g inputs a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacompress.kernels.int8_linear.reference import int_matmul, quantize_input, weight_only, wide_dtype
from mambacompress.kernels.int8_linear.tiles import BYTES, untiled

OFFSET = 8


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., I/2] -> uint8 [..., I] of 0..15; the low nibble is the even column."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """uint8 [..., I] of 0..15 -> uint8 [..., I/2]. Raises ValueError for an odd number of columns."""
    if nibbles.shape[-1] % 2:
        raise ValueError(f"two 4-bit codes share a byte: {tuple(nibbles.shape)} has an odd number of columns")
    pairs = nibbles.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def centred_codes(packed: Tensor, zero: Tensor | None) -> Tensor:
    """nibble - zero as int8, [..., I]; zero: uint8 [..., G] or None for 8."""
    codes = unpack_nibbles(packed).to(torch.int8)
    if zero is None:
        return codes - OFFSET
    return (codes.unflatten(-1, (zero.shape[-1], -1)) - zero.to(torch.int8)[..., None]).flatten(-2)


def dequantize_int4(packed: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Float weight rows [..., I] of packed rows [..., I/2], scale [..., G]."""
    codes = centred_codes(packed, zero).to(dtype)
    return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale.to(dtype)[..., None]).flatten(-2)


def rows_again(qweight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Copies of a tiled weight, its scales and zero points as rows."""
    return untiled(qweight, BYTES), untiled(scale, 1), None if zero is None else untiled(zero, 1)


def int4_linear_reference(
    x: Tensor, qweight: Tensor, scale_OG: Tensor, zero_OG: Tensor | None = None, bias_O: Tensor | None = None, *,
    group_size: int, activation: str = "token", act_scale: Tensor | None = None, act_bits: int = 8,
    tiled: bool = False,
) -> Tensor:
    """See ``int4_linear``."""
    if tiled:
        qweight, scale_OG, zero_OG = rows_again(qweight, scale_OG, zero_OG)
    wide = wide_dtype(x)
    outputs, inputs = qweight.shape[0], qweight.shape[1] * 2
    x_TI = x.reshape(-1, inputs)
    if activation == "none":
        y_TO = weight_only(x_TI.to(wide), lambda rows: dequantize_int4(
            qweight[rows], scale_OG[rows], None if zero_OG is None else zero_OG[rows], wide), (outputs, inputs))
    else:
        q_TI, token_scale = quantize_input(x_TI, activation, act_bits, act_scale)
        y_TO = x_TI.new_zeros(())
        for group in range(inputs // group_size):
            columns = slice(group * group_size, (group + 1) * group_size)
            zero = None if zero_OG is None else zero_OG[:, group:group + 1]
            codes_Og = centred_codes(qweight[:, columns.start // 2:columns.stop // 2], zero)
            part = int_matmul(q_TI[:, columns].contiguous(), codes_Og).to(wide) * scale_OG[:, group].to(wide)
            y_TO = part if group == 0 else y_TO + part
        y_TO = y_TO * token_scale
    if bias_O is not None:
        y_TO = y_TO + bias_O.to(wide)
    return y_TO.to(x.dtype).reshape(*x.shape[:-1], outputs)
