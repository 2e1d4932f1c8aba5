"""What rounding passes check before they round, in the user's words, how they round to nearest, and what they store in
fp16 instead.

Legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.models.modelmap import Block
from mambacompress.numerics import Grid, searched_scales, sqnr_db, widest_scales

HARMLESS_DB = 60
"""fp16 costs a matrix no more than this (fp32's own rounding: about 150 dB)."""

CHUNK_VALUES = 1 << 23
"""Values of a weight that are rounded at a time."""


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


def round_weight(weight_OI: Tensor, grid: Grid, where: str, *, search: bool = False,
                 importance_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes int8 [O, I], scales fp32 [O, G]) by rounding to nearest, a few rows at a time.

    search: look for the clip of least error, weighted by ``importance`` [I]. Raises UserError for NaN or Inf.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for chunk_OI in weight_OI.split(max(1, CHUNK_VALUES // weight_OI.shape[1])):
        if not torch.isfinite(chunk_OI).all():
            raise UserError(f"{where}: the weight holds NaN or Inf", "check the checkpoint")
        chunk_OI = chunk_OI.double() if chunk_OI.dtype == torch.float64 else chunk_OI.float()
        scales_OG = searched_scales(chunk_OI, grid, importance_I) if search else widest_scales(chunk_OI, grid)
        parts.append((grid.round(chunk_OI, scales_OG), scales_OG))
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def weight_sqnr_db(weight_OI: Tensor, codes_OI: Tensor, scales_OG: Tensor, grid: Grid) -> float:
    """10 log10 of signal over error energy, a few rows at a time; at most 999."""
    signal = wrong = 0.0
    rows = max(1, CHUNK_VALUES // weight_OI.shape[1])
    for w_OI, q_OI, s_OG in zip(*(t.split(rows) for t in (weight_OI, codes_OI, scales_OG)), strict=True):
        signal += w_OI.double().square().sum().item()
        wrong += (w_OI.double() - grid.dequantize(q_OI, s_OG).double()).square().sum().item()
    return 10 * math.log10(signal / wrong) if signal and wrong else 999.0


__all__ = ["HARMLESS_DB", "check_groups", "checked_weight", "half_if_harmless", "halve_rest", "round_weight",
           "weight_sqnr_db"]
