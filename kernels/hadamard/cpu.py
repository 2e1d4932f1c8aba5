"""The native Hadamard transform."""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.hadamard.reference import base_matrix, split

_HADAMARD = struct.Struct("@8q4P")  # ``Hadamard`` of cpu.cpp


@functools.cache
def _mix(base: int, transpose: bool) -> Tensor:
    """fp32 [base, base]: row c says how each input run enters output run c."""
    matrix = base_matrix(base).float()
    return (matrix if transpose else matrix.T).contiguous()


def hadamard_native(x: Tensor, signs: Tensor | None, block: int, transpose: bool) -> Tensor:
    """See ``hadamard``; x on the CPU in fp32, bf16 or fp16."""
    size = x.shape[-1]
    rows_x = x if x.dim() == 2 else x.reshape(-1, size)
    if rows_x.stride(1) != 1:
        rows_x = rows_x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel() == 0:
        return y
    if signs is not None:
        signs = signs.to(torch.int8).contiguous()
    base = split(block)[0]  # type: ignore[index]
    native.function("mc_hadamard", (ctypes.c_char_p,))(_HADAMARD.pack(
        rows_x.shape[0], size, block, base, transpose, torch.get_num_threads(), rows_x.stride(0),
        native.DTYPE_CODES[x.dtype], rows_x.data_ptr(), _mix(base, transpose).data_ptr(),
        0 if signs is None else signs.data_ptr(), y.data_ptr()))
    return y


__all__ = ["hadamard_native"]
