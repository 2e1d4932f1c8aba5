"""Rounding, scales and packing: pure tensor functions, no modules.

Weights: codes in ±(2^(bits-1) - 1), one scale a row or a group of a row, rounded half to even; w ≈ code * scale.
Asymmetric 4-bit weights use all sixteen codes and a zero point a group: w ≈ (code - zero) * scale. A scale is rounded
to the dtype it is stored in *before* any code is chosen. It may be the one that clips nothing, or the one of least
weighted squared error.

Activations round as the kernels do (``quantize_activation`` *is* their rounding), and the straight-through
``fake_quantize`` functions let training see exactly what the packed model will compute.

Legend: O rows (outputs), I columns (inputs), G groups, g group size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels.int4_linear import pack_nibbles, unpack_nibbles
from mambacompress.kernels.int8_linear import quantize_rows

NIBBLE_OFFSET = 8  # 4-bit codes -8..7 are stored as 0..15


def limit(bits: int) -> int:
    """The largest code: 127 for 8 bits, 7 for 4."""
    return (1 << (bits - 1)) - 1


def round_half_even(x: Tensor) -> Tensor:
    """The nearest whole number, ties to the even one; floats stay floats."""
    return torch.round(x)


# -- weights ---------------------------------------------------------------------------------------------------------


def grouped(weight_OI: Tensor, group_size: int | None) -> Tensor:
    """[O, I] -> [O, I/g, g]. Raises ValueError where the group does not divide the row."""
    rows, columns = weight_OI.shape
    group = columns if group_size is None else group_size
    if group < 1 or columns % group:
        raise ValueError(f"groups of {group} do not divide the {columns} columns of a [{rows}, {columns}] weight")
    return weight_OI.unflatten(1, (columns // group, group))


def absmax_scale(weight_OGg: Tensor, bits: int) -> Tensor:
    """The scale [O, G] that clips nothing; 1 for a row of zeros."""
    scale = weight_OGg.abs().amax(-1) / limit(bits)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def searched_scale(weight_OGg: Tensor, bits: int, importance_Gg: Tensor | None = None, steps: int = 40,
                   lowest: float = 0.5) -> Tensor:
    """The scale [O, G] that minimises Σ importance · (w - ŵ)² over clips from ``lowest`` to 1 of the largest value."""
    full = absmax_scale(weight_OGg, bits)
    best = full.clone()
    best_error = torch.full_like(full, torch.inf)
    for shrink in torch.linspace(1.0, lowest, steps).tolist():
        scale = full * shrink
        wrong = (round_to(weight_OGg, scale, bits) * scale[..., None] - weight_OGg).square()
        error = (wrong if importance_Gg is None else wrong * importance_Gg).sum(-1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def round_to(weight_OGg: Tensor, scale_OG: Tensor, bits: int) -> Tensor:
    """Codes (as floats) of the nearest multiples of the scale, clamped."""
    top = limit(bits)
    return torch.clamp(round_half_even(weight_OGg / scale_OG[..., None]), -top, top)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale rounded to the dtype it is stored in, never to zero. Raises ValueError where it is too large for it."""
    if scale.numel() and float(scale.max()) > torch.finfo(dtype).max:
        raise ValueError(f"a scale of {float(scale.max()):.3g} does not fit {str(dtype).removeprefix('torch.')}: the "
                         "weight is too large")
    return scale.clamp_min(torch.finfo(dtype).tiny).to(dtype)


def quantize_symmetric(weight_OI: Tensor, bits: int, group_size: int | None = None, *, search: bool = False,
                       importance_I: Tensor | None = None,
                       scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(codes int8 [O, I], scale [O] or, with groups, [O, I/g]).

    search: look for the clip of least error, weighted by ``importance`` [I] (the inputs' mean square). scale_dtype: the
    scale is rounded to it *before* the codes are chosen. Raises ValueError for NaN or Inf, or groups that do not
    divide.
    """
    weight_OGg = grouped(_checked(weight_OI), group_size)
    importance = None if importance_I is None else grouped(importance_I[None].to(weight_OGg.dtype), group_size)[0]
    scale = searched_scale(weight_OGg, bits, importance) if search else absmax_scale(weight_OGg, bits)
    scale = storable(scale, scale_dtype)
    codes = round_to(weight_OGg, scale.to(weight_OGg.dtype), bits).flatten(1).to(torch.int8)
    return codes, scale if group_size is not None else scale[:, 0]


def quantize_asymmetric(weight_OI: Tensor, group_size: int | None = None, *,
                        scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits: (codes int8 [O, I] in -8..7, scale [O, G], zero int8 [O, G] in -8..7), w ≈ (code - zero) * scale.

    The range of a group is widened to hold 0, so that 0 is exact. Raises ValueError as ``quantize_symmetric`` does.
    """
    weight_OGg = grouped(_checked(weight_OI), group_size)
    low, high = weight_OGg.amin(-1).clamp(max=0), weight_OGg.amax(-1).clamp(min=0)
    span = (high - low) / 15
    scale = storable(torch.where(span > 0, span, torch.ones_like(span)), scale_dtype)
    wide = scale.to(weight_OGg.dtype)
    zero = (round_half_even(-low / wide) - NIBBLE_OFFSET).clamp(-8, 7)
    codes = (round_half_even(weight_OGg / wide[..., None]) + zero[..., None]).clamp(-8, 7)
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


def percentile_absmax(x: Tensor, percentile: float) -> Tensor:
    """The magnitude that ``percentile`` % of the values do not exceed; 100 is the largest. fp32 scalar.

    A value that occurs, never one between two: sorted position ceil(p / 100 * n). Raises ValueError for an empty
    tensor.
    """
    if x.numel() == 0 or not 0 < percentile <= 100:
        raise ValueError(f"no {percentile} % range of {x.numel()} values")
    magnitudes = x.detach().abs().flatten().float()
    if percentile == 100:
        return magnitudes.max()
    position = min(magnitudes.numel(), max(1, math.ceil(percentile / 100 * magnitudes.numel())))
    return magnitudes.kthvalue(position).values


def static_scale(x: Tensor, bits: int = 8, percentile: float = 100.0) -> Tensor:
    """The per-tensor scale of calibration values: the percentile range over 127 (or 7), never zero. fp32 scalar."""
    return (percentile_absmax(x, percentile) / limit(bits)).clamp_min(torch.finfo(torch.float32).tiny)


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


def fake_quantize_weight(weight_OI: Tensor, bits: int, group_size: int | None = None, *,
                         scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """The packed weight's values in float, [O, I]; gradients pass straight through. Packing later gives the same
    codes.
    """
    codes, scale = quantize_symmetric(weight_OI.detach(), bits, group_size, scale_dtype=scale_dtype)
    wide = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    return _StraightThrough.apply(weight_OI, dequantize(codes, scale, wide), None)


def fake_quantize_activation(x: Tensor, mode: str = "token", bits: int = 8, scale: Tensor | None = None) -> Tensor:
    """Activations as the integer kernels see them; gradients pass straight through, except where ``tensor`` mode
    clips.
    """
    codes, used = quantize_activation(x.detach(), mode, bits, scale)
    inside = x.detach().abs() <= used * limit(bits) if mode == "tensor" else None
    return _StraightThrough.apply(x, codes.to(used.dtype) * used, inside)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 log10 of signal over error energy, in dB; infinite where they are equal."""
    signal = reference.double().square().sum()
    error = (reference.double() - approximation.double()).square().sum()
    return float("inf") if error == 0 else float(10 * torch.log10(signal / error))
