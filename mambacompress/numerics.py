"""Rounding, scales and packing: pure tensor functions and the grid they round to, no modules.

Weights: w ≈ code · scale, one scale a row or a group of a row. 8 bits: |code| ≤ 127. 4 bits: codes from -8 to 7; the
one code more below zero is not wasted, as the *sign* of a scale points it at the group's largest weight, so that steps
are an eighth of that weight, not a seventh: 18 % less squared error for Gaussian weights, at no cost in bytes or time.
A scale is rounded to what the artifact stores *before* anything is rounded to it, so that codes · scale is the stored
weight exactly. Asymmetric 4-bit weights have a zero point a group instead: w ≈ (code - zero) · scale.

The clipping search minimises Σ_i m_i (w_i - q_i s)², m the mean square of input channel i: the expected error of the
linear's output where inputs are uncorrelated. It only ever shrinks the scale (some values clip, all others are finer),
so the largest code stays at the end of the grid and rounding the result again changes nothing.

Activations round as the kernels do (``quantize_activation`` *is* their rounding), and the straight-through
``fake_quantize`` functions let training see exactly what the packed model will compute.

Legend: O rows (outputs), I columns (inputs), G groups a row, g columns a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels.int4_linear import pack_nibbles, unpack_nibbles
from mambacompress.kernels.int8_linear import quantize_rows

NIBBLE_OFFSET = 8  # 4-bit codes -8..7 are stored as 0..15

#: Scales tried by the search, as shares of the one that clips nothing.
SHRINKS = tuple(1.0 - step / 50 for step in range(26))


# -- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The integers a weight is rounded to. bits: 4 or 8. group_size: columns a scale, None: one scale a row."""

    bits: int
    group_size: int | None = None

    @property
    def lowest(self) -> int:
        return -127 if self.bits == 8 else -8

    @property
    def highest(self) -> int:
        return 127 if self.bits == 8 else 7

    @property
    def described(self) -> str:
        return "per row" if self.group_size is None else f"groups of {self.group_size}"

    @property
    def scale_dtype(self) -> torch.dtype:
        """What a scale is stored in: fp16 at 4 bits, fp32 at 8, where a row has but one."""
        return torch.float16 if self.bits == 4 else torch.float32

    def grouped(self, w_OI: Tensor) -> Tensor:
        """View [O, G, g]. Raises ValueError where groups do not divide the row."""
        group = self.group_size or w_OI.shape[1]
        if w_OI.shape[1] % group:
            raise ValueError(f"groups of {group} do not divide the {w_OI.shape[1]} columns of a "
                             f"[{w_OI.shape[0]}, {w_OI.shape[1]}] weight")
        return w_OI.unflatten(1, (-1, group))

    def storable(self, scales_OG: Tensor) -> Tensor:
        """The nearest scales the artifact can hold, as fp32; zero becomes the smallest normal number."""
        limits = torch.finfo(self.scale_dtype)
        magnitude_OG = scales_OG.abs().clamp(limits.smallest_normal, limits.max)
        return torch.where(scales_OG < 0, -magnitude_OG, magnitude_OG).to(self.scale_dtype).float()

    def round(self, w_OI: Tensor, scales_OG: Tensor) -> Tensor:
        """Codes [O, I] int8, ties to even."""
        codes_OGg = torch.round(self.grouped(w_OI) / scales_OG[..., None].to(w_OI.dtype))
        return codes_OGg.clamp(self.lowest, self.highest).to(torch.int8).flatten(1)

    def dequantize(self, codes_OI: Tensor, scales_OG: Tensor) -> Tensor:
        """codes · scale, [O, I] in the scales' dtype."""
        return dequantize(codes_OI, scales_OG, scales_OG.dtype)


def widest_scales(w_OI: Tensor, grid: Grid) -> Tensor:
    """Scales fp32 [O, G] at which nothing clips: the largest magnitude becomes the lowest code."""
    grouped_OGg = grid.grouped(w_OI)
    place_OG1 = grouped_OGg.abs().argmax(-1, keepdim=True)
    peak_OG = grouped_OGg.gather(-1, place_OG1)[..., 0]
    peak_OG = torch.where(peak_OG == 0, torch.full_like(peak_OG, grid.lowest), peak_OG)  # a group of zeros: any scale
    return grid.storable(peak_OG / grid.lowest if grid.bits == 4 else peak_OG.abs() / grid.highest)


def searched_scales(w_OI: Tensor, grid: Grid, mean_square_I: Tensor | None = None) -> Tensor:
    """Scales fp32 [O, G] of least weighted error among ``SHRINKS``; ``mean_square_I`` None weighs all channels alike.
    """
    widest_OG = widest_scales(w_OI, grid).to(w_OI.dtype)
    grouped_OGg = grid.grouped(w_OI)
    weight_1Gg = None if mean_square_I is None else grid.grouped(mean_square_I[None].to(w_OI))
    best_OG, least_OG = widest_OG.float(), torch.full_like(widest_OG, float("inf"))
    for shrink in SHRINKS:
        scales_OG = grid.storable(widest_OG * shrink)
        wide_OG1 = scales_OG[..., None].to(w_OI.dtype)
        rounded_OGg = torch.round(grouped_OGg / wide_OG1).clamp_(grid.lowest, grid.highest) * wide_OG1
        wrong_OGg = (rounded_OGg - grouped_OGg).square()
        error_OG = (wrong_OGg if weight_1Gg is None else wrong_OGg * weight_1Gg).sum(-1)
        better_OG = error_OG < least_OG
        best_OG = torch.where(better_OG, scales_OG, best_OG)
        least_OG = torch.where(better_OG, error_OG, least_OG)
    return best_OG


def round_to_nearest(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(codes int8 [O, I], scales fp32 [O, G] as stored), nothing clipped.

    Raises ValueError for NaN or Inf, or groups that do not divide.
    """
    weight_OI = _checked(weight_OI)
    scales_OG = widest_scales(weight_OI, grid)
    return grid.round(weight_OI, scales_OG), scales_OG


def quantize_asymmetric(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits: (codes int8 [O, I] in -8..7, scales fp32 [O, G], zero int8 [O, G] in -8..7), w ≈ (code - zero) * scale.

    The range of a group is widened to hold 0, so that 0 is exact. Raises ValueError as ``round_to_nearest`` does.
    """
    weight_OGg = grid.grouped(_checked(weight_OI))
    low, high = weight_OGg.amin(-1).clamp(max=0), weight_OGg.amax(-1).clamp(min=0)
    span = (high - low) / 15
    scale = grid.storable(torch.where(span > 0, span, torch.ones_like(span)))
    wide = scale.to(weight_OGg.dtype)
    zero = (torch.round(-low / wide) - NIBBLE_OFFSET).clamp(-8, 7)
    codes = (torch.round(weight_OGg / wide[..., None]) + zero[..., None]).clamp(-8, 7)
    return codes.flatten(1).to(torch.int8), scale, zero.to(torch.int8)


def _checked(weight: Tensor) -> Tensor:
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or Inf")
    return weight if weight.dtype == torch.float64 else weight.float()


def dequantize(codes_OI: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32,
               zero: Tensor | None = None) -> Tensor:
    """(codes [O, I] - zero) times scale; scale [O] or [O, G], zero [O, G] or None."""
    scale_OG = scale[:, None] if scale.dim() == 1 else scale
    codes_OGg = codes_OI.to(dtype).unflatten(1, (scale_OG.shape[1], -1))
    if zero is not None:
        codes_OGg = codes_OGg - zero.to(dtype)[..., None]
    return (codes_OGg * scale_OG.to(dtype)[..., None]).flatten(1)


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes [..., I] in -8..7 -> uint8 [..., I/2], low nibble = even column. Raises ValueError for odd I or big
    codes.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"{tuple(codes.shape)}: an odd number of columns cannot be packed two a byte")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError("codes outside -8..7 do not fit four bits")
    return pack_nibbles((codes.to(torch.int8) + NIBBLE_OFFSET).to(torch.uint8))


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [..., I/2] -> int8 codes [..., I]."""
    return unpack_nibbles(packed).to(torch.int8) - NIBBLE_OFFSET


# -- activations -----------------------------------------------------------------------------------------------------


def quantize_activation(x: Tensor, mode: str = "token", bits: int = 8,
                        scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes int8 [..., I], scale): ``token`` finds a scale [..., 1] a row, ``tensor`` uses the given one.

    This is the rounding of the integer kernels. Raises ValueError for another mode or a missing scale.
    """
    return quantize_rows(x, mode, bits, scale)


# -- training --------------------------------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    """Passes ``rounded`` on; the gradient flows to ``x`` where ``inside`` is true (everywhere where it is None)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (inside,) = ctx.saved_tensors
        return (grads[0] if inside is None else grads[0] * inside, None, None)


def fake_quantize_weight(weight_OI: Tensor, grid: Grid) -> Tensor:
    """The packed weight's values in float, [O, I]; gradients pass straight through. Packing later gives the same
    codes.
    """
    codes_OI, scales_OG = round_to_nearest(weight_OI.detach(), grid)
    return _StraightThrough.apply(weight_OI, grid.dequantize(codes_OI, scales_OG), None)


def fake_quantize_activation(x: Tensor, mode: str = "token", bits: int = 8, scale: Tensor | None = None) -> Tensor:
    """Activations as the integer kernels see them; gradients pass straight through, except where ``tensor`` mode
    clips.
    """
    codes, used = quantize_activation(x.detach(), mode, bits, scale)
    inside = x.detach().abs() <= used * Grid(bits).highest if mode == "tensor" else None
    return _StraightThrough.apply(x, codes.to(used.dtype) * used, inside)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 log10 of signal over error energy, in dB; infinite where they are equal."""
    signal = reference.double().square().sum()
    error = (reference.double() - approximation.double()).square().sum()
    return float("inf") if error == 0 else float(10 * torch.log10(signal / error))
