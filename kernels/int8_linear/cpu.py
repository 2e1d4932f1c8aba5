"""The native linears: one C function a kind of weight, the same description of the problem for all."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.int8_linear.tiles import tiled_outputs

_MODE_CODES = {"none": 2, "token": 0, "tensor": 1}


# ``Linear`` of int_tiles.h: twelve int64 and seven pointers. Packed as bytes: a call costs less than filling a
# ctypes.Structure.
_LINEAR = struct.Struct("@12q7P")


def integer_linear(function: str, x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
                   groups: int, activation: str, act_scale: Tensor | None, act_bits: int, tiled: bool) -> Tensor:
    """y [..., O] in x's dtype by the C function of that name; arguments as in int4_linear, all on the CPU."""
    outputs, inputs = qweight.shape[0], x.shape[-1]
    x_TI = x if x.dim() == 2 else x.reshape(-1, inputs)
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    rows = x_TI.shape[0]
    y = x.new_empty((*x.shape[:-1], outputs))
    if rows == 0:
        return y
    qweight = qweight.contiguous()
    scale = scale.contiguous() if scale.dtype in (torch.float32, torch.float16) else scale.float().contiguous()
    if zero is not None:
        zero = zero.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    if act_scale is not None:
        act_scale = act_scale.float()
    dtype, mode = native.DTYPE_CODES[x.dtype], _MODE_CODES[activation]
    native.function(function, (ctypes.c_char_p,))(_LINEAR.pack(
        rows, inputs, outputs, groups, torch.get_num_threads(), mode, act_bits, x_TI.stride(0), dtype, dtype,
        native.DTYPE_CODES[scale.dtype], tiled_outputs(qweight) if tiled else 0, x_TI.data_ptr(), qweight.data_ptr(),
        scale.data_ptr(), 0 if zero is None else zero.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if act_scale is None else act_scale.data_ptr(), y.data_ptr()))
    return y


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., O] in x's dtype on a float weight [O, I], contiguous and on the CPU."""
    outputs, inputs = weight.shape
    x_TI = x.reshape(-1, inputs)
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    y = x.new_empty((*x.shape[:-1], outputs))
    if bias is not None:
        bias = bias.float().contiguous()
    dtype = native.DTYPE_CODES[x.dtype]
    native.function("mc_linear", (ctypes.c_char_p,))(_LINEAR.pack(
        len(x_TI), inputs, outputs, 1, torch.get_num_threads(), _MODE_CODES["none"], 8, x_TI.stride(0), dtype, dtype,
        native.DTYPE_CODES[weight.dtype], 0, x_TI.data_ptr(), weight.data_ptr(), 0, 0,
        0 if bias is None else bias.data_ptr(), 0, y.data_ptr()))
    return y


__all__ = ["float_linear", "integer_linear"]
