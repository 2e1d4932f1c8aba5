"""Weights rearranged for the native integer linears: tiles of 16 outputs, in place and byte for byte.

A tile of a weight [O, bytes] is [bytes / 4][16][4]: a vector of the dot instruction is one load, and a tile one stream.
Scales and zero points [O, G] go along as [G][16] a tile. Outputs behind the last whole tile stay rows. The shape of a
tensor does not change, nor its bytes, only their order: whoever holds one must say so (``tiled``).

Legend: O outputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUTS = 16
BYTES = 4  # of a row that stay together in a tile of weights
_AT_A_TIME = 1024  # outputs


def can_be_tiled(qweight: Tensor, groups: int) -> bool:
    """Whether a weight [O, bytes] has whole tiles, and no group of inputs ends inside a quad of bytes."""
    return len(qweight) >= OUTPUTS and qweight.shape[1] % (BYTES * groups) == 0


def tile(x: Tensor, unit: int) -> None:
    """Rearrange the rows of x [O, columns] in place; unit: columns that stay together (BYTES, or 1 for scales)."""
    for start in range(0, tiled_outputs(x), _AT_A_TIME):
        part = x[start:min(start + _AT_A_TIME, tiled_outputs(x))]
        rows = part.clone().reshape(-1, OUTPUTS, x.shape[1] // unit, unit)
        part.copy_(rows.transpose(1, 2).reshape(part.shape))


def untiled(x: Tensor, unit: int) -> Tensor:
    """A copy of x as it was before ``tile``."""
    y, whole = x.clone(), x[:tiled_outputs(x)]
    tiles = whole.reshape(-1, x.shape[1] // unit, OUTPUTS, unit)
    y[:len(whole)] = tiles.transpose(1, 2).reshape(whole.shape)
    return y


def rows_of(x: Tensor, rows_R: Tensor, unit: int) -> Tensor:
    """Rows [R, columns] of a tiled x [O, columns]; rows: int64 [R]."""
    whole = tiled_outputs(x)
    tiles = x[:whole].view(-1, x.shape[1] // unit, OUTPUTS, unit)
    inside = rows_R.clamp_max(whole - 1)
    found = tiles[inside // OUTPUTS, :, inside % OUTPUTS].flatten(1)
    return found if whole == len(x) else torch.where((rows_R < whole)[:, None], found, x[rows_R])


def tiled_outputs(x: Tensor) -> int:
    """How many rows of x lie in tiles."""
    return len(x) // OUTPUTS * OUTPUTS


__all__ = ["BYTES", "OUTPUTS", "can_be_tiled", "rows_of", "tile", "tiled_outputs", "untiled"]
