"""The native Hadamard transform."""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.hadamard.reference import base_matrix, split
from mambacompress.kernels.quantized import codes_fields, empty_codes, fp32_scale

_HADAMARD = struct.Struct("@8q4P")  # ``Hadamard`` of hadamard_rows.h
_HADAMARD_INT8 = struct.Struct("@8q4P q3P")  # ``HadamardInt8`` of cpu.cpp


@functools.cache
def _mix(base: int, transpose: bool) -> Tensor:
    """fp32 [base, base]: row c says how each input run enters output run c."""
    matrix = base_matrix(base).float()
    return (matrix if transpose else matrix.T).contiguous()


def _rows(x: Tensor) -> Tensor:
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _problem(x_TD: Tensor, signs: Tensor | None, block: int, transpose: bool, y: Tensor | None) -> tuple[int, ...]:
    """The fields of ``Hadamard``; everything passed must outlive the call."""
    base = split(block)[0]  # type: ignore[index]
    return (x_TD.shape[0], x_TD.shape[1], block, base, transpose, torch.get_num_threads(), x_TD.stride(0),
            native.DTYPE_CODES[x_TD.dtype], x_TD.data_ptr(), _mix(base, transpose).data_ptr(),
            native.pointer(signs) or 0, native.pointer(y) or 0)


def _bytes(signs: Tensor | None) -> Tensor | None:
    return None if signs is None else signs.to(torch.int8).contiguous()


def hadamard_native(x: Tensor, signs: Tensor | None, block: int, transpose: bool) -> Tensor:
    """See ``hadamard``; x on the CPU in fp32, bf16 or fp16."""
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel() == 0:
        return y
    rows_x, signs = _rows(x), _bytes(signs)
    native.function("mc_hadamard", (ctypes.c_char_p,))(_HADAMARD.pack(*_problem(rows_x, signs, block, transpose, y)))
    return y


def hadamard_int8_native(x: Tensor, signs: Tensor | None, block: int, transpose: bool, act_scale: Tensor | None,
                         act_bits: int) -> tuple[Tensor, Tensor]:
    """See ``hadamard_int8``; x on the CPU in fp32, bf16 or fp16."""
    codes, scales = empty_codes(x)
    if codes.numel():
        rows_x, signs, static = _rows(x), _bytes(signs), fp32_scale(act_scale)
        native.function("mc_hadamard_int8", (ctypes.c_char_p,))(_HADAMARD_INT8.pack(
            *_problem(rows_x, signs, block, transpose, None), *codes_fields(codes, scales, static, act_bits)))
    return codes, scales


__all__ = ["hadamard_int8_native", "hadamard_native"]
