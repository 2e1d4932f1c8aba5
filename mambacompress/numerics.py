"""Rounding, scales and packing: pure tensor functions, no modules.

Symmetric quantizers throughout: codes in ±(2^(bits-1) - 1), one scale a row or a group of a row, rounding half to even. A
scale may be chosen by the largest value (no clipping) or by searching the clip that minimises a weighted squared error.

Legend: O rows (outputs), I columns (inputs), g group size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def limit(bits: int) -> int:
    """The largest code: 127 for 8 bits, 7 for 4."""
    return 2 ** (bits - 1) - 1


def grouped(weight_OI: Tensor, group_size: int | None) -> Tensor:
    """[O, I] -> [O, I/g, g]. Raises ValueError where the group does not divide the row."""
    columns = weight_OI.shape[1]
    group = columns if group_size is None else group_size
    if columns % group:
        raise ValueError(f"groups of {group} do not divide rows of {columns}")
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
    return torch.clamp(torch.round(weight_OGg / scale_OG[..., None]), -top, top)


def quantize_symmetric(weight_OI: Tensor, bits: int, group_size: int | None = None, *, search: bool = False,
                       importance_I: Tensor | None = None, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(codes int8 [O, I], scale [O] or, with groups, [O, I/g]).

    search: look for the clip of least error, weighted by ``importance`` [I] (the inputs' mean square). scale_dtype: the
    scale is rounded to it *before* the codes are chosen. Raises ValueError for NaN or Inf, or groups that do not divide.
    """
    if not torch.isfinite(weight_OI).all():
        raise ValueError("the weight holds NaN or Inf")
    work = weight_OI.double() if weight_OI.dtype == torch.float64 else weight_OI.float()
    weight_OGg = grouped(work, group_size)
    importance = None if importance_I is None else grouped(importance_I[None].to(work.dtype), group_size)[0]
    scale = searched_scale(weight_OGg, bits, importance) if search else absmax_scale(weight_OGg, bits)
    scale = storable(scale, scale_dtype)
    codes = round_to(weight_OGg, scale.to(work.dtype), bits).flatten(1).to(torch.int8)
    return codes, scale if group_size is not None else scale[:, 0]


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale rounded to the dtype it is stored in, never to zero."""
    return scale.clamp_min(torch.finfo(dtype).tiny).to(dtype)


def dequantize(codes_OI: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes [O, I] times scale [O] or [O, G]."""
    scale_OG = scale[:, None] if scale.dim() == 1 else scale
    return (codes_OI.to(dtype).unflatten(1, (scale_OG.shape[1], -1)) * scale_OG.to(dtype)[..., None]).flatten(1)


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes [..., I] in -8..7 -> uint8 [..., I/2], low nibble = even column. Raises ValueError for odd I or big codes."""
    if codes.shape[-1] % 2:
        raise ValueError(f"{tuple(codes.shape)}: an odd number of columns cannot be packed two a byte")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError("codes outside -8..7 do not fit four bits")
    shifted = (codes.to(torch.int16) + 8).to(torch.uint8)
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [..., I/2] -> int8 codes [..., I]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8) - 8


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 log10 of signal over error energy, in dB; infinite where they are equal."""
    signal = reference.double().square().sum()
    error = (reference.double() - approximation.double()).square().sum()
    return float("inf") if error == 0 else float(10 * torch.log10(signal / error))
