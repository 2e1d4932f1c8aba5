"""The native RMS norms."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.quantized import codes_fields, empty_codes, fp32_scale

_NORM = struct.Struct("@9qd4P")  # ``Norm`` of norm_rows.h
_FUSED = struct.Struct("@9qd4P q2P q3P")  # ``FusedNorm`` of cpu.cpp


def _rows(x: Tensor) -> Tensor:
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _norm(x_TD: Tensor, z_TD: Tensor | None, weight: Tensor | None, eps: float, group: int, y: Tensor | None,
          dtype: torch.dtype) -> tuple[int | float, ...]:
    """The fields of ``Norm``; everything passed must outlive the call."""
    return (x_TD.shape[0], x_TD.shape[1], group, torch.get_num_threads(), x_TD.stride(0),
            0 if z_TD is None else z_TD.stride(0), native.DTYPE_CODES[x_TD.dtype],
            0 if weight is None else native.DTYPE_CODES[weight.dtype], native.DTYPE_CODES[dtype], eps, x_TD.data_ptr(),
            *(0 if t is None else t.data_ptr() for t in (z_TD, weight, y)))


def _dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


def rms_norm_native(x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, group: int) -> Tensor:
    """RMS norm in groups of ``group`` channels, of x * silu(z) where z is given; x on the CPU in fp32, bf16 or fp16."""
    rows_x, rows_z = _rows(x), None if z is None else _rows(z)
    y = torch.empty(x.shape, dtype=_dtype(x, weight))
    if y.numel() == 0:
        return y
    if weight is not None:
        weight = weight.contiguous()
    native.function("mc_rms_norm", (ctypes.c_char_p,))(_NORM.pack(
        *_norm(rows_x, rows_z, weight, eps, group, y, y.dtype)))
    return y


def add_rms_norm_native(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(the norm of x + residual, x + residual)."""
    y, total = torch.empty(x.shape, dtype=_dtype(x, weight)), torch.empty(x.shape, dtype=x.dtype)
    if y.numel():
        rows_x, rows_r, weight = _rows(x), _rows(residual), None if weight is None else weight.contiguous()
        native.function("mc_rms_norm_fused", (ctypes.c_char_p,))(_FUSED.pack(
            *_norm(rows_x, None, weight, eps, x.shape[-1], y, y.dtype), rows_r.stride(0), rows_r.data_ptr(),
            total.data_ptr(), 8, 0, 0, 0))
    return y, total


def rms_norm_int8_native(x: Tensor, z: Tensor | None, residual: Tensor | None, weight: Tensor | None, eps: float,
                         group: int, act_scale: Tensor | None, act_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, x + residual; empty where there is no residual); arguments as in ``rms_norm_native``."""
    codes, scales = empty_codes(x)
    total = torch.empty(0 if residual is None else x.shape, dtype=x.dtype)
    if codes.numel() == 0:
        return codes, scales, total
    rows_x, rows_z, rows_r = _rows(x), None if z is None else _rows(z), None if residual is None else _rows(residual)
    weight, static = None if weight is None else weight.contiguous(), fp32_scale(act_scale)
    native.function("mc_rms_norm_fused", (ctypes.c_char_p,))(_FUSED.pack(
        *_norm(rows_x, rows_z, weight, eps, group, None, _dtype(x, weight)),
        0 if rows_r is None else rows_r.stride(0), 0 if rows_r is None else rows_r.data_ptr(),
        0 if rows_r is None else total.data_ptr(), *codes_fields(codes, scales, static, act_bits)))
    return codes, scales, total


__all__ = ["add_rms_norm_native", "rms_norm_int8_native", "rms_norm_native"]
