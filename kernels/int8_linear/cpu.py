"""The native integer linears: one C function a weight width, the same description of the problem for both."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mambacompress.kernels import native

_MODE_CODES = {"none": 2, "token": 0, "tensor": 1}


class _Linear(ctypes.Structure):
    """``Linear`` of int_tiles.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "rows", "inputs", "outputs", "groups", "threads", "activation", "act_bits", "x_row", "x_dtype", "y_dtype",
            "scale_dtype")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "zero", "bias", "act_scale", "y"))]


def integer_linear(function: str, x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
                   outputs: int, groups: int, activation: str, act_scale: Tensor | None, act_bits: int) -> Tensor:
    """y [..., outputs] in x's dtype by the C function of that name; arguments as in int4_linear, all on the CPU."""
    inputs = x.shape[-1]
    x_TI = x.reshape(-1, inputs)
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    rows = x_TI.shape[0]
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    if rows == 0:
        return y
    qweight = qweight.contiguous()
    scale = scale.contiguous() if scale.dtype in (torch.float32, torch.float16) else scale.float().contiguous()
    zero = None if zero is None else zero.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    act_scale = None if act_scale is None else act_scale.float()
    problem = _Linear(
        rows, inputs, outputs, groups, torch.get_num_threads(), _MODE_CODES[activation], act_bits, x_TI.stride(0),
        native.DTYPE_CODES[x.dtype], native.DTYPE_CODES[x.dtype], native.DTYPE_CODES[scale.dtype], x_TI.data_ptr(),
        qweight.data_ptr(), scale.data_ptr(), native.pointer(zero), native.pointer(bias), native.pointer(act_scale),
        y.data_ptr())
    native.function(function, (ctypes.c_void_p,))(ctypes.addressof(problem))
    return y


__all__ = ["integer_linear"]
