"""What rounding passes check before they round, in the user's words, and what they store in fp16 instead."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.models.modelmap import Block
from mambacompress.numerics import Grid, sqnr_db

HARMLESS_DB = 60
"""fp16 costs a matrix no more than this (fp32's own rounding: about 150 dB)."""


def check_groups(where: str, channels: int, grid: Grid) -> None:
    """Raise UserError where groups do not divide the input channels, or two 4-bit values do not fill a byte."""
    if grid.bits == 4 and channels % 2:
        raise UserError(f"{where} has {channels} input channels, an odd number, and two 4-bit values share a byte",
                        "store it as int8 with `overrides`")
    size = grid.group_size
    if size is None or channels % size == 0:
        return
    fitting = [other for other in range(2, min(channels, 256) + 1, 2) if channels % other == 0]
    if not fitting:
        raise UserError(f"{where} has {channels} input channels, which groups of {size} do not divide",
                        "leave it in float, or store it as int8")
    nearest = min(fitting, key=lambda other: (abs(math.log(other / size)), -other))
    raise UserError(f"{where} has {channels} input channels, which groups of {size} do not divide",
                    f"use group size {nearest} for it with `overrides`, or store it as int8")


def checked_weight(weight: Tensor, where: str) -> Tensor:
    """An fp64 copy; raises UserError where it holds NaN or Inf."""
    if not torch.isfinite(weight).all():
        raise UserError(f"{where}: the weight holds NaN or Inf", "check the checkpoint")
    return weight.double()


def halve_rest(block: Block) -> None:
    """Store the matrices no pass has packed (A_log, convolutions) in fp16, where harmless."""
    for parameter in block.mixer.parameters():
        if parameter.dim() > 1 and parameter.dtype == torch.float32:
            parameter.data = half_if_harmless(parameter.data)


def half_if_harmless(matrix: Tensor) -> Tensor:
    """fp16 where it keeps ``HARMLESS_DB`` of the matrix, else fp32."""
    half = matrix.half()
    return half if torch.isfinite(half).all() and sqnr_db(matrix, half) > HARMLESS_DB else matrix.float()


__all__ = ["HARMLESS_DB", "check_groups", "checked_weight", "half_if_harmless", "halve_rest"]
