"""What a norm or a rotation with an int8 output gives: the codes, and a scale a row.

The rounding is ``quantize_rows``, that of the integer linears, of exactly what the float op would have returned (in
its own dtype): fusing saves a pass over memory, not a bit. A row that holds a NaN, or an Inf where the scale is
dynamic, has no codes: they are 0 and its scale is NaN, so that it stays NaN in whatever it is multiplied into.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.int8_linear.reference import qmax_of, quantize_rows, wide_dtype


def quantized(y: Tensor, act_scale: Tensor | None, act_bits: int) -> tuple[Tensor, Tensor]:
    """(codes int8 [..., D], scales [..., 1]) of y; act_scale: one static scale, None: a dynamic one a row."""
    if act_scale is None:
        codes, scales = quantize_rows(y, "token", act_bits)
        lost = ~y.isfinite().all(-1, keepdim=True)
    else:
        codes, scale = quantize_rows(y, "tensor", act_bits, act_scale)
        lost = y.isnan().any(-1, keepdim=True)
        scales = scale.reshape(()).expand(lost.shape)
    return codes.masked_fill(lost, 0), scales.masked_fill(lost, torch.nan)


def check_quantizer(op: str, act_scale: Tensor | None, act_bits: int) -> None:
    """Raise ValueError where a static scale is not one number, or the width is not known."""
    qmax_of(act_bits)
    if act_scale is not None and act_scale.numel() != 1:
        raise ValueError(f"{op}: act_scale has shape {tuple(act_scale.shape)}, expected one number")


def empty_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the codes and scales of rows of x's shape."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=wide_dtype(x))


def codes_fields(codes: Tensor, scales: Tensor, act_scale: Tensor | None, act_bits: int) -> tuple[int, ...]:
    """``Codes`` of quantized_rows.h: one int64 and three pointers."""
    return act_bits, codes.data_ptr(), scales.data_ptr(), native.pointer(act_scale) or 0


def fp32_scale(act_scale: Tensor | None) -> Tensor | None:
    """A static scale as native code reads it; the caller keeps it alive over the call."""
    return None if act_scale is None else act_scale.float().contiguous()


__all__ = ["check_quantizer", "codes_fields", "empty_codes", "fp32_scale", "quantized"]
