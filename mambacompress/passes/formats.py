"""What a recipe's format of a tensor is to the packer: its grid, the formats of weights and activations, stored bytes.

Legend: O outputs, G groups a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.models.packed import ActivationFormat, WeightFormat
from mambacompress.models.packed_sparse import sparse_bytes
from mambacompress.nm import Pattern
from mambacompress.numerics import Grid
from mambacompress.schema import MapFormat


def grid_of(format_: MapFormat) -> Grid:
    """What its codes are rounded to."""
    return Grid(format_.bits, format_.group_size)


def weights_of(format_: MapFormat) -> WeightFormat:
    """How its codes are stored."""
    return WeightFormat(format_.bits, format_.group_size)


def activations_of(format_: MapFormat) -> ActivationFormat:
    """How activations meet it."""
    if format_.activations == "none":
        return ActivationFormat()
    kind, _, mode = format_.activations.partition("-")
    return ActivationFormat(mode, 8 if kind == "int8" else 4)


def stored_scale(scales_OG: Tensor, format_: MapFormat) -> Tensor:
    """[O] where a row has one scale, else [O, G]."""
    return scales_OG[:, 0] if format_.group_size is None else scales_OG


def check_sparse(where: str, tensor: str, format_: MapFormat, pattern: Pattern | None) -> None:
    """Raise UserError where a sparse weight would be stored as what sparse values are not."""
    if pattern is not None and format_.weights != "int8":
        raise UserError(f"{where} is {pattern} sparse, and sparse values are stored as int8 or fp16, not "
                        f"{format_.weights}",
                        f"give it int8 with `overrides`, or leave {tensor} out of quantize's maps for fp16")


def packed_bytes(shape: torch.Size, format_: MapFormat, pattern: Pattern | None = None) -> int:
    """Stored bytes of a weight [rows, columns]: codes and scales, positions where it is sparse, and the static scale of
    its activations.
    """
    rows, columns = shape
    if pattern is not None:
        return sparse_bytes(rows, columns, pattern, format_.weights, format_.activations)
    scales = rows * (1 if format_.group_size is None else columns // format_.group_size)
    static = 4 if format_.activations.endswith("tensor") else 0
    return rows * columns * format_.bits // 8 + scales * weights_of(format_).scale_dtype.itemsize + static


__all__ = ["activations_of", "check_sparse", "grid_of", "packed_bytes", "stored_scale", "weights_of"]
