"""Readable torch for N:M sparse weights: their packed form, and the linear that expands them.

``keep`` of every ``of`` consecutive weights of a row are stored, in order; the rest is zero. ``values`` [O, V],
V = I · keep / of. Where the values belong is stored in the smaller of two forms (``position_form``):

    mask      a bit a weight, bit i % 8 of byte i // 8 is column i: 1 bit a weight
    indices   the place of every value in its group, ceil(log2 of) bits each, low bit first, one run of bits a row

2:4 and 4:8 take the mask (2:4 is a draw), 1:4, 1:8 and 2:8 indices. The last byte of a row is filled with zero bits. A
kept weight may be zero itself; a group never stores more than ``keep``.

A linear on int8 values expands them and multiplies exactly as ``int8_linear`` does: same rounding, same order, bit for
bit. On floats (fp16, bf16 or fp32) it is a float product.

Legend: T rows (tokens), I inputs, O outputs, G groups a row, V values a row, B bytes a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambacompress.kernels.int8_linear import int8_linear_reference, weight_only, wide_dtype


def index_bits(of: int) -> int:
    """Bits that name one of ``of`` places."""
    return max(1, (of - 1).bit_length())


def position_form(keep: int, of: int) -> str:
    """``mask`` or ``indices``: the smaller; a draw goes to the mask."""
    return "mask" if of <= keep * index_bits(of) else "indices"


def position_bytes(columns: int, keep: int, of: int) -> int:
    """Bytes a row that say where the values belong."""
    bits = columns if position_form(keep, of) == "mask" else columns // of * keep * index_bits(of)
    return -(-bits // 8)


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., n] -> uint8 [..., ceil(n / 8)], bit i % 8 of byte i // 8 is element i."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << _shifts(8, bits)).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """uint8 [..., B] -> bool [..., count]."""
    return (((packed[..., None] >> _shifts(8, packed)) & 1) != 0).flatten(-2)[..., :count]


def pack_positions(mask_OI: Tensor, keep: int, of: int) -> Tensor:
    """Where the kept weights are, uint8 [O, B]; mask: bool with ``keep`` of every ``of`` set."""
    if position_form(keep, of) == "mask":
        return pack_bits(mask_OI)
    places_OGk = mask_OI.unflatten(-1, (-1, of)).nonzero()[:, -1].reshape(len(mask_OI), -1, keep)
    bits = (places_OGk[..., None] >> _shifts(index_bits(of), mask_OI)) & 1
    return pack_bits(bits.flatten(1) != 0)


def unpack_positions(packed_OB: Tensor, columns: int, keep: int, of: int) -> Tensor:
    """The mask, bool [O, columns], of ``pack_positions``."""
    if position_form(keep, of) == "mask":
        return unpack_bits(packed_OB, columns)
    width = index_bits(of)
    bits_OGkw = unpack_bits(packed_OB, columns // of * keep * width).reshape(len(packed_OB), -1, keep, width)
    places_OGk = (bits_OGkw.long() << _shifts(width, packed_OB)).sum(-1)
    mask_OGM = torch.zeros(*places_OGk.shape[:2], max(of, 1 << width), dtype=torch.bool, device=packed_OB.device)
    return mask_OGM.scatter_(-1, places_OGk, True)[..., :of].flatten(1)


def kept_values(weight_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """[O, V]: what the mask keeps, in order of the columns. Every row keeps equally many."""
    return weight_OI[mask_OI].reshape(len(weight_OI), -1)


def expand(values_OV: Tensor, positions_OB: Tensor, columns: int, keep: int, of: int) -> Tensor:
    """The weight [O, columns] in the values' dtype, +0 where nothing is stored."""
    mask_OI = unpack_positions(positions_OB, columns, keep, of)
    return torch.zeros_like(mask_OI, dtype=values_OV.dtype).masked_scatter_(mask_OI, values_OV)


def nm_linear_reference(
    x: Tensor, values_OV: Tensor, positions_OB: Tensor, scale_O: Tensor | None = None, bias_O: Tensor | None = None, *,
    keep: int, of: int, activation: str = "token", act_scale: Tensor | None = None, act_bits: int = 8,
) -> Tensor:
    """See ``nm_linear``."""
    inputs = x.shape[-1]
    if scale_O is not None:
        codes_OI = expand(values_OV, positions_OB, inputs, keep, of)
        return int8_linear_reference(x, codes_OI, scale_O, bias_O, activation=activation, act_scale=act_scale,
                                     act_bits=act_bits)
    return float_product(x, lambda rows: expand(values_OV[rows], positions_OB[rows], inputs, keep, of), len(values_OV),
                         bias_O)


def float_product(x: Tensor, rows_of: Callable[[slice], Tensor], outputs: int, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + bias in float, in x's dtype; rows_of: some rows [., I] of W, in any float dtype."""
    wide = wide_dtype(x)
    y_TO = weight_only(x.reshape(-1, x.shape[-1]).to(wide), lambda rows: rows_of(rows).to(wide),
                       (outputs, x.shape[-1]))
    if bias_O is not None:
        y_TO = y_TO + bias_O.to(wide)
    return y_TO.to(x.dtype).reshape(*x.shape[:-1], outputs)


def _shifts(count: int, like: Tensor) -> Tensor:
    dtype = torch.uint8 if count == 8 else torch.int64
    return torch.arange(count, dtype=dtype, device=like.device)
