"""The native RMS norms."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from mambacompress.kernels import native

_NORM = struct.Struct("@9qd4P")  # ``Norm`` of cpu.cpp


def _rows(x: Tensor) -> Tensor:
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def rms_norm_native(x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, group: int) -> Tensor:
    """RMS norm in groups of ``group`` channels, of x * silu(z) where z is given; x on the CPU in fp32, bf16 or fp16."""
    rows_x, rows_z = _rows(x), None if z is None else _rows(z)
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty(x.shape, dtype=dtype)
    if y.numel() == 0:
        return y
    if weight is not None:
        weight = weight.contiguous()
    native.function("mc_rms_norm", (ctypes.c_char_p,))(_NORM.pack(
        rows_x.shape[0], x.shape[-1], group, torch.get_num_threads(), rows_x.stride(0),
        0 if rows_z is None else rows_z.stride(0), native.DTYPE_CODES[x.dtype],
        0 if weight is None else native.DTYPE_CODES[weight.dtype], native.DTYPE_CODES[dtype], eps, rows_x.data_ptr(),
        0 if rows_z is None else rows_z.data_ptr(), 0 if weight is None else weight.data_ptr(), y.data_ptr()))
    return y


__all__ = ["rms_norm_native"]
